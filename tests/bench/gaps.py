"""What one matrix in the gaps of a plan (`~linear`) is worth beside healing, on SmolLM2-135M; nothing is trained.

    python tests/bench/gaps.py --out gaps.jsonl ["0-3 6-12 19-29" ...]

Plans that only drop blocks are healed as they are; with `~linear` in every gap, or in the longest alone, which starts
at zero and is solved by healing; "apart": the position before a gap is left the dense model's, and the matrix solved
for all of the gap; "fitted first": to the dense model's states, then healed. Text: the default study's, healed on 8,192
tokens, and judged on 30 × 256 report tokens; "little" is what a screening heals and judges on. What is in the file is
not measured again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from foldsearch.cache import default_cache_dir
from foldsearch.context import open_workbench
from foldsearch.fates.replace import runs
from foldsearch.model import heal as healing
from foldsearch.model.fold import fold
from foldsearch.model.heal import Healer
from foldsearch.model.judge import dense_targets, judge
from foldsearch.model.starts import folded_start
from foldsearch.model.states import FitText, text_to_fit
from foldsearch.plan.cost import price
from foldsearch.plan.plan import FoldPlan, Replacement, Slot
from foldsearch.prepare import prepare_context
from foldsearch.search.screening import _some
from foldsearch.spec.load import load_study

PLANS = ("0-3 6-12 19-29", "0-2 8-11 19-22 24 27-29", "0-3 6-10 12 19-21 24-29")
FORMS = ("dropped", "healed", "every gap", "longest gap", "every gap, apart", "every gap, fitted first")


def with_linear(plan: FoldPlan, *, longest: bool) -> FoldPlan:
    """One matrix in every gap, or in the longest."""
    gaps = [Replacement(first, last, "linear") for first, last in runs(plan.dropped)]
    if longest:
        gaps = [max(gaps, key=lambda gap: gap.last - gap.first)]
    every = sorted([*plan.slots, *gaps], key=lambda slot: slot.home if isinstance(slot, Slot) else slot.first)
    return FoldPlan(tuple(every), plan.num_blocks)


class Bench:
    """SmolLM2 with the default study's texts, much of it and little."""

    def __init__(self) -> None:
        sizes = {"splits.report": 30, "precision": "float32"}
        study = load_study("default", sizes)
        folder = Path(tempfile.mkdtemp())
        self.context = prepare_context(study, folder / "run", cache_dir=default_cache_dir())
        self.bench = open_workbench(self.context)
        self.dense = self.bench.dense
        splits, screen = self.bench.splits, study.screen
        self.texts = {
            "much": (text_to_fit(splits.recovery.ids_NT, 8192), splits.report),
            "little": (
                _some(splits.recovery, screen.healed_tokens).ids_NT,
                _some(splits.search, screen.judged_tokens),
            ),
        }

    def measure(self, plan: FoldPlan, form: str, size: str) -> dict[str, Any]:
        """One row."""
        ids_NT, judged = self.texts[size]
        kept = {"model_hash": self.context.files.content_hash, "cache_dir": self.context.cache_dir}
        text = FitText(self.dense, ids_NT, self.context.files.content_hash, self.context.cache_dir)
        states, targets = text.states(), dense_targets(self.dense, judged, **kept)
        if form not in ("dropped", "healed"):
            plan = with_linear(plan, longest=form == "longest gap")
        began = time.process_time()
        model = folded_start(text, plan)[0] if form.endswith("fitted first") else fold(self.dense, plan)
        if form != "dropped":
            apart = patch.object(healing, "_joined", lambda places: places)
            with apart if form.endswith("apart") else nullcontext():
                Healer(states, ids_NT).heal(model)
        made = time.process_time() - began
        quality = judge(model, judged, targets)
        cost = price(plan, self.context.table, self.context.target)
        return {
            "plan": str(plan),
            "kl": quality.kl,
            "kl_se": quality.kl_se,
            "kinds": {kind.name: kind.kl for kind in quality.kinds},
            "megabytes": cost.stored_bytes / 1e6,
            "cpu_seconds": made,
        }


def rows_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("plans", nargs="*", default=PLANS)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    done = {(row["of"], row["form"], row["size"]) for row in rows_of(args.out)}
    bench = Bench()
    for size in ("little", "much"):
        for text in args.plans:
            for form in FORMS:
                if (text, form, size) in done:
                    continue
                row = bench.measure(FoldPlan.parse(text, 30), form, size)
                with args.out.open("a") as file:
                    file.write(json.dumps({"of": text, "form": form, "size": size, **row}) + "\n")
                print(
                    f"{size} {text} {form}: {row['megabytes']:.1f} MB {row['kl']:.3f} ± {row['kl_se']:.3f} "
                    + " ".join(f"{name} {kl:.3f}" for name, kl in row["kinds"].items())
                    + f" {row['cpu_seconds']:.0f} s",
                    flush=True,
                )


if __name__ == "__main__":
    main()
