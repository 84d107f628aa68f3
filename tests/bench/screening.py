"""What a screening of the demo's model costs and finds, and how well its regression foretells plans.

    python tests/bench/screening.py --plans 150 --budget-gb 0.28 --out DIR [--seeds 0 1] [--cheap] [--halves 0.2]
    python tests/bench/screening.py --units --out DIR [--cheap]

Nothing is trained. A line of each seed has the lowest KL of plans that take no more memory than those that drop so many
blocks (--halves: up to this share of the blocks may run one unit only); the last one leaves out each of the larger
plans in turn, fits the chain to the others, and compares what it foretells with what was measured (rank correlation at
equal counts). --units measures every block, attention and MLP alone instead.

A plan that DIR has the figures of is not measured again, and counts with the CPU seconds that it took: searches that
are to be compared get the same DIR, and one of its own where --judged is another. --cheap does not heal, and judges 160
tokens: half a second a plan.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from threading import Lock
from unittest.mock import patch

import numpy as np
import torch

from foldsearch.codec import from_json, to_json
from foldsearch.model import heal
from foldsearch.model.screen import Screen
from foldsearch.plan.cost import price
from foldsearch.plan.plan import FoldPlan
from foldsearch.plan.result import Quality
from foldsearch.prepare import prepare_context
from foldsearch.progress import CountProgress
from foldsearch.report.health import foretelling
from foldsearch.search import screening as screenings
from foldsearch.search.chain import KEPT, plan_of
from foldsearch.search.screened import Screened, screened_by_count, write_screened
from foldsearch.search.screening import Screening
from foldsearch.spec.fit import narrow
from foldsearch.spec.load import load_study


def foretold(found: Sequence[Screened], num_blocks: int) -> str:
    """The rank correlation at equal counts, in words."""
    told = foretelling({one.plan: one.quality.kl for one in found if one.plan.only_drops}, num_blocks)
    assert told is not None
    return f"{told.plans} plans foretold: at equal counts {told.correlation:.2f}"


class Memory:
    """The figures of plans that were measured, and the CPU seconds that each took; of one model and text."""

    def __init__(self, path: Path) -> None:
        self._path, self._real = path, Screen.measure
        self._lock = Lock()  # several plans are measured at once
        lines = path.read_text().splitlines() if path.exists() else []
        self._known = {row["plan"]: row for row in map(json.loads, lines)}
        self.cpu_seconds = 0.0  # that the asked plans took, now or earlier
        self.fresh_seconds = 0.0  # of these, in this process

    def measure(self, screen: Screen, plan: FoldPlan, progress: CountProgress | None = None) -> Quality:
        """In place of `Screen.measure`."""
        row = self._known.get(str(plan))
        if row is None:
            began = time.thread_time()  # a plan has one thread
            quality = to_json(self._real(screen, plan, progress))
            row = {"plan": str(plan), "quality": quality, "cpu_seconds": time.thread_time() - began}
        with self._lock:
            if str(plan) not in self._known:
                self._known[str(plan)] = row
                self.fresh_seconds += row["cpu_seconds"]
                with self._path.open("a") as file:
                    file.write(json.dumps(row) + "\n")
            self.cpu_seconds += row["cpu_seconds"]
        return from_json(Quality, row["quality"])


def lowest(found: Sequence[Screened], counts: range, memory: Callable[[FoldPlan], int]) -> list[float]:
    """The lowest KL of plans that take no more memory than those that drop so many blocks."""
    points = [(memory(one.plan), one.quality.kl) for one in found]
    num_blocks = found[0].plan.num_blocks
    bounds = [memory(FoldPlan.dropping(range(count), num_blocks)) for count in counts]
    return [min((kl for size, kl in points if size <= bound), default=math.inf) for bound in bounds]


def units(screening: Screening, num_blocks: int) -> None:
    """The KL of each block without its attention, its MLP, or both; and the medians of their shares of the last."""
    rows = []
    for block in range(num_blocks):
        codes = [KEPT * block + state + KEPT * (num_blocks - block - 1) for state in "mad"]
        rows.append([screening._screen.measure(plan_of(code)).kl for code in codes])
        print(block, "  ".join(f"{kl:.3f}" for kl in rows[-1]), flush=True)
    for name, column in (("attention", 0), ("MLP", 1)):
        shares = [row[column] / row[2] for row in rows]
        low, middle, high = np.quantile(shares, (0.25, 0.5, 0.75))
        print(f"without its {name}, as a share of without the block: {middle:.2f} ({low:.2f} to {high:.2f})")


def main() -> None:
    """Screen, and print what came of it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--plans", type=int, default=150)
    parser.add_argument("--budget-gb", type=float, default=0.28)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--cheap", action="store_true")
    parser.add_argument("--judged", type=int, metavar="TOKENS", help="judge each plan on so many tokens")
    parser.add_argument("--units", action="store_true")
    parser.add_argument("--halves", type=float, default=0.0, metavar="SHARE")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    overrides = {"budget.gb": given.budget_gb, "precision": "float32", "screen.plans": given.plans}
    if given.cheap:
        overrides |= {"screen.healed_tokens": 64, "screen.judged_tokens": 160}
        screenings.LENGTH = 32
        patch.object(heal, "places_of", without_writers(heal.places_of)).start()
    if given.judged:
        overrides["screen.judged_tokens"] = given.judged
    print(f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads")
    for seed in given.seeds:
        study = load_study("smollm2-demo", {**overrides, "seed": seed})
        context = prepare_context(study, given.out / f"run{seed}", cache_dir=given.out / "cache")
        wide = study.space.model_copy(update={"attention": (0.0, given.halves)})
        space = narrow(wide, context.table, context.target, context.budget)
        screening = Screening(context, space)
        memory = Memory(given.out / ("cheap.jsonl" if given.cheap else "measured.jsonl"))
        with (
            patch.object(
                Screen, "measure", lambda screen, *rest, memory=memory: memory.measure(screen, *rest)
            ),
            patch.object(screenings.cache, "json_grown"),  # a seed knows nothing of another
        ):
            if given.units:
                units(screening, len(context.table.blocks))
                break
            found = screening.run()
        fewest, most = space.counts(len(context.table.blocks))
        row = lowest(
            found,
            range(fewest, most + 1),
            lambda plan, context=context: price(plan, context.table, context.target).memory_bytes,
        )
        print(
            f"seed {seed}: {len(found)} plans, {memory.cpu_seconds:.0f} CPU s; as {fewest} to {most} dropped: "
            f"{' '.join(f'{kl:.3f}' for kl in row)}; mean of the logarithms {np.log(row).mean():.3f}"
        )
        for count, best in screened_by_count(found).items():
            order = sorted(best.items(), key=lambda pair: pair[1].quality.kl)
            print(count, "  ".join(f"{name} {one.quality.kl:.3f}" for name, one in order))
        print(foretold(found, len(context.table.blocks)), flush=True)
        write_screened(given.out / f"screened{seed}.json", found)


def without_writers(places_of):
    """Positions that nothing is solved at."""
    return lambda model: [replace(place, writer=None) for place in places_of(model)]


if __name__ == "__main__":
    sys.exit(main())
