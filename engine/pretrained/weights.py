"""The weights of a pretrained model, from a folder as transformers saves it.

The folder holds config.json and *.safetensors. (bpe.py reads its tokenizer, chat.py its chat template.) The supported
families are Llama (SmolLM2 is one), Qwen2 and Qwen3 (families.py). Anything else is refused, with a message that names
the field. Pickle files are never opened. Rows of the embedding after the last token are left out, so that every sampled
token can be decoded.
"""
import dataclasses
import re
from pathlib import Path

import torch

from data.own import path_of
from engine.pretrained.bpe import MALFORMED, read_json, refuse_pointer
from engine.pretrained.families import FamilyConfig, FamilyGPT
from model import GPT

# The only value that is supported in each of these fields of config.json. A field may be missing.
FIXED = {"hidden_act": "silu", "mlp_bias": False, "use_sliding_window": False, "quantization_config": None,
         "partial_rotary_factor": 1.0}
EMBEDDING = "model.embed_tokens.weight"
NAMES = {"norm1": "input_layernorm", "norm2": "post_attention_layernorm", "q_norm": "self_attn.q_norm",
         "k_norm": "self_attn.k_norm", "gate": "mlp.gate_proj", "up": "mlp.up_proj",
         "down": "mlp.down_proj"} | {name: f"self_attn.{name}_proj" for name in "qkvo"}


def read_shape(config: dict, tied: bool, vocab_size: int, block_size: int) -> FamilyConfig:
    """The FamilyConfig of a config.json. `tied` says whether the output matrix is the embedding, if the file does not.
    Raises ValueError, with the field's name, for an architecture that families.py cannot compute."""
    tables = [config.get(name) or {} for name in ("rope_scaling", "rope_parameters")]  # older and newer files
    rope = tables[0] | tables[1]
    for name, wanted in FIXED.items():
        for value in (config.get(name), rope.get(name)):
            if value not in (None, wanted):
                raise ValueError(f"{name} is {str(value)[:60]!r}, and only {wanted!r} is supported")
    kind, scaling = rope.get("rope_type", rope.get("type", "default")), None
    kinds = {table.get("rope_type", table.get("type", "default")) for table in tables if table}
    for name, values, known in (("model_type", {config.get("model_type")}, {"llama", "qwen2", "qwen3"}),
                               ("layer_types", set(config.get("layer_types") or ()), {"full_attention"}),
                               ("rope_type", kinds, {"default", "llama3"})):
        if values - known:
            raise ValueError(f"{name} has {min(values - known)!r}, and only {sorted(known)} are supported")
    if len(kinds) > 1:
        raise ValueError(f"rope_scaling and rope_parameters have different types, {' and '.join(sorted(kinds))}")
    if block_size > config.get("max_position_embeddings", block_size):
        raise ValueError(f"max_position_embeddings is {config['max_position_embeddings']}: lower --block_size to it")
    for name in ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_size", "intermediate_size"):
        if not isinstance(config.get(name, 0) or 0, int):
            raise ValueError(f"{name} is {config[name]!r}, which is no whole number")
    try:
        if kind == "llama3":
            scaling = tuple(rope[key] for key in ("factor", "low_freq_factor", "high_freq_factor",
                                                  "original_max_position_embeddings"))
        return FamilyConfig(
            vocab_size, block_size, config["num_hidden_layers"], config["num_attention_heads"], config["hidden_size"],
            config["intermediate_size"], config.get("num_key_value_heads") or 0, config.get("head_dim") or 0,
            rope.get("rope_theta", config.get("rope_theta", 10_000.0)), scaling, config["rms_norm_eps"],
            qkv_bias=config["model_type"] == "qwen2", qk_norm=config["model_type"] == "qwen3",
            tied=bool(config.get("tie_word_embeddings", tied)))
    except KeyError as error:
        raise ValueError(f"{error.args[0]} is missing") from None


def tensor_name(name: str) -> str:
    """The name in transformers' files of a parameter.

    >>> tensor_name("blocks.3.q.weight"), tensor_name("embedding.weight")
    ('model.layers.3.self_attn.q_proj.weight', 'model.embed_tokens.weight')
    """
    in_block = re.fullmatch(r"blocks\.(\d+)\.(\w+)\.(\w+)", name)
    if in_block:
        return f"model.layers.{in_block[1]}.{NAMES[in_block[2]]}.{in_block[3]}"
    return {"embedding.weight": EMBEDDING, "norm.weight": "model.norm.weight",
            "output.weight": "lm_head.weight"}[name]


def copy_tensors(model: GPT, tensors: dict, config: dict, n_tokens: int) -> None:
    """Copy tensors into the model's parameters. `tensors` maps a tensor's name to the open file that holds it. Raises
    ValueError for a tensor that is missing, left over, or of another shape or type."""
    for name, parameter in model.named_parameters():
        theirs = tensor_name(name)
        if theirs not in tensors:
            raise ValueError(f"tensor {theirs} is missing")
        tensor = tensors.pop(theirs).get_tensor(theirs)
        if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(f"tensor {theirs} has type {tensor.dtype}, not float32, float16 or bfloat16")
        if theirs in (EMBEDDING, "lm_head.weight"):
            if not n_tokens <= config["vocab_size"] == len(tensor):
                raise ValueError(f"vocab_size is {config['vocab_size']}, {theirs} has {len(tensor)} rows, and "
                                 f"tokenizer.json has {n_tokens} tokens")
            tensor = tensor[:n_tokens]
        if tensor.shape != parameter.shape:
            raise ValueError(f"tensor {theirs} is {tuple(tensor.shape)}, but config.json says {tuple(parameter.shape)}")
        parameter.data.copy_(tensor)
    if tensors:
        raise ValueError(f"tensor {min(tensors)} has no place in this architecture")


def load_model(folder: str | Path, n_tokens: int, block_size: int, dtype: torch.dtype = torch.float32) -> GPT:
    """The model in a folder, with the first n_tokens rows of its embedding. Raises ValueError if it is not supported,
    or if config.json and the tensors disagree."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise ValueError("the package that reads weights is missing: pip install safetensors") from None
    folder, one, index = Path(folder), "model.safetensors", "model.safetensors.index.json"
    try:
        config = read_json(folder, "config.json")
        shards = set(read_json(folder, index)["weight_map"].values()) if (folder / index).exists() else {one}
        if shards == {one} and not (folder / one).exists():
            raise ValueError(f"{one} is missing, and only *.safetensors are opened")
        for shard in shards:
            refuse_pointer(folder / shard)
        tensors = {name: file for file in (safe_open(folder / shard, "pt") for shard in shards)
                   for name in file.keys() if not name.endswith("rotary_emb.inv_freq")}
        shape = read_shape(config, "lm_head.weight" not in tensors, n_tokens, block_size)
        if shape.tied and "lm_head.weight" in tensors:
            embedding, head = (tensors[name].get_tensor(name) for name in (EMBEDDING, "lm_head.weight"))
            if torch.equal(embedding, head):
                tensors.pop("lm_head.weight")
            else:  # transformers uses the head, too
                shape.tied = False
        model = FamilyGPT(shape, dtype)
        copy_tensors(model, tensors, config, n_tokens)
        return model
    except (*MALFORMED, SafetensorError, OSError) as error:
        raise ValueError(f"cannot load {folder}: {error or repr(error)}") from None


def starting_model(cfg, n_tokens: int, student: bool, dtype: torch.dtype) -> GPT:
    """The base of a run with --init. For the student it is the model of --student_init, or else the base without every
    second layer."""
    folder = cfg.student_init if student and cfg.student_init else cfg.init
    model = load_model(path_of(folder), n_tokens, cfg.block_size, dtype)
    if read_json(Path(path_of(folder)), "config.json").get("tie_word_embeddings") and not model.config.tied:
        print(f"{path_of(folder)}: lm_head.weight differs from the embedding and is used, although config.json says "
              "that the two are tied")
    if student and not cfg.student_init:
        model.blocks = model.blocks[::2]
        model.config = dataclasses.replace(model.config, n_layer=len(model.blocks))
    return model
