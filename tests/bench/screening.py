"""What a screening of the demo's model costs and finds, and how well its regression foretells plans.

    python tests/bench/screening.py --plans 150 --budget-gb 0.28 --out DIR

Nothing is trained. The last lines leave out each of the larger plans in turn, fit the chain to the others, and compare
what it foretells with what was measured (rank correlations, over all and at equal counts).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from foldsearch.prepare import prepare_context
from foldsearch.report.view import rank_correlation
from foldsearch.search.chain import ChainFit
from foldsearch.search.screened import Screened, screened_by_count, write_screened
from foldsearch.search.screening import Screening
from foldsearch.spec.fit import narrow
from foldsearch.spec.load import load_study

LARGER = 5  # dropped blocks, from which on plans are foretold


def foretold(found: Sequence[Screened], num_blocks: int) -> str:
    """The rank correlations, in words."""
    known = {one.plan.dropped: one.quality.kl for one in found if one.plan.only_drops}
    larger = [dropped for dropped in known if len(dropped) >= LARGER]
    told = [
        ChainFit(num_blocks, {other: kl for other, kl in known.items() if other != dropped})
        .mean()
        .kl(dropped)
        for dropped in larger
    ]
    measured = [known[dropped] for dropped in larger]
    counts = np.log([len(dropped) for dropped in larger])
    trend = np.vstack(
        [np.ones_like(counts), counts]
    ).T  # what is left of logarithms after a curve of the count

    def left(values: Sequence[float]) -> list[float]:
        logs = np.log(np.maximum(values, 1e-4))
        return list(logs - trend @ np.linalg.lstsq(trend, logs, rcond=None)[0])

    alike = rank_correlation(left(told), left(measured))
    return (
        f"{len(larger)} plans foretold: {rank_correlation(told, measured):.2f}, at equal counts {alike:.2f}"
    )


def main() -> None:
    """Screen, and print what came of it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--plans", type=int, default=150)
    parser.add_argument("--budget-gb", type=float, default=0.28)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    overrides = {"budget.gb": given.budget_gb, "precision": "float32", "screen.plans": given.plans}
    study = load_study("smollm2-demo", overrides)
    context = prepare_context(study, given.out / "run", cache_dir=given.out / "cache")
    space = narrow(study.space, context.table, context.target, context.budget)
    screening = Screening(context, space)
    cpu, began = time.process_time(), time.monotonic()
    found = screening.run()
    cpu, wall = time.process_time() - cpu, time.monotonic() - began
    print(f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads")
    print(f"{len(found)} plans: {wall:.0f} s, {cpu:.0f} CPU s, {cpu / len(found):.2f} a plan")
    for count, row in screened_by_count(found).items():
        best = sorted(row.items(), key=lambda pair: pair[1].quality.kl)
        print(count, "  ".join(f"{name} {one.quality.kl:.3f}" for name, one in best))
    print(foretold(found, len(context.table.blocks)))
    write_screened(given.out / "screened.json", found)


if __name__ == "__main__":
    sys.exit(main())
