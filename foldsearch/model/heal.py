"""Healing in closed form: what kept blocks write to the stream is solved again, so that it meets the dense model's.

After blocks were taken out, the next block reads a stream that it was not trained for. So, in execution order and on
the folded model's own states so far, the matrix through which a position writes to the stream (`down_proj` in a Llama)
is solved again by ridge regression, and before it, in the same way, the one that its attention writes by:

    min over ΔD of  Σ_t w_t ‖y_t − x_t − ΔD h_t‖² + λ Σ_i q_i ‖ΔD_i‖²

with h what the matrix reads, x the position's output as it is, y the dense model's state before the next position, and
q_i = Σ_t w_t h_ti² over all of the text, for column i of the matrix: what a column adds to the stream costs alike,
however much it reads (one ridge for all columns healed less, on texts of the same kind and of another; docs/log.md).
The healed output is what the next position reads. Nothing is added to the model: no tensor, no byte, no FLOP, and a
model that only dropped blocks stays in its stock architecture. Source: ours, after ReplaceMe's fused map (arXiv
2505.02819) and the layer-by-layer least squares of one-shot pruning.

What the attention writes is solved for what the output of the whole position lacks, as if the MLP would not read it.
The change is kept where the position, run again with it, is nearer on held-out sequences; then the last matrix is
solved for what is left.

A token weighs 1 / ‖r‖², r what the dense blocks from here to there add: every token's relative error counts alike
(see replacements.py). λ, and whether anything changes at all, is chosen on held-out sequences; of what is found a share
is taken (`TAKEN`).

Where a norm stands between the matrix and the stream (Gemma 2 and 3, OLMo 2), what it adds is D h · gain / size. The
fit holds each token's size as it was, which makes this linear again: it reads h / size, and what it finds is divided
by the gain. The held-out error is that of the norm itself.

Shapes: N sequences, T positions, M tokens of a batch, D width of the stream, F what the matrix reads.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import groupby, pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from foldsearch.errors import ModelError
from foldsearch.model.blocks import decoder_blocks
from foldsearch.model.evidence import hidden_of, other_inputs
from foldsearch.model.parts import Replaced
from foldsearch.model.places import (
    Place,
    Stored,
    StreamText,
    StreamWriter,
    first_touched,
    num_fitted,
    places_of,
)
from foldsearch.model.ridge import sums_for
from foldsearch.model.states import DepthStates, first_state
from foldsearch.progress import CountProgress

RIDGES = (1e-4, 1e-3, 1e-2, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)  # in squares of what a column reads
TRIED = 3  # ridges, the best of them and its neighbours
FIRST_RIDGE = 5  # of them; a matrix begins with the one that served such a matrix of the position before
# Of every change that is found, the share that is made. What is left of it is missed by the positions that follow, each
# of which makes its share of that: a correction is spread over many matrices in small steps, as in boosting, and none
# goes as far as the fitted text alone would have it. A larger ridge is not the same, and is worse (docs/log.md).
TAKEN = 0.6
TAKEN_BEFORE = 0.3  # of what an attention writes, which the MLP of its position is solved after (docs/log.md)


@dataclass(frozen=True, slots=True)
class HealedBlock:
    """A matrix of one position that was solved.

    Attributes:
        position: in the folded model.
        ridge: that was chosen, in squares of what a column reads; None where no change was best; 0 of methods that have
            none (fuse.py, rescale.py).
        before: mean relative squared error of the position's output on held-out tokens, as it was.
        after: the same, with what is taken of what was found on the others.
        path: of the matrix, in its block; empty where all of the position changed (rescale.py).
    """

    position: int
    ridge: float | None
    before: float
    after: float
    path: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class Healed:
    """What healing changed.

    Attributes:
        values: the new parameters by their names in the folded model.
        blocks: what was solved, in execution order; up to two matrices a position.
        tokens: of the text that was fitted to.
    """

    values: dict[str, Tensor]
    blocks: tuple[HealedBlock, ...]
    tokens: int

    @property
    def positions(self) -> list[HealedBlock]:
        """What was solved at each position as one: from before its first matrix to after its last one.

        The ridge is the last one that was chosen; None where none of its matrices was changed.
        """
        found: list[HealedBlock] = []
        for _, blocks in groupby(self.blocks, key=lambda block: block.position):
            first, *others = blocks
            ridges = [block.ridge for block in (first, *others) if block.ridge is not None]
            last = others[-1] if others else first
            found.append(
                HealedBlock(first.position, ridges[-1] if ridges else None, first.before, last.after)
            )
        return found


def heal(
    model: PreTrainedModel,
    states: DepthStates,
    ids_NT: Tensor,
    progress: CountProgress | None = None,
    stored: Stored | None = None,
) -> Healed:
    """Heal a folded model in place: what it is changed in are new tensors, so no other model's memory is written.

    Matrices that more than one position runs stay as they are, as do those of children: a change that is good at one
    depth would be made at others too; so does what an attention writes where the MLP after it stays. A network in place
    of blocks is solved in its last matrix. Experts are not solved, which would take each one's own tokens: a block that
    has some is solved in what its attention writes alone. What stands before the first change runs on the dense model's
    states, and is not solved.

    Args:
        model: of `foldsearch.model.fold.fold`, before `attach`.
        states: of the dense model, from `foldsearch.model.states`.
        ids_NT: the tokens that they are of.
        progress: called with (done, total) positions.
        stored: what a file keeps of a matrix. The model is then one of rounded weights, whose states differ from the
            dense model's from the first block on: every position is solved, and rounded before the next one reads it.

    Raises:
        InputError: there is only one sequence. ModelError: a state is no finite number.
    """
    return Healer(states, ids_NT, stored=stored).heal(model, progress)[0]


@dataclass(frozen=True, slots=True, eq=False)
class _Step:
    """What healing came to at one position.

    Attributes:
        own_NTD: the states after it.
        values: its new parameters, by their names in the block.
        blocks: what was solved.
        ridges: that served matrices so far, by their numbers: of what is not last in its position, and of what is.
    """

    own_NTD: Tensor
    values: dict[str, Tensor] = field(default_factory=dict)
    blocks: tuple[HealedBlock, ...] = ()
    ridges: tuple[int, int] = (FIRST_RIDGE, FIRST_RIDGE)

    @property
    def num_bytes(self) -> int:
        return sum(value.nbytes for value in (self.own_NTD, *self.values.values()))


class Healer:
    """Heals folded models of one dense model on one text, see `heal`.

    Plans that begin alike are healed alike up to where they part: that part is computed once, while it is kept. Several
    threads may heal at once, each a model of its own.
    """

    def __init__(
        self,
        states: DepthStates,
        ids_NT: Tensor,
        *,
        num_led: int = 0,
        most_bytes: int = 0,
        stored: Stored | None = None,
        states_only: bool = False,
        with_attention: bool = True,
    ) -> None:
        """See `heal` for the others.

        Args:
            states: of the dense model.
            ids_NT: the tokens that they are of.
            num_led: so many of the last sequences go along only: nothing is fitted to them or chosen on them.
            most_bytes: of the states and parameters that are kept; what was used longest ago goes first.
            stored: see `heal`.
            states_only: parameters are not kept, which take most of the memory: only the states of a model are right,
                it is not healed itself.
            with_attention: whether what attentions write is solved before the last matrix of a position.

        Raises:
            InputError: there is only one sequence to fit to.
        """
        self._states, self._ids_NT, self._stored = states, ids_NT[: states.shape[1]], stored
        num, length = self._ids_NT.shape
        self._num_text = num - num_led
        self._num_fitted = num_fitted(self._num_text, length)
        self._most_bytes, self._states_only = most_bytes, states_only
        self._with_attention = with_attention
        self._kept: OrderedDict[tuple[str, ...], _Step] = OrderedDict()
        self._kept_bytes = 0
        self.num_steps = 0  # positions that were computed, not taken from what is kept
        self._inputs: dict[int, Any] = {}  # what the model hands a block besides the states, by its home
        self._lock = threading.RLock()  # of what is kept

    @torch.no_grad()
    def heal(self, model: PreTrainedModel, progress: CountProgress | None = None) -> tuple[Healed, Tensor]:
        """Heal a folded model in place; also its states after the last position, for the sequences that are led."""
        places = _joined(places_of(model))
        if not self._with_attention:
            places = [replace(place, attention=None) for place in places]
        begin = 0 if self._stored else first_touched(places)
        with self._lock:
            if any(place.reads not in self._inputs for place in places):
                inputs = other_inputs(model, list(decoder_blocks(model)), self._ids_NT)
                self._inputs |= {place.reads: given for place, given in zip(places, inputs, strict=True)}
        own_NTD = first_state(model, self._ids_NT) if self._stored else self._states[begin]
        text = StreamText(self._states, own_NTD, (self._num_fitted, self._num_text), model.device)
        values: dict[str, Tensor] = {}
        blocks: list[HealedBlock] = []
        ridges = (FIRST_RIDGE, FIRST_RIDGE)
        for index, place in enumerate(places[begin:], begin):
            key = tuple(one.key for one in places[: index + 1])
            step = self._known(key)
            if step is None:
                step = self._step(place, text, ridges)
                self._keep(key, step)
            else:
                text.own_NTD = step.own_NTD
                for writer in place.writers:
                    writer.take(step.values)
            ridges = step.ridges
            values |= {f"{place.path}.{name}": value for name, value in step.values.items()}
            blocks += step.blocks
            if progress is not None:
                progress(index + 1 - begin, len(places) - begin)
        tokens = self._num_text * self._ids_NT.shape[1] if blocks else 0
        return Healed(values, tuple(blocks), tokens), text.own_NTD[self._num_text :]

    def _step(self, place: Place, text: StreamText, ridges: tuple[int, int]) -> _Step:
        others, named = self._inputs[place.reads]

        def run(own_BTD: Tensor) -> Tensor:
            return hidden_of(place.block(own_BTD, *others, **named))

        if self._most_bytes:
            text.own_NTD = text.own_NTD.clone()  # that of the position before is kept
        values: dict[str, Tensor] = {}
        blocks: list[HealedBlock] = []
        for writer in place.writers:
            share = TAKEN if writer is place.writer else TAKEN_BEFORE
            block, ridge = _heal_one(place, writer, text, run, (ridges[writer.is_last], share), self._stored)
            ridges = (ridges[0], ridge) if writer.is_last else (ridge, ridges[1])
            blocks.append(block)
            if block.ridge is not None and not self._states_only:
                values |= writer.parameters()
        if not blocks or not place.writers[-1].is_last:
            text.advance(run)
        return _Step(text.own_NTD, values, tuple(blocks), ridges)

    def _known(self, key: tuple[str, ...]) -> _Step | None:
        with self._lock:
            step = self._kept.get(key)
            if step is not None:
                self._kept.move_to_end(key)
            return step

    def _keep(self, key: tuple[str, ...], step: _Step) -> None:
        with self._lock:
            self.num_steps += 1
            if (
                not self._most_bytes or key in self._kept
            ):  # another thread was there first, with the same bits
                return
            self._kept[key] = step
            self._kept_bytes += step.num_bytes
            while self._kept_bytes > self._most_bytes and len(self._kept) > 1:
                _, oldest = self._kept.popitem(last=False)
                self._kept_bytes -= oldest.num_bytes


def is_healable(model: PreTrainedModel) -> bool:
    """Whether anything would be solved: something was taken out, and a position from there on has a matrix of its own.

    It costs nothing, where the dense model's states are still to be computed.
    """
    places = _joined(places_of(model))
    return any(place.writer for place in places[first_touched(places) :])


def _joined(places: list[Place]) -> list[Place]:
    """Before a network that adds nothing yet, a position is solved for what is to come after it.

    So both share the work: what a matrix of the position before can say of the gap, which reads more than the stream,
    and what the network can say of the rest. A network that was fitted says it all already.
    """
    found = list(places)
    for index, (place, after) in enumerate(pairwise(places)):
        network = after.writer.module if after.writer else None
        if isinstance(network, Replaced) and not bool(network.down.any()):
            key = f"{place.key} joined {after.meets}"
            found[index] = replace(place, meets=after.meets, is_touched=True, key=key)
    return found


def _heal_one(
    place: Place,
    writer: StreamWriter,
    text: StreamText,
    run: Callable[[Tensor], Tensor],
    start: tuple[int, float],
    stored: Stored | None,
) -> tuple[HealedBlock, int]:
    """Solve one matrix of a position.

    Afterwards the text has gone through the position if the matrix is its last; else it stands before it, as it did.

    Args:
        start: the ridge that served before, by its number, and the share of what is found that is taken.

    Returns:
        What is told, and the ridge that served, by its number.
    """
    first_ridge, share = start
    weight_NT1 = text.weights(place)
    sums = sums_for(writer, text.num_tokens)
    reads_NTD = text.own_NTD
    if not writer.is_last:
        text.own_NTD = reads_NTD.clone()
    read = text.read(run, writer)
    for here, h_MF in read.batches:
        if (part := text.part(here)) != "led":
            weight_M1 = weight_NT1[here].flatten(0, 1)
            sums.add(part, writer.features(h_MF), text.missing(place, here), weight_M1)

    solutions: dict[int, Tensor] = {}  # the best ridge is always one of the last that were tried

    def fitted(number: int) -> Tensor:
        if number not in solutions:
            solutions[number] = sums.solved(RIDGES[number], ("fitted",))
            if len(solutions) > TRIED:
                solutions.pop(next(iter(solutions)))
        return solutions[number]

    def missed(number: int, share: float = 1.0) -> float:
        known = sums.error(RIDGES[number], share)
        return text.missed(place, read, weight_NT1, share * fitted(number)) if known is None else known

    before = text.missed(place, read, weight_NT1)
    if not math.isfinite(before + sums.square):
        raise ModelError(
            f"healing must read finite states, but the output of position {place.position} of the folded model is "
            f"not a finite number. Compute in float32, or leave healing out."
        )
    number = _best_ridge(missed, first_ridge)
    after, solution_FD = missed(number, share), None
    if after < before:
        solution_FD = share * sums.solved(RIDGES[number], ("fitted", "held out"))
    if not writer.is_last:
        text.own_NTD = reads_NTD
    if solution_FD is not None and bool(solution_FD.isfinite().all()):
        if stored is not None:  # rounded, it may be no better than the rounded matrix that was there
            solution_FD = writer.as_stored(solution_FD, stored)
        if stored is not None or not writer.is_last:
            fitted_FD = share * fitted(number)
            if stored is not None:
                fitted_FD = writer.as_stored(fitted_FD, stored)
            after = (
                text.missed(place, read, weight_NT1, fitted_FD)
                if writer.is_last
                else _missed_after(writer, fitted_FD, lambda: text.missed_if_run(place, run, weight_NT1))
            )
        if after < before:
            if writer.is_last:
                text.take(read, solution_FD)
            else:
                writer.add(solution_FD)
            return HealedBlock(place.position, RIDGES[number], before, after, writer.path), number
    return HealedBlock(place.position, None, before, before, writer.path), number


def _missed_after(writer: StreamWriter, change_FD: Tensor, missed: Callable[[], float]) -> float:
    """The error of a position with a change of a matrix that an MLP or experts read the output of.

    What they make of it is no linear function of it, so the position runs with it. The matrix is then as it was.
    """
    old = writer.parameters()
    writer.add(change_FD)
    error = missed()
    writer.take(old)
    return error


def _best_ridge(error: Callable[[int], float], first: int) -> int:
    """The number of the ridge with the least error: downhill from the first, both ways."""
    errors = {first: error(first)}
    for way in (1, -1):
        number = min(errors, key=errors.__getitem__) + way
        while 0 <= number < len(RIDGES) and number not in errors:
            errors[number] = error(number)
            if errors[number] >= errors[number - way]:
                break
            number += way
    return min(errors, key=errors.__getitem__)
