"""The positions of a folded model, what each of them writes to the stream by, and a text that goes through them.

What changes a folded model in closed form (heal.py, fuse.py, rescale.py) goes through it position by position, on the
folded model's own states so far.

A position writes to the stream through a linear map: `down_proj` in a Llama. Where a norm stands between the matrix and
the stream (Gemma 2 and 3, OLMo 2), what it adds is D h · gain / size. A change is computed with each token's size held
as it was, which makes it linear again: it reads h / size, and what is found is divided by the gain.

Granite multiplies what a unit writes before it is added. What a matrix reads counts with that factor.

Shapes: N sequences, T positions, M tokens of a batch, D width of the stream, F what the matrix reads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from foldsearch.errors import InputError, ModelError
from foldsearch.model.blocks import Family, Unit, decoder_blocks, family_of, residual_multiplier
from foldsearch.model.folded import linears
from foldsearch.model.parts import Borrowed, Replaced
from foldsearch.model.states import DepthStates

BATCH_TOKENS = 2048
HELD_OUT = 0.25  # of the sequences, the last of them
LEAST_SIZE = 0.1  # of the mean squared size of what is added; smaller tokens weigh no more than such a one
LEAST_GAIN = 1e-2  # of the RMS of a norm's gains; a channel below it hardly gets through, and stays as it is


Stored = Callable[[Tensor], Tensor]
"""What a file keeps of a matrix, (O, I) float32: the same matrix, rounded."""


# ---- positions


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """A position of the folded model.

    Attributes:
        position: its number.
        key: all that its healing depends on, beside the positions before it.
        path: of its block, in the model.
        block: the block.
        reads: depth of the dense state that it should read.
        ends: depth up to which the dense model's blocks have had their turn after it.
        meets: depth of the dense state that its output should be; a gap follows where it is not `ends`.
        is_touched: whether it is not the dense block at its depth, or a gap follows.
        writer: what writes to the stream last, and is this position's alone; else None.
        attention: what the attention before it writes by, where that is this position's alone too; else None.
    """

    position: int
    key: str
    path: str
    block: nn.Module
    reads: int
    ends: int
    meets: int
    is_touched: bool
    writer: StreamWriter | None
    attention: StreamWriter | None = None

    @property
    def writers(self) -> tuple[StreamWriter, ...]:
        """What can be solved, in the order in which it runs; nothing where the last of it is not this position's."""
        if self.writer is None:
            return ()
        return (self.writer,) if self.attention is None else (self.attention, self.writer)

    @property
    def is_before_gap(self) -> bool:
        """Whether blocks that follow on it in the dense model are not there."""
        return self.meets > self.ends


def places_of(model: PreTrainedModel) -> list[Place]:
    """The positions of a folded model, in execution order."""
    family, slots = family_of(model.config), model.config.fold["slots"]
    num_blocks = model.config.fold["num_blocks"]
    shared = shared_parameters(model)
    places: list[Place] = []
    covered = 0  # depth up to which the dense model's blocks have had their turn
    for position, (block, slot) in enumerate(zip(decoder_blocks(model), slots, strict=True)):
        home = slot["home"]
        covered = max(covered, slot.get("replaced", {}).get("last", home) + 1)
        following = slots[position + 1]["home"] if position + 1 < len(slots) else num_blocks
        meets = max(covered, following)  # a block that runs again follows on what is covered already
        is_dense = "replaced" not in slot and home == slot["attention"] == slot["mlp"] == position
        given = block, slot, family, shared, residual_multiplier(model.config)
        places.append(
            Place(
                position,
                f"{meets} {sorted(slot.items())}",
                f"{family.blocks}.{position}",
                block,
                home,
                covered,
                meets,
                not is_dense or meets != home + 1,
                writer_of(*given),
                attention_writer_of(*given),
            )
        )
    return places


def first_touched(places: list[Place]) -> int:
    """The first position that is not as in the dense model, or is followed by a gap; their number if there is none."""
    return next((index for index, place in enumerate(places) if place.is_touched), len(places))


def shared_parameters(model: PreTrainedModel) -> set[int]:
    """The ids of parameters that more than one module runs."""
    found: set[int] = set()
    seen: set[int] = set()
    for module in model.modules():
        if isinstance(module, Borrowed):
            found |= {id(parameter) for parameter in module.owner.parameters()}
        for parameter in module.parameters(recurse=False):
            (found if id(parameter) in seen else seen).add(id(parameter))
    return found


def writer_of(
    block: nn.Module, slot: dict[str, Any], family: Family, shared: set[int], multiplier: float = 1.0
) -> StreamWriter | None:
    """What a position writes to the stream last; None where it is not the position's alone, or nothing is there.

    A mixture of experts has no one matrix that it writes by: there it is what the attention writes before it.

    Args:
        block: at the position.
        slot: of the position, from the model's config.
        family: of the model.
        shared: the ids of parameters that others run too.
        multiplier: of what a unit writes.
    """
    if isinstance(block.get_submodule(family.mlp.modules[-1]), Replaced):
        path = family.mlp.modules[-1]
        return StreamWriter.alone(block, path, path, shared)
    if slot["mlp"] is None and slot["attention"] is None:
        return None
    if slot["mlp"] is None or family.has_experts(block):
        if slot["attention"] is None:
            return None
        writer = unit_writer(block, family.attention_of(block), shared, multiplier)
        if writer is not None:
            writer.is_last = slot["mlp"] is None
        return writer
    return unit_writer(block, family.mlp, shared, multiplier)


def attention_writer_of(
    block: nn.Module, slot: dict[str, Any], family: Family, shared: set[int], multiplier: float = 1.0
) -> StreamWriter | None:
    """What the attention writes before an MLP that reads it; see `writer_of`."""
    is_replaced = isinstance(block.get_submodule(family.mlp.modules[-1]), Replaced)
    if is_replaced or slot["attention"] is None or slot["mlp"] is None or family.has_experts(block):
        return None
    writer = unit_writer(block, family.attention_of(block), shared, multiplier)
    if writer is not None:
        writer.is_last = False
    return writer


def unit_writer(
    block: nn.Module, unit: Unit, shared: set[int], multiplier: float = 1.0
) -> StreamWriter | None:
    """What a unit that is there writes to the stream; None where it is not this block's alone."""
    # Where a norm stands after a unit, its last linear comes last in the block too (a test looks).
    # Phi-3's attention, without such a norm, ends in another one.
    names = linears(block, unit)
    if not names:
        return None  # experts
    path = unit.output if unit.output in names else names[-1]
    # What ends a unit is a norm after it, unless it is the unit itself: a MLP that may be one of experts.
    norm = path if unit.output in unit.modules else unit.output
    writer = StreamWriter.alone(block, path, norm, shared)
    if writer is not None:
        writer.multiplier = multiplier
    return writer


# ---- what writes to the stream


class StreamWriter:
    """A linear map whose output is added to the stream, by itself or through a norm.

    Attributes:
        path: of the module, in its block.
        module: a linear, or a network in place of blocks.
        norm: that stands between the module and the stream, or None.
        has_bias: whether the module adds one.
        device: of its weights.
        multiplier: of what it writes, before it is added; a network's is undone by the network.
        is_last: whether nothing of its position reads what it writes; else an MLP or experts do, and a change of it is
            a change of theirs too.
    """

    multiplier: float = 1.0
    is_last: bool = True

    def __init__(self, path: str, module: nn.Module, norm: nn.Module | None) -> None:
        self.path, self.module, self.norm = path, module, norm
        self._weight = "down" if isinstance(module, Replaced) else "weight"
        self.has_bias = getattr(module, "bias", None) is not None
        self.device: torch.device = getattr(module, self._weight).device

    @classmethod
    def alone(cls, block: nn.Module, path: str, norm: str, shared: set[int]) -> StreamWriter | None:
        """The module of a block at a path, and the norm at another; None where others run its parameters too."""
        module = block.get_submodule(path)
        if isinstance(module, Borrowed) or any(id(parameter) in shared for parameter in module.parameters()):
            return None
        return cls(path, module, block.get_submodule(norm) if norm != path else None)

    def reads(self, given_MD: Tensor) -> Tensor:
        """What the matrix reads, (M, F), of what the module is given."""
        given_MD = given_MD.flatten(0, -2)
        return self.module.features(given_MD) if isinstance(self.module, Replaced) else given_MD

    def features(self, h_MF: Tensor) -> Tensor:
        """What the change of the stream is linear in, float32: h / size, and a column for the bias."""
        h_MF = h_MF.float()
        if self.has_bias:
            h_MF = torch.cat((h_MF, torch.ones_like(h_MF[:, :1])), 1)
        if self.norm is not None:
            h_MF = h_MF / rms(self._written(h_MF))
        return h_MF if self.multiplier == 1 else h_MF * self.multiplier

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
        change_MD: Tensor = new.float() - old.float()
        return change_MD * self.multiplier

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

    def as_stored(self, solution_FD: Tensor, stored: Stored) -> Tensor:
        """The solution after which the matrix has the numbers that are stored of it."""
        if self.norm is not None:
            solution_FD = solution_FD * self._per_gain()
        weight_FD = self._own_weight()
        new_FD = weight_FD + solution_FD
        inputs = len(new_FD) - self.has_bias
        new_FD[:inputs] = stored(new_FD[:inputs].T.contiguous()).T
        change_FD = new_FD - weight_FD
        if self.norm is not None:  # a channel that hardly gets through counts as one that does not
            change_FD = torch.where(self._per_gain() != 0, change_FD * self._gain(), 0.0)
        return change_FD

    def take(self, values: Mapping[str, Tensor]) -> None:
        """Take up what `parameters` told, where it is among these."""
        for name in self.parameters():
            if name in values:
                self._put(name.rpartition(".")[2], values[name])

    def parameters(self) -> dict[str, Tensor]:
        """What `add` changes, by its name in the block."""
        names = (self._weight, *(["bias"] if self.has_bias else []))
        return {f"{self.path}.{name}": getattr(self.module, name).detach() for name in names}

    def to_stream(self) -> Tensor:
        """What the features are multiplied by on their way to the stream, (F, D), float32."""
        weight_FD = self._own_weight()
        if self.norm is None:
            return weight_FD
        return weight_FD * self._gain()

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

    def _own_weight(self) -> Tensor:
        """The matrix, with a row for the bias, (F, D), float32."""
        weight_FD: Tensor = getattr(self.module, self._weight).float()
        if not isinstance(self.module, Conv1D):
            weight_FD = weight_FD.T
        if self.has_bias:
            weight_FD = torch.cat((weight_FD, self._bias.float()[None]))
        return weight_FD

    def _written(self, h_MF: Tensor) -> Tensor:
        """What the matrix gives, before the norm, of h with the column for the bias; float32."""
        return h_MF @ self._own_weight()

    def _gain(self) -> Tensor:
        """The norm's, by channel, (D), float32."""
        assert self.norm is not None
        like = next(self.norm.parameters())
        gain_D: Tensor = self.norm(torch.ones_like(like)[None])[0].float()
        return gain_D

    def _per_gain(self) -> Tensor:
        """1 / gain of the norm, by channel; 0 where hardly anything gets through."""
        gain_D = self._gain()
        least = LEAST_GAIN * rms(gain_D)
        return torch.where(gain_D.abs() > least, 1 / gain_D, 0.0)


def rms(values: Tensor) -> Tensor:
    """The root mean square over the last dimension, which is kept."""
    return values.square().mean(-1, keepdim=True).clamp_min(1e-12).sqrt()


# ---- the text


def num_fitted(num: int, length: int) -> int:
    """How many of the sequences of a text are fitted to; the others are held out.

    Raises:
        InputError: there is only one.
    """
    if num < 2:
        raise InputError(
            f"healing must have a sequence to fit to and another to choose on; got {num} of {length} tokens. "
            f"Give {2 * length} tokens or more."
        )
    return num - max(1, round(HELD_OUT * num))


@dataclass(frozen=True, slots=True, eq=False)
class Read:
    """What a matrix read of a text.

    Attributes:
        writer: whose matrix it is.
        batches: of sequences, each with (M, F).
    """

    writer: StreamWriter
    batches: list[tuple[slice, Tensor]]


class StreamText:
    """The folded model's own states at one depth, over all of the text, beside the dense model's at every depth.

    Attributes:
        own_NTD: in the dtype of the model, on its device.
    """

    def __init__(
        self, states: DepthStates, own_NTD: Tensor, ends: tuple[int, int], device: torch.device
    ) -> None:
        """`own_NTD`: as they begin. `ends`: of the sequences that are fitted to, and of those that are held out; others
        are led along.
        """
        self._states, self._ends = states, ends
        self.own_NTD = own_NTD.to(device, copy=True)

    @classmethod
    def of(cls, model: PreTrainedModel, states: DepthStates) -> StreamText:
        """A text as it comes to the first position of a model that is touched.

        Args:
            model: a folded one.
            states: of the dense model, from `foldsearch.model.states.residual_states`.

        Raises:
            InputError: there is only one sequence.
        """
        num, length = states.shape[1:3]
        own_NTD = states[first_touched(places_of(model))]
        return cls(states, own_NTD, (num_fitted(num, length), num), model.device)

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

    def read(self, run: Callable[[Tensor], Tensor], writer: StreamWriter) -> Read:
        """Let a position run; what a matrix of it reads: a few depths of states in all.

        Sequences that are led along do not run where the position is to run again.
        """
        read: list[tuple[slice, Tensor]] = []

        def keep(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            reads = writer.reads(args[0])
            # A network of a parallel block reads the states themselves, and what it reads is overwritten below.
            is_own = reads.untyped_storage().data_ptr() == self.own_NTD.untyped_storage().data_ptr()
            read.append((here, reads.clone() if is_own else reads))

        handle = writer.module.register_forward_pre_hook(keep)
        try:
            for here in self.batches():
                if writer.is_last or self.part(here) != "led":
                    self.own_NTD[here] = run(self.own_NTD[here])
        finally:
            handle.remove()
        return Read(writer, read)

    def missing(self, place: Place, here: slice, own_BTD: Tensor | None = None) -> Tensor:
        """What the output of a position lacks, which is the own state now or is given; (M, D), float32."""
        own_BTD = self.own_NTD[here] if own_BTD is None else own_BTD
        wanted_BTD = self._states[place.meets][here].to(own_BTD.device)
        return (wanted_BTD.float() - own_BTD.float()).flatten(0, 1)

    def missed_if_run(self, place: Place, run: Callable[[Tensor], Tensor], weight_NT1: Tensor) -> float:
        """Of the held-out tokens, the mean relative squared error that a position would leave; it does not run."""
        total, tokens = 0.0, 0
        for here in self.batches():
            if self.part(here) == "held out":
                left_MD = self.missing(place, here, run(self.own_NTD[here]))
                total += _square(left_MD, weight_NT1[here])
                tokens += len(left_MD)
        return math.inf if math.isnan(total) else total / tokens

    def missed(
        self,
        place: Place,
        read: Read,
        weight_NT1: Tensor,
        solution_FD: Tensor | None = None,
    ) -> float:
        """Of the held-out tokens, the mean relative squared error of a position's output.

        Args:
            place: the position, which has run.
            read: what its matrix read.
            weight_NT1: of the tokens.
            solution_FD: a change of its matrix, which its output is without.
        """
        total, tokens = 0.0, 0
        for here, h_MF in read.batches:
            if self.part(here) == "held out":
                left_MD = self.missing(place, here)
                if solution_FD is not None:
                    left_MD = left_MD - read.writer.change(h_MF, solution_FD)
                total += _square(left_MD, weight_NT1[here])
                tokens += len(left_MD)
        return math.inf if math.isnan(total) else total / tokens

    def take(self, read: Read, solution_FD: Tensor) -> None:
        """Change the last matrix of a position that has run, and its output."""
        for here, h_MF in read.batches:
            own_BTD = self.own_NTD[here]
            own_BTD += read.writer.change(h_MF, solution_FD).view_as(own_BTD).to(own_BTD.dtype)
        read.writer.add(solution_FD)

    def weights(self, place: Place) -> Tensor:
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


def _square(left_MD: Tensor, weight_BT1: Tensor) -> float:
    """The weighted sum of squares, summed in float64."""
    return float((left_MD.square() * weight_BT1.flatten(0, 1)).sum(dtype=torch.float64))
