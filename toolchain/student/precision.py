"""Which number types a processor runs well."""

import os
import sys
from pathlib import Path
from typing import Literal

import torch

from toolchain.errors import HostError
from toolchain.student import parallel

_NVIDIA_GPUS = Path("/proc/driver/nvidia/gpus")
_BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}


def pick_device() -> torch.device:
    """This process's GPU, else the CPU. Raises HostError for a GPU that torch cannot use: never a quiet CPU run."""
    if torch.cuda.is_available():
        if parallel.local_rank() >= torch.cuda.device_count():
            raise HostError(
                f"{parallel.local_rank() + 1} processes on this host, and {torch.cuda.device_count()} GPUs",
                hint="start as many processes as there are GPUs",
            )
        torch.cuda.set_device(parallel.local_rank())
        return torch.device("cuda")
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if not hidden and _NVIDIA_GPUS.is_dir() and any(_NVIDIA_GPUS.iterdir()):
        raise HostError(
            f"there is an NVIDIA GPU, and torch {torch.__version__} cannot use it",
            hint="install a CUDA build of torch that fits the driver; or set CUDA_VISIBLE_DEVICES= to run without it",
        )
    return torch.device("cpu")


def has_bfloat16(device: torch.device) -> bool:
    """Whether the processor has instructions for bfloat16 products; without them it is slower than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if sys.platform != "linux":
        return False
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        name, _, flags = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return not _BF16_FLAGS.isdisjoint(flags.split())
    return False


def autocast_type(precision: Literal["auto", "float32", "bfloat16"], device: torch.device) -> torch.dtype | None:
    """The autocast type of a training step; None is plain float32."""
    if precision == "bfloat16" or (precision == "auto" and has_bfloat16(device)):
        return torch.bfloat16
    return None


def weights_type(device: torch.device) -> torch.dtype:
    """How weights are held where they are trained, scored or merged: float32 on a CPU, bfloat16 on a GPU."""
    return torch.bfloat16 if device.type == "cuda" and has_bfloat16(device) else torch.float32


def decoding_type(device: torch.device) -> torch.dtype:
    """How weights are held for decoding, which is bound by reading them: 16 bits where the processor can."""
    return torch.bfloat16 if has_bfloat16(device) else torch.float32
