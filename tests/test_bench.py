"""The benchmark's own command line and arithmetic; what it measures needs the peers, and a quiet machine."""
import importlib.util

import pytest

import bench
from model import GPT, GPTConfig


@pytest.mark.parametrize("arg, words", [
    ("--rep=3", "unknown argument"), ("--reps", "unknown argument"), ("--reps=0", "above 0"), ("--reps=x", "above 0"),
    ("--only=rl", "sampling, pretrain, grpo, distill"), ("--dtype=int8", "float32"), ("--device=tpu", "cuda")])
def test_bad_input(capsys, arg, words):
    """Ten minutes of measuring something else than was asked for."""
    assert bench.main([arg]) == 2
    printed = capsys.readouterr()
    assert words in printed.err and printed.err.count("\n") == 1 and not printed.out


def test_missing_peers_are_named(capsys, monkeypatch):
    """A traceback where a line would tell what to install."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert bench.main([]) == 2
    assert "pip install -r experiments/requirements.txt" in capsys.readouterr().err


def test_flops_are_those_of_the_products():
    """A forgotten factor of 2, or of attention: the share of the roof is then of another roof."""
    config = GPTConfig(11, n_layer=2, n_head=2, n_embd=32)
    C, H, V = 32, config.n_hidden, 11
    products = config.n_layer * (4 * C * C + 3 * C * H) + C * V  # multiplications of a token
    attention = config.n_layer * 2 * 7 * C                       # q k' and the sum over v, with 7 tokens in sight
    gains = (2 * config.n_layer + 1) * C                         # of the norms, a product each too
    assert GPT(config).n_params() == products + gains
    assert bench.forward_flops(config, 5, 7) == 5 * 2 * (products + gains + attention)
