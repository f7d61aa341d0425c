"""An exported model, loaded by transformers without our code, must give our outputs. The tests need
experiments/requirements.txt, which CI has."""
import dataclasses
import random
import resource
import subprocess
import sys

import pytest
import torch

import export_hf
from data.arithmetic import make_problem
from data.tokenizer import END_OF_TEXT, PIECES, get_tokenizer
from engine.files import save_checkpoint
from engine.speed.sampler import generate
from model import GPT, GPTConfig
from train import Config

transformers = pytest.importorskip("transformers")
ENCODING = get_tokenizer()
SHAPES = {"base": (4, 3, 96), "student": (3, 2, 44)}  # n_layer, n_head, n_embd


@pytest.fixture(scope="module", params=SHAPES)
def exported(request, tmp_path_factory):
    """Our model, the exported model and its tokenizer, all from one checkpoint. The weights are larger than those of a
    new model, so that the output depends on the input."""
    folder, cfg = tmp_path_factory.mktemp("export"), Config(rl_max_new_tokens=30)
    torch.manual_seed(0)
    model = GPT(GPTConfig(ENCODING.n_vocab, 64, *SHAPES[request.param]))
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.mul_(4.0) if p.dim() == 2 else p.add_(torch.randn_like(p) / 4)
    save_checkpoint(folder / "model.pt", {
        "nanor1": 1, "stage": request.param, "step": 1, "seconds": 1.0, "config": dataclasses.asdict(cfg),
        "shape": dataclasses.asdict(model.config), "model": model.state_dict()})
    assert export_hf.main([str(folder / "model.pt"), str(folder / "hf")]) == 0
    return (model, transformers.AutoModelForCausalLM.from_pretrained(folder / "hf"),
            transformers.AutoTokenizer.from_pretrained(folder / "hf"))


@torch.no_grad()
def test_logits_are_equal(exported):
    """Weights may load without an error and still mean something else: rotary halves may be paired in another way, a
    norm may have another epsilon, or the output projection may not be the embedding."""
    model, theirs, _ = exported
    idx = torch.randint(ENCODING.n_vocab, (4, 64))
    logits = model(idx)
    assert logits.std() > 0.5 and torch.allclose(theirs(idx).logits, logits, atol=1e-4)
    assert theirs.num_parameters() == model.n_params() and theirs.dtype == torch.float32


def test_greedy_answers_are_equal(exported):
    """Answers must stop at the stop token and at the run's generation budget, and prompts must be padded on the
    left."""
    model, theirs, tokenizer = exported
    rng = random.Random(0)
    problems = [make_problem(rng) for _ in range(20)]
    ours, _ = generate(model, [ENCODING.encode_ordinary(p.prompt) for p in problems], 30, temperature=0.0,
                       stop_ids=(ENCODING.eot_token,))
    chats = [[{"role": "user", "content": p.question}] for p in problems]
    prompts = tokenizer.apply_chat_template(chats, padding=True, return_tensors="pt")
    assert tokenizer.batch_decode(prompts["input_ids"], skip_special_tokens=True) == [p.prompt for p in problems]
    rows = theirs.generate(**prompts)[:, prompts["input_ids"].size(1):].tolist()
    for row, expected in zip(rows, ours):
        assert row[:len(expected)] == expected and set(row[len(expected):]) <= {ENCODING.eot_token}
    assert len(set(map(tuple, ours))) > 3 and max(map(len, rows)) <= 30


def test_the_tokenizer_cuts_as_ours(exported):
    """The exported tokenizer must not split a piece into bytes, join two digits, or decode another character."""
    *_, tokenizer = exported
    rng = random.Random(0)
    texts = ["", " ", "naïve \U0001f600\r\n\0", "".join(PIECES), "User: 12*3\nAssistant: <think>", "a  b ,  c"]
    for _ in range(300):
        texts.append("".join(rng.choice((chr(rng.randrange(0xD800)), chr(rng.randrange(128)), rng.choice(PIECES)))
                             for _ in range(rng.randrange(30))))
    for text in texts:
        assert tokenizer.encode(text) == ENCODING.encode_ordinary(text), repr(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids(END_OF_TEXT) == ENCODING.eot_token
    assert tokenizer.is_fast and len(tokenizer) == ENCODING.n_vocab


@pytest.mark.parametrize("exported", ["student"], indirect=True)
def test_full_disk(exported, tmp_path):
    """A half-written folder would block the next try."""
    checkpoint = tmp_path / "model.pt"
    model, *_ = exported
    save_checkpoint(checkpoint, {"nanor1": 1, "stage": "base", "config": {"rl_max_new_tokens": 9},
                                 "shape": dataclasses.asdict(model.config), "model": model.state_dict()})
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    done = subprocess.run([sys.executable, export_hf.__file__, str(checkpoint), str(tmp_path / "hf")],
                          capture_output=True, text=True, preexec_fn=limit)
    assert done.returncode == 2 and "export_hf.py: cannot write" in done.stderr
    assert list(tmp_path.iterdir()) == [checkpoint]


def test_bad_input(tmp_path, capsys):
    """A folder that is not empty must not be overwritten, and a file that is not a checkpoint must not end in a
    traceback."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("x")
    (tmp_path / "other.pt").write_text("hello")
    for args, words in (([], "a checkpoint and a folder"), (["--help", "x"], "a checkpoint and a folder"),
                        ([str(tmp_path / "none.pt"), str(tmp_path / "new")], "none.pt is missing"),
                        ([str(tmp_path / "other.pt"), str(tmp_path / "new")], "not a complete nanoR1 checkpoint"),
                        ([str(tmp_path / "other.pt"), str(tmp_path / "full")], "not an empty folder"),
                        ([str(tmp_path / "other.pt"), str(tmp_path / "other.pt")], "not an empty folder")):
        assert export_hf.main(args) == 2
        printed = capsys.readouterr().err
        assert words in printed and printed.count("\n") == 1
    assert not (tmp_path / "new").exists() and (tmp_path / "full" / "precious").read_text() == "x"
