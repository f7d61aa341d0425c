"""What the run computes on."""
import ctypes
import dataclasses
import os
import platform

import torch

from engine.parallel import world_size


def has(device: str) -> bool:
    """Is this device here?"""
    return {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}[device]


def has_bfloat16(device: str) -> bool:
    """Does this device compute with bfloat16, instead of converting it first?"""
    if device == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def settle(cfg, stored: dict):
    """Replace what the settings leave open by what the run began with (`stored`), or else by what this machine has."""
    if not has(stored.get("device", "cpu")):
        stored = {}  # the run began on another machine
    settled = {key: stored[key] for key in ("device", "dtype") if getattr(cfg, key) == "auto" and key in stored}
    cfg = dataclasses.replace(cfg, **settled, threads=cfg.threads or torch.get_num_threads())
    if cfg.device == "auto":
        cfg.device = next(device for device in ("cuda", "mps", "cpu") if has(device))
    if cfg.dtype == "auto":
        cfg.dtype = "bfloat16" if has_bfloat16(cfg.device) else "float32"
    if cfg.compile == "auto":
        works = cfg.device == "cuda" or (cfg.device == "cpu" and can_compile())
        cfg.compile = "on" if works else "off"
    # subtle: the compiler writes other code for more than 4,096 tokens.
    small, large = (65_536, 16_384) if cfg.device == "cuda" else (4_096, 512)  # for a small model and a real one
    cfg.micro_batch = cfg.micro_batch or (large if cfg.init else small)
    return cfg


def tune_libraries() -> None:
    """Set what torch's libraries read from the environment. Call it before the first matrix product.

    oneDNN would keep its compiled kernels for 1,024 shapes, which costs memory; 256 cost no time. torch.compile is told
    to call its kernels from C++ instead of Python, and to believe the CPU about its vector units, which it would spend
    6 s on trying one by one. cuDNN's attention is off, because it plans anew for every length.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")
    os.environ.setdefault("TORCHINDUCTOR_CPP_WRAPPER", "1")
    os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")
    torch.backends.cuda.enable_cudnn_sdp(False)


def can_compile() -> bool:
    """Does torch.compile work here? On a CPU it needs a C++ compiler and Python's headers. Prints a line if not."""
    print("trying out torch.compile", flush=True)
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(8))
    except RuntimeError as error:
        print(f"torch.compile does not work here, and the run goes without: {str(error).splitlines()[0]}")
        return False
    return True


def return_memory(cfg) -> None:
    """Give the memory that a large model's step has freed back to the system. glibc would keep it, in pieces that the
    next step's tensors do not fit into, so that the process grew from step to step."""
    if cfg.init and platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def machine(cfg) -> str:
    """What the run computes on, as text."""
    return f"{cfg.device}, {cfg.dtype}, {world_size()} x {cfg.threads} threads"
