"""Healing in closed form: what kept blocks write to the stream is solved again, so that it meets the dense model's.

After blocks were taken out, the next block reads a stream that it was not trained for. So, in execution order and on
the folded model's own states so far, the matrix through which a position writes to the stream (`down_proj` in a Llama)
is solved again by ridge regression:

    min over ΔD of  Σ_t w_t ‖y_t − x_t − ΔD h_t‖² + λ Σ_i q_i ‖ΔD_i‖²

with h what the matrix reads, x the position's output as it is, y the dense model's state before the next position, and
q_i = Σ_t w_t h_ti² for column i of the matrix: what a column adds to the stream costs alike, however much it reads
(one ridge for all columns healed less, on texts of the same kind and of another; docs/log.md).
The healed output is what the next position reads. Nothing is added to the model: no tensor, no byte, no FLOP, and a
model that only dropped blocks stays in its stock architecture. Source: ours, after ReplaceMe's fused map (arXiv
2505.02819) and the layer-by-layer least squares of one-shot pruning.

A token weighs 1 / ‖r‖², r what the dense blocks from here to there add: every token's relative error counts alike
(see replacements.py). λ, and whether anything changes at all, is chosen on held-out sequences.

Where a norm stands between the matrix and the stream (Gemma 2 and 3, OLMo 2), what it adds is D h · gain / size. The
fit holds each token's size as it was, which makes this linear again: it reads h / size, and what it finds is divided
by the gain. The held-out error is that of the norm itself.

Shapes: N sequences, T positions, M tokens of a batch, D width of the stream, F what the matrix reads.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from foldsearch.errors import InputError, ModelError
from foldsearch.model.blocks import Family, decoder_blocks, family_of
from foldsearch.model.evidence import hidden_of, other_inputs
from foldsearch.model.folded import linears
from foldsearch.model.parts import Borrowed, Replaced
from foldsearch.model.states import in_float64
from foldsearch.progress import CountProgress

RIDGES = (1e-4, 1e-3, 1e-2, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)  # in squares of what a column reads
LEAST_SQUARE = (
    1e-6  # of the mean square: a column that reads next to nothing counts as one that reads so much
)
FIRST_RIDGE = 5  # of them; a block begins with the one that served the block before it
BIAS_RIDGE = 1e-9  # a bias is free
HELD_OUT = 0.25  # of the sequences, the last of them
BATCH_TOKENS = 2048
LEAST_SIZE = 0.1  # of the mean squared size of what is added; smaller tokens weigh no more than such a one
LEAST_GAIN = 1e-2  # of the RMS of a norm's gains; a channel below it hardly gets through, and stays as it is


@dataclass(frozen=True, slots=True)
class HealedBlock:
    """One position that was solved.

    Attributes:
        position: in the folded model.
        ridge: that was chosen, in squares of what a column reads; None where no change was best.
        before: mean relative squared error of its output on held-out tokens, as it was.
        after: the same, with what was found on the others.
    """

    position: int
    ridge: float | None
    before: float
    after: float


@dataclass(frozen=True, slots=True, eq=False)
class Healed:
    """What healing changed.

    Attributes:
        values: the new parameters by their names in the folded model.
        blocks: what was solved, in execution order.
        tokens: of the text that was fitted to.
    """

    values: dict[str, Tensor]
    blocks: tuple[HealedBlock, ...]
    tokens: int


def heal(
    model: PreTrainedModel, states: Tensor, ids_NT: Tensor, progress: CountProgress | None = None
) -> Healed:
    """Heal a folded model in place: what it is changed in are new tensors, so no other model's memory is written.

    Matrices that more than one position runs stay as they are, as do those of children: a change that is good at one
    depth would be made at others too. A block without MLP is solved in what its attention writes, a network in place of
    blocks in its last matrix. What stands before the first change runs on the dense model's states, and is not solved.

    Args:
        model: of `foldsearch.model.fold.fold`, before `attach`.
        states: of the dense model, from `foldsearch.model.states.residual_states`.
        ids_NT: the tokens that they are of.
        progress: called with (done, total) positions.

    Raises:
        InputError: there is only one sequence. ModelError: a state is no finite number.
    """
    return Healer(states, ids_NT).heal(model, progress)[0]


@dataclass(frozen=True, slots=True, eq=False)
class _Step:
    """What healing came to at one position: the states after it, its new parameters, what is told, and the ridge."""

    own_NTD: Tensor
    values: dict[str, Tensor]
    block: HealedBlock | None
    ridge: int

    @property
    def num_bytes(self) -> int:
        return sum(value.nbytes for value in (self.own_NTD, *self.values.values()))


class Healer:
    """Heals folded models of one dense model on one text, see `heal`.

    Plans that begin alike are healed alike up to where they part: that part is computed once, while it is kept.
    """

    def __init__(self, states: Tensor, ids_NT: Tensor, *, num_led: int = 0, most_bytes: int = 0) -> None:
        """See `heal` for the others.

        Args:
            states: of the dense model.
            ids_NT: the tokens that they are of.
            num_led: so many of the last sequences go along only: nothing is fitted to them or chosen on them.
            most_bytes: of the states and parameters that are kept; what was used longest ago goes first.

        Raises:
            InputError: there is only one sequence to fit to.
        """
        self._states, self._ids_NT = states, ids_NT[: states.shape[1]]
        num, length = self._ids_NT.shape
        self._num_text = num - num_led
        if self._num_text < 2:
            raise InputError(
                f"healing must have a sequence to fit to and another to choose on; got {self._num_text} of {length} "
                f"tokens. Give {2 * length} tokens or more."
            )
        self._num_led, self._most_bytes = num_led, most_bytes
        self._kept: OrderedDict[tuple[str, ...], _Step] = OrderedDict()
        self._kept_bytes = 0
        self.num_steps = 0  # positions that were computed, not taken from what is kept
        self._inputs: dict[int, Any] = {}  # what the model hands a block besides the states, by its home

    @torch.no_grad()
    def heal(self, model: PreTrainedModel, progress: CountProgress | None = None) -> tuple[Healed, Tensor]:
        """Heal a folded model in place; also its states after the last position, for the sequences that are led."""
        places = _places(model)
        begin = _first_touched(places)
        if any(place.reads not in self._inputs for place in places):
            inputs = other_inputs(model, list(decoder_blocks(model)), self._ids_NT)
            self._inputs |= {place.reads: given for place, given in zip(places, inputs, strict=True)}
        num_fitted = self._num_text - max(1, round(HELD_OUT * self._num_text))
        text = _Text(self._states, begin, (num_fitted, self._num_text), model.device)
        values: dict[str, Tensor] = {}
        blocks: list[HealedBlock] = []
        ridge = FIRST_RIDGE
        for index, place in enumerate(places[begin:], begin):
            key = tuple(one.key for one in places[: index + 1])
            step = self._kept.get(key)
            if step is None:
                step = self._step(place, text, ridge)
                self._keep(key, step)
            else:
                self._kept.move_to_end(key)
                text.own_NTD = step.own_NTD
                for name, value in step.values.items():
                    assert place.writer is not None
                    place.writer.take(name, value)
            ridge = step.ridge
            values |= {f"{place.path}.{name}": value for name, value in step.values.items()}
            if step.block is not None:
                blocks.append(step.block)
            if progress is not None:
                progress(index + 1 - begin, len(places) - begin)
        tokens = self._num_text * self._ids_NT.shape[1] if blocks else 0
        return Healed(values, tuple(blocks), tokens), text.own_NTD[self._num_text :]

    def _step(self, place: _Place, text: _Text, ridge: int) -> _Step:
        self.num_steps += 1
        others, named = self._inputs[place.reads]

        def run(own_BTD: Tensor) -> Tensor:
            return hidden_of(place.block(own_BTD, *others, **named))

        if self._most_bytes:
            text.own_NTD = text.own_NTD.clone()  # that of the position before is kept
        if place.writer is None:
            text.advance(run)
            return _Step(text.own_NTD, {}, None, ridge)
        block, ridge = _heal_one(place, place.writer, text, run, ridge)
        values = place.writer.parameters() if block.ridge is not None else {}
        return _Step(text.own_NTD, values, block, ridge)

    def _keep(self, key: tuple[str, ...], step: _Step) -> None:
        if not self._most_bytes:
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
    places = _places(model)
    return any(place.writer for place in places[_first_touched(places) :])


def _first_touched(places: list[_Place]) -> int:
    return next((index for index, place in enumerate(places) if place.is_touched), len(places))


def _heal_one(
    place: _Place, writer: _Writer, text: _Text, run: Callable[[Tensor], Tensor], first_ridge: int
) -> tuple[HealedBlock, int]:
    """Solve one position, and let the text go through it; also the ridge that served, by its number."""
    weight_NT1 = text.weights(place)
    read: list[tuple[slice, Tensor]] = []  # what the matrix reads of all of the text: a few depths of states
    sums: dict[str, Any] = {part: _sums_for(writer, text) for part in ("fitted", "held out")}

    def keep(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        read.append((here, writer.reads(args[0])))

    handle = writer.module.register_forward_pre_hook(keep)
    try:
        for here in text.batches():
            text.own_NTD[here] = run(text.own_NTD[here])
            if (part := text.part(here)) in sums:
                features_MF = writer.features(read[-1][1])
                weight_M1 = weight_NT1[here].flatten(0, 1)
                sums[part].add(features_MF, text.missing(place, here), weight_M1)
    finally:
        handle.remove()
    held_out = [(here, h_MF) for here, h_MF in read if text.part(here) == "held out"]

    def missed(solution_FD: Tensor | None) -> float:
        """Of the held-out tokens, the mean relative squared error of the output."""
        total = 0.0
        for here, h_MF in held_out:
            left_MD = text.missing(place, here)
            if solution_FD is not None:
                left_MD = left_MD - writer.change(h_MF, solution_FD)
            total += float((left_MD.square() * weight_NT1[here].flatten(0, 1)).sum(dtype=torch.float64))
        error = total / sum(weight_NT1[here].numel() for here, _ in held_out)
        return math.inf if math.isnan(error) else error

    before = missed(None)
    if not math.isfinite(before + sums["fitted"].square):
        raise ModelError(
            f"healing must read finite states, but the output of position {place.position} of the folded model is "
            f"not a finite number. Compute in float32, or leave healing out."
        )
    number, after = _best_ridge(
        lambda number: missed(sums["fitted"].solved(RIDGES[number], writer)), first_ridge
    )
    solution_FD = (sums["fitted"] + sums["held out"]).solved(RIDGES[number], writer)
    if not (after < before and bool(solution_FD.isfinite().all())):
        return HealedBlock(place.position, None, before, before), number
    for here, h_MF in read:
        own_BTD = text.own_NTD[here]
        own_BTD += writer.change(h_MF, solution_FD).view_as(own_BTD).to(own_BTD.dtype)
    writer.add(solution_FD)
    return HealedBlock(place.position, RIDGES[number], before, after), number


def _best_ridge(error: Callable[[int], float], first: int) -> tuple[int, float]:
    """The number of the ridge with the least error, and that: downhill from the first, both ways."""
    errors = {first: error(first)}
    for way in (1, -1):
        number = min(errors, key=errors.__getitem__) + way
        while 0 <= number < len(RIDGES) and number not in errors:
            errors[number] = error(number)
            if errors[number] >= errors[number - way]:
                break
            number += way
    best = min(errors, key=errors.__getitem__)
    return best, errors[best]


# ---- positions


@dataclass(frozen=True, slots=True, eq=False)
class _Place:
    """A position of the folded model.

    Attributes:
        position: its number.
        key: all that its healing depends on, beside the positions before it.
        path: of its block, in the model.
        block: the block.
        reads: depth of the dense state that it should read.
        meets: depth of the dense state that its output should be.
        is_touched: whether it is not the dense block at its depth, or a gap follows.
        writer: what writes to the stream, and is this position's alone; else None.
    """

    position: int
    key: str
    path: str
    block: nn.Module
    reads: int
    meets: int
    is_touched: bool
    writer: _Writer | None


def _places(model: PreTrainedModel) -> list[_Place]:
    family, slots = family_of(model.config), model.config.fold["slots"]
    num_blocks = model.config.fold["num_blocks"]
    shared = _shared(model)
    places: list[_Place] = []
    covered = 0  # depth up to which the dense model's blocks have had their turn
    for position, (block, slot) in enumerate(zip(decoder_blocks(model), slots, strict=True)):
        home = slot["home"]
        covered = max(covered, slot.get("replaced", {}).get("last", home) + 1)
        following = slots[position + 1]["home"] if position + 1 < len(slots) else num_blocks
        meets = max(covered, following)  # a block that runs again follows on what is covered already
        is_dense = "replaced" not in slot and home == slot["attention"] == slot["mlp"] == position
        places.append(
            _Place(
                position,
                f"{meets} {sorted(slot.items())}",
                f"{family.blocks}.{position}",
                block,
                home,
                meets,
                not is_dense or meets != home + 1,
                _writer(block, slot, family, shared),
            )
        )
    return places


def _shared(model: PreTrainedModel) -> set[int]:
    """The ids of parameters that more than one module runs."""
    found: set[int] = set()
    seen: set[int] = set()
    for module in model.modules():
        if isinstance(module, Borrowed):
            found |= {id(parameter) for parameter in module.owner.parameters()}
        for parameter in module.parameters(recurse=False):
            (found if id(parameter) in seen else seen).add(id(parameter))
    return found


def _writer(block: nn.Module, slot: dict[str, Any], family: Family, shared: set[int]) -> _Writer | None:
    unit = family.mlp
    if isinstance(block.get_submodule(unit.modules[-1]), Replaced):
        path = norm = unit.modules[-1]
    else:
        if slot["mlp"] is None:
            unit = family.attention
        if slot["mlp" if unit is family.mlp else "attention"] is None:
            return None
        # Where a norm stands after a unit, its last linear comes last in the block too (a test looks).
        # Phi-3's attention, without such a norm, ends in another one.
        norm = unit.output
        path = norm if norm in linears(block, unit) else linears(block, unit)[-1]
    module = block.get_submodule(path)
    if isinstance(module, Borrowed) or any(id(parameter) in shared for parameter in module.parameters()):
        return None
    return _Writer(path, module, block.get_submodule(norm) if norm != path else None)


# ---- what writes to the stream


class _Writer:
    """A linear map whose output is added to the stream, by itself or through a norm.

    Attributes:
        path: of the module, in its block.
        module: a linear, or a network in place of blocks.
        norm: that stands between the module and the stream, or None.
        has_bias: whether the module adds one.
        device: of its weights.
    """

    def __init__(self, path: str, module: nn.Module, norm: nn.Module | None) -> None:
        self.path, self.module, self.norm = path, module, norm
        self._weight = "down" if isinstance(module, Replaced) else "weight"
        self.has_bias = getattr(module, "bias", None) is not None
        self.device: torch.device = getattr(module, self._weight).device

    def reads(self, given_MD: Tensor) -> Tensor:
        """What the matrix reads, (M, F), of what the module is given."""
        given_MD = given_MD.flatten(0, -2)
        return self.module.features(given_MD) if isinstance(self.module, Replaced) else given_MD

    def features(self, h_MF: Tensor) -> Tensor:
        """What the change of the stream is linear in, float32: h / size, and a column for the bias."""
        h_MF = h_MF.float()
        if self.has_bias:
            h_MF = torch.cat((h_MF, torch.ones_like(h_MF[:, :1])), 1)
        return h_MF if self.norm is None else h_MF / _rms(self._written(h_MF))

    def change(self, h_MF: Tensor, solution_FD: Tensor) -> Tensor:
        """What a solution adds to the stream, (M, D), float32."""
        if self.norm is None:
            return self.features(h_MF) @ solution_FD
        h_MF = h_MF.float()
        if self.has_bias:
            h_MF = torch.cat((h_MF, torch.ones_like(h_MF[:, :1])), 1)
        old_MD = self._written(h_MF)
        new_MD = old_MD + h_MF @ (solution_FD * self._per_gain())
        dtype = next(self.norm.parameters()).dtype
        new, old = self.norm(new_MD.to(dtype)), self.norm(old_MD.to(dtype))
        return new.float() - old.float()  # type: ignore[no-any-return]

    def add(self, solution_FD: Tensor) -> None:
        """Take up a solution: new parameters, not the old ones' memory."""
        if self.norm is not None:
            solution_FD = solution_FD * self._per_gain()
        weight: Tensor = getattr(self.module, self._weight)
        inputs = len(solution_FD) - self.has_bias
        change = solution_FD[:inputs] if isinstance(self.module, Conv1D) else solution_FD[:inputs].T
        self._put(self._weight, weight.float() + change)
        if self.has_bias:
            self._put("bias", self._bias.float() + solution_FD[inputs])

    def take(self, name: str, value: Tensor) -> None:
        """Take up what `parameters` told."""
        self._put(name.rpartition(".")[2], value)

    def parameters(self) -> dict[str, Tensor]:
        """What `add` changes, by its name in the block."""
        names = (self._weight, *(["bias"] if self.has_bias else []))
        return {f"{self.path}.{name}": getattr(self.module, name).detach() for name in names}

    @property
    def num_features(self) -> int:
        """Of what the change is linear in."""
        weight: Tensor = getattr(self.module, self._weight)
        return weight.shape[0 if isinstance(self.module, Conv1D) else 1] + self.has_bias

    @property
    def _bias(self) -> Tensor:
        bias = self.module.bias
        assert isinstance(bias, Tensor)
        return bias

    def _put(self, name: str, value: Tensor) -> None:
        old: Tensor = getattr(self.module, name)
        setattr(self.module, name, nn.Parameter(value.to(old.dtype), requires_grad=False))

    def _written(self, h_MF: Tensor) -> Tensor:
        """What the matrix gives, before the norm, of h with the column for the bias; float32."""
        weight_FD: Tensor = getattr(self.module, self._weight).float()
        if not isinstance(self.module, Conv1D):
            weight_FD = weight_FD.T
        if self.has_bias:
            weight_FD = torch.cat((weight_FD, self._bias.float()[None]))
        return h_MF @ weight_FD

    def _per_gain(self) -> Tensor:
        """1 / gain of the norm, by channel; 0 where hardly anything gets through."""
        assert self.norm is not None
        like = next(self.norm.parameters())
        gain_D: Tensor = self.norm(torch.ones_like(like)[None])[0].float()
        least = LEAST_GAIN * _rms(gain_D)
        return torch.where(gain_D.abs() > least, 1 / gain_D, 0.0)


def _rms(values: Tensor) -> Tensor:
    return values.square().mean(-1, keepdim=True).clamp_min(1e-12).sqrt()


# ---- the text


class _Text:
    """The folded model's own states at one depth, over all of the text, beside the dense model's at every depth.

    Attributes:
        own_NTD: in the dtype of the model, on its device.
    """

    def __init__(self, states: Tensor, depth: int, ends: tuple[int, int], device: torch.device) -> None:
        """`ends`: of the sequences that are fitted to, and of those that are held out; others are led along."""
        self._states, self._ends = states, ends
        self.own_NTD = states[depth].to(device, copy=True)

    def batches(self) -> Iterator[slice]:
        """Of sequences; all of a batch are of one part."""
        num, length = self.own_NTD.shape[:2]
        step = max(1, BATCH_TOKENS // length)
        for first, last in pairwise((0, *self._ends, num)):
            for start in range(first, last, step):
                yield slice(start, min(start + step, last))

    def part(self, here: slice) -> str:
        """Whether a batch is "fitted", "held out" or "led"."""
        fitted, held_out = self._ends
        return "fitted" if here.stop <= fitted else "held out" if here.stop <= held_out else "led"

    @property
    def num_tokens(self) -> int:
        """Of those that are fitted to or held out."""
        return self._ends[1] * self.own_NTD.shape[1]

    def advance(self, run: Callable[[Tensor], Tensor]) -> None:
        """Let a position run."""
        for here in self.batches():
            self.own_NTD[here] = run(self.own_NTD[here])

    def missing(self, place: _Place, here: slice) -> Tensor:
        """What the output of a position, which is the own state now, lacks; (M, D), float32."""
        wanted_BTD = self._states[place.meets][here].to(self.own_NTD.device)
        return (wanted_BTD.float() - self.own_NTD[here].float()).flatten(0, 1)

    def weights(self, place: _Place) -> Tensor:
        """1 / size² of what the dense model adds from what a position reads to what it should meet, (N, T, 1)."""
        before, after = self._states[place.reads], self._states[place.meets]
        sizes_NT1 = torch.cat(
            [
                (after[here].float() - before[here].float()).square().sum(-1, keepdim=True)
                for here in self.batches()
                if self.part(here) != "led"
            ]
        )
        mean = float(sizes_NT1.mean(dtype=torch.float64))
        if not math.isfinite(mean):
            raise ModelError(
                f"healing must read finite states, but the dense model's at depth {place.reads} or {place.meets} are "
                "not finite numbers. Compute in float32, or leave healing out."
            )
        return (1 / sizes_NT1.clamp_min(max(LEAST_SIZE * mean, 1e-12))).to(self.own_NTD.device)


def _sums_for(writer: _Writer, text: _Text) -> _Moments | _Tokens:
    """What solves faster: sums over features, or over tokens where there are fewer of these."""
    return _Tokens() if text.num_tokens < writer.num_features else _Moments()


class _Tokens:
    """The weighted tokens themselves, for few of them: one equation a token (the kernel form of ridge regression)."""

    def __init__(self) -> None:
        self._features: list[Tensor] = []
        self._wanted: list[Tensor] = []
        self._joined: _Joined | None = None  # once, for all ridges
        self.square = 0.0

    def __add__(self, other: _Tokens) -> _Tokens:
        both = _Tokens()
        both._features, both._wanted = self._features + other._features, self._wanted + other._wanted
        both.square = self.square + other.square
        return both

    def add(self, features_MF: Tensor, wanted_MD: Tensor, weight_M1: Tensor) -> None:
        """Take up the tokens of a batch."""
        root_M1 = weight_M1.sqrt()
        self._features.append(features_MF * root_M1)
        self._wanted.append(wanted_MD * root_M1)
        self.square += float(self._wanted[-1].square().sum(dtype=torch.float64))

    def solved(self, ridge: float, writer: _Writer) -> Tensor:
        """As of `_Moments`: R⁻¹ Fᵀ (F R⁻¹ Fᵀ + 1)⁻¹ Y, R the diagonal of the ridges."""
        if self._joined is None:
            self._joined = _Joined.of(torch.cat(self._features), torch.cat(self._wanted), writer.has_bias)
        joined = self._joined
        regular_MM = joined.products_MM / ridge
        regular_MM += joined.bias_products_MM
        regular_MM.diagonal().add_(1.0)
        factor_MM, failed = torch.linalg.cholesky_ex(regular_MM)
        if failed:
            size = (len(joined.scaled_FM) + writer.has_bias, joined.wanted_MD.shape[1])
            return torch.full(size, math.nan, device=writer.device)
        dual_MD = torch.cholesky_solve(joined.wanted_MD, factor_MM)
        solution_FD = joined.scaled_FM @ (dual_MD / ridge).to(joined.scaled_FM)
        if writer.has_bias:
            solution_FD = torch.cat((solution_FD, (joined.scaled_bias_1M @ dual_MD).to(solution_FD)))
        return solution_FD


@dataclass(frozen=True, slots=True, eq=False)
class _Joined:
    """Tokens as they are solved, whatever the ridge. Features are without the bias; products are float64.

    Attributes:
        scaled_FM: features over the squares that their penalty goes by, float32.
        products_MM: of features and scaled features.
        wanted_MD: float64.
        scaled_bias_1M, bias_products_MM: of the bias, its ridge in them; 0 without one.
    """

    scaled_FM: Tensor
    products_MM: Tensor
    wanted_MD: Tensor
    scaled_bias_1M: Tensor
    bias_products_MM: Tensor

    @classmethod
    def of(cls, features_MF: Tensor, wanted_MD: Tensor, has_bias: bool) -> _Joined:
        size = features_MF.shape[1] - has_bias
        own_MF = features_MF[:, :size]
        square_F = own_MF.square().sum(0)
        mean = float(square_F.mean())
        scaled_MF = own_MF / square_F.clamp_min(LEAST_SQUARE * mean)
        products_MM = in_float64(scaled_MF @ own_MF.T)
        bias_1M = in_float64(features_MF[:, size:].T) if has_bias else products_MM.new_zeros(1, 1)
        scaled_1M = bias_1M / (BIAS_RIDGE * mean) if has_bias else bias_1M
        return cls(scaled_MF.T, products_MM, in_float64(wanted_MD), scaled_1M, bias_1M.T @ scaled_1M)


class _Moments:
    """Weighted sums over tokens, float64: FᵀF (F, F), FᵀR (F, D) and ‖R‖²."""

    def __init__(self) -> None:
        self.gram_FF = self.cross_FD = torch.zeros(1, 1, dtype=torch.float64)
        self.square = 0.0

    def __add__(self, other: _Moments) -> _Moments:
        both = _Moments()
        both.gram_FF, both.cross_FD = self.gram_FF + other.gram_FF, self.cross_FD + other.cross_FD
        both.square = self.square + other.square
        return both

    def add(self, features_MF: Tensor, wanted_MD: Tensor, weight_M1: Tensor) -> None:
        """Take up the tokens of a batch."""
        root_M1 = weight_M1.sqrt()
        features_MF, wanted_MD = features_MF * root_M1, wanted_MD * root_M1
        # The products of a batch in float32, their sums over batches in float64: the least ridge is far above what
        # that leaves open, and products in float64 take twice the time.
        gram_FF, cross_FD = in_float64(features_MF.T @ features_MF), in_float64(features_MF.T @ wanted_MD)
        self.gram_FF = self.gram_FF.to(gram_FF.device) + gram_FF
        self.cross_FD = self.cross_FD.to(cross_FD.device) + cross_FD
        self.square += float(wanted_MD.square().sum(dtype=torch.float64))

    def solved(self, ridge: float, writer: _Writer) -> Tensor:
        """The ridge solution, (F, D), float32, on the writer's device; no numbers where rounding leaves none."""
        size = len(self.gram_FF) - writer.has_bias
        diagonal = self.gram_FF.diagonal()
        mean = float(diagonal[:size].mean())
        regular_FF = self.gram_FF.clone()
        regular_FF.diagonal()[:size] += ridge * diagonal[:size].clamp_min(LEAST_SQUARE * mean)
        regular_FF.diagonal()[size:] += BIAS_RIDGE * mean
        factor_FF, failed = torch.linalg.cholesky_ex(regular_FF)
        if failed:
            return torch.full_like(self.cross_FD, math.nan, device=writer.device, dtype=torch.float32)
        return torch.cholesky_solve(self.cross_FD, factor_FF).to(writer.device, torch.float32)
