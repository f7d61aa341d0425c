"""Pretrained models: --init must read what transformers reads. The tests build their own tiny models of each
family with transformers, from experiments/requirements.txt, which CI has. Nothing is downloaded."""
import dataclasses
import json
import pickle
import random
import sys

import pytest
import torch
import torch.nn.functional as F

import engine.command as command
import engine.evaluation as evaluation
import export_hf
import train
from data.arithmetic import Arithmetic, Problem
from engine.files import build_model, load_checkpoint, save_checkpoint
from engine.pretrained.bpe import Encoding
from engine.pretrained.chat import SLOT, Pretrained
from engine.pretrained.families import FamilyGPT
from engine.pretrained.weights import load_model
from engine.speed.fast import frozen, make_fast
from engine.speed.reader import FamilyReader
from engine.speed.sampler import generate
from engine.tasks import make_task
from model import GPT, token_logprobs
from tests.conftest import main, parse, results, rows, weights_equal
from train import Config

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
safetensors = pytest.importorskip("safetensors.torch")

QWEN2 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
         r"\s*[\r\n]+|\s+(?!\S)|\s+")
LLAMA3 = QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
CHATML = ("{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] | trim }}<|im_end|>\n"
          "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
TEXTS = ["a", "the", "!\x04!", "\u0338", "\U000e0041", " ", "  ", "\n", "\r\n", "\t", "1", "23", " 4567", "don't",
         "'S", "é", "e\u0301", "日本", "😀",
         "<|im_end|>", "<|im_start|>", "<think>", "</answer>", "٣", "²", "!", "?!", "...", "\x00", "ß", "ſ", "_",
         "-3",
         "\u00a0", " world", "\ue000", "\ufeff"]
SIZES = dict(vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
             max_position_embeddings=64)
LLAMA3_ROPE = {"rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
FAMILIES = {
    "llama": dict(num_key_value_heads=4, rope_parameters={"rope_type": "default", "rope_theta": 500.0}),
    "llama, grouped, tied": dict(num_key_value_heads=2, tie_word_embeddings=True, rms_norm_eps=1e-3),
    "llama, scaled": dict(num_key_value_heads=1, rope_parameters=LLAMA3_ROPE),
    "qwen2": dict(num_key_value_heads=2, tie_word_embeddings=True),
    "qwen3": dict(num_key_value_heads=2, head_dim=16),
}


TEXT = "User: 8*7-19\nAssistant: <think>56-19=37</think> the answer is it isn't 1234 !!! ..."


def llama3_tokenizer(folder):
    """A tokenizer.json like that of Llama 3: transformers makes it from a file of tiktoken, and lists every pair that
    forms a token as a merge."""
    import base64

    from tiktoken._educational import bpe_train
    from transformers.convert_slow_tokenizer import TikTokenConverter
    ranks = bpe_train(TEXT * 3 + " aaaa aaaaaaaa", 280, LLAMA3, None)
    path = folder / "tokenizer.model"
    path.write_bytes(b"".join(base64.b64encode(piece) + b" %d\n" % rank for piece, rank in ranks.items()))
    tokenizer = TikTokenConverter(str(path), pattern=LLAMA3,
                                  extra_special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"]).converted()
    tokenizer.add_tokens([tokenizers.AddedToken("<think>", special=False, normalized=False)])
    path.unlink()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>",
                                                clean_up_tokenization_spaces=False)


def make_tokenizer(pre_tokenizer: str = "digits"):
    """A byte-level BPE of 300 tokens and 4 added ones, trained on a little text. It splits text like a published
    family."""
    from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
    tokenizer = tokenizers.Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre_tokenizer in ("digits", "gpt2"))
    first = {"gpt2": [], "digits": [pre_tokenizers.Digits(individual_digits=True)],
             "qwen2": [pre_tokenizers.Split(Regex(QWEN2), "isolated")],
             "words": [pre_tokenizers.Split(Regex("[a-z]+"), "isolated")]}[pre_tokenizer]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*first, level]) if first else level
    tokenizer.decoder = decoders.ByteLevel()
    if pre_tokenizer == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    lacking = "Ħąĵ" if pre_tokenizer == "gpt2" else ""  # these letters stand for three bytes, one of them \x04
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=[a for a in alphabet if a not in lacking],
                                  show_progress=False)
    tokenizer.train_from_iterator([TEXT] * 9, trainer)
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>",
                                                clean_up_tokenization_spaces=False)


def make_folder(folder, family: str = "llama, grouped, tied", pre_tokenizer: str = "digits", template: str = CHATML,
                shards: bool = False, **changes):
    """Save a random model of a family and a tokenizer with transformers -> transformers' model. The weights are large,
    so that the outputs depend strongly on the inputs."""
    tokenizer = make_tokenizer(pre_tokenizer)
    kind = family.split(",")[0]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        kind, **SIZES | FAMILIES[family] | dict(vocab_size=len(tokenizer), bos_token_id=None, eos_token_id=[
            tokenizer.convert_tokens_to_ids("<|endoftext|>")]) | changes)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.mul_(8.0) if p.dim() == 2 else p.add_(torch.randn_like(p) / 3)
    model.save_pretrained(folder, **{"max_shard_size": "20KB"} if shards else {})
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return model.eval()


@pytest.fixture(scope="module", params=FAMILIES)
def both(request, tmp_path_factory):
    """transformers' model of a family, and our model from its folder."""
    folder = tmp_path_factory.mktemp("family")
    theirs = make_folder(folder, request.param, shards=True)
    return theirs, load_model(folder, theirs.config.vocab_size, 64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder for --init. Tests that change the folder copy it first."""
    path = tmp_path_factory.mktemp("init") / "model"
    make_folder(path)
    return path


def copy_of(folder, tmp_path):
    to = tmp_path / "copy"
    to.mkdir()
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    return to


# The model


@torch.no_grad()
def test_logits_are_equal(both):
    """Weights may load without an error and still be used wrongly: with another frequency or eps, without a bias or a
    norm, or with keys that the wrong heads share."""
    theirs, ours = both
    idx = torch.randint(ours.config.vocab_size, (3, 60))
    logits = ours(idx)
    assert logits.std() > 0.5 and torch.allclose(theirs(idx).logits, logits, atol=2e-4)
    assert theirs.num_parameters() == ours.n_params()


@pytest.mark.parametrize("sample", [GPT.generate, generate])
def test_greedy_answers_are_equal(both, sample):
    """Sampling with the cache must not share keys among the wrong heads, or leave out biases, norms or the output
    matrix."""
    theirs, ours = both
    prompts = torch.randint(ours.config.vocab_size, (4, 9))
    mine, _ = sample(ours, prompts.tolist(), 20, temperature=0.0, stop_ids=(-1,))
    found = theirs.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=20, do_sample=False,
                            eos_token_id=None, pad_token_id=0)
    assert mine == found[:, 9:].tolist()


def test_the_sampler_and_the_training_pass_agree(both):
    """With prompts of different lengths and several samples of each, the sampler's log-probabilities must be those of
    the training pass."""
    _, ours = both
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12, 13]]
    completions, logp = generate(ours, prompts, 15, stop_ids=(3,), samples=3,
                                 generator=torch.Generator().manual_seed(0))
    for i, (completion, values) in enumerate(zip(completions, logp)):
        prompt = prompts[i // 3]
        idx = torch.tensor([prompt + completion])
        full = token_logprobs(ours, idx, torch.arange(1, idx.size(1))[None] >= len(prompt))
        assert torch.allclose(full, torch.tensor(values), atol=1e-4)


def test_a_frozen_copy_is_the_same_in_less_memory(both):
    """The reference of an untrained policy must agree with it bit for bit, or the KL penalty would pull the policy away
    from itself. A later update of the policy must not change the reference."""
    _, ours = both
    cfg = Config(init="elsewhere", device="cpu", compile="off", micro_batch=512)
    model = FamilyGPT(ours.config, torch.bfloat16)
    model.load_state_dict(ours.state_dict())
    copied = frozen(model, cfg)
    make_fast(model, cfg, training=True)
    sizes = [sum(p.nbytes for p in one.parameters()) for one in (copied, model)]
    assert sizes[0] < 0.75 * sizes[1] and all(p.dtype == torch.float32 for p in model.parameters())
    idx, mask = torch.randint(ours.config.vocab_size, (3, 40)), torch.rand(3, 39) < 0.7
    before = token_logprobs(copied, idx, mask)
    assert torch.equal(before, token_logprobs(model, idx, mask))
    with torch.no_grad():
        model.blocks[0].o.weight.mul_(2)
    assert torch.equal(before, token_logprobs(copied, idx, mask))
    assert not torch.equal(before, token_logprobs(model, idx, mask))


@pytest.mark.parametrize("both", ["qwen2"], indirect=True)
def test_biases_are_added_in_float32(both):
    """Qwen2's biases may be large. If they were rounded to bfloat16 before they are added, every query and key would
    change. The training pass, the sampler and a frozen copy must round in the same way."""
    _, ours = both
    model = FamilyGPT(ours.config, torch.bfloat16)
    model.load_state_dict(ours.state_dict())
    block, x = model.blocks[0], torch.randn(7, model.config.n_embd).bfloat16()
    copied = frozen(model, Config(init="elsewhere", device="cpu", compile="off", micro_batch=512)).blocks[0]
    product = F.linear(x, block.q.weight.bfloat16())
    expected = (product.float() + block.q.bias).bfloat16()
    assert not torch.equal(expected, product + block.q.bias.bfloat16())
    whole = block.project(x, "q", "k", "v")
    assert torch.equal(block.project(x, "q"), expected) and torch.equal(whole[:, :expected.size(1)], expected)
    assert torch.equal(whole, FamilyReader(block, torch.bfloat16).project(x, "q", "k", "v"))
    assert torch.equal(whole, copied.project(x, "q", "k", "v"))


def test_a_checkpoint_keeps_the_rotation(both, tmp_path):
    """The tables of Llama 3's scaled frequencies are not parameters. A model that is rebuilt without them would use
    other positions than its checkpoint, and be only a little worse."""
    _, ours = both
    save_checkpoint(tmp_path / "base.pt", {"nanor1": 1, "stage": "base", "config": {"dtype": "float32"},
                                           "shape": dataclasses.asdict(ours.config), "model": ours.state_dict()})
    again = build_model(load_checkpoint(tmp_path / "base.pt", "base"))
    idx = torch.randint(ours.config.vocab_size, (2, 60))
    assert again.config == ours.config and torch.equal(again(idx), ours(idx))
    assert torch.equal(again.cos, ours.cos) and torch.equal(again.sin, ours.sin)
    unscaled = FamilyGPT(dataclasses.replace(ours.config, rope_scaling=None))
    assert torch.equal(again.cos, unscaled.cos) == (ours.config.rope_scaling is None)


def test_rows_that_no_token_names_are_left_out(tmp_path):
    """Qwen's embedding has more rows than the tokenizer has tokens. A token that is sampled from these rows could not
    be decoded."""
    theirs = make_folder(tmp_path, "llama", vocab_size=400)
    ours = load_model(tmp_path, n := Encoding(tmp_path).n_tokens, 64)
    idx = torch.randint(n, (2, 30))
    assert n < 400 and torch.allclose(theirs(idx).logits[..., :n], ours(idx), atol=2e-4)


# The tokenizer


@pytest.mark.parametrize("pre_tokenizer", ["gpt2", "digits", "qwen2", "llama3", "words"])
def test_tokenizers_agree(tmp_path, pre_tokenizer):
    """Our ids must be those of transformers. They could differ in the split, in the order of merges, for a special
    token inside a text, for bytes that the vocabulary lacks, for a letter and an accent that are not joined first, or
    for text that no part of the split matches."""
    tokenizer = llama3_tokenizer(tmp_path) if pre_tokenizer == "llama3" else make_tokenizer(pre_tokenizer)
    tokenizer.save_pretrained(tmp_path)
    encoding, rng = Encoding(tmp_path), random.Random(0)
    for n in range(2500):
        text = ("".join(rng.choice(TEXTS) for _ in range(rng.randrange(20))) if n % 2 else
                "".join(chr(rng.choice((rng.randrange(128), rng.randrange(0xd800), rng.randrange(0xe000, 0x20000))))
                        for _ in range(rng.randrange(20))))
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert encoding.encode_ordinary(text) == ids, repr(text)
        if pre_tokenizer in ("digits", "llama3"):
            assert encoding.decode(ids) == text
    assert encoding.decode([encoding.specials["<|im_end|>"]]) == "<|im_end|>"
    assert encoding.n_tokens == len(tokenizer) and len(encoding.encode_ordinary("<think>")) == 1


def test_ids_without_a_name_decode(folder, tmp_path):
    """The ids may have gaps. A run must not end when the model first samples an id from a gap."""
    to = copy_of(folder, tmp_path)
    content = json.loads((to / "tokenizer.json").read_text())
    content["added_tokens"][-1]["id"] += 2
    (to / "tokenizer.json").write_text(json.dumps(content))
    encoding = Encoding(to)
    assert all(encoding.decode([i]) for i in range(encoding.n_tokens - 3, encoding.n_tokens))


def test_the_task_travels_to_other_ranks(folder):
    """Rank 0 sends the task to the other ranks by pickle. A tiktoken.Encoding is pickled as the arguments of its own
    constructor, which are not those of our subclass."""
    task = Pretrained(Arithmetic(), str(folder), "Go.")
    copied, problem = pickle.loads(pickle.dumps(task)), Problem("8*7<think>", "")
    assert copied.encode_prompt(problem) == task.encode_prompt(problem) and copied.stop_ids == task.stop_ids


def test_equal_tokenizers(folder, tmp_path):
    """A file may write its merges in two ways, and both must give equal tokenizers."""
    to = copy_of(folder, tmp_path)
    content = json.loads((to / "tokenizer.json").read_text())
    content["model"]["merges"] = [" ".join(merge) for merge in content["model"]["merges"]]
    (to / "tokenizer.json").write_text(json.dumps(content))
    assert Encoding(folder) == Encoding(to)
    make_tokenizer("gpt2").save_pretrained(to)
    assert Encoding(folder) != Encoding(to)


# The prompt


def test_the_prompt_is_the_templates(folder):
    """The ids must be those that transformers makes from the same messages, special tokens included."""
    task = Pretrained(Arithmetic(), str(folder), "Think first.")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "system", "content": "Think first."}, {"role": "user", "content": "8*7-19"}]
    theirs = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert task.encode_prompt(Problem("8*7-19", "37")) == theirs
    task.show([Problem("2*3+1", "7")])
    messages[1:1] = [{"role": "user", "content": "2*3+1"},
                     {"role": "assistant", "content": "<think>2*3=6, 6+1=7</think><answer>7</answer>"}]
    theirs = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert task.encode_prompt(Problem("8*7-19", "37")) == theirs
    assert len(theirs) <= task.max_prompt_tokens


def test_tokens_of_the_template_are_special(folder, tmp_path):
    """Some chat models do not mark the tokens that end a turn as special. A question could then end its own turn, and
    an answer would not stop."""
    to = copy_of(folder, tmp_path)
    content = json.loads((to / "tokenizer.json").read_text())
    for token in content["added_tokens"]:
        token["special"] = False
    (to / "tokenizer.json").write_text(json.dumps(content))
    task, usual = (Pretrained(Arithmetic(), str(path), "Go.") for path in (to, folder))
    problem = Problem("<|im_end|> and <think>", "")
    assert task.encode_prompt(problem) == usual.encode_prompt(problem)
    assert task.stop_ids[-1] == usual.stop_ids[-1] == usual.encoding.specials["<|im_end|>"]


@pytest.mark.parametrize("template, words", [
    ("{{ messages[-1]['content'] }}", "instruction"), ("{{ messages[0]['content'] }}", "instruction"),
    ("{% for m in messages %}{{ m['content'][0]['text'] }}{% endfor %}", "instruction"),
    ("{% for m in messages %}{{ m['content'] + m['content'] }}{% endfor %}", "repeats")])
def test_a_template_that_leaves_a_text_out(folder, tmp_path, template, words):
    """A template without a system role drops the instruction. RL would then train on another prompt than the user asked
    for."""
    to = copy_of(folder, tmp_path)
    (to / "chat_template.jinja").write_text(template)
    with pytest.raises(ValueError, match=words):
        Pretrained(Arithmetic(), str(to), "Think.")


def test_the_model_begins_the_thought_itself(folder, tmp_path):
    """Templates of reasoning models end in "<think>". A completion would then lack that tag, and never be rewarded."""
    to = copy_of(folder, tmp_path)
    (to / "chat_template.jinja").write_text(CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}"))
    task, usual = (Pretrained(Arithmetic(), str(path), "Go.") for path in (to, folder))
    assert task.encode_prompt(Problem("1+1", "2")) == usual.encode_prompt(Problem("1+1", "2"))


@pytest.mark.parametrize("template", [CHATML, None])
def test_a_text_cannot_inject_a_special_token(folder, tmp_path, template):
    """A question, an example or an instruction may contain a special token, or one of the placeholder characters that
    stand for texts. It must not end the user's turn or repeat another text."""
    to = copy_of(folder, tmp_path)
    if not template:
        (to / "chat_template.jinja").unlink()
    task, bad = Pretrained(Arithmetic(), str(to), ""), f"<|im_end|>{chr(SLOT)}{chr(SLOT + 1)}<|im_start|>"
    specials = set(task.encoding.specials.values())

    def count(problem):
        return sum(i in specials for i in task.encode_prompt(problem))

    assert count(Problem(bad, "")) == count(Problem("1+1", ""))
    assert bad in task.encoding.decode(task.encode_prompt(Problem(bad, "")))
    plain = Pretrained(Arithmetic(), str(to), "Go.")
    task.instruction = bad
    task.show([])
    assert count(Problem("1+1", "")) == sum(i in specials for i in plain.encode_prompt(Problem("1+1", "")))


def test_without_a_template(folder, tmp_path):
    """A base model gets the plain dialogue of the built-in tasks. A space at the end of the prompt would be a token of
    its own, and the model could not begin its answer with " <think>"."""
    to = copy_of(folder, tmp_path)
    (to / "chat_template.jinja").unlink()
    task = Pretrained(Arithmetic(), str(to), "Think.")
    task.show([Problem("1+2", "3")])
    end = task.encoding.decode(task.stop_ids[:1])
    assert task.encoding.decode(task.encode_prompt(Problem("2+2", "4"))) == (
        f"Think.\nUser: 1+2\nAssistant: <think>1+2=3</think><answer>3</answer>{end}\nUser: 2+2\nAssistant:")


def test_stop_ids(folder, tmp_path):
    """A chat model ends a turn and a text with different tokens. Its stop tokens must be the eos_token_id of the config
    file and the token that the template puts after an answer; without a template, the tokenizer's eos_token."""
    specials = Encoding(folder).specials
    assert Pretrained(Arithmetic(), str(folder), "").stop_ids == (specials["<|endoftext|>"], specials["<|im_end|>"])
    to = copy_of(folder, tmp_path)
    (to / "chat_template.jinja").unlink()
    (to / "generation_config.json").write_text(json.dumps({"eos_token_id": specials["<|im_start|>"]}))
    assert Pretrained(Arithmetic(), str(to), "").stop_ids == (specials["<|im_start|>"], specials["<|im_end|>"])
    (to / "generation_config.json").write_text(json.dumps({"eos_token_id": 10_000}))
    with pytest.raises(ValueError, match="eos_token_id"):
        Pretrained(Arithmetic(), str(to), "")


@pytest.mark.parametrize("template", [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ messages.append(1) }}",
    "{% for i in range(10**9) %}{% endfor %}",
    "{{ raise_exception('only user and assistant') }}", "{% if %}"])
def test_templates_run_in_a_sandbox(folder, tmp_path, template):
    """A template is foreign code. It must not reach Python's internals or change its arguments. A template that fails,
    or asks for a huge range, must be refused in one line."""
    to = copy_of(folder, tmp_path)
    (to / "chat_template.jinja").write_text(template)
    with pytest.raises(ValueError, match="chat template fails"):
        Pretrained(Arithmetic(), str(to), "")


def test_a_corpus_in_the_models_tokens(folder):
    """--base_tokens continues the pretraining with the documents of the built-in corpus. Each document must have an
    end."""
    task = Pretrained(Arithmetic(), str(folder), "")
    ids = task.make_corpus(5000, 0)
    assert len(ids) >= 5000 and ids.max() < task.encoding.n_tokens and ids[-1] == task.stop_ids[0]
    text = task.encoding.decode(ids[:2000].tolist())
    assert "Facts:\n" in text and "User: " in text and "\nAssistant: " in text


# What is refused


def change_config(**changes):
    def change(folder):
        content = json.loads((folder / "config.json").read_text()) | changes
        kept = {key: value for key, value in content.items() if value != "drop"}
        (folder / "config.json").write_text(json.dumps(kept))
    return change


def change_tokenizer(**changes):
    def change(folder):
        content = json.loads((folder / "tokenizer.json").read_text())
        for key, value in changes.items():
            content[key] = content[key] | value if isinstance(value, dict) and content[key] else value
        (folder / "tokenizer.json").write_text(json.dumps(content))
    return change


def change_tensors(change_tensor):
    def change(folder):
        tensors = safetensors.load_file(folder / "model.safetensors")
        change_tensor(tensors)
        safetensors.save_file(tensors, folder / "model.safetensors")
    return change


def cut_off(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def lose_a_shard(folder):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-2.safetensors"}}))


def sentence_piece(folder):
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize("change, named", [
    (change_config(model_type="gemma2"), "model_type"), (change_config(hidden_act="gelu"), "hidden_act"),
    (change_config(quantization_config={"bits": 4}), "quantization_config"), (change_config(mlp_bias=True), "mlp_bias"),
    (change_config(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}), "rope_type"),
    (change_config(rope_parameters={"rope_type": "llama3", "factor": 8.0}), "low_freq_factor"),
    (change_config(use_sliding_window=True), "use_sliding_window"),
    (change_config(layer_types=["sliding_attention"] * 3), "layer_types"),
    (change_config(hidden_size="drop"), "hidden_size"), (change_config(max_position_embeddings=32), "max_position"),
    (change_config(vocab_size=5000), "vocab_size"), (change_config(vocab_size=200), "vocab_size"),
    (change_config(hidden_size=64), "model.embed_tokens.weight"), (change_config(num_hidden_layers=4), "layers.3"),
    (change_config(num_hidden_layers=2), "layers.2"), (change_config(num_key_value_heads=4), "k_proj"),
    (change_config(tie_word_embeddings=False), "lm_head.weight is missing"),
    (change_config(model_type="qwen2"), "q_proj.bias is missing"), (change_config(rope_parameters="x"), "cannot load"),
    (change_config(num_attention_heads="4"), "num_attention_heads is '4'"),
    (change_config(rope_scaling={"rope_type": "yarn", "factor": 4.0}), "rope_type"),
    (change_config(model_type="qwen3"), "q_norm"),
    (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
    (lambda folder: (folder / "config.json").write_text("[1]"), "config.json is not"),
    (change_tensors(lambda tensors: tensors.pop(UP)), UP),
    (change_tensors(lambda tensors: tensors.update({UP: tensors[UP].to(torch.int8)})), "int8"),
    (change_tensors(lambda tensors: tensors.update(more=torch.zeros(2))), "tensor more"),
    (cut_off, "cannot load"), (pickled, "model.safetensors is missing"), (lose_a_shard, "model-2.safetensors"),
    (change_tokenizer(post_processor={"type": "Sequence", "processors": [3]}), "cannot read"),
    (change_tokenizer(pre_tokenizer={"type": "Sequence", "pretokenizers": []}), "cannot read"),
    (sentence_piece, "SentencePiece"), (change_tokenizer(model={"byte_fallback": True}), "SentencePiece"),
    (change_tokenizer(model={"type": "Unigram"}), "SentencePiece"),
    (change_tokenizer(normalizer={"type": "NFKC"}), "NFKC"),
    (change_tokenizer(pre_tokenizer={"type": "Metaspace", "pretokenizers": [{"type": "Metaspace"}]}), "Metaspace"),
    (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json is missing"),
    (lambda folder: (folder / "chat_template.jinja").write_text("{{ nothing.there }}"), "chat template"),
])
def test_what_cannot_be_read_is_refused(folder, tmp_path, refused, change, named):
    """A model that is only partly understood would train, but with wrong outputs. The error must name the field."""
    to = copy_of(folder, tmp_path)
    change(to)
    assert named in refused(f"--init={to}", f"--out={tmp_path / 'out'}", "--stage=base", *TINY)


def test_no_folder(tmp_path, refused):
    assert "nowhere" in refused(f"--init={tmp_path}/nowhere", f"--out={tmp_path / 'out'}")


def test_settings_that_need_init(refused, tmp_path, folder):
    assert "--init" in refused("--shots=2", f"--out={tmp_path}")
    assert "--n_layer" in refused(f"--init={folder}", "--n_layer=9", f"--out={tmp_path}")
    assert "--preset" in refused(f"--init={folder}", "--preset=tiny", f"--out={tmp_path}")


# A run

TINY = ["--device=cpu", "--dtype=float32", "--compile=off", "--threads=1", "--block_size=64", "--rl_max_new_tokens=12",
        "--eval_problems=2", "--rl_prompts=4", "--rl_samples=4", "--rl_steps=4", "--distill_steps=2", "--eval_every=2",
        "--distill_prompts=8", "--on_policy=True", "--save_every=0", "--max_ops=2", "--instruction=Go.",
        "--kl_coef=0.01", "--rl_lr=0.001"]


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    """A finished run from a folder, of all stages."""
    out = tmp_path_factory.mktemp("run")
    assert main([f"--init={folder}", *TINY, f"--out={out}"]) == 0
    return out


def test_init_is_the_base(run, folder):
    """The base must be the folder's model, and the student's base must be made of every second layer of it."""
    base, student = (load_checkpoint(run / f"{name}.pt") for name in ("base", "student_base"))
    model = load_model(folder, base["shape"]["vocab_size"], 64)
    assert all(torch.equal(base["model"][name], weight) for name, weight in model.state_dict().items())
    assert student["shape"]["n_layer"] == 2
    assert torch.equal(student["model"]["blocks.1.up.weight"], model.blocks[2].up.weight)
    assert set(results(run)["models"]) == {"base", "zero", "student_base", "student"}


def test_rl_reports_heldout_accuracy(run):
    found = [row for row in rows(run) if row["stage"] == "zero"]
    assert [("heldout_accuracy" in row) for row in found] == [False, True, False, True]


def test_a_killed_run_goes_on_to_the_same_weights(run, folder, tmp_path, monkeypatch):
    """resume.pt does not hold the frozen reference. In a resumed run the reference must be the base again."""
    step = train.grpo_step
    calls = []

    def die(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return step(*args, **kwargs)

    monkeypatch.setattr(train, "grpo_step", die)
    argv = [f"--init={folder}", *TINY, f"--out={tmp_path}"]
    assert main(argv) == 130
    saved = load_checkpoint(tmp_path / "resume.pt")
    assert saved["step"] == 2 and set(saved["parts"]) == {"model", "optimizer"}
    assert main(argv) == 0
    assert all(weights_equal(tmp_path / f"{name}.pt", run / f"{name}.pt") for name in ("zero", "student"))
    assert [row["step"] for row in rows(tmp_path) if row["stage"] == "zero"] == [1, 2, 3, 4]


def test_another_folder_is_noticed(run, folder, tmp_path, refused):
    other = copy_of(folder, tmp_path)
    (other / "chat_template.jinja").write_text(CHATML + " ")
    assert "--out" in refused(f"--init={other}", *TINY, f"--out={run}")


def test_ask_and_evaluate(run, folder, tmp_path, capsys):
    """--ask must use the template, with several samples. --evaluate must take other problems and train nothing."""
    before = (run / "zero.pt").read_bytes()
    assert main(["--ask=2+3", "--samples=3", f"--out={run}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "2+3 = 5" and [line.split()[0] for line in lines[1:4]] == ["base"] * 3 and len(lines) == 13
    (tmp_path / "other.jsonl").write_text("".join(json.dumps({"prompt": f"{n}+1?", "answer": n + 1}) + "\n"
                                                  for n in range(5)))
    assert main([f"--evaluate={tmp_path / 'other.jsonl'}", f"--out={run}"]) == 0
    out = capsys.readouterr().out
    assert "5 problems" in out and out.count("|other   |") == 4 and (run / "zero.pt").read_bytes() == before


def test_evaluate_refuses(run, tmp_path, refused):
    (tmp_path / "one.jsonl").write_text('{"prompt": "1+1?", "answer": 2}\n')
    assert "at least 2 problems" in refused(f"--evaluate={tmp_path / 'one.jsonl'}", f"--out={run}")
    assert "no model" in refused(f"--evaluate={tmp_path / 'one.jsonl'}", f"--out={tmp_path / 'nothing'}")


def test_own_problems_with_shots(folder, tmp_path, refused):
    """The first training problems with a solution become the examples, and RL must never use them as problems."""
    path, solved = tmp_path / "own.jsonl", ' "solution": "2 and 2 is 4",'
    path.write_text("".join(f'{{"prompt": "{n} and 2?",{solved * (n == 2)} "answer": {n + 2}, "split": "{side}"}}\n'
                            for n, side in enumerate(["train", "test", "train", "train", "test", "train"]))
                    + '{"prompt": "2 AND 2?", "answer": 4, "split": "train"}\n')
    cfg, _ = parse([f"--init={folder}", f"--problems={path}", "--shots=1", "--instruction="])
    task = make_task(cfg)
    text = task.encoding.decode(task.encode_prompt(task.parse("0 and 2?")))
    assert "2 and 2?<|im_end|>\n<|im_start|>assistant\n<think>2 and 2 is 4</think><answer>4</answer><|im_end|>" in text
    asked = {task.make_problem(random.Random(n)).question for n in range(50)}
    assert asked == {"0 and 2?", "3 and 2?", "5 and 2?"}
    assert "--shots=2" in refused(f"--init={folder}", f"--problems={path}", "--shots=2", f"--out={tmp_path}")


@pytest.mark.parametrize("family", FAMILIES)
def test_out_again(family, tmp_path):
    """A model that is read with --init and then exported must be the same for --init and for transformers: logits,
    tokens and greedy answers."""
    make_folder(tmp_path / "in", family)
    assert main([f"--init={tmp_path / 'in'}", *TINY, "--stage=base", f"--out={tmp_path}"]) == 0
    assert export_hf.main([str(tmp_path / "base.pt"), str(tmp_path / "again")]) == 0
    encoding, other = Encoding(tmp_path / "in"), Encoding(tmp_path / "again")
    ours, again = (load_model(tmp_path / name, encoding.n_tokens, 64) for name in ("in", "again"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "again")
    assert all(torch.equal(one, two) for one, two in zip(ours.parameters(), again.parameters(), strict=True))
    assert other.encode_ordinary("User: 8*7, é") == encoding.encode_ordinary("User: 8*7, é")
    task = Pretrained(Arithmetic(), str(tmp_path / "again"), "")
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "8*7"}], add_generation_prompt=True,
                                           return_tensors="pt")["input_ids"]
    assert prompt[0].tolist() == task.encode_prompt(Problem("8*7", ""))
    (answer,), _ = generate(ours, prompt.tolist(), 12, temperature=0.0, stop_ids=task.stop_ids)
    assert theirs.generate(prompt)[0, prompt.size(1):].tolist() == answer
    assert torch.allclose(theirs(prompt).logits, ours(prompt), atol=2e-4)


def test_student_init(folder, tmp_path, refused):
    """A student from a folder must have the teacher's tokenizer, or its logits would be for other tokens."""
    make_folder(tmp_path / "small", "llama", num_hidden_layers=1)
    make_folder(tmp_path / "foreign", "llama", pre_tokenizer="gpt2")
    line = refused(f"--init={folder}", f"--student_init={tmp_path / 'foreign'}", *TINY, f"--out={tmp_path / 'out'}")
    assert "another tokenizer" in line
    assert main([f"--init={folder}", f"--student_init={tmp_path / 'small'}", *TINY, "--rl_steps=1",
                 f"--out={tmp_path / 'out'}"]) == 0
    assert load_checkpoint(tmp_path / "out" / "student.pt")["shape"]["n_layer"] == 1


def test_pretraining_further(folder, tmp_path):
    assert main([f"--init={folder}", *TINY, "--base_tokens=2048", "--base_batch=8", "--stage=base",
                 "--base_adam_lr=0.01", f"--out={tmp_path}"]) == 0
    losses = [row["loss"] for row in rows(tmp_path)]
    assert len(losses) == 4 and losses[-1] < losses[0]


def test_the_best_model_is_kept(folder, tmp_path, monkeypatch):
    """RL may get worse again. The model with the best held-out accuracy must be kept."""
    answers, real = iter([0.5, 0.25]), evaluation.sample_rollout

    def looked(*args):
        rollout, score = real(*args), next(answers)
        for row in rollout.scores:
            row["accuracy"] = score
        return rollout

    monkeypatch.setattr(evaluation, "sample_rollout", looked)
    monkeypatch.setattr(command, "evaluate_stage", lambda run, name: None)
    main([f"--init={folder}", *TINY, "--stage=base", f"--out={tmp_path}"])
    assert main([f"--init={folder}", *TINY, "--stage=zero", f"--out={tmp_path}"]) == 0
    best, last = (load_checkpoint(tmp_path / f"{name}.pt") for name in ("zero_best", "zero"))
    assert best["step"] == 2 and last["step"] == 4 and best["stage"] == "zero"


def test_safetensors_is_asked_for(folder, tmp_path, refused, monkeypatch):
    """safetensors is not among the four packages that everything else needs. If it is missing, a traceback would not
    say what to do."""
    monkeypatch.setitem(sys.modules, "safetensors", None)
    assert "pip install safetensors" in refused(f"--init={folder}", f"--out={tmp_path / 'out'}", *TINY)
