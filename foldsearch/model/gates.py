"""Gated block removal: train one gate a block together, and rank the blocks by their gates.

FoldGPT (arXiv 2407.00928) trains gates under a FLOPs constraint with a polarization-friendly `eps`. Its formulas were
not available to us; everything below is FoldGPT-style, ours. Only the gates are trained; the model is never written to.

A gate g closes its block: x + g (B(x) - x), the exact block at g = 1 and the exact identity at g = 0.

Why it isn't plain gradient descent on g: a network hardly minds when all its blocks are a little closed, so gates that
are relaxed together find that state (30 gates near 0.8 cost SmolLM2-135M a KL of 0.06, six closed ones ten times as
much), stay there, and rank by nothing. So gates are sampled. In every sequence of a step some gates are closed part
way, uniformly between 0 and 1, and the rest are open. The slope of the loss along a uniformly placed gate is, in the
mean, exactly what closing it altogether costs, with the others closed as they may be: so a removal is measured, not an
attenuation, for every gate in play, by one backward pass. The weight w of a gate is the running mean of that cost, and

    p_i = w_i^(1/eps) / (w_i^(1/eps) + tau^(1/eps))      with tau such that  sum c_i p_i = sum c_i - removed FLOPs

is its opening. The FLOPs to remove are, at each step, PRESSURE times those still to be closed, and enough that a few
gates are always in play; when the last gate is closed they are the constraint's. `eps` is how far a weight must be from
the threshold tau for its gate to be out of play. Gate i plays with probability min(1, 2 (1 - p_i)), so that it is p_i
open on average (half open at least). As the run proceeds the gates with the lowest weights are closed for good, one by
one, and the others learn how much they matter without them. So the gates always end polarized. Before a gate closes, it
and the next few are tried closed on a little training text; last, a few swaps of gates near the threshold are.

Shapes: N sequences, B sequences of a step, T positions, D width, V vocabulary, C positions of a chunk, L blocks.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from foldsearch.errors import InputError
from foldsearch.model.blocks import decoder_blocks
from foldsearch.model.evidence import BlockRun, measure_evidence
from foldsearch.model.head import head_normaliser, last_hidden, positions_at_once
from foldsearch.model.judge import DenseTargets, ask_dense, cross_terms
from foldsearch.model.tokens import TokenSet
from foldsearch.model.training import GateTraining
from foldsearch.progress import CountProgress

CLOSED, OPEN = 0.05, 0.95  # a gate outside these is polarized

# The numbers below are measured in docs/log.md.

SEQUENCES_PER_STEP = 8  # even: the halves of a step get opposite gates
POSITIONS = 64  # length that sequences are cut into: short ones give more gates a try for the same tokens
SEQUENCES = 64  # different ones, which the steps go round: the dense model is asked about each only once
STRIDE = 2  # the loss is taken at every second position: half the price, and neighbours say much the same

# Share of the blocks still to be removed that is closed on average at any time. Below 1: the states that gates are
# measured in come nearer to the final one as gates close for good, not all at once.
PRESSURE = 0.75
# Blocks that are closed on average at least, but never more than a quarter of the open ones: with fewer in play, most
# gates would be measured too seldom to be ranked.
LEAST_CLOSED = 3.0
# Share of the steps before the first gate closes for good: until then, too few measurements rank it.
WARMUP = 0.4

# Of the running mean, a step: what was measured while other gates were open counts less and less.
DECAY = 0.97
PRIOR = 3.0  # measurements that the Block Influence which gates start from counts for: it is soon outvoted
MOST_COST = 10.0  # that one measurement can say, in medians of its step
MOST_INFLUENCE = 20.0  # of a block at the start, in medians: the first block's is far out and says no more

SHORTLIST = 3  # so many gates of the lowest weights are tried closed before one of them closes for good
# At the end, so many of the kept blocks are tried in place of the two removed ones that matter most.
SWAPPED_IN = 4
SWAP_ROUNDS = 2  # each makes one swap at most


@dataclass(frozen=True, slots=True)
class GateResult:
    """What training the gates gave.

    Attributes:
        ranking: all blocks, least important first. To remove n, take the first n.
        gates: expected opening per block at the end.
        history: `gates` after every step.
        polarized: the share of `gates` that is below 0.05 or above 0.95.
        soft_loss: KL to the dense model (nats a token) with the gates as training left them, on the first training
            sequences. They are all 0 or 1 by then.
        hard_loss: the same with the first `count` blocks of the ranking removed: lower where a swap helped.
        steps: training steps done.
        tokens: tokens trained on (every one forward and backward).
        check_tokens: tokens of the runs that check removals on the training text (forward only).
        seconds: wall time.
    """

    ranking: tuple[int, ...]
    gates: tuple[float, ...]
    history: tuple[tuple[float, ...], ...]
    polarized: float
    soft_loss: float
    hard_loss: float
    steps: int
    tokens: int
    check_tokens: int
    seconds: float


class GatedModel:
    """A dense model whose blocks are closed by gates, one set of gates a sequence.

    A context: on exit the model is as it was. Its weights are never written to.

    Attributes:
        gates_BL: openings, or None for the dense model. Blocks that no sequence opens don't run.
    """

    def __init__(self, dense: PreTrainedModel) -> None:
        self.dense = dense
        self.gates_BL: Tensor | None = None
        self._run = BlockRun(decoder_blocks(dense), self._run_block)

    def __enter__(self) -> GatedModel:
        self._run.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._run.__exit__(*exception)

    def hidden(self, ids_BT: Tensor, gates_BL: Tensor | None = None) -> Tensor:
        """Hidden states after the final norm, (B, T, D), with these gates."""
        self.gates_BL = gates_BL
        try:
            return last_hidden(self.dense, ids_BT)
        finally:
            self.gates_BL = None

    def _run_block(self, i: int, hidden_BTD: Tensor, block: Callable[[Tensor], Tensor]) -> Tensor:
        if self.gates_BL is None:
            return block(hidden_BTD)
        gate_B = self.gates_BL[:, i]
        if not gate_B.any():
            return hidden_BTD
        # lerp is exact at 0 and at 1, which x + g (y - x) is not.
        return torch.lerp(hidden_BTD, block(hidden_BTD), gate_B.to(hidden_BTD.dtype)[:, None, None])


def train_gates(
    dense: PreTrainedModel,
    tokens: TokenSet,
    settings: GateTraining,
    *,
    block_macs: Sequence[float],
    progress: CountProgress | None = None,
) -> GateResult:
    """Train one gate a block and rank the blocks by them (FoldGPT-style, ours: see the module).

    The ranking is a function of the model, the tokens, the settings and the seed.

    Args:
        dense: a causal language model of transformers, in eval mode with frozen parameters. Gates are held in float32
            whatever its dtype is.
        tokens: recovery text.
        settings: how to train.
        block_macs: FLOPs of each block in any unit, for the constraint.
        progress: called with (step, steps).

    Raises:
        InputError: a wrong count, costs that aren't one positive number a block, too few tokens, or a loss that is not
            finite.
    """
    began = time.perf_counter()
    num_blocks = len(decoder_blocks(dense))
    cost_L = torch.tensor(block_macs, dtype=torch.float64)
    _check(settings, num_blocks, cost_L, tokens)
    cost_L /= cost_L.mean()  # so that what is to be removed counts in blocks
    rng = torch.Generator().manual_seed(settings.seed)
    tokens = _cut(tokens, rng)
    ids_NT = tokens.ids_NT.to(dense.device)
    weights = _Weights(_influence(dense, tokens))
    history: list[tuple[float, ...]] = []
    with GatedModel(dense) as model:
        # The dense model runs first, and once: later steps run blocks that it has shown how to call (see BlockRun).
        targets = ask_dense(dense, tokens).to(ids_NT.device)
        rows = slice(0, SEQUENCES_PER_STEP)
        removal = _Removal(model, ids_NT[rows], targets.of(rows))
        # Weights are per cost: of two blocks that matter alike, the one that costs more goes first.
        expected_L = _expected(weights.values / cost_L, cost_L, removal.closed, settings)
        for step in range(settings.steps):
            gates_BL, in_play_BL = _sample(expected_L, rng)
            row_B = torch.arange(step * len(gates_BL), (step + 1) * len(gates_BL)) % len(ids_NT)
            slope_BL = _slopes(model, ids_NT[row_B], targets.of(row_B), gates_BL)
            weights.add(-slope_BL, in_play_BL)  # opening a gate lowers the loss by what closing it costs
            while len(removal.closed) < _due(step, settings):
                removal.close_one(weights.values / cost_L, cost_L)
            expected_L = _expected(weights.values / cost_L, cost_L, removal.closed, settings)
            history.append(tuple(expected_L.tolist()))
            if progress is not None:
                progress(step + 1, settings.steps)
        soft_loss = removal.loss
        removal.swap(weights.values / cost_L)
        final_L = _expected(weights.values / cost_L, cost_L, removal.closed, settings)
    outside = [gate < CLOSED or gate > OPEN for gate in final_L.tolist()]
    return GateResult(
        # The blocks that stay follow by their weights.
        ranking=(*removal.closed, *_lowest(weights.values / cost_L, removal.closed, num_blocks)),
        gates=tuple(final_L.tolist()),
        history=tuple(history),
        polarized=sum(outside) / len(outside),
        soft_loss=soft_loss,
        hard_loss=removal.loss,
        steps=settings.steps,
        tokens=settings.steps * SEQUENCES_PER_STEP * ids_NT.shape[1],
        check_tokens=removal.tokens,
        seconds=time.perf_counter() - began,
    )


def _influence(dense: PreTrainedModel, tokens: TokenSet) -> Tensor:
    """Measure Block Influence on the first step's sequences, in medians: the weights of the gates start from it."""
    first = tokens.of(list(range(min(len(tokens.ids_NT), SEQUENCES_PER_STEP))))
    influence_L = 1.0 - torch.tensor(measure_evidence(dense, first).block_cosine, dtype=torch.float64)
    return (influence_L / influence_L.median()).clamp(1e-3, MOST_INFLUENCE)


class _Removal:
    """The blocks that are closed for good, in the order in which they closed, and the loss without them on little text.

    Attributes:
        closed: block numbers.
        loss: KL to the dense model, nats a token, with exactly these blocks left out.
        tokens: how many ran to measure losses.
    """

    def __init__(self, model: GatedModel, ids_BT: Tensor, targets: DenseTargets) -> None:
        self._model = model
        self._ids_BT = ids_BT
        self._targets = targets
        self.closed: list[int] = []
        self.loss = 0.0
        self.tokens = 0

    def close_one(self, weight_L: Tensor, cost_L: Tensor) -> None:
        """Close one more block: of those with the lowest weights, the one whose removal costs least now."""
        # The mean cost of a gate is over states in which others were half open; the next one to close is the cheapest
        # of a few when it is closed on top of those that are.
        shortlist = _lowest(weight_L, self.closed, SHORTLIST)
        losses = {block: self._loss_without([*self.closed, block]) for block in shortlist}
        block = min(shortlist, key=lambda block: (losses[block] - self.loss) / float(cost_L[block]))
        self.closed.append(block)
        self.loss = losses[block]

    def swap(self, weight_L: Tensor) -> None:
        """Swap a closed block for a kept one, as long as a swap lowers the loss."""
        # Blocks were closed one by one: an early one may be a bad choice beside those that were closed after it.
        for _ in range(SWAP_ROUNDS):
            best, best_loss = self.closed, self.loss
            for swapped in _swaps(self.closed, weight_L):
                loss = self._loss_without(swapped)
                if loss < best_loss:
                    best, best_loss = swapped, loss
            if best is self.closed:
                break
            self.closed, self.loss = best, best_loss

    def _loss_without(self, removed: Sequence[int]) -> float:
        self.tokens += self._ids_BT.numel()
        gate_L = torch.ones(len(decoder_blocks(self._model.dense)), device=self._ids_BT.device)
        gate_L[list(removed)] = 0.0
        with torch.no_grad():
            hidden_BTD = self._model.hidden(self._ids_BT, gate_L.expand(len(self._ids_BT), -1))
        return float(kl_to_dense(self._model.dense, hidden_BTD, self._targets, stride=STRIDE)[0].mean())


class _Weights:
    """For each gate, the running mean of the loss that closing it costs; the mean starts from Block Influence."""

    def __init__(self, influence_L: Tensor) -> None:
        self._influence_L = influence_L
        self._sum_L = torch.zeros_like(influence_L)
        self._count_L = torch.zeros_like(influence_L)
        self._prior = PRIOR

    def add(self, cost_BL: Tensor, in_play_BL: Tensor) -> None:
        # A gate that is nearly closed can have a slope a thousand times the usual, of either sign; one such measurement
        # would outweigh all the others of a run. No removal helps by much, so the bound below is tighter.
        if in_play_BL.any():
            usual = float(cost_BL[in_play_BL].abs().median())
            cost_BL = cost_BL.clamp(-usual, MOST_COST * usual)
        self._sum_L = DECAY * self._sum_L + (cost_BL * in_play_BL).sum(0)
        self._count_L = DECAY * self._count_L + in_play_BL.sum(0)
        self._prior *= DECAY

    @property
    def values(self) -> Tensor:
        # Block Influence has no unit of loss: take the one that fits what was measured so far.
        unit = self._sum_L.sum().clamp_min(0.0) / (self._count_L * self._influence_L).sum()
        start_L = self._influence_L * (unit if unit > 0.0 else 1.0)
        values_L = (self._prior * start_L + self._sum_L) / (self._prior + self._count_L)
        # A removal may seem to help: then its cost is below zero, but its logarithm must exist.
        return torch.maximum(values_L, 1e-3 * start_L.median())


def _expected(weight_L: Tensor, cost_L: Tensor, closed: Sequence[int], settings: GateTraining) -> Tensor:
    """The expected opening of each gate: 0 if it is closed for good; the openings of the others leave room for what is
    still to be removed.
    """
    open_L = torch.ones_like(weight_L)
    open_L[list(closed)] = 0.0
    left = settings.count - len(closed)
    if left == 0:
        return open_L
    removal = max(PRESSURE * left, min(LEAST_CLOSED, float(open_L.sum()) / 4))
    logit_L = weight_L.log() / settings.eps
    target = float((open_L * cost_L).sum()) - removal
    # Bisection: the expected cost of what stays open falls as the threshold rises.
    low, high = float(logit_L.min()) - 50.0, float(logit_L.max()) + 50.0
    for _ in range(60):
        threshold = (low + high) / 2
        kept = float((open_L * cost_L * torch.sigmoid(logit_L - threshold)).sum())
        low, high = (threshold, high) if kept > target else (low, threshold)
    return open_L * torch.sigmoid(logit_L - low)


def _sample(expected_L: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw gates with these expected openings, (B, L), and say which are in play.

    Those are uniformly random, the others are open or closed.
    """
    half = (SEQUENCES_PER_STEP // 2, len(expected_L))
    # A uniform gate is half closed on average, so it plays twice as often as it is to be closed.
    play = torch.rand(half, generator=rng) < 2.0 * (1.0 - expected_L)
    uniform = torch.rand(half, generator=rng)
    open_L = expected_L > 0.0
    # Both halves of the sequences play the same gates, at u and at 1 - u: their mean is less noisy.
    play = (play & open_L).repeat(2, 1)
    gates_BL = torch.where(play, torch.cat([uniform, 1.0 - uniform]), open_L.float())
    return gates_BL, play


def _due(step: int, settings: GateTraining) -> int:
    """How many gates are closed for good after this step."""
    done = (step + 1) / settings.steps
    if done < WARMUP:
        return 0
    if step + 1 == settings.steps:  # whatever rounding says
        return settings.count
    return 1 + math.floor((settings.count - 1) * (done - WARMUP) / (1.0 - WARMUP))


def _lowest(weight_L: Tensor, ranked: Sequence[int], number: int) -> list[int]:
    left = [i for i in range(len(weight_L)) if i not in ranked]
    return sorted(left, key=lambda i: (float(weight_L[i]), i))[:number]


def _cut(tokens: TokenSet, rng: torch.Generator) -> TokenSet:
    """The sequences to train on: `POSITIONS` long, chosen and ordered by the seed."""
    pieces = tokens.cut(max(POSITIONS, tokens.num_in_front + 2))
    return pieces.of(torch.randperm(len(pieces.ids_NT), generator=rng)[:SEQUENCES].tolist())


def _slopes(model: GatedModel, ids_BT: Tensor, targets: DenseTargets, gates_BL: Tensor) -> Tensor:
    """The slope of each sequence's KL along each of its gates, (B, L), on the CPU."""
    gates_BL = gates_BL.to(ids_BT.device).requires_grad_()
    with torch.enable_grad():
        hidden_BTD = model.hidden(ids_BT, gates_BL)
    loss_B, slope_BTD = kl_to_dense(model.dense, hidden_BTD.detach(), targets, stride=STRIDE, slopes=True)
    if not loss_B.isfinite().all():
        raise InputError("The gated model's loss is not finite. Load the model in bfloat16 or float32.")
    (slope_BL,) = torch.autograd.grad(hidden_BTD, gates_BL, slope_BTD)
    return slope_BL.cpu().double()


def _swaps(removed: Sequence[int], weight_L: Tensor) -> Iterator[list[int]]:
    """Yield the removed blocks with one of them swapped: one of the two that matter most is kept, and one of the kept
    blocks that matter least is removed in its place.
    """
    by_weight = sorted(range(len(weight_L)), key=lambda i: (float(weight_L[i]), i))
    returns = [i for i in by_weight if i in removed][-2:]
    goes = [i for i in by_weight if i not in removed][:SWAPPED_IN]
    for old, new in product(returns, goes):
        yield [new if i == old else i for i in removed]


def kl_to_dense(
    dense: PreTrainedModel,
    hidden_BTD: Tensor,
    targets: DenseTargets,
    *,
    stride: int = 1,
    slopes: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """KL of the dense model's next-token distribution to a model's, and its slope, chunk by chunk.

    Args:
        dense: gives the vocabulary projection.
        hidden_BTD: states after the final norm of the model that is measured.
        targets: what the dense model says on the same B sequences.
        stride: take every so many of the scored positions; the first one differs from sequence to sequence.
        slopes: whether to give the slope.

    Returns:
        mean KL of each sequence in nats a token, (B,), and if asked its slope in each hidden state, (B, T, D).
    """
    num_sequences, num_positions = hidden_BTD.shape[0], hidden_BTD.shape[1] - 1
    taken = [
        b * num_positions + position
        for b, scored_P in enumerate(targets.scored_NP.cpu())
        for position in scored_P.nonzero()[b % stride :: stride, 0].tolist()
    ]
    place_M = torch.tensor(taken, device=hidden_BTD.device)
    sequence_M = place_M // num_positions
    count_B = torch.bincount(sequence_M, minlength=num_sequences)
    hidden = hidden_BTD[:, :-1].flatten(0, 1)
    negentropy, dense_hidden, rows = targets.flat()
    loss_B = torch.zeros(num_sequences, device=hidden_BTD.device)
    slope = torch.zeros_like(hidden) if slopes else None
    for place_C in torch.split(place_M, positions_at_once(dense)):
        hidden_CD = hidden[place_C].detach().requires_grad_(slopes)
        with torch.set_grad_enabled(slopes):
            normaliser_C = head_normaliser(dense, hidden_CD)
            cross_C = cross_terms(dense, hidden_CD, targets, (dense_hidden[place_C], rows[place_C]))
            kl_C = (negentropy[place_C] - cross_C + normaliser_C) / count_B[place_C // num_positions]
        loss_B.index_add_(0, place_C // num_positions, kl_C.detach())
        if slope is not None:
            (slope[place_C],) = torch.autograd.grad(kl_C.sum(), hidden_CD)
    if slope is None:
        return loss_B, None
    return loss_B, nn.functional.pad(slope.unflatten(0, (num_sequences, num_positions)), (0, 0, 0, 1))


def _check(settings: GateTraining, num_blocks: int, cost_L: Tensor, tokens: TokenSet) -> None:
    if not 1 <= settings.count < num_blocks:
        raise InputError(
            f"From 1 to {num_blocks - 1} of {num_blocks} blocks can be removed, but the gates' count is "
            f"{settings.count}."
        )
    if cost_L.shape != (num_blocks,) or not bool((cost_L > 0.0).all()):
        raise InputError(
            f"Gates need one positive cost a block, {num_blocks} in all, but block_macs has {len(cost_L)} values "
            f"with a minimum of {float(cost_L.min()) if len(cost_L) else 'nothing'}."
        )
    if len(tokens.ids_NT) == 0 or tokens.ids_NT.shape[1] < 2:
        raise InputError(
            "Token ids come as (sequences, positions), at least 1 by 2, but here they are "
            f"{tuple(tokens.ids_NT.shape)}. Give more recovery text."
        )
