"""What "auto" stands for: the law is that of the processor as oneDNN may use it, not of what its flags say.

How threads wait is told by the runtime of OpenMP itself, where it is GNU's.
"""

import os
import subprocess
import sys

import pytest
import torch

from foldsearch.machine import SPINS, choose_precision, computing_dtype


@pytest.mark.parametrize(
    ("tiles", "held", "precision"),
    [
        (True, None, "bfloat16"),
        (True, "ALL", "bfloat16"),
        (True, "avx10_1_512_amx", "bfloat16"),
        (True, "AVX512_CORE_AMX", "bfloat16"),
        (True, "AVX512_CORE_BF16", "float32"),
        (True, "AVX2", "float32"),
        (False, None, "float32"),
    ],
)
def test_auto_is_what_is_multiplied_fast(
    tiles: bool, held: str | None, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: tiles)
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    if held is not None:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", held)
    assert choose_precision("auto", "cpu") == precision
    assert choose_precision("bfloat16", "cpu") == "bfloat16"  # who names one gets it
    assert computing_dtype("bfloat16") == precision
    assert computing_dtype("float16") == computing_dtype("float32") == "float32"


@pytest.mark.parametrize(
    ("given", "spins"),
    [({}, SPINS), ({"OMP_WAIT_POLICY": "PASSIVE"}, 0), ({"GOMP_SPINCOUNT": "123"}, 123)],
    ids=["nothing", "policy", "count"],
)
def test_threads_spin_briefly_unless_somebody_said_otherwise(given: dict[str, str], spins: int) -> None:
    env = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    env |= {"OMP_DISPLAY_ENV": "VERBOSE", **given}
    words = "from foldsearch.machine import spin_briefly; spin_briefly(); import torch"
    told = subprocess.run([sys.executable, "-c", words], env=env, capture_output=True, text=True, check=True)
    if "GOMP_SPINCOUNT" not in told.stderr:
        pytest.skip("torch has another runtime of OpenMP here")
    assert f"GOMP_SPINCOUNT = '{spins}'" in told.stderr
