"""Compare our speed and memory with those of peers: transformers (sampling, pretraining), TRL (GRPO, distillation).

    pip install -r experiments/requirements.txt
    python experiments/bench.py                           all cases; each row is printed as soon as it is measured
    python experiments/bench.py --only=grpo --reps=3      one group of cases: sampling, real, pretrain, grpo, distill
    python experiments/bench.py --dtype=float32           by default bfloat16, if the machine has it
    python experiments/bench.py --device=cpu              cpu or cuda; by default a GPU if there is one
    python experiments/bench.py --beside=../old           the peer is another checkout of nanoR1; needs no installation

Both sides start from random weights of the same shape: the peer's model is a LlamaForCausalLM with exactly as many
parameters as ours. Completions never end early, so both sides sample the same number of tokens. Nothing is downloaded,
and nothing is written outside a temporary folder. The groups of cases:

    sampling   R completions x T tokens after prompts of 12 tokens, at temperature 1, without top-k or top-p, with a KV
               cache: our generate(samples=8), and transformers' generate(num_return_sequences=8)
    real       the same with a model of the shape of SmolLM2-135M
    pretrain   an update on 32 x 128 tokens: Muon for the layers' matrices, AdamW for the rest, clipped gradients
    grpo       32 prompts x 16 samples x 48 tokens, a reward, group advantages, the token-level loss with a KL penalty
               (k3), one AdamW update: our grpo_step, and a step of GRPOTrainer.train()
    distill    512 completions of 48 tokens sampled from the teacher, forward KL, one AdamW update: our distill_step,
               and a step of GKDTrainer.train() with seq_kd (lmbda 0, beta 0)

How it is measured
1. Each side of each case runs in a process of its own, so the two sides share no memory, allocator or cache. They take
   turns: ours, peer, ours, peer. A turn is one step, or several if a step is short. While one process runs, the other
   sleeps. The ratio of speeds is computed for each pair of turns, because a slow moment of the machine slows both
   turns of a pair.
2. Both sides compute in the same dtype. Our side is compiled, as in a run. (The table does not count the seconds of
   compiling.) The peer first tries its settings and keeps the fastest: several kinds of cache in sampling, and of
   attention and micro-batch in training. (In sampling, the attention "sdpa" is always the faster one.) In training both
   sides keep float32 weights. In sampling the peer's weights have the compute dtype, as is usual. The compiled peer has
   rows of its own, in pretraining and at two sizes of sampling, because by default generate compiles on GPUs only.
   TRL's trainers are not compiled, because their model also generates. With --beside, the other checkout runs its own
   experiments/bench.py.
3. Our processes configure torch's libraries as train.py does. The peers' processes keep the defaults.
4. A trainer's step is timed from the end of the previous step to its own end. So its data loading, callbacks and
   metrics count, as the metrics of grpo_step do.
5. Peak memory is that of the whole process, including imported libraries. On a GPU it is what torch allocated there.
"""
import argparse
import dataclasses
import importlib.metadata
import importlib.util
import logging
import multiprocessing
import os
import platform
import resource
import shlex
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch
import torch.nn.functional as F

from data.arithmetic import Arithmetic
from data.tokenizer import get_tokenizer
from distill import distill_step
from engine.arguments import Parser, number
from engine.machine import has_bfloat16, tune_libraries
from engine.optimizer import Optimizer
from engine.speed.fast import frozen, graphed, make_fast
from engine.terminal import UsageError
from grpo import grpo_step
from engine.pretrained.families import FamilyConfig, make_model
from model import GPT, GPTConfig
from train import Config, next_token_loss

CFG = Config(micro_batch=65_536 if torch.cuda.is_available() else 4_096, compile="on")
ENCODING = get_tokenizer()
VOCAB = ENCODING.n_vocab
TEACHER = GPTConfig(VOCAB, CFG.block_size, CFG.n_layer, CFG.n_head, CFG.n_embd)
STUDENT = GPTConfig(VOCAB, CFG.block_size, CFG.student_n_layer, CFG.student_n_head, CFG.student_n_embd)
SMOLLM2 = FamilyConfig(49_152, 1024, 30, 9, 576, n_hidden=1536, n_kv_head=3, rope_theta=100_000.0)
B, T = 32, 128            # the pretraining batch
PROMPT = 12               # tokens in a prompt; all prompts have the same length, so neither side pads
P, G, NEW = 32, 16, 48    # a GRPO step: prompts, samples per prompt, new tokens per sample
N = P * G                 # completions of a GRPO step, and of a distillation step
KL = 0.01


# The inputs of both sides


def prompt_texts(n: int) -> list[str]:
    return [f"User: {i % 100:02}*{i % 9 + 1}-19+33\nAssistant: " for i in range(n)]


def prompt_ids(n: int) -> list[list[int]]:
    """The texts of prompt_texts as token ids: n lists of PROMPT ids."""
    return [ENCODING.encode_ordinary(text) for text in prompt_texts(n)]


def odd_characters(text: str) -> float:
    """The reward: the number of characters with an odd code point. About half of all characters have one, so the
    completions of one prompt differ in their reward."""
    return float(sum(ord(character) % 2 for character in text))


class Turns:
    """The turns of a process. In each turn the process takes some steps, sends the seconds per step, and waits for its
    next turn."""

    def __init__(self, pipe, device: str):
        self.pipe, self.device, self.start = pipe, device, time.perf_counter()
        self.steps = self.left = 3  # the first turn warms up: CUDA graphs are recorded in the second step

    def next(self) -> bool:
        """Call this after each step. It returns whether to take another step."""
        self.left -= 1
        if not self.left:
            if self.device == "cuda":
                torch.cuda.synchronize()
            self.pipe.send((time.perf_counter() - self.start) / self.steps)
            self.steps = self.left = self.pipe.recv()
            self.start = time.perf_counter()
        return self.left > 0

    def take(self, step: Callable[[], None]) -> None:
        """Take steps until the turns end."""
        step()
        while self.next():
            step()

    def train(self, trainer) -> None:
        """Do the same with a trainer, which has a loop of its own."""
        from transformers import TrainerCallback
        turns = self

        class Wait(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                control.should_training_stop = not turns.next()

        trainer.add_callback(Wait())
        trainer.train()


# Our side of each case


class Endless(Arithmetic):
    stop_ids = (-1,)  # no token has this id, so no completion ends early


def problems(n: int) -> list:
    return [SimpleNamespace(prompt=text) for text in prompt_texts(n)]


def our_reward(completion: str, problem) -> dict[str, float]:
    return {"reward": odd_characters(completion), "accuracy": 1.0}  # distill_step keeps every completion


def settings(option: dict, **changes) -> Config:
    """The settings of a run on the option's device."""
    return dataclasses.replace(CFG, device=option["device"], **changes)


def quick_model(shape: GPTConfig, option: dict, cfg: Config, **passes: bool) -> GPT:
    """Our model with random weights, with the faster methods that a run gives it."""
    model = make_model(dataclasses.asdict(shape), getattr(torch, option["dtype"])).to(option["device"])
    return make_fast(model, cfg, **passes)


def our_sampling(option: dict, turns: Turns, shape: GPTConfig, rows: int, new: int) -> None:
    shape = dataclasses.replace(shape, block_size=PROMPT + new)
    model = quick_model(shape, option, settings(option), sampling=True)

    def step():
        completions, _ = model.generate(prompt_ids(rows // 8), new, stop_ids=Endless.stop_ids, samples=8)
        assert len(completions) == rows and {len(c) for c in completions} == {new}, "every row must run to its end"

    turns.take(step)


def our_pretraining(option: dict, turns: Turns) -> None:
    cfg = settings(option)
    model = quick_model(TEACHER, option, cfg, training=True)
    optimizer = Optimizer(model, cfg.base_adam_lr, cfg.base_muon_lr)
    graphed(optimizer, cfg)
    idx = torch.randint(VOCAB, (B, T + 1), device=option["device"])

    def step():
        next_token_loss(model, idx).mean().backward()
        optimizer.step()

    turns.take(step)


def our_grpo(option: dict, turns: Turns) -> None:
    cfg = settings(option, rl_samples=G, rl_max_new_tokens=NEW, rl_minibatches=1, kl_coef=KL)
    policy = quick_model(TEACHER, option, cfg, training=True, sampling=True)
    reference, optimizer = frozen(policy, cfg), Optimizer(policy, cfg.rl_lr)

    def step():
        metrics, _ = grpo_step(policy, reference, optimizer, problems(P), our_reward, Endless(), cfg)
        found = metrics.means()
        assert found["no_signal"] == 0 and found["length"] == NEW, "all rows must be whole, all groups have a signal"

    turns.take(step)


def our_distillation(option: dict, turns: Turns) -> None:
    cfg = settings(option, rl_max_new_tokens=NEW, distill_minibatches=1, distill_epochs=1, distill_temperature=1.0)
    student = quick_model(STUDENT, option, cfg, training=True)
    teacher = quick_model(TEACHER, option, cfg, training=True, sampling=True)
    optimizer = Optimizer(student, cfg.distill_adam_lr)

    def step():
        metrics = distill_step(student, teacher, optimizer, problems(N), our_reward, Endless(), cfg)
        found = metrics.means()
        assert found["accepted"] == 1 and found["length"] == NEW, "all rows must be whole, and accepted"

    turns.take(step)


# The peer's side


def llama(config: GPTConfig, attention: str = "sdpa"):
    """A Llama of transformers with the shape of our model."""
    from transformers import LlamaConfig, LlamaForCausalLM
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=config.vocab_size, max_position_embeddings=config.block_size, num_hidden_layers=config.n_layer,
        num_attention_heads=config.n_head, hidden_size=config.n_embd,
        num_key_value_heads=getattr(config, "n_kv_head", config.n_head),
        intermediate_size=config.n_hidden, rms_norm_eps=1e-5, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=None, attn_implementation=attention))
    with torch.device("meta"):  # our model without its memory, which would count in the peak of the process
        ours = make_model(dataclasses.asdict(config))
    assert sum(p.numel() for p in model.parameters()) == ours.n_params(), "both models must have the same size"
    return model


def peer_sampling(option: dict, turns: Turns, shape: GPTConfig, rows: int, new: int) -> None:
    from transformers import CompileConfig
    model = llama(dataclasses.replace(shape, block_size=PROMPT + new)).eval()
    model.to(option["device"], getattr(torch, option["dtype"]))
    compiling = CompileConfig(mode="default")
    compiling._compile_all_devices = True  # without this, generate does not compile on a CPU
    cache = {"growing cache": {}, "static cache": dict(cache_implementation="static", disable_compile=True),
             "static cache, compiled": dict(cache_implementation="static", compile_config=compiling)}[option["cache"]]

    def step():
        idx = torch.tensor(prompt_ids(rows // 8), device=option["device"])  # (P, PROMPT)
        out = model.generate(idx, attention_mask=torch.ones_like(idx), max_new_tokens=new, do_sample=True,
                             temperature=1.0, top_k=0, top_p=1.0, num_return_sequences=8, **cache)
        assert len(out.tolist()) == rows and out.size(1) == PROMPT + new, "every row must run to its end"

    turns.take(step)


def peer_pretraining(option: dict, turns: Turns) -> None:
    model = llama(TEACHER, option["attention"]).to(option["device"])
    if option["compile"] == "compiled":
        model.compile()
    matrices = [p for p in model.model.layers.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if all(p is not m for m in matrices)]
    optimizers = (torch.optim.Muon(matrices, lr=CFG.base_muon_lr, weight_decay=0.0),
                  torch.optim.AdamW(others, lr=CFG.base_adam_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True))
    idx = torch.randint(VOCAB, (B, T + 1), device=option["device"])

    def step():
        with torch.autocast(option["device"], torch.bfloat16, enabled=option["dtype"] == "bfloat16"):
            logits = model(input_ids=idx[:, :-1], use_cache=False).logits
        F.cross_entropy(logits.float().flatten(0, 1), idx[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    turns.take(step)


def spell(ids: list[int]) -> str:
    """Token ids as a text for `peer_tokenizer`: one character for each token."""
    return "".join(chr(256 + i) for i in ids)


def peer_tokenizer():
    """A tokenizer with one character for each token. Its stop token has the id VOCAB, which the model cannot sample."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    words = Tokenizer(models.WordLevel({spell([i]): i for i in range(VOCAB)} | {"<eos>": VOCAB}, unk_token="<eos>"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<eos>")


def trainer_settings(option: dict, folder: str, lr: float) -> dict:
    """The settings of both trainers of TRL: one update per step, without logs and checkpoints."""
    return dict(output_dir=folder, bf16=option["dtype"] == "bfloat16", use_cpu=option["device"] == "cpu",
                per_device_train_batch_size=option["rows"], gradient_accumulation_steps=N // option["rows"],
                gradient_checkpointing=False, learning_rate=lr, lr_scheduler_type="constant", max_steps=1_000_000,
                max_grad_norm=1.0, temperature=1.0, logging_strategy="no", save_strategy="no", report_to="none",
                disable_tqdm=True, dataloader_pin_memory=False)


def peer_grpo(option: dict, turns: Turns) -> None:
    from datasets import Dataset
    from transformers import LlamaForCausalLM
    from trl import GRPOConfig, GRPOTrainer

    def reward(completions: list[str], completion_ids: list[list[int]], **_) -> list[float]:
        rewards = [odd_characters(text) for text in completions]
        assert len(rewards) == N and {len(ids) for ids in completion_ids} == {NEW}, "every row must run to its end"
        assert all(len(set(rewards[i:i + G])) > 1 for i in range(0, N, G)), "every group needs a signal"
        return rewards

    with tempfile.TemporaryDirectory() as folder:
        llama(TEACHER).save_pretrained(folder)  # the trainer loads the reference from the folder of the policy
        policy = LlamaForCausalLM.from_pretrained(folder, attn_implementation=option["attention"])
        # "dapo" averages over tokens, as we do. Without the bias correction the KL penalty is k3, as on our side.
        args = GRPOConfig(**trainer_settings(option, folder, CFG.rl_lr), num_generations=G, max_completion_length=NEW,
                          top_k=0, top_p=1.0, beta=KL, epsilon=CFG.clip_low, loss_type="dapo",
                          use_bias_correction_kl=False)
        assert args.steps_per_generation == args.gradient_accumulation_steps, "a rollout must serve one update, as ours"
        data = Dataset.from_dict({"prompt": [spell(ids) for ids in prompt_ids(P)] * 64})
        turns.train(GRPOTrainer(policy, reward, args, data, processing_class=peer_tokenizer()))


def peer_distillation(option: dict, turns: Turns) -> None:
    from datasets import Dataset
    from trl.experimental.gkd import GKDConfig, GKDTrainer
    student, teacher = llama(STUDENT, option["attention"]), llama(TEACHER, option["attention"])
    rows = [ids + [0] * NEW for ids in prompt_ids(N)]  # the trainer replaces these completions by the teacher's
    data = Dataset.from_dict({"prompt": [spell(ids) for ids in prompt_ids(N)] * 32, "input_ids": rows * 32,
                              "completion_mask": [[0] * PROMPT + [1] * NEW] * N * 32})
    with tempfile.TemporaryDirectory() as folder:
        args = GKDConfig(**trainer_settings(option, folder, CFG.distill_adam_lr), lmbda=0.0, seq_kd=True, beta=0.0,
                         max_new_tokens=NEW)
        turns.train(GKDTrainer(student, teacher, args, train_dataset=data, processing_class=peer_tokenizer()))


# The cases


@dataclass
class Case:
    group: str                # a name for --only
    ours: Callable[[dict, Turns], None]
    peer: Callable[[dict, Turns], None]
    peer_options: list[dict]  # settings that the peer tries
    tokens: int = 0           # per step, if the table shows tokens/s instead of seconds
    steps: int = 1            # per turn, so that a turn is long enough to be timed


ATTENTION = [dict(attention="sdpa"), dict(attention="eager")]


def sampling_case(rows: int, new: int, caches: tuple[str, ...] = ("growing cache", "static cache"),
                  shape: GPTConfig = TEACHER) -> Case:
    size, tokens = dict(shape=shape, rows=rows, new=new), rows * new
    group, steps = ("sampling", max(1, 8_192 // tokens)) if shape == TEACHER else ("real", 1)
    return Case(group, partial(our_sampling, **size), partial(peer_sampling, **size),
                [dict(cache=cache) for cache in caches], tokens, steps)


def pretraining_case(compile: str) -> Case:
    options = [option | dict(compile=compile) for option in ATTENTION]
    return Case("pretrain", our_pretraining, peer_pretraining, options, B * T, 8)


TRAINER = [option | dict(rows=N) for option in ATTENTION] + [dict(attention="eager", rows=N // 4)]
SIZES = [(16, 48), (64, 48), (512, 48), (1024, 48), (64, 256)]
CASES = {f"sampling, {rows} x {new}": sampling_case(rows, new) for rows, new in SIZES} | {
    f"sampling, {rows} x {new}, peer compiled": sampling_case(rows, new, ("static cache, compiled",))
    for rows, new in ((512, 48), (64, 256))} | {
    f"sampling by SmolLM2-135M, {rows} x {new}": sampling_case(rows, new, shape=SMOLLM2)
    for rows, new in ((16, 48), (64, 48))} | {
    f"pretraining, {B} x {T}": pretraining_case("not compiled"),
    f"pretraining, {B} x {T}, peer compiled": pretraining_case("compiled"),
    f"GRPO iteration, {P} x {G} x {NEW}": Case("grpo", our_grpo, peer_grpo, TRAINER),
    f"distillation, {N} x {NEW}": Case("distill", our_distillation, peer_distillation, TRAINER),
}


# Processes


def serve(pipe, side: str, name: str, options: list[dict]) -> None:
    """The work of a process: run one side of a case with one option after another. For each option it sends the seconds
    per step in every turn, and the peak memory in MiB at the end. It sends None if the option fails."""
    sys.stdout = open(os.devnull, "w")
    if side == "ours":
        tune_libraries()
    else:
        from transformers.utils import logging as transformers_logging
        transformers_logging.disable_progress_bar()
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
    for option in options:
        try:
            getattr(CASES[name], side)(option, Turns(pipe, option["device"]))
            kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**10 if sys.platform == "darwin" else 1)
            pipe.send(torch.cuda.max_memory_allocated() / 2**20 if option["device"] == "cuda" else kib / 2**10)
        except (EOFError, BrokenPipeError):  # the parent has ended
            return
        except Exception:
            traceback.print_exc()
            pipe.send(None)


def launch(checkout: Path, side: str, name: str, options: list[dict]):
    """Start a process in which a checkout's bench.py serves one side of a case -> our end of the pipe to it."""
    pipe, end = multiprocessing.Pipe()
    code = (f"import sys; sys.path[:0] = {[str(checkout / 'experiments'), str(checkout)]}; import bench; "
            "from multiprocessing.connection import Connection; "
            f"bench.serve(Connection({end.fileno()}), {side!r}, {name!r}, {options!r})")
    subprocess.Popen([sys.executable, "-c", code], pass_fds=[end.fileno()])
    end.close()  # so that recv() raises EOFError if the process dies
    return pipe


def ask(pipe, steps: int) -> float | None:
    """Let a process take this many steps -> the seconds per step. With 0 steps, end its option -> its peak memory in
    MiB. Both are None if the option failed."""
    pipe.send(steps)
    return pipe.recv()


def quickest(name: str, dtype: str, device: str) -> dict:
    """Try the peer's options for a case -> the fastest option. Raises UsageError if none works."""
    options = [dict(device=device, dtype=dtype) | option for option in CASES[name].peer_options]
    pipe, tried = launch(ROOT, "peer", name, options), []
    for option in options:
        seconds = pipe.recv() and ask(pipe, CASES[name].steps)  # recv waits for the first turn, which warms up
        if seconds and ask(pipe, 0):
            tried.append((seconds, option))
    if not tried:
        raise UsageError(f"{name}: the peer failed: the error is above")
    return min(tried, key=lambda pair: pair[0])[1]


def measure(name: str, sides: list[tuple[Path, str]], options: list[dict], reps: int) -> None:
    """Run both sides of a case in turn, `reps` times, and print the row of the case. A side is a checkout and "ours" or
    "peer": which functions of the checkout's bench.py to run."""
    case = CASES[name]
    pipes = [launch(checkout, side, name, [option]) for (checkout, side), option in zip(sides, options)]
    if None in [pipe.recv() for pipe in pipes]:
        raise UsageError(f"{name} failed: the error is above")
    pairs = [[ask(pipe, case.steps) for pipe in pipes] for _ in range(reps)]
    peaks = [f"{ask(pipe, 0):,.0f}" for pipe in pipes]
    ratios, seconds = [peer / ours for ours, peer in pairs], [median(side) for side in zip(*pairs)]
    speeds = [f"{case.tokens / s:,.0f} tokens/s" if case.tokens else f"{s:.3f} s" for s in seconds]
    settings = [f"{value} rows" if key == "rows" else value for key, value in options[1].items()
                if key not in ("device", "dtype")]
    print(f"| {name} | {speeds[0]} | {speeds[1]} | {median(ratios):.2f} ({min(ratios):.2f}..{max(ratios):.2f}) | "
          f"{', '.join(settings)} | {' / '.join(peaks)} MiB |", flush=True)


# The command line


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse the flags. Raises UsageError for an unknown flag, a bad value, or a missing folder or package."""
    parser = Parser(prog="bench.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                    allow_abbrev=False)
    parser.add_argument("--reps", type=number(int, None, None), default=5, help="turns of each side")
    parser.add_argument("--only", choices=(*dict.fromkeys(case.group for case in CASES.values()), *CASES), default="",
                        help="a group of cases, or one case")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--beside", metavar="PATH", type=Path, help="another checkout of nanoR1 as the peer")
    flags = parser.parse_args(argv)
    flags.dtype = flags.dtype or ("bfloat16" if has_bfloat16(flags.device) else "float32")
    if flags.beside and not (flags.beside / "experiments" / "bench.py").exists():
        raise UsageError(f"--beside={flags.beside} is no checkout of nanoR1")
    for package in () if flags.beside else ("transformers", "trl", "datasets", "accelerate"):
        if not importlib.util.find_spec(package):
            raise UsageError(f"{package} is missing: pip install -r experiments/requirements.txt")
    return flags


def compare(reps: int, only: str, dtype: str, device: str, beside: Path | None) -> None:
    """Measure the chosen cases and print their rows."""
    chosen = [name for name, case in CASES.items()
              if only in ("", case.group, name) and not (beside and "peer" in name)]
    sides = [(ROOT, "ours"), (beside.resolve(), "ours") if beside else (ROOT, "peer")]
    columns = ("case", "ours", "peer", "ratio of speeds (min..max)", "the peer's settings", "peak memory, ours / peer")
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|", flush=True)
    for name in chosen:
        ours = dict(device=device, dtype=dtype, compile="compiled")  # "compile" is for an older bench.py
        measure(name, sides, [ours, ours if beside else quickest(name, dtype, device)], reps)


def machine(device: str) -> str:
    """The name of the GPU or of the processor, if the system tells it."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def main(argv: list[str]) -> int:
    """Run the command line -> exit code."""
    try:
        flags = vars(parse(argv))
        with tempfile.TemporaryDirectory() as folder:
            os.environ.update(HF_HOME=folder, HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error",
                              TRL_EXPERIMENTAL_SILENCE="1")
            compare(**flags)
    except (UsageError, EOFError) as error:
        print(f"bench.py: {error if str(error) else 'a process died'}", file=sys.stderr)
        return 2
    packages = ("torch", "numpy") + (() if flags["beside"] else ("transformers", "trl"))
    versions = [f"{name} {importlib.metadata.version(name)}" for name in packages]
    given = [f"--{key}={value}" for key, value in flags.items() if value]
    print(f"\n{', '.join(versions)}; {machine(flags['device'])}, {torch.get_num_threads()} threads\n"
          + shlex.join(["python", "experiments/bench.py", *given]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
