"""The machine: its cores, its devices and their shares, the dtype that they multiply fast, what names it in a record.

torch is imported where a device is asked for: the process that only hands out trials needs none.
"""

from __future__ import annotations

import gc
import math
import os
import platform
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from foldsearch.errors import InputError

DEVICES = ("cpu", "cuda", "mps")  # on which a run may begin
SPINS = 10_000  # looks of a thread that waits for another, before it sleeps: 300,000 by default
MACS_PER_SECOND = 3e10  # of a core in a forward pass, where nothing is known of it


def collect_seldom() -> None:
    """Let Python look for garbage less often: for processes that import torch, transformers or Ray, before they do.

    A sixth of the time of these imports is the search for garbage among what they make, which lives on.
    """
    gc.set_threshold(50_000, 20, 20)


def spin_briefly() -> None:
    """Let torch's threads wait for each other awake for a moment only: for processes that import torch, before they do.

    By default GNU's OpenMP lets them spin for long, so where another program has the processor of one, a step takes
    three to four times as long. Without any spinning, models write tokens at half the speed. Who has set how threads
    wait keeps it.
    """
    if not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}:
        os.environ["GOMP_SPINCOUNT"] = str(SPINS)


def num_cpus() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_memory() -> int:
    """Bytes that a new process could use, within what its container may."""
    import psutil

    free = int(psutil.virtual_memory().available)
    with suppress(OSError, ValueError):  # no limit is written as "max"
        free = min(free, int(Path("/sys/fs/cgroup/memory.max").read_text()) - _used_by_container())
    return max(0, free)


def _used_by_container() -> int:
    # Pages of files are given back when memory is short, so they are free.
    pages = dict(line.split() for line in Path("/sys/fs/cgroup/memory.stat").read_text().splitlines())
    return int(Path("/sys/fs/cgroup/memory.current").read_text()) - int(pages.get("inactive_file", 0))


def num_gpus() -> int:
    """CUDA devices that this process may use."""
    import torch

    return torch.cuda.device_count()


def gpu_share(gpus: int, jobs: int) -> float:
    """Of one GPU, for each of `jobs` trials at a time: a whole one where there are enough, and an equal part of one
    where several trials have to share it.
    """
    return 1 / math.ceil(jobs / gpus) if gpus else 0.0


def choose_device(wanted: str) -> str:
    """The device that "auto" stands for on this machine: CUDA, then MPS, then the CPU.

    Raises:
        InputError: a device was named that is not here.
    """
    import torch

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
    return "bfloat16" if device == "cuda" or (device == "cpu" and _has_amx()) else "float32"


def computing_dtype(dtype: str) -> str:
    """The dtype in which this processor computes with numbers of `dtype`: float32 where it has no instructions for it.

    Every number of 16 bits is one of float32 too, so nothing is rounded by that. A product of 16 bits was seen to take
    forty times as long there (an AMD EPYC with AVX2).
    """
    return "bfloat16" if dtype == "bfloat16" and _has_amx() else "float32"


def _has_amx() -> bool:
    import torch

    return torch.cpu._is_amx_tile_supported() and _may_use_amx()


def _may_use_amx() -> bool:
    """Whether oneDNN, which multiplies for torch, is not held to older instructions: bfloat16 takes forever then."""
    held = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or "ALL"
    return held.upper() in ("ALL", "DEFAULT") or "AMX" in held.upper()


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
        import torch

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
