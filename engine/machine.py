"""The machine of a run: its device, compute dtype and compiler, and options that make torch's libraries faster."""
import ctypes
import dataclasses
import math
import os
import platform
from pathlib import Path

import torch

from engine.parallel import world_size
from engine.terminal import UsageError


def has(device: str) -> bool:
    """Does torch see this device?"""
    return {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}[device]


def has_bfloat16(device: str) -> bool:
    """Does this device multiply bfloat16 itself, instead of converting it to float32 first?"""
    if device == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def check_kernels() -> None:
    """Raises UsageError if this build of torch has no kernels for the GPU, as today's builds for old ones."""
    try:
        torch.zeros(1, device="cuda").add(1).item()
    except RuntimeError as error:
        raise UsageError(f"this torch cannot compute on the GPU ({str(error).splitlines()[0]}): take --device=cpu, or "
                         "a torch that was built for this GPU") from None


def usable_cpus(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """The CPUs that this process may use: by its affinity, and by the quota of its container (cgroup v2 or v1)."""
    n = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for names in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            quota, period = " ".join((cgroup / name).read_text() for name in names).split()
            if quota != "max" and int(quota) > 0:
                n = min(n, math.ceil(int(quota) / int(period)))
        except (OSError, ValueError):
            pass  # no such file, or no such quota
    return max(n, 1)


def settle(cfg, stored: dict):
    """Replace "auto" and 0 in the settings by what suits this machine. A run that began with the settings `stored`
    keeps their device and dtype, if this machine has that device."""
    if not has(stored.get("device", "cpu")):
        stored = {}  # the run began on a machine with another device
    settled = {key: stored[key] for key in ("device", "dtype") if getattr(cfg, key) == "auto" and key in stored}
    cfg = dataclasses.replace(cfg, **settled, threads=cfg.threads or min(torch.get_num_threads(), usable_cpus()))
    if cfg.device == "auto":
        cfg.device = next(device for device in ("cuda", "mps", "cpu") if has(device))
    if cfg.device == "cuda":
        check_kernels()
    if cfg.dtype == "auto":
        cfg.dtype = "bfloat16" if has_bfloat16(cfg.device) else "float32"
    if cfg.compile == "auto":
        works = cfg.device == "cuda" or (cfg.device == "cpu" and can_compile())
        cfg.compile = "on" if works else "off"
    # subtle: for more than 4,096 tokens, torch.compile generates other code.
    small, large = (65_536, 16_384) if cfg.device == "cuda" else (4_096, 512)  # for a model made here; for --init
    cfg.micro_batch = cfg.micro_batch or (large if cfg.init else small)
    return cfg


def tune_libraries() -> None:
    """Set options that torch's libraries read from the environment. Call this before the first matrix product.

    oneDNN keeps 256 compiled kernels instead of 1,024, which saves memory and costs no time. torch.compile calls its
    kernels from C++ instead of Python. It also trusts the CPU's list of vector units, because trying them one by one
    takes 6 s. cuDNN's attention is off, because it makes a new plan for every length.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")
    os.environ.setdefault("TORCHINDUCTOR_CPP_WRAPPER", "1")
    os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")
    torch.backends.cuda.enable_cudnn_sdp(False)


def can_compile() -> bool:
    """Does torch.compile work here? On a CPU it needs a C++ compiler and Python's headers. If not, it prints why."""
    print("testing whether torch.compile works", flush=True)
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(8))
    except Exception as error:  # no compiler, no headers, a cache that cannot be written, a folder without exec
        print(f"torch.compile does not work here, so the run does not use it: {str(error).splitlines()[0]}")
        return False
    return True


def return_memory(cfg) -> None:
    """Give freed memory back to the system after a step of a pretrained model. glibc would keep it, in pieces that are
    too small for the tensors of the next step, so the process would grow with every step."""
    if cfg.init and platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def machine(cfg) -> str:
    """The machine of a run as text, for the terminal and the report."""
    return f"{cfg.device}, {cfg.dtype}, {world_size()} x {cfg.threads} threads"
