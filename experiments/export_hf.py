"""Export a checkpoint as a folder that transformers loads without our code: config, safetensors, a fast tokenizer.

    pip install -r experiments/requirements.txt
    python experiments/export_hf.py out/zero.pt DIR

Our GPT has the architecture of Llama (a pretrained model may have that of Qwen), so its weights only get other names.
In float32 the logits are the same. A pretrained model (--init) keeps the tokenizer and the chat template of its folder,
and --init can read the exported folder. Our own tokenizer splits texts in transformers as it does here, with one
exception: as everywhere in transformers, "<|endoftext|>" in a text becomes the stop token. The chat template turns a
user's message into the prompt that the model was trained on:

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

from data.own import path_of
from data.tokenizer import END_OF_TEXT, PIECES, get_tokenizer
from engine.files import load_checkpoint
from engine.pretrained.bpe import byte_letters
from engine.pretrained.chat import Pretrained
from engine.pretrained.weights import tensor_name
from engine.terminal import UsageError
from engine.pretrained.families import FamilyConfig

TEMPLATE = ("{% for message in messages %}{% if message['role'] == 'user' %}User: {{ message['content'] }}\nAssistant: "
            "{% else %}{{ message['content'] }}" + END_OF_TEXT + "{% endif %}{% endfor %}")


def model_of(content: dict):
    """The model in a checkpoint's content, as a model of transformers."""
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
    shape = FamilyConfig(**content["shape"])
    rope = {"rope_type": "default", "rope_theta": shape.rope_theta}
    if shape.rope_scaling:
        names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        rope |= {"rope_type": "llama3"} | dict(zip(names, shape.rope_scaling))
    source = path_of(content["config"].get("init", ""))
    stop = Pretrained(None, source, "").stop_ids if source else (get_tokenizer().eot_token,)
    config = AutoConfig.for_model(
        "qwen3" if shape.qk_norm else "qwen2" if shape.qkv_bias else "llama", vocab_size=shape.vocab_size,
        hidden_size=shape.n_embd, intermediate_size=shape.n_hidden, num_hidden_layers=shape.n_layer,
        num_attention_heads=shape.n_head, num_key_value_heads=shape.n_kv_head, head_dim=shape.head_size,
        rms_norm_eps=shape.eps, max_position_embeddings=shape.block_size, rope_parameters=rope,
        tie_word_embeddings=shape.tied, bos_token_id=None, eos_token_id=list(stop), pad_token_id=stop[0])
    weights = {tensor_name(name): weight for name, weight in content["model"].items()}
    weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(weights)
    model.generation_config = GenerationConfig(max_new_tokens=content["config"]["rl_max_new_tokens"],
                                               eos_token_id=list(stop), pad_token_id=stop[0])
    return model


def save_tokenizer(content: dict, folder: str) -> None:
    """Write the tokenizer and the chat template that the checkpoint's model was trained with."""
    if source := path_of(content["config"].get("init", "")):
        for path in Path(source).iterdir():
            if path.name.startswith(("tokenizer", "special_tokens", "chat_template", "vocab", "merges")):
                shutil.copy(path, folder)
    else:
        fast_tokenizer(content["shape"]["block_size"]).save_pretrained(folder)


def fast_tokenizer(block_size: int):
    """Our tokenizer as a PreTrainedTokenizerFast. It splits a text at the same places. A character that is not a piece
    becomes its UTF-8 bytes, one token each."""
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
        model = model_of(content)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=folder.name) as unfinished:
            try:
                model.save_pretrained(unfinished)
                save_tokenizer(content, unfinished)
            except Exception as error:  # safetensors and tokenizers raise their own classes of errors on a full disk
                raise UsageError(f"cannot write {folder}: {error}") from None
            shutil.copytree(unfinished, folder, dirs_exist_ok=True)
        print(f"{folder} holds {content['stage']}, {model.num_parameters():,} parameters")
        return 0
    except ImportError:
        print("export_hf.py: pip install -r experiments/requirements.txt first", file=sys.stderr)
    except (ValueError, OSError) as error:  # UsageError is a ValueError
        print(f"export_hf.py: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
