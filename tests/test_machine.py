"""What a run computes on: the device, the dtype, the compiler; and a run that moves to another machine."""
import json
import re
from pathlib import Path

import pytest
import torch

import engine.machine
from engine.machine import has_bfloat16, machine, settle
from tests.conftest import NAMES, QUICK, copy, main, results
from train import Config

ALL = [f"{name}.pt" for name in NAMES] + ["log.jsonl", "results.json"]


def test_a_run_moves_to_another_dtype(quick, tmp_path):
    """A base.pt that was copied to another --out must not be refused because a setting of the machine differs."""
    copy(quick, tmp_path, "base.pt")
    few = [*QUICK, "--stage=zero", "--rl_steps=1", "--rl_prompts=2", "--eval_problems=2"]
    assert main([*few, "--dtype=bfloat16", "--micro_batch=500", "--save_every=9", f"--out={tmp_path}"]) == 0
    assert torch.load(tmp_path / "zero.pt", weights_only=True)["config"]["dtype"] == "bfloat16"
    assert results(tmp_path)["config"]["dtype"] == "bfloat16" and (tmp_path / "zero.pt").exists()


def test_a_gpus_run_goes_on_without_a_gpu(quick, tmp_path, monkeypatch, refused):
    """A finished run from a GPU that is copied to a laptop must not be refused, and its evaluation must not end in a
    traceback."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    copy(quick, tmp_path, *ALL)
    for name in NAMES:
        content = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        content["config"]["device"] = "cuda"
        torch.save(content, tmp_path / f"{name}.pt")
    found = results(tmp_path)
    found["config"]["device"] = "cuda"
    expected = found["models"].pop("student")
    (tmp_path / "results.json").write_text(json.dumps(found))
    settings = [arg for arg in QUICK if arg != "--device=cpu"]
    assert main([*settings, f"--out={tmp_path}"]) == 0
    assert results(tmp_path)["config"]["device"] == "cpu" and results(tmp_path)["models"]["student"] == expected
    assert main(["--ask=8*7-19", f"--out={tmp_path}"]) == 0
    assert "no such GPU" in refused(*settings, "--device=cuda", f"--out={tmp_path}")


@pytest.mark.parametrize("stored, native, expected", [
    ({}, True, "bfloat16"), ({}, False, "float32"),
    ({"device": "cpu", "dtype": "float32"}, True, "float32"),
    ({"device": "cpu", "dtype": "bfloat16"}, False, "bfloat16"),
    ({"device": "cuda", "dtype": "bfloat16"}, False, "float32"),
])
def test_auto_dtype_is_a_rule(monkeypatch, stored, native, expected):
    """--dtype=auto must not choose bfloat16 where the machine only emulates it. A run must not change its dtype
    half-way, or keep the dtype of a device that this machine does not have."""
    monkeypatch.setattr(engine.machine, "has_bfloat16", lambda device: native)
    monkeypatch.setattr(engine.machine, "has", lambda device: device == "cpu")
    found = settle(Config(compile="off"), stored)
    assert (found.device, found.dtype) == ("cpu", expected) and found.threads == torch.get_num_threads()
    assert settle(Config(compile="off", dtype="float32", threads=7), stored | {"dtype": "bfloat16"}).dtype == "float32"
    assert settle(Config(compile="off", dtype="float32", threads=7), stored).threads == 7


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="the flags of the CPU are read where Linux lists them")
def test_bfloat16_of_the_cpu_is_what_its_flags_say():
    """A CPU with bf16 units must not compute in float32, and one without them must not emulate bfloat16."""
    flags = set(re.findall(r"[a-z0-9_]+", Path("/proc/cpuinfo").read_text()))
    assert has_bfloat16("cpu") == bool({"avx512_bf16", "amx_bf16"} & flags)


def test_micro_batches_suit_the_model_and_the_machine(monkeypatch):
    """With other sizes, a pretrained model could need more memory than the machine has, or torch.compile would generate
    other code. A micro_batch that the user sets must be kept."""
    monkeypatch.setattr(engine.machine, "has", lambda device: True)
    fixed = dict(dtype="float32", compile="off", threads=1)
    found = [settle(Config(device=device, init=init, **fixed), {}).micro_batch
             for device in ("cpu", "cuda") for init in ("", "folder")]
    assert found == [4_096, 512, 65_536, 16_384]
    assert settle(Config(device="cpu", micro_batch=100, **fixed), {}).micro_batch == 100


def test_compiling_is_settled_by_trying(capsys):
    """On a laptop without a C++ compiler, the run must not print a traceback of a hundred lines in the middle."""
    cfg = Config(device="cpu", dtype="float32", threads=1)
    with torch.compiler.set_stance("default"), torch._inductor.config.patch("cpp.cxx", ("no-such-compiler",)):
        assert settle(cfg, {}).compile == "off"
    printed = capsys.readouterr().out
    assert printed.count("\n") == 2 and printed.startswith("testing whether torch.compile works\n")
    assert "does not use it" in printed


def test_settling_does_not_change_what_was_asked_for():
    """settle must not change the settings object of its caller."""
    cfg = Config(device="cpu", dtype="float32", compile="off")
    found = settle(cfg, {})
    assert cfg == Config(device="cpu", dtype="float32", compile="off") and found.threads == torch.get_num_threads()
    assert machine(found) == f"cpu, float32, 1 x {found.threads} threads"
