"""Chat templates and weights as they lie in people's folders."""
import json

import pytest
import torch

from data.arithmetic import Arithmetic, parse
from engine.pretrained.chat import Pretrained
from engine.pretrained.template import fill_template, read_template
from engine.pretrained.weights import load_model, starting_model
from train import Config

pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")

from tests.test_pretrained import CHATML, copy_of, folder  # noqa: E402, F401

OPEN = CHATML.replace("assistant\n", "assistant\n<think>\n")
CLOSED = CHATML.replace("assistant\n", "assistant\n<think>\n\n</think>\n\n")
QUESTION = parse("8*7-19")


def with_template(folder, tmp_path, template, name="chat_template.jinja"):
    to = copy_of(folder, tmp_path)
    (to / "chat_template.jinja").unlink(missing_ok=True)
    if template is not None:
        (to / name).write_text(template if name.endswith("jinja") else json.dumps({"chat_template": template}))
    return to


def prompt_of(folder, **options):
    task = Pretrained(Arithmetic(), str(folder), "", **options)
    return task.encoding.decode(task.encode_prompt(QUESTION))


# Templates


def test_a_template_that_closes_the_thought_is_refused(folder, tmp_path, refused):  # noqa: F811
    """The answer could never earn the format reward, because the thought is over before the model begins."""
    to = with_template(folder, tmp_path, CLOSED)
    line = refused(f"--init={to}", f"--out={tmp_path / 'out'}")
    assert "closes the thought itself" in line and "--template=plain" in line and not (tmp_path / "out").exists()
    assert prompt_of(to, template="plain") == "User: 8*7-19\nAssistant:"


@pytest.mark.parametrize("switch", ["enable_thinking", "open_thinking", "thinking"])
def test_a_template_is_asked_for_thinking(folder, tmp_path, switch):  # noqa: F811
    """A template with a switch must not close the thought. One that is off by default closes it."""
    template = CHATML.replace("assistant\n", "assistant\n{% if not " + switch + " %}<think>\n\n</think>\n\n{% endif %}")
    assert prompt_of(with_template(folder, tmp_path, template)).endswith("assistant\n")


def test_a_template_that_opens_the_thought(folder, tmp_path):  # noqa: F811
    """The model writes the first tag itself, as the rewards ask for both."""
    assert prompt_of(with_template(folder, tmp_path, OPEN)).endswith("assistant\n")


@pytest.mark.parametrize("template", [
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}",
    "{% for message in messages %}{{ message['content'] }}{% endfor %}",
])
def test_a_template_without_a_header_is_refused(folder, tmp_path, template):  # noqa: F811
    """Without the header of an answer, the model continues the question, and nothing says so."""
    with pytest.raises(ValueError, match="begins no answer .* --template=plain"):
        prompt_of(with_template(folder, tmp_path, template))


def test_generation_blocks_and_dates(folder, tmp_path):  # noqa: F811
    """TRL's training templates mark the answers, and Llama's print the date. Both must be read, and a prompt must be
    the same every day."""
    marked = CHATML.replace("{{ message['content'] | trim }}",
                            "{% generation %}{{ message['content'] | trim }}{% endgeneration %}")
    assert prompt_of(with_template(folder, tmp_path, marked)) == prompt_of(folder)
    assert fill_template("{{ strftime_now('%d %b %Y') }}", [], {}) == "01 Jan 2025"
    with pytest.raises(ValueError, match="the chat template fails"):
        fill_template("{% generation %}never closed", [], {})


def test_where_a_template_is_found(folder, tmp_path):  # noqa: F811
    """A template in chat_template.json must not be missed, and of several the default is taken, not the first."""
    to = with_template(folder, tmp_path, CHATML, "chat_template.json")
    config = json.loads((to / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (to / "tokenizer_config.json").write_text(json.dumps(config))
    assert prompt_of(to) == prompt_of(folder)
    named = [{"name": "tool_use", "template": "a"}, {"name": "default", "template": "b"}]
    assert read_template(to, {"chat_template": named}) == "b"
    with pytest.raises(ValueError, match="none of the chat templates tool_use is the default; --template=plain"):
        read_template(to, {"chat_template": named[:1]})


def test_template_needs_an_init(refused):
    """A flag without effect must not be accepted."""
    assert "--template need an --init" in refused("--template=plain")


def test_both_ends_of_a_text_stop_a_plain_answer(folder, tmp_path):  # noqa: F811
    """config.json and the tokenizer may name different ends of a text. Without a template, a model may write either."""
    to = with_template(folder, tmp_path, None)
    config = json.loads((to / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (to / "tokenizer_config.json").write_text(json.dumps(config))
    task = Pretrained(Arithmetic(), str(to), "")
    assert task.template is None
    assert {task.encoding.decode([i]) for i in task.stop_ids} == {"<|endoftext|>", "<|im_end|>"}


# Weights


def test_a_head_that_is_not_the_embedding_is_used(folder, tmp_path, capsys):  # noqa: F811
    """config.json says that the two are tied, and the file has both. If they differ, dropping the head is another
    model."""
    to = copy_of(folder, tmp_path)
    tensors = safetensors.load_file(to / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    cfg = Config(init=str(to), block_size=64)

    def start(head):
        safetensors.save_file(tensors | {"lm_head.weight": head}, to / "model.safetensors", {"format": "pt"})
        return starting_model(cfg, len(embedding), False, torch.float32)

    assert json.loads((to / "config.json").read_text())["tie_word_embeddings"]
    assert start(embedding.clone()).config.tied and not capsys.readouterr().out
    model = start(embedding + 1)
    assert not model.config.tied and torch.equal(model.output.weight, embedding + 1)
    assert "lm_head.weight differs from the embedding and is used" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_pointer_of_git_lfs_is_named(folder, tmp_path, refused, name):  # noqa: F811
    """A clone without git-lfs has pointers of three lines in place of large files."""
    to = copy_of(folder, tmp_path)
    (to / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    line = refused(f"--init={to}", f"--out={tmp_path / 'out'}")
    assert f"{name} is a pointer of git-lfs: run git lfs pull" in line
    with pytest.raises(ValueError, match="pointer of git-lfs" if name.startswith("model") else ""):
        load_model(to, 300, 64)
        raise ValueError
