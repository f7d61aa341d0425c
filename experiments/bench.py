"""Speed and memory, compared with those of peers: transformers (sampling, pretraining) and TRL (GRPO, distillation).

    pip install -r experiments/requirements.txt
    python experiments/bench.py                           everything; a row is printed as soon as it is known
    python experiments/bench.py --only=grpo --reps=3      sampling, real, pretrain, grpo or distill alone
    python experiments/bench.py --dtype=float32           no bfloat16; by default each side takes the quicker type
    python experiments/bench.py --device=cpu              cpu or cuda; by default a GPU if there is one
    python experiments/bench.py --beside=../old           the peer is another checkout of nanoR1; needs no installation

Both sides start from random weights of one shape: the peer's model is a LlamaForCausalLM with exactly as many
parameters as ours. Completions never end early, so that both sides make the same number of tokens. Nothing is
downloaded, and nothing is written outside a temporary folder. What is compared:

    sampling   R rows x T new tokens after a prompt of 12, from the whole distribution at temperature 1, with a KV
               cache: generate(samples=8) and transformers' generate(num_return_sequences=8)
    real       the same by a model of SmolLM2-135M's shape
    pretrain   an update on 32 x 128 tokens: Muon for the layers' matrices, AdamW for the rest, gradients clipped
    grpo       32 prompts x 16 samples x 48 tokens, a reward, group advantages, the token-level loss with a KL penalty
               (k3), one AdamW update: grpo_step and a step of GRPOTrainer.train()
    distill    512 completions of 48 tokens sampled from the teacher, forward KL, one AdamW update: distill_step and a
               step of GKDTrainer.train() with seq_kd (lmbda 0, beta 0). "Update alone" is given the completions, which
               our side still decodes and scores

How it is measured
1. Each side of each case is a process of its own, so that neither shares the other's memory, allocator or caches. The
   two take turns, ours, peer, ours, peer, one step each (several where a step is short), while the other sleeps. The
   ratio of speeds is taken pair by pair: what slows the machine for a while slows both of a pair.
2. Before that, each side tries its settings and keeps the quickest. Both try float32 and bfloat16. We try with and
   without torch.compile (the seconds of compiling are not in the table). The peer tries kinds of cache (sampling), and
   of attention and micro-batch (training; in sampling "sdpa" is always the quicker). In training both keep float32
   weights; in sampling the peer has bfloat16 weights, as is usual there. The compiled peer has rows of its own, in
   pretraining and at two sizes of sampling: by default generate compiles on GPUs only. TRL's trainers, whose model also
   generates, are not compiled. Another checkout (--beside) runs its side by its own experiments/bench.py, with the
   settings that are the quickest for us.
3. Our processes set up torch's libraries as train.py does. The peers' processes leave them as they are.
4. A trainer's step lasts from the end of the step before to its own end, so that its loading, callbacks and metrics
   count, as the metrics of grpo_step do.
5. Peak memory is that of the whole process, with the libraries that it imported; on a GPU, what torch allocated there.
6. The roof is the speed that this machine reaches in the layers' own matrix products, [rows, C] x [C, C] and so on,
   with as many rows as our pass has. MFU (model FLOPs utilization) is the share of the roof that our step reaches, by
   the FLOPs of `forward_flops`.
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
from engine.machine import tune_libraries
from engine.optimizer import Optimizer
from engine.speed.fast import frozen, make_fast
from engine.terminal import UsageError
from grpo import grpo_step
from model import GPT, GPTConfig
from train import Config, next_token_loss

CFG, ENCODING = Config(micro_batch=65_536 if torch.cuda.is_available() else 4_096), get_tokenizer()
VOCAB = ENCODING.n_vocab
TEACHER = GPTConfig(VOCAB, CFG.block_size, CFG.n_layer, CFG.n_head, CFG.n_embd)
STUDENT = GPTConfig(VOCAB, CFG.block_size, CFG.student_n_layer, CFG.student_n_head, CFG.student_n_embd)
SMOLLM2 = GPTConfig(49_152, 1024, 30, 9, 576, n_hidden=1536, n_kv_head=3, rope_theta=100_000.0)
B, T = 32, 128            # the pretraining batch
PROMPT = 12               # tokens of every prompt; with one length for all, neither side pads
P, G, NEW = 32, 16, 48    # a GRPO iteration: prompts, samples of each, new tokens
N = P * G                 # its completions, and those of a distillation step
KL = 0.01


# What both sides are given


def prompt_texts(n: int) -> list[str]:
    return [f"User: {i % 100:02}*{i % 9 + 1}-19+33\nAssistant: " for i in range(n)]


def prompt_ids(n: int) -> list[list[int]]:
    """These texts as token ids, n lists of PROMPT."""
    return [ENCODING.encode_ordinary(text) for text in prompt_texts(n)]


def given_rows() -> list[list[int]]:
    """Prompts and completions, N lists of PROMPT + NEW token ids."""
    completions = torch.randint(VOCAB, (N, NEW), generator=torch.Generator().manual_seed(0))
    return [prompt + completion for prompt, completion in zip(prompt_ids(N), completions.tolist())]


def odd_characters(text: str) -> float:
    """The reward. About half of all characters count, so that the answers to one prompt differ in their reward."""
    return float(sum(ord(character) % 2 for character in text))


class Turns:
    """What a process does in its turn: it takes steps, sends the seconds of a step, and waits for its next turn."""

    def __init__(self, pipe, device: str):
        self.pipe, self.device, self.start = pipe, device, time.perf_counter()
        self.steps = self.left = 3  # the first turn warms up: CUDA graphs are recorded in the second step

    def next(self) -> bool:
        """Call after a step -> whether to take another."""
        self.left -= 1
        if not self.left:
            if self.device == "cuda":
                torch.cuda.synchronize()
            self.pipe.send((time.perf_counter() - self.start) / self.steps)
            self.steps = self.left = self.pipe.recv()
            self.start = time.perf_counter()
        return self.left > 0

    def take(self, step: Callable[[], None]) -> None:
        """Take as many steps as are wanted."""
        step()
        while self.next():
            step()

    def train(self, trainer) -> None:
        """The same, with the steps of a trainer's own loop."""
        from transformers import TrainerCallback
        turns = self

        class Wait(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                control.should_training_stop = not turns.next()

        trainer.add_callback(Wait())
        trainer.train()


# Our side of each case


class Endless(Arithmetic):
    stop_ids = (-1,)  # no token has this id, so that no completion ends early


def problems(n: int) -> list:
    return [SimpleNamespace(prompt=text) for text in prompt_texts(n)]


def our_reward(completion: str, problem) -> dict[str, float]:
    return {"reward": odd_characters(completion), "accuracy": 1.0}  # distill_step keeps every completion


def settings(option: dict, **changes) -> Config:
    """The settings of a run on the option's device, compiled if the option says so."""
    compile = "on" if option["compile"] == "compiled" else "off"
    return dataclasses.replace(CFG, device=option["device"], compile=compile, **changes)


def quick_model(shape: GPTConfig, option: dict, cfg: Config, **passes: bool) -> GPT:
    """Our model with random weights, made quick as a run does it."""
    model = GPT(shape, getattr(torch, option["dtype"])).to(option["device"])
    return make_fast(model, cfg, **passes)


def our_sampling(option: dict, turns: Turns, shape: GPTConfig, rows: int, new: int) -> None:
    shape = dataclasses.replace(shape, block_size=PROMPT + new)
    model = quick_model(shape, option, settings(option), sampling=True)

    def step():
        completions, _ = model.generate(prompt_ids(rows // 8), new, stop_ids=Endless.stop_ids, samples=8)
        assert len(completions) == rows and {len(c) for c in completions} == {new}, "every row must run to its end"

    turns.take(step)


def our_pretraining(option: dict, turns: Turns) -> None:
    model = quick_model(TEACHER, option, settings(option), training=True)
    optimizer = Optimizer(model, CFG.base_adam_lr, CFG.base_muon_lr)
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
        assert found["no_signal"] == 0 and found["length"] == NEW, "every row must be whole, and teach something"

    turns.take(step)


def our_distillation(option: dict, turns: Turns, sampling: bool) -> None:
    cfg = settings(option, rl_max_new_tokens=NEW, distill_minibatches=1, distill_epochs=1, distill_temperature=1.0)
    student = quick_model(STUDENT, option, cfg, training=True)
    teacher = quick_model(TEACHER, option, cfg, training=True, sampling=sampling)
    optimizer = Optimizer(student, cfg.distill_adam_lr)
    if not sampling:
        completions, logp = [row[PROMPT:] for row in given_rows()], [[0.0] * NEW] * N
        teacher.generate = lambda *_, **__: (completions, logp)

    def step():
        metrics = distill_step(student, teacher, optimizer, problems(N), our_reward, Endless(), cfg)
        found = metrics.means()
        assert found["accepted"] == 1 and found["length"] == NEW, "every row must be whole, and kept"

    turns.take(step)


# The peer's side


def llama(config: GPTConfig, attention: str = "sdpa"):
    """transformers' Llama, with the shape of a model of ours."""
    from transformers import LlamaConfig, LlamaForCausalLM
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=config.vocab_size, max_position_embeddings=config.block_size, num_hidden_layers=config.n_layer,
        num_attention_heads=config.n_head, num_key_value_heads=config.n_kv_head, hidden_size=config.n_embd,
        intermediate_size=config.n_hidden, rms_norm_eps=1e-5, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=None, attn_implementation=attention))
    assert sum(p.numel() for p in model.parameters()) == n_params(config), "both sides must have one size"
    return model


def peer_sampling(option: dict, turns: Turns, shape: GPTConfig, rows: int, new: int) -> None:
    from transformers import CompileConfig
    model = llama(dataclasses.replace(shape, block_size=PROMPT + new)).eval()
    model.to(option["device"], getattr(torch, option["dtype"]))
    compiling = CompileConfig(mode="default")
    compiling._compile_all_devices = True  # on a CPU generate would not compile
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
    """Token ids in the alphabet of `peer_tokenizer`."""
    return "".join(chr(256 + i) for i in ids)


def peer_tokenizer():
    """A tokenizer with one character for each token. Its stop token is the first id that the model cannot sample."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    words = Tokenizer(models.WordLevel({spell([i]): i for i in range(VOCAB)} | {"<eos>": VOCAB}, unk_token="<eos>"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<eos>")


def trainer_settings(option: dict, folder: str, lr: float) -> dict:
    """The settings of TRL's two trainers: one update a step, and nothing but training."""
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
        assert all(len(set(rewards[i:i + G])) > 1 for i in range(0, N, G)), "every group must teach something"
        return rewards

    with tempfile.TemporaryDirectory() as folder:
        llama(TEACHER).save_pretrained(folder)  # the trainer loads the reference from where the policy came from
        policy = LlamaForCausalLM.from_pretrained(folder, attn_implementation=option["attention"])
        # "dapo" averages over tokens, as we do. Without the bias correction the KL penalty is k3, as ours.
        args = GRPOConfig(**trainer_settings(option, folder, CFG.rl_lr), num_generations=G, max_completion_length=NEW,
                          top_k=0, top_p=1.0, beta=KL, epsilon=CFG.clip_low, loss_type="dapo",
                          use_bias_correction_kl=False)
        assert args.steps_per_generation == args.gradient_accumulation_steps, "a rollout must serve one update, as ours"
        data = Dataset.from_dict({"prompt": [spell(ids) for ids in prompt_ids(P)] * 64})
        turns.train(GRPOTrainer(policy, reward, args, data, processing_class=peer_tokenizer()))


def peer_distillation(option: dict, turns: Turns, sampling: bool) -> None:
    from datasets import Dataset
    from trl.experimental.gkd import GKDConfig, GKDTrainer
    student, teacher = llama(STUDENT, option["attention"]), llama(TEACHER, option["attention"])
    data = Dataset.from_dict({"prompt": [spell(ids) for ids in prompt_ids(N)] * 32, "input_ids": given_rows() * 32,
                              "completion_mask": [[0] * PROMPT + [1] * NEW] * N * 32})
    with tempfile.TemporaryDirectory() as folder:
        args = GKDConfig(**trainer_settings(option, folder, CFG.distill_adam_lr), lmbda=0.0, seq_kd=sampling, beta=0.0,
                         max_new_tokens=NEW)
        turns.train(GKDTrainer(student, teacher, args, train_dataset=data, processing_class=peer_tokenizer()))


# The cases


@dataclass
class Case:
    group: str                                # what --only names
    ours: Callable[[dict, Turns], None]
    peer: Callable[[dict, Turns], None]
    our_options: list[dict]                   # what each side tries, each in all types of numbers
    peer_options: list[dict]
    work: list[tuple[GPTConfig, int, float]]  # shape, rows of its products, FLOPs of a step
    tokens: int = 0                           # of a step, where the table shows tokens/s and not seconds
    steps: int = 1                            # in a turn, so that a turn lasts long enough to be timed


def n_params(config: GPTConfig) -> int:
    """GPT(config).n_params(), without a model, whose memory would count in the peak of each process."""
    C, D = config.n_embd, config.head_size
    attention = 2 * C * (config.n_head + config.n_kv_head) * D
    layer = attention + 3 * C * config.n_hidden + 2 * C  # the last are the gains of two norms
    return config.vocab_size * C + config.n_layer * layer + C


def forward_flops(config: GPTConfig, tokens: int, context: float) -> float:
    """The FLOPs of a forward pass: 2 for each parameter and token (the embedding is also the output matrix), and 2 for
    each multiplication of the two attention products, whose tokens see `context` others on average. A training pass
    takes three times as many."""
    return tokens * (2 * n_params(config) + 4 * config.n_layer * config.n_head * config.head_size * context)


ATTENTION = [dict(attention="sdpa"), dict(attention="eager")]
COMPILE = [dict(compile="not compiled"), dict(compile="compiled")]


def sampling_case(rows: int, new: int, caches: tuple[str, ...] = ("growing cache", "static cache"),
                  shape: GPTConfig = TEACHER) -> Case:
    size, tokens = dict(shape=shape, rows=rows, new=new), rows * new
    # on a CPU a deep model's sampling is never compiled: see DEEP in engine/speed/fast.py
    group, options, steps = (("sampling", COMPILE, max(1, 8_192 // tokens)) if shape == TEACHER
                             else ("real", COMPILE[:1], 1))
    return Case(group, partial(our_sampling, **size), partial(peer_sampling, **size), options,
                [dict(cache=cache) for cache in caches],
                [(shape, rows, forward_flops(shape, tokens, PROMPT + new / 2))], tokens, steps)


def pretraining_case(compile: dict) -> Case:
    return Case("pretrain", our_pretraining, peer_pretraining, COMPILE, [option | compile for option in ATTENTION],
                [(TEACHER, B * T, 3 * forward_flops(TEACHER, B * T, T / 2))], B * T, 8)


def passes(config: GPTConfig, n: int) -> tuple[GPTConfig, int, float]:
    """The work of n forward passes over all rows of a GRPO or distillation step."""
    return config, CFG.micro_batch, n * forward_flops(config, N * (PROMPT + NEW), (PROMPT + NEW) / 2)


TRAINER = [option | dict(rows=N) for option in ATTENTION] + [dict(attention="eager", rows=N // 4)]
SIZES = [(16, 48), (64, 48), (256, 48), (512, 48), (1024, 48), (64, 32), (64, 64), (64, 128), (64, 256), (64, 512)]
SAMPLED, DISTILLED = sampling_case(N, NEW).work, [passes(STUDENT, 3), passes(TEACHER, 1)]
CASES = {f"sampling, {rows} x {new}": sampling_case(rows, new) for rows, new in SIZES} | {
    f"sampling, {rows} x {new}, peer compiled": sampling_case(rows, new, ("static cache, compiled",))
    for rows, new in ((512, 48), (64, 256))} | {
    f"sampling by SmolLM2-135M, {rows} x {new}": sampling_case(rows, new, shape=SMOLLM2)
    for rows, new in ((16, 48), (64, 48))} | {
    f"pretraining, {B} x {T}": pretraining_case(COMPILE[0]),
    f"pretraining, {B} x {T}, peer compiled": pretraining_case(COMPILE[1]),
    # Learning takes 3 passes and the reference 1. With one update none is needed for pi_old.
    f"GRPO iteration, {P} x {G} x {NEW}": Case("grpo", our_grpo, peer_grpo, COMPILE, TRAINER,
                                               SAMPLED + [passes(TEACHER, 4)]),
    f"distillation, {N} x {NEW}": Case("distill", partial(our_distillation, sampling=True),
                                       partial(peer_distillation, sampling=True), COMPILE, TRAINER,
                                       SAMPLED + DISTILLED),
    "distillation, update alone": Case("distill", partial(our_distillation, sampling=False),
                                       partial(peer_distillation, sampling=False), COMPILE, TRAINER, DISTILLED),
}


# Processes


def serve(pipe, side: str, name: str, options: list[dict]) -> None:
    """What a process does: it runs one side of a case with one option after another. For each option it sends the
    seconds of a step at every turn, and the peak memory in MiB at the end. It sends None if the option fails."""
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
    """Start a process in which the bench.py of a checkout serves a side of a case -> our end of its pipe."""
    pipe, end = multiprocessing.Pipe()
    code = (f"import sys; sys.path[:0] = {[str(checkout / 'experiments'), str(checkout)]}; import bench; "
            "from multiprocessing.connection import Connection; "
            f"bench.serve(Connection({end.fileno()}), {side!r}, {name!r}, {options!r})")
    subprocess.Popen([sys.executable, "-c", code], pass_fds=[end.fileno()])
    end.close()  # so that recv() raises EOFError if the process dies
    return pipe


def ask(pipe, steps: int) -> float | None:
    """Ask a process for so many steps -> the seconds of one; or, with 0, to end its option -> its peak memory in MiB.
    None if the option failed."""
    pipe.send(steps)
    return pipe.recv()


def quickest(side: str, name: str, dtypes: list[str], device: str) -> dict:
    """Try a side's options for a case -> the quickest. Raises UsageError if none works."""
    options = [dict(device=device, dtype=dtype) | option for dtype in dtypes
               for option in (CASES[name].peer_options if side == "peer" else CASES[name].our_options)]
    pipe, tried = launch(ROOT, side, name, options), []
    for option in options:
        seconds = pipe.recv() and ask(pipe, CASES[name].steps)  # after a step that warms up
        if seconds and ask(pipe, 0):
            tried.append((seconds, option))
    if not tried:
        raise UsageError(f"{name}: {side} failed: the error is above")
    return min(tried, key=lambda pair: pair[0])[1]


def roof(config: GPTConfig, rows: int, dtype: str, device: str) -> float:
    """The FLOP/s of the matrix products of all layers and of the output on so many rows, the best of a few tries."""
    C, H, D = config.n_embd, config.n_hidden, config.head_size
    sizes = ([(C, C)] * 2 + [(C, config.n_kv_head * D)] * 2 + [(C, H)] * 2 + [(H, C)]) * config.n_layer
    sizes.append((C, config.vocab_size))
    make = partial(torch.randn, dtype=getattr(torch, dtype), device=device)
    products = [(make(rows, k), make(n, k).t(), make(rows, n)) for k, n in sizes]
    best, start = float("inf"), time.perf_counter()
    while time.perf_counter() - start < 0.3:
        before = time.perf_counter()
        for x, weight, out in products:
            torch.mm(x, weight, out=out)
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - before)
    return sum(2 * rows * k * n for k, n in sizes) / best


def measure(name: str, sides: list[tuple[Path, str]], options: list[dict], reps: int, roofs: dict) -> list[float]:
    """Run both sides of a case in turn, `reps` times, and print its row -> the median seconds of each side. A side is a
    checkout, and which functions of its bench.py to run."""
    case = CASES[name]
    pipes = [launch(checkout, side, name, [option]) for (checkout, side), option in zip(sides, options)]
    if None in [pipe.recv() for pipe in pipes]:
        raise UsageError(f"{name} failed: the error is above")
    pairs = [[ask(pipe, case.steps) for pipe in pipes] for _ in range(reps)]
    peaks = [f"{ask(pipe, 0):,.0f}" for pipe in pipes]
    ratios, seconds = [peer / ours for ours, peer in pairs], [median(side) for side in zip(*pairs)]
    speeds = [f"{case.tokens / s:,.0f} tokens/s" if case.tokens else f"{s:.3f} s" for s in seconds]
    ideal = sum(flops / roofs[config.n_embd, rows, options[0]["dtype"]] for config, rows, flops in case.work)
    settings = [", ".join(f"{value} rows" if key == "rows" else value for key, value in option.items()
                          if key != "device") for option in options]
    print(f"| {name} | {speeds[0]} | {speeds[1]} | {median(ratios):.2f} ({min(ratios):.2f}..{max(ratios):.2f}) | "
          f"{' / '.join(settings)} | {ideal / seconds[0]:.0%} | {' / '.join(peaks)} MiB |", flush=True)
    return seconds


# The command line


def parse(argv: list[str]) -> argparse.Namespace:
    """The flags. Raises UsageError for what is unknown, out of range or not there."""
    parser = Parser(prog="bench.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                    allow_abbrev=False)
    parser.add_argument("--reps", type=number(int, None, None), default=5, help="turns of each side")
    parser.add_argument("--only", choices=(*dict.fromkeys(case.group for case in CASES.values()), *CASES), default="",
                        help="a group of cases, or one case")
    parser.add_argument("--dtype", choices=("best", "float32", "bfloat16"), default="best")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--beside", metavar="PATH", type=Path, help="another checkout of nanoR1, instead of the peers")
    flags = parser.parse_args(argv)
    if flags.beside and not (flags.beside / "experiments" / "bench.py").exists():
        raise UsageError(f"--beside={flags.beside} is no checkout of nanoR1")
    for package in () if flags.beside else ("transformers", "trl", "datasets", "accelerate"):
        if not importlib.util.find_spec(package):
            raise UsageError(f"{package} is missing: pip install -r experiments/requirements.txt")
    return flags


def compare(reps: int, only: str, dtype: str, device: str, beside: Path | None) -> None:
    """Measure the chosen cases and print the tables."""
    dtypes = ["float32", "bfloat16"] if dtype == "best" else [dtype]
    chosen = [name for name, case in CASES.items()
              if only in ("", case.group, name) and not (beside and "peer" in name)]
    sides = [(ROOT, "ours"), (beside.resolve(), "ours") if beside else (ROOT, "peer")]
    shapes = {(config.n_embd, rows): config for name in chosen for config, rows, _ in CASES[name].work}
    keys = [(width, rows, dtype) for width, rows in sorted(shapes) for dtype in dtypes]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        rates = pool.starmap(roof, [(shapes[width, rows], rows, dtype, device) for width, rows, dtype in keys])
    roofs, seconds = dict(zip(keys, rates)), {}
    columns = ("case", "ours", "peer", "ratio of speeds (min..max)", "settings, ours / peer", "our MFU",
               "peak memory, ours / peer")
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|", flush=True)
    for name in chosen:
        options = [quickest("ours", name, dtypes, device)]
        options += options if beside else [quickest("peer", name, dtypes, device)]
        seconds[name] = measure(name, sides, options, reps, roofs)
        if name == "sampling, 64 x 512":
            ours, peer = (f"{long / 512 / (short / 64):.2f} times"
                          for long, short in zip(seconds[name], seconds["sampling, 64 x 64"]))
            print(f"| time of a token at length 512, in times of length 64 | {ours} | {peer} | | | | |", flush=True)
    print("\n| the roof, GFLOP/s: width | rows |", " | ".join(dtypes), "|\n|---|---|" + "---|" * len(dtypes))
    for width, rows in sorted(shapes):
        print(f"| {width} | {rows:,} |", " | ".join(f"{roofs[width, rows, d] / 1e9:,.0f}" for d in dtypes), "|")


def machine(device: str) -> str:
    """The processor's name, as far as the system tells."""
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
