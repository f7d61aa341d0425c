"""Export a checkpoint as a folder that transformers loads without our code: config, safetensors, a fast tokenizer.

    pip install -r experiments/requirements.txt
    python experiments/export_hf.py out/zero.pt DIR

The GPT is a Llama, so its weights only get other names. In float32 they give the same logits. The tokenizer splits
texts as ours does, with one exception: as everywhere in transformers, "<|endoftext|>" in a text becomes the stop token.
The chat template turns a user's message into the prompt that the model was trained on:

    tokenizer, model = AutoTokenizer.from_pretrained(DIR), AutoModelForCausalLM.from_pretrained(DIR)
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "8*7-19"}], return_tensors="pt")
    print(tokenizer.decode(model.generate(**prompt)[0]))
"""
import re
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.tokenizer import END_OF_TEXT, PIECES, get_tokenizer
from run import UsageError, load_checkpoint

NAMES = {"norm1": "input_layernorm", "norm2": "post_attention_layernorm", "gate": "mlp.gate_proj", "up": "mlp.up_proj",
         "down": "mlp.down_proj"} | {name: f"self_attn.{name}_proj" for name in "qkvo"}
TEMPLATE = ("{% for message in messages %}{% if message['role'] == 'user' %}User: {{ message['content'] }}\nAssistant: "
            "{% else %}{{ message['content'] }}" + END_OF_TEXT + "{% endif %}{% endfor %}")


def llama(content: dict):
    """The model of a checkpoint's content as a LlamaForCausalLM."""
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
    shape, stop = content["shape"], get_tokenizer().eot_token
    gate = content["model"]["blocks.0.gate.weight"]  # (inner width, width)
    config = LlamaConfig(
        vocab_size=shape["vocab_size"], hidden_size=shape["n_embd"], intermediate_size=len(gate),
        num_hidden_layers=shape["n_layer"], num_attention_heads=shape["n_head"], rms_norm_eps=1e-5,
        max_position_embeddings=shape["block_size"], rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=stop, pad_token_id=stop)
    embedding = content["model"]["embedding.weight"]
    weights = {"model.embed_tokens.weight": embedding, "lm_head.weight": embedding,
               "model.norm.weight": content["model"]["norm.weight"]}
    for name, weight in content["model"].items():
        if found := re.fullmatch(r"blocks\.(\d+)\.(\w+)\.weight", name):
            weights[f"model.layers.{found[1]}.{NAMES[found[2]]}.weight"] = weight
    model = LlamaForCausalLM(config)
    model.load_state_dict(weights)
    model.generation_config = GenerationConfig(max_new_tokens=content["config"]["rl_max_new_tokens"], eos_token_id=stop,
                                               pad_token_id=stop)
    return model


def byte_letters() -> list[str]:
    """The character that stands for each byte in the vocabulary of a byte-level tokenizer, as GPT-2 chose them. A
    printable byte stands for itself; the others get the characters from 256 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def fast_tokenizer(block_size: int):
    """Our tokenizer as a PreTrainedTokenizerFast. It splits at the same places, and spells what is no piece in
    bytes."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    encoding, letters = get_tokenizer(), byte_letters()
    vocabulary = {"".join(letters[byte] for byte in encoding.decode_single_token_bytes(i)): i
                  for i in range(encoding.eot_token)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    pieces = "|".join(re.escape(piece) for piece in sorted(PIECES, key=len, reverse=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(pieces + r"|[\s\S]"), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT,
                                   padding_side="left", model_max_length=block_size, chat_template=TEMPLATE,
                                   clean_up_tokenization_spaces=False)


def main(argv: list[str]) -> int:
    """Run the command line -> exit code."""
    try:
        if len(argv) != 2 or any(arg.startswith("-") for arg in argv):
            raise UsageError("it needs a checkpoint and a folder: python experiments/export_hf.py out/zero.pt DIR")
        path, folder = map(Path, argv)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UsageError(f"{folder} exists already, and is not an empty folder")
        content = load_checkpoint(path)
        model, tokenizer = llama(content), fast_tokenizer(content["shape"]["block_size"])
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=folder.name) as unfinished:
            try:
                model.save_pretrained(unfinished)
                tokenizer.save_pretrained(unfinished)
            except Exception as error:  # on a full disk safetensors and tokenizers raise errors of their own kinds
                raise UsageError(f"cannot write {folder}: {error}") from None
            shutil.copytree(unfinished, folder, dirs_exist_ok=True)
        print(f"{folder} holds {content['stage']}, {model.num_parameters():,} parameters")
        return 0
    except ImportError:
        print("export_hf.py: pip install -r experiments/requirements.txt first", file=sys.stderr)
    except (UsageError, OSError) as error:
        print(f"export_hf.py: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
