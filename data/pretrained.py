"""A language model that somebody else trained: its weights and its tokenizer, from a folder as transformers saves it.

The folder holds config.json, *.safetensors and tokenizer.json. (data/chat.py reads its prompts.) The families are Llama
(SmolLM2 is one), Qwen2 and Qwen3, whose blocks model.py computes. Anything else is refused, in a line that names the
field. Files of pickles are never opened.

A byte-level BPE tokenizer becomes a tiktoken.Encoding. Both join the pair of pieces that comes first in the order of
the merges, and the ids rise in that order, so an id is a rank. Rows of the embedding that no token names are left out,
so that what is sampled can always be decoded.
"""
import json
import re
import unicodedata
from pathlib import Path

import tiktoken
import torch

from model import GPT, GPTConfig

# What a fixed field must be if config.json has it.
FIXED = {"hidden_act": "silu", "mlp_bias": False, "use_sliding_window": False, "quantization_config": None,
         "partial_rotary_factor": 1.0}
NAMES = {"norm1": "input_layernorm", "norm2": "post_attention_layernorm", "q_norm": "self_attn.q_norm",
         "k_norm": "self_attn.k_norm", "gate": "mlp.gate_proj", "up": "mlp.up_proj",
         "down": "mlp.down_proj"} | {name: f"self_attn.{name}_proj" for name in "qkvo"}
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+"
# The two usual splits before BPE, as regular expressions: GPT-2's, and the same with each digit alone (SmolLM2).
GPT2 = WORDS + r"| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SINGLE_DIGITS = WORDS + r"|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"


def read_json(folder: Path, name: str) -> dict:
    """A JSON file of the folder. Raises ValueError if it is missing or not an object."""
    try:
        return json.loads((folder / name).read_text(encoding="utf-8")) | {}  # a TypeError if it is not an object
    except FileNotFoundError:
        raise ValueError(f"{folder / name} is missing") from None
    except (ValueError, TypeError, RecursionError):
        raise ValueError(f"{folder / name} is not a JSON object") from None


# The weights


def read_shape(config: dict, names: set[str], vocab_size: int, block_size: int) -> GPTConfig:
    """The GPTConfig of a config.json, given the names of the tensors: they tell biases, and an output matrix of its
    own. Raises ValueError, with the field's name, for what model.py cannot compute."""
    rope = (config.get("rope_scaling") or {}) | (config.get("rope_parameters") or {})
    for name, wanted in FIXED.items():
        for found in (config.get(name), rope.get(name)):
            if found not in (None, wanted):
                raise ValueError(f"{name} is {str(found)[:60]!r}, and only {wanted!r} can be loaded")
    kind, scaling = rope.get("rope_type", rope.get("type", "default")), None
    for name, found, known in (("model_type", {config.get("model_type")}, {"llama", "qwen2", "qwen3"}),
                               ("layer_types", set(config.get("layer_types") or ()), {"full_attention"}),
                               ("rope_type", {kind}, {"default", "llama3"})):
        if found - known:
            raise ValueError(f"{name} has {min(found - known)!r}, and only {sorted(known)} can be loaded")
    if block_size > config.get("max_position_embeddings", block_size):
        raise ValueError(f"max_position_embeddings is {config['max_position_embeddings']}, less than --block_size")
    try:
        if kind == "llama3":
            scaling = tuple(rope[key] for key in ("factor", "low_freq_factor", "high_freq_factor",
                                                  "original_max_position_embeddings"))
        return GPTConfig(
            vocab_size, block_size, config["num_hidden_layers"], config["num_attention_heads"], config["hidden_size"],
            config["intermediate_size"], config.get("num_key_value_heads") or 0, config.get("head_dim") or 0,
            rope.get("rope_theta", config.get("rope_theta", 10_000.0)), scaling, config["rms_norm_eps"],
            qkv_bias="model.layers.0.self_attn.q_proj.bias" in names,
            qk_norm="model.layers.0.self_attn.q_norm.weight" in names,
            tied=bool(config.get("tie_word_embeddings", "lm_head.weight" not in names)))
    except KeyError as error:
        raise ValueError(f"{error.args[0]} is missing") from None


def tensor_name(name: str) -> str:
    """The name of one of our parameters in transformers' files.

    >>> tensor_name("blocks.3.q.weight"), tensor_name("embedding.weight")
    ('model.layers.3.self_attn.q_proj.weight', 'model.embed_tokens.weight')
    """
    if found := re.fullmatch(r"blocks\.(\d+)\.(\w+)\.(\w+)", name):
        return f"model.layers.{found[1]}.{NAMES[found[2]]}.{found[3]}"
    return {"embedding.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight",
            "output.weight": "lm_head.weight"}[name]


def load_model(folder: str | Path, vocab_size: int, block_size: int, dtype: torch.dtype = torch.float32) -> GPT:
    """The folder's model, with the first vocab_size rows of its embedding. Raises ValueError for what it cannot load,
    and where config.json and the tensors disagree."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise ValueError("weights are read with safetensors: pip install safetensors first") from None
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    shards = (sorted(set(read_json(folder, index.name).get("weight_map", {}).values())) if index.exists()
              else sorted(path.name for path in folder.glob("*.safetensors")))
    if not shards:
        raise ValueError(f"{folder} has no *.safetensors; other files of weights are not opened")
    try:
        files = [safe_open(folder / shard, "pt") for shard in shards]
        holder = {name: file for file in files for name in file.keys() if not name.endswith("rotary_emb.inv_freq")}
        shape = read_shape(read_json(folder, "config.json"), set(holder), vocab_size, block_size)
        if shape.tied:
            holder.pop("lm_head.weight", None)  # a copy of the embedding
        model = GPT(shape, dtype)
        for name, parameter in model.named_parameters():
            if (theirs := tensor_name(name)) not in holder:
                raise ValueError(f"tensor {theirs} is missing")
            tensor = holder.pop(theirs).get_tensor(theirs)
            if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
                raise ValueError(f"tensor {theirs} has type {tensor.dtype}, not float32, float16 or bfloat16")
            if theirs in ("model.embed_tokens.weight", "lm_head.weight"):
                tensor = tensor[:vocab_size]
            if tensor.shape != parameter.shape:
                raise ValueError(f"tensor {theirs} is {tuple(tensor.shape)}, not {tuple(parameter.shape)} as by "
                                 "config.json")
            parameter.data.copy_(tensor)
        if holder:
            raise ValueError(f"tensor {min(holder)} has no place in this architecture")
        return model
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"cannot load {folder}: {error}") from None


# The tokenizer


def byte_letters() -> list[str]:
    """The character that stands for each byte in the vocabulary of a byte-level tokenizer, as GPT-2 chose them. A
    printable byte stands for itself; the others get the characters from 256 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


class Encoding(tiktoken.Encoding):
    """A tiktoken.Encoding of a folder's tokenizer.json, which adds to one:

    n_tokens         how many ids it names, from 0 on
    specials         its special tokens, text -> id, and special_pattern, a regular expression that finds them
    prefix           the special token that a plain text begins with, as text, or ""

    Raises ValueError for a tokenizer that is not byte-level BPE, or cuts texts in an unknown way.
    """

    def __init__(self, folder: Path):
        if not (folder / "tokenizer.json").exists() and (folder / "tokenizer.model").exists():
            raise ValueError(f"{folder}/tokenizer.model is of SentencePiece, and only byte-level BPE can be read")
        content, where = read_json(folder, "tokenizer.json"), f"cannot read {folder}/tokenizer.json:"
        try:
            model, added = content["model"], {token["content"]: token for token in content.get("added_tokens", ())}
            if model["type"] != "BPE" or model.get("byte_fallback"):
                raise ValueError(f"{where} it is of SentencePiece ({model['type']}), and not byte-level BPE")
            pattern = split_pattern(content.get("pre_tokenizer") or {})
            byte = {letter: value for value, letter in enumerate(byte_letters())}
            vocabulary = {text: i for text, i in model["vocab"].items() if text not in added}
            ranks = {bytes(byte[letter] for letter in text): i for text, i in vocabulary.items()}
            merges = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
            merged = [model["vocab"][first + second] for first, second in merges]
            self.form = (content.get("normalizer") or {"type": None})["type"]
            processor = content.get("post_processor") or {}
            first = processor.get("processors", [processor])[-1].get("single", [{}])[0]
            self.prefix = first["SpecialToken"]["id"] if "SpecialToken" in first else ""
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{where} it is not byte-level BPE ({error!r})") from None
        for wrong, line in (
            (pattern is None, f"pre_tokenizer {json.dumps(content.get('pre_tokenizer'))[:200]} is unknown"),
            (self.form not in (None, "NFC"), f"normalizer is {self.form}, and only NFC is known"),
            (merged != sorted(set(merged)) or len(ranks) != len(merged) + sum(len(piece) == 1 for piece in ranks),
             "its ids are not in the order of its merges"),
            (any(token.get(flag) for token in added.values() for flag in ("lstrip", "rstrip", "single_word")),
             "added_tokens with lstrip, rstrip or single_word are unknown"),
        ):
            if wrong:
                raise ValueError(f"{where} {line}")
        ids = {text: token["id"] for text, token in added.items()}
        self.n_tokens = max(*ranks.values(), *ids.values()) + 1
        self.specials = {text: i for text, i in ids.items() if added[text]["special"]}
        self.special_pattern = "|".join(map(re.escape, sorted(self.specials, key=len, reverse=True))) or "(?!)"
        self.found_in_text = set(ids) - set(self.specials)  # added tokens that are pieces of any text
        unnamed = set(range(self.n_tokens)) - {*ranks.values(), *ids.values()}
        # tiktoken wants a rank for each byte. A byte that the vocabulary lacks gets one beyond it, and is then dropped,
        # as transformers drops it.
        lacking = [piece for value in range(256) if (piece := bytes([value])) not in ranks]
        super().__init__(folder.name, pat_str=pattern,
                         mergeable_ranks=ranks | {piece: self.n_tokens + i for i, piece in enumerate(lacking)},
                         special_tokens=ids | {f"<|unnamed {i}|>": i for i in unnamed})

    def encode_ordinary(self, text: str) -> list[int]:
        """The ids of a text, in which no special token is found."""
        text = unicodedata.normalize(self.form, text) if self.form else text
        found = self.encode(text, allowed_special=self.found_in_text, disallowed_special=())
        return [i for i in found if i < self.n_tokens]


def same_tokenizer(folder: str, other: str) -> bool:
    """Do two folders' tokenizers give every text the same ids?"""
    one, two = (read_json(Path(path), "tokenizer.json") for path in (folder, other))
    return all(one.get(part) == two.get(part) for part in ("model", "added_tokens", "pre_tokenizer", "normalizer"))


def split_pattern(pre_tokenizer: dict) -> str | None:
    """The regular expression by which a pre_tokenizer cuts a text before BPE; None for an unknown one."""
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    kinds, first, last = [step.get("type") for step in steps], steps[0], steps[-1]
    if last.get("add_prefix_space") or last.get("use_regex", True) == (kinds[0] == "Split"):
        return None
    if kinds == ["Split", "ByteLevel"] and first["behavior"] == "Isolated" and not first.get("invert"):
        return first["pattern"].get("Regex")
    if kinds == ["Digits", "ByteLevel"] and first["individual_digits"]:
        return SINGLE_DIGITS
    return GPT2 if kinds == ["ByteLevel"] else None
