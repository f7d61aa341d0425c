"""The page that replays a run: what is in the file, and what a browser shows."""
import base64
import doctest
import html
import json
import re
import shutil
import subprocess
import zlib

import pytest

import page
from data.arithmetic import parse
from data.tokenizer import get_tokenizer
from engine.samples import token_text
from tests.conftest import ROOT, copy

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="there is no Chromium: apt-get install chromium")
FILES = ("samples.jsonl", "log.jsonl", "results.json", "base.pt", "zero.pt", "student_base.pt", "student.pt")
HOSTILE = ('</script><script>window.hacked = 1</script><img src=x onerror="window.hacked = 1">&amp;'
           "\u202egnirts\u202c\u2028é" + "x" * 5000)


def data_of(text):
    """The data in a page."""
    packed = re.search('<script id="data" type="text/plain">(.*?)</script>', text, re.DOTALL)[1]
    return json.loads(zlib.decompress(base64.b64decode(packed)))


@pytest.fixture(scope="module")
def made(quick, tmp_path_factory):
    """A folder with a copy of a quick run and its page."""
    out = tmp_path_factory.mktemp("page")
    copy(quick, out, *FILES)
    assert page.main([f"--out={out}"]) == 0
    return out


@pytest.fixture(scope="module")
def hostile(quick, tmp_path_factory):
    """The same with a hostile answer and a hostile question."""
    out = tmp_path_factory.mktemp("hostile")
    copy(quick, out, *FILES)
    rows = [json.loads(line) for line in (quick / "samples.jsonl").read_text().splitlines()]
    rows[0]["completions"][0] = HOSTILE
    encoding = get_tokenizer()
    rows[0]["tokens"][0] = ["\u202e<img src=x onerror=alert(1)>",
                            *(token_text(encoding, i) for i in encoding.encode_ordinary(HOSTILE))]
    n = len(rows[0]["tokens"][0])
    rows[0]["logprobs"][0] = [-0.5] * n
    rows[0]["likeliest"][0] = [dict.fromkeys(("<b>", "</script>", "\u202e", "1", "2"), 0.1)] * n
    first = rows[0]["question"]
    for row in rows:
        row["question"] = row["question"].replace(first, "<img src=x onerror=alert(1)>")
    (out / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert page.main([f"--out={out}"]) == 0
    return out


BEFORE = """<script>const problems = [];
    addEventListener("error", event => problems.push(String(event.message || event.target.outerHTML)), true);
    addEventListener("unhandledrejection", event => problems.push(String(event.reason)));
    addEventListener("securitypolicyviolation", event => problems.push(`asks for ${event.blockedURI}`));
    for (const name of ["error", "warn"]) console[name] = (...words) => problems.push(words.join(" "));</script>"""
AFTER = """<script>(async () => {
    const $ = query => document.querySelector(query), $$ = query => [...document.querySelectorAll(query)];
    const press = key => (document.activeElement || document.body).dispatchEvent(
        new KeyboardEvent("keydown", {key, bubbles: true, cancelable: true}));
    const pause = () => new Promise(resolve => setTimeout(resolve, 20));
    while (!document.documentElement.dataset.ready && !problems.length) await pause();
    const found = {};
    try { SCRIPT } catch (error) { problems.push(String(error.stack)); }
    const requests = performance.getEntriesByType("resource").map(entry => entry.name);
    parent.postMessage(JSON.stringify({found, problems, requests}), "*");
})();</script>"""
FRAME = """<!doctype html><iframe src="test_copy.html{address}" style="width: {width}px; height: 800px"></iframe>
    <pre id="found"></pre>
    <script>onmessage = event => document.getElementById("found").textContent = event.data</script>"""


def browse(path, script, address="", width=1280):
    """Open a copy of a page, and run a script there once it is drawn -> what the script put into `found`. There must be
    no error and no request. In the script, press(key) types a key, and $ and $$ find elements. (The page is in a frame,
    because a window without a screen is 500 pixels wide or more.)"""
    text = path.read_text(encoding="utf-8").replace("<head>", "<head>" + BEFORE, 1)
    text = text.replace("</body>", AFTER.replace("SCRIPT", script) + "</body>", 1)
    path.with_name("test_copy.html").write_text(text, encoding="utf-8")
    frame = path.with_name("frame.html")
    frame.write_text(FRAME.format(address=address, width=width), encoding="utf-8")
    done = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
         "--disable-background-networking", "--disable-component-update", f"--user-data-dir={path.parent / 'profile'}",
         "--window-size=1400,900", "--virtual-time-budget=20000", "--dump-dom", frame.as_uri()],
        capture_output=True, text=True, timeout=120)
    written = re.search('<pre id="found">(.+?)</pre>', done.stdout, re.DOTALL)
    assert written, done.stderr[-1000:]
    result = json.loads(html.unescape(written[1]))
    assert result["problems"] == [] and result["requests"] == []
    return result["found"]


# The file


def test_the_file(made, quick):
    """A page that asks the network for something, or is too large to send by mail."""
    assert doctest.testmod(page).failed == 0
    text = (made / "run.html").read_text(encoding="utf-8")
    assert len(text) < 1_000_000
    data = data_of(text)
    code = re.sub("[A-Za-z0-9+/=]{200,}", "", text)  # without the data
    assert not re.search(r"https?:|//[a-z]|@import|url\(|src=|href=\"(?!data:)", code)
    kept = [json.loads(line) for line in (quick / "samples.jsonl").read_text().splitlines()]
    assert [view["stage"] for view in data["views"]] == ["zero", "student"]
    assert data["views"][0]["steps"] == [0, 1, 2, 5] and data["views"][1]["steps"] == [0, 1, 2, 5, 9]
    zero, student = data["views"]
    groups = [group for each in zero["groups"] + student["groups"] + [student["teacher"]] for group in each]
    in_order = [row for row in kept if row["model"] == "zero"]
    in_order += [row for row in kept if row["model"] == "student"] + [row for row in kept if row["model"] == "teacher"]
    for group, row in zip(groups, in_order, strict=True):
        for i, answer in enumerate(group["answers"]):
            assert [data["words"][entries[0][0]] for entries in answer["tokens"]] == row["tokens"][i]
            assert answer["reward"] == row["rewards"]["reward"][i]
            for entries, likeliest in zip(answer["tokens"], row["likeliest"][i], strict=True):
                shown = {data["words"][token]: p for token, p, *_ in entries if p >= 0}
                assert all(shown[text] == round(1000 * p) for text, p in likeliest.items())


def test_the_other_models(made):
    """A model that reads other tokens than were sampled: at step 0 the model that RL began with must agree with the
    model that is trained. At the last step of the student, so must the finished student."""
    data = data_of((made / "run.html").read_text(encoding="utf-8"))
    zero, student = data["views"]
    for group in zero["groups"][0]:
        for answer in group["answers"]:
            assert answer["tokens"]
            for entries in answer["tokens"]:
                assert all(len(entry) == 3 for entry in entries)
                assert all(abs(now - before) <= 1 for _, now, before in entries if now >= 0)
    assert any(abs(entry[1] - entry[2]) > 50 for group in zero["groups"][-1] for answer in group["answers"]
               for entries in answer["tokens"] for entry in entries)
    for group in student["teacher"]:  # zero's answers: zero, the student at step 0, the student at the end
        assert all(len(entry) == 4 for answer in group["answers"] for entries in answer["tokens"] for entry in entries)


def test_without_the_other_models(quick, tmp_path):
    """Somebody may have removed the checkpoints. Two of the four problems may be the same one."""
    copy(quick, tmp_path, "samples.jsonl", "log.jsonl", "results.json")
    path = tmp_path / "samples.jsonl"
    questions = {row["question"]: None for row in map(json.loads, path.read_text().splitlines())}
    path.write_text(path.read_text().replace([*questions][1], [*questions][0]))
    assert page.main([f"--out={tmp_path}"]) == 0
    data = data_of((tmp_path / "run.html").read_text(encoding="utf-8"))
    assert all(len(entry) == 2 for view in data["views"] for groups in view["groups"] for group in groups
               for answer in group["answers"] for entries in answer["tokens"] for entry in entries)
    assert [len(columns) for view in data["views"] for columns in view["columns"].values()] == [1, 1, 1]
    assert {len(groups) for view in data["views"] for groups in view["groups"]} == {4}


def test_the_links():
    """A link to a moment that is not there. (The default run has all four.)"""
    data = data_of((ROOT / "docs" / "run.html").read_text(encoding="utf-8"))
    zero, found = data["views"][0], {}
    for link in data["links"]:
        at = link["at"]
        group = zero["groups"][zero["steps"].index(at["step"])][at["problem"] - 1]
        found[link["text"]] = group, group["answers"][at.get("answer", 1) - 1]
    assert [*found] == ["a correct number that is punished", "a problem that most answers now solve",
                        "a wrong digit that is punished", "a group without signal"]
    (_, unread), (solved, _), (_, wrong), (equal, _) = found.values()
    assert "correct number" in unread["why"] and unread["advantage"] < 0
    assert sum(answer["rewards"]["accuracy"] for answer in solved["answers"]) > 4
    assert "is wrong" in wrong["why"] and wrong["rewards"]["format"] == 1 and wrong["advantage"] < 0
    assert {answer["advantage"] for answer in equal["answers"]} == {0} and not equal["signal"]


@pytest.mark.parametrize("text, accuracy, form, words", (
    ("<think>2-15=-13</think><answer>-13</answer>", 1, 1, "−13 is correct"),
    ("<think>2-15=-13</think><answer>-13</answer>.", 1, 0, "−13 is correct, and text outside the two blocks costs"),
    ("<think>2-15=-13</think><answer>-17</answer>", 0, 1, "−17 is wrong"),
    ("<think>2-15=-13</think>-13</answer>", 0, 0, "−13 is the correct number, but <answer> is missing, so it earns"),
    ("2-15=-13, so -13", 0, 0, "−13 is the correct number, but the four tags are missing, so it earns nothing"),
    ("2-15=-17", 0, 0, "the four tags are missing, so it earns nothing"),
    ("<think></think><answer>-13</answer>", 0, 0, "−13 is the correct number, but the thought is empty, so it earns"),
    ("<think>a<answer>-13</answer></think>", 0, 0, "−13 is the correct number, but the tags are in another order"),
    ("<think>a<think>b</think><answer>1</answer>", 0, 0, "<think> occurs more than once, so it earns nothing")))
def test_why(text, accuracy, form, words):
    """A reader must learn why an answer with the correct number earns nothing."""
    scores = {"accuracy": accuracy, "format": form, "reward": accuracy + form}
    assert page.verdict(text, parse("2-15"), scores, cut=False).startswith(words)


@pytest.mark.parametrize("args, words", (("--out=nowhere", "run python train.py first"),
                                         ("--colour=1", "unrecognized")))
def test_bad_input(capsys, args, words):
    """A mistake must not end in a traceback."""
    assert page.main([args]) == 2
    printed = capsys.readouterr()
    assert words in printed.err and printed.err.count("\n") == 1 and not printed.out


# The browser


@needs_browser
def test_what_the_reader_can_do(made):
    """Without errors and requests: the slider, the keys, pointing at a token, links, and a view's address."""
    found = browse(made / "run.html", """
        const texts = () => $("#answers").textContent, first = texts();
        found.words = $("#words").textContent;
        const slider = $("#slider");
        slider.value = slider.max;
        slider.dispatchEvent(new Event("input"));
        found.changed = texts() !== first;
        found.address = location.hash;
        press("ArrowLeft");
        found.left = location.hash;
        press("3");
        found.third = [location.hash, $("#problems [aria-pressed=true]").textContent];
        const token = $$(".token[data-token]")[3];
        token.dispatchEvent(new MouseEvent("mouseover", {bubbles: true}));
        found.pointed = $("#inspector").textContent;
        token.click();
        found.focus = [document.activeElement.dataset.token, location.hash];
        press("ArrowRight");
        found.next = [document.activeElement.dataset.token, location.hash];
        press("v");
        found.view = location.hash;
        location.hash = "#view=zero&step=2&problem=4";
        await pause();
        found.restored = [$("#step").textContent, $("#problems [aria-pressed=true]").textContent[0]];
    """, "#view=zero&step=0&problem=1")
    assert found["words"] == page.KINDS["rl"][1] and found["changed"]
    assert found["address"] == "#view=zero&step=5&problem=1" and found["left"] == "#view=zero&step=2&problem=1"
    assert found["third"][0] == "#view=zero&step=2&problem=3" and found["third"][1].startswith("3: ")
    assert found["pointed"].startswith("closetoken 4 of") and "Probability: " in found["pointed"]
    assert found["focus"] == ["3", "#view=zero&step=2&problem=3&answer=1&token=4"]
    assert found["next"] == ["4", "#view=zero&step=2&problem=3&answer=1&token=5"]
    assert found["view"].startswith("#view=student") and found["restored"] == ["2", "4"]


@needs_browser
def test_every_token_can_be_pointed_at(made):
    """A token of a stored answer without an element, or an element that shows nothing."""
    data = data_of((made / "run.html").read_text(encoding="utf-8"))
    found = browse(made / "run.html", """
        found.counts = [];
        for (let v = 0; v < data.views.length; v++) for (let s = 0; s < data.views[v].steps.length; s++)
            for (let p = 0; p < data.views[v].problems.length; p++) {
                choose({view: v, step: s, problem: p, answer: null, token: null, whose: "answers"});
                const tokens = $$("#answers .token");
                found.counts.push([tokens.filter(token => token.dataset.whose === "answers").length,
                                   tokens.filter(token => token.dataset.whose === "teacher").length]);
                if (s + p === 0) for (const token of tokens) {
                    token.dispatchEvent(new MouseEvent("mouseover", {bubbles: true}));
                    if (!$("#inspector .big").textContent || !$("#inspector table").rows.length) problems.push("empty");
                }
            }
    """)
    counts = [[sum(len(answer["tokens"]) for answer in group["answers"]),
               sum(len(answer["tokens"]) for answer in view["teacher"][p]["answers"]) if "teacher" in view else 0]
              for view in data["views"] for groups in view["groups"] for p, group in enumerate(groups)]
    assert found["counts"] == counts


@needs_browser
@pytest.mark.parametrize("width", (380, 1280))
def test_a_hostile_answer_is_text(hostile, width):
    """Text of a model that runs as a script, turns the text around it, or makes the page wider than the screen."""
    found = browse(hostile / "run.html", """
        found.hacked = window.hacked || 0;
        found.elements = $$("#columns img, #columns script, #columns b > *, #problems img").length;
        found.text = $("#answers .text").textContent;
        found.inspector = $("#inspector").textContent;
        found.turned = /[\\u202a-\\u202e\\u2066-\\u2069]/.test($("main").textContent);
        found.widths = [document.documentElement.scrollWidth, document.documentElement.clientWidth, innerWidth];
        found.asked = $("#problems").textContent;
    """, "#view=zero&step=0&problem=1&answer=1&token=1", width)
    assert not found["hacked"] and not found["elements"] and not found["turned"]
    assert "<img src=x onerror=alert(1)></script><script>window.hacked = 1</script>" in found["text"]
    assert "x" * 5000 in found["text"] and "\\u202e" in found["text"]
    assert found["widths"][0] <= found["widths"][1] <= found["widths"][2] == width
    assert "<img src=x onerror=alert(1)>" in found["asked"]
