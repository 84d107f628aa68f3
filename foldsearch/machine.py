"""The machine that torch computes on: its devices, the dtype that they multiply fast, and what names it in a record."""

from __future__ import annotations

import platform
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from foldsearch.errors import InputError


def choose_device(wanted: str) -> str:
    """The device that "auto" stands for on this machine: CUDA, then MPS, then the CPU.

    Raises:
        InputError: a device was named that is not here.
    """
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if wanted == "auto":
        return next(device for device, available in here.items() if available)
    if not here[wanted]:
        found = ", ".join(device for device, available in here.items() if available)
        raise InputError(f"--device {wanted} needs one, but torch finds only: {found}.")
    return wanted


def choose_precision(wanted: str, device: str) -> str:
    """The dtype that "auto" stands for: bfloat16 where the device multiplies it fast, else float32."""
    if wanted != "auto":
        return wanted
    fast = device == "cuda" or (device == "cpu" and torch.cpu._is_amx_tile_supported())
    return "bfloat16" if fast else "float32"


@dataclass(frozen=True, slots=True)
class Machine:
    """What figures were computed with: where it is the same, they are too.

    kind: processor and its instructions, or GPU. threads: of torch, on the CPU. torch: its version.
    """

    kind: str
    threads: int
    torch: str

    @classmethod
    def here(cls, device: str) -> Machine:
        """This process, computing on a device."""
        if device == "cuda":
            kind = torch.cuda.get_device_name()
        else:
            kind = f"{device} {_processor()} {torch.backends.cpu.get_cpu_capability()}"
        return cls(kind, torch.get_num_threads(), torch.__version__)


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()
