"""What a run computes on: the device, the dtype, the compiler; and a run that moves to another machine."""
import json
import re
import sqlite3
from pathlib import Path

import pytest
import torch

import engine.files
import engine.machine
from engine.files import lock
from engine.machine import has_bfloat16, machine, settle, usable_cpus
from engine.parallel import check_shares
from engine.terminal import UsageError
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
    monkeypatch.setattr(engine.machine, "check_kernels", lambda: None)
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


@pytest.mark.parametrize("error", [PermissionError(13, "no"), NotADirectoryError(20, "no"), RuntimeError("no\nmore")])
def test_a_compiler_that_fails_is_done_without(monkeypatch, capsys, error):
    """A cache that cannot be written, or a temporary folder without exec, must not stop the run."""
    def fail(function):
        raise error

    monkeypatch.setattr(torch, "compile", fail)
    assert settle(Config(device="cpu", dtype="float32", threads=1), {}).compile == "off"
    printed = capsys.readouterr().out
    assert printed.count("\n") == 2 and "does not use it" in printed


def test_the_compilers_cache_cannot_be_written(monkeypatch, capsys):
    """The same with torch's own error: its cache lies below a file."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/dev/null/cache")
    torch._dynamo.reset()
    with torch.compiler.set_stance("default"):
        assert settle(Config(device="cpu", dtype="float32", threads=1), {}).compile == "off"
    assert "does not use it" in capsys.readouterr().out


@pytest.mark.parametrize("files, cpus", [
    ({}, 32), ({"cpu.max": "max 100000\n"}, 32), ({"cpu.max": "200000 100000\n"}, 2),
    ({"cpu.max": "150000 100000\n"}, 2),
    ({"cpu.max": "50000 100000\n"}, 1), ({"cpu.max": "6400000 100000\n"}, 32), ({"cpu.max": "?"}, 32),
    ({"cpu/cpu.cfs_quota_us": "200000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 2),
    ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 32)])
def test_the_quota_of_a_container_counts(tmp_path, monkeypatch, files, cpus):
    """In a container with two of 32 cores, 32 threads would take turns on two cores."""
    monkeypatch.setattr(engine.machine.os, "sched_getaffinity", lambda pid: set(range(32)), raising=False)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert usable_cpus(tmp_path) == cpus


def test_the_affinity_counts(tmp_path, monkeypatch):
    """taskset and schedulers give a process a few of the machine's cores."""
    monkeypatch.setattr(engine.machine.os, "sched_getaffinity", lambda pid: {3}, raising=False)
    assert usable_cpus(tmp_path) == 1
    monkeypatch.setattr(torch, "get_num_threads", lambda: 32)
    assert settle(Config(device="cpu", dtype="float32", compile="off"), {}).threads == 1
    assert settle(Config(device="cpu", dtype="float32", compile="off", threads=8), {}).threads == 8


def test_a_gpu_without_kernels_is_one_line(monkeypatch, tmp_path, refused):
    """torch sees an old GPU that its build has no kernels for. A stand-in raises torch's error."""
    zeros = torch.zeros

    def without_kernels(*args, **options):
        if options.get("device") == "cuda":
            raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nCompile with ...")
        return zeros(*args, **options)

    monkeypatch.setattr(engine.machine, "has", lambda device: True)
    monkeypatch.setattr("engine.settings.has", lambda device: True)
    monkeypatch.setattr(torch, "zeros", without_kernels)
    line = refused(*[arg for arg in QUICK if arg != "--device=cpu"], "--device=cuda", f"--out={tmp_path / 'out'}")
    assert "no kernel image is available" in line and "--device=cpu" in line


def test_out_of_memory_is_one_line(monkeypatch, quick, tmp_path, refused):
    """The line says what was done and which setting needs less memory. What was finished is kept."""
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    copy(quick, tmp_path, "base.pt")
    monkeypatch.setattr("train.grpo_step", full)
    line = refused(*QUICK, "--stage=zero", f"--out={tmp_path}")
    assert "zero: the GPU's memory is full" in line and "--micro_batch below 4096" in line
    assert {path.name for path in tmp_path.glob("*.pt")} == {"base.pt"}


@pytest.mark.parametrize("error, other_run", [
    ("database is locked", True), ("disk I/O error", False), ("locking protocol", False),
    ("unable to open database file", False)])
def test_a_file_system_without_locks(tmp_path, monkeypatch, capfd, error, other_run):
    """Another run is refused. A file system that has no locks gets a warning, or nobody could train there."""
    class Holder:
        def execute(self, command):
            raise sqlite3.OperationalError(error)

        def close(self):
            pass

    monkeypatch.setattr(engine.files.sqlite3, "connect", lambda *args, **options: Holder())
    entered = []
    if other_run:
        with pytest.raises(UsageError, match="another run is writing"), lock(tmp_path):
            entered.append(1)
    else:
        with lock(tmp_path):
            entered.append(1)
        assert f"cannot lock {tmp_path} ({error})" in capfd.readouterr().err
    assert bool(entered) != other_run


@pytest.mark.parametrize("n, name, value, nearest", [(3, "rl_prompts", 64, 63), (5, "distill_prompts", 512, 510),
                                                     (7, "rl_prompts", 2, 7)])
def test_what_does_not_divide_is_refused_at_the_start(monkeypatch, n, name, value, nearest):
    """Three processes cannot share 64 prompts. This must not come out after the base was trained."""
    monkeypatch.setattr("engine.parallel.world_size", lambda: n)
    cfg = Config(**{"rl_prompts": n, "distill_prompts": n, name: value})
    with pytest.raises(UsageError, match=f"--{name}={value} cannot be divided evenly among {n} processes: take "
                                         f"--{name}={nearest}$"):
        check_shares(cfg)
    check_shares(Config(rl_prompts=2 * n, distill_prompts=n))
