"""What a plan costs on a device: arithmetic over a table that fvcore measured once on the dense model.

Units: sizes in bytes, compute in MACs (one multiply and add; 1 MAC = 2 FLOPs) per token, gigabytes decimal, times in
milliseconds. A gigabyte budget bounds weights + adapters + KV cache + activations, for one target. Times are there
where they were measured (see `foldsearch.plan.latency`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from decimal import ROUND_CEILING, Context, Decimal
from typing import Literal

from foldsearch.errors import BudgetError
from foldsearch.plan.kinds import kind_named
from foldsearch.plan.latency import Latency, Work
from foldsearch.plan.plan import UNITS, FoldPlan, Replacement
from foldsearch.plan.stored import DTYPE_TYPES, TYPES, VECTOR_BYTES, Matrix, StoredTypes, cache_bytes

GB = 10**9
EXPERTS = "experts"
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
STATE = 1  # a window that is none: what is kept is a state of fixed size
CELLS = 256  # tokens by which llama.cpp's caches grow
WindowCache = Literal["window", "chunk", "all"]


@dataclass(frozen=True, slots=True)
class Target:
    """The device side of the price.

    dtype: of the stored weights, the KV cache and the activations.
    kv_cache: the type that keys and values are stored in (`foldsearch.plan.stored`); empty where they are of the dtype.
    context: tokens held in the KV cache. batch: sequences served at once.
    prefill_chunk: tokens that go through the model at once when a prompt is read.
    runtime: the name of what runs the export (see `foldsearch.runtimes`).
    shares_weights: whether it stores a shared weight once; else it stores it again for every child, adapters merged.
    holds_rest: whether an export of a text part is the whole model, whose other parts are then priced too.
    weights: the type that matrices are stored in (`foldsearch.plan.stored`); empty where all weights are of the dtype.
    own_cache: the type of keys and values where `kv_cache` names none; empty where that is the dtype.
    window_cache: what the cache of a block that sees a window holds: the "window"; the window and a "chunk"; or "all"
    tokens. In the second case caches grow by whole `CELLS`, those of other blocks too.
    """

    dtype: str = "bfloat16"
    context: int = 2048
    batch: int = 1
    prefill_chunk: int = 512
    runtime: str = "folded"
    shares_weights: bool = True
    weights: str = ""
    holds_rest: bool = False
    kv_cache: str = ""
    own_cache: str = ""
    window_cache: WindowCache = "window"

    @property
    def rounds(self) -> bool:
        """Whether what is stored has other numbers than the dtype's: it is then another model, and measured as one."""
        return self.weights not in ("", DTYPE_TYPES[self.dtype]) or self.rounds_kv_cache

    @property
    def rounds_kv_cache(self) -> bool:
        """Whether keys and values are stored in fewer bits than any dtype has."""
        return bool(self.kv_cache) and TYPES[self.kv_cache].block > 1

    @property
    def types(self) -> StoredTypes:
        """The types of what is stored; empty ones where it is as the dtype is."""
        return StoredTypes(self.weights, self.kv_cache)

    def cached_bytes(self, numbers: int) -> int:
        """Of keys and values."""
        if stored := self.kv_cache or self.own_cache:
            return cache_bytes(numbers, stored)
        return numbers * DTYPE_BYTES[self.dtype]

    def cached_tokens(self, window: int, tokens: int) -> int:
        """How many of so many tokens the cache of a block has room for that sees a window of them; 0: that sees all."""
        if self.window_cache == "chunk":
            tokens = _in_cells(tokens)
            window = _in_cells(window + self.prefill_chunk) if window > STATE else window
        elif self.window_cache == "all":
            window = STATE if window == STATE else 0
        return min(tokens, window) if window else tokens

    def storing(self, types: StoredTypes) -> Target:
        """The same with what is stored in other types, but for those that are empty."""
        return replace(self, weights=types.weights or self.weights, kv_cache=types.kv_cache or self.kv_cache)


def _in_cells(tokens: int) -> int:
    """Whole `CELLS` that so many tokens fit in."""
    return -(-tokens // CELLS) * CELLS


@dataclass(frozen=True, slots=True)
class UnitCost:
    """The attention or the MLP of one block, as measured on the dense model.

    weights: parameters of its linears (they can be borrowed). norms: parameters that stay with the block; also experts,
    all of them, and what chooses among them.
    output_norm: parameters of an output norm γ on this unit.
    macs: per token, whatever the context; of experts those that a token goes to. context_macs: per token and per token
    of context.
    adapter_width: sum over its linears of inputs + outputs (parameters, and MACs per token, of rank 1).
    kv_width: numbers cached per token. window: tokens its attention can see (0: all of them); 1 where `kv_width` is a
    state that does not grow (LFM2's short convolution).
    matrices: of its linears; the rest of `weights` are biases. kind: blocks run the weights of those of the same kind
    only, and nothing of experts (`EXPERTS`).
    """

    weights: int
    norms: int
    output_norm: int
    macs: int
    context_macs: int
    adapter_width: int
    kv_width: int = 0
    window: int = 0
    matrices: tuple[Matrix, ...] = ()
    kind: str = ""


@dataclass(frozen=True, slots=True)
class BlockCost:
    """One block of the dense model. other: parameters of the block that belong to neither unit."""

    attention: UnitCost
    mlp: UnitCost
    other: int = 0


@dataclass(frozen=True, slots=True)
class CostTable:
    """The dense model, measured (see foldsearch.model.measure).

    width: of the residual stream. fixed_weights: parameters outside the blocks (a tied head counted once).
    fixed_macs: MACs per token outside the blocks and the head. head_macs: of one token's logits.
    activation_width, activation_fixed: peak of live activation numbers while a block runs, per token that goes
    through at once, and the part that does not grow with them. vocabulary: logits of one token.
    by_position: whether attention is scaled by a block's position (GPT-2's scale_attn_by_inverse_layer_idx).
    family: the model type of transformers.
    fixed_matrices: outside the blocks; the rest of `fixed_weights` are norms and biases.
    latencies: how fast it is on this machine, in each type of weights that was asked for (see `foldsearch.calibrate`).
    rest_weights: parameters of the model that also sees but for its text part, which is what all else here is of; 0
    where the model is one of text alone.
    """

    width: int
    fixed_weights: int
    fixed_macs: int
    head_macs: int
    activation_width: int
    activation_fixed: int
    vocabulary: int
    blocks: tuple[BlockCost, ...]
    by_position: bool = False
    family: str = ""
    fixed_matrices: tuple[Matrix, ...] = ()
    latencies: tuple[Latency, ...] = ()
    rest_weights: int = 0

    def outside_weights(self, target: Target) -> int:
        """Parameters outside the blocks that an export for a target holds."""
        return self.fixed_weights + (self.rest_weights if target.holds_rest else 0)

    def latency_on(self, target: Target) -> Latency | None:
        """What was measured for a target; None where nothing was."""
        for latency in self.latencies:
            if latency.types == target.types and latency.runtime == target.runtime:
                return latency
        return None

    @property
    def is_uniform(self) -> bool:
        """Whether each block could run the weights of each other: not in a hybrid, nor in a mixture of experts."""
        kinds = {(block.attention.kind, block.mlp.kind) for block in self.blocks}
        return len(kinds) == 1 and all(mlp != EXPERTS for _, mlp in kinds)

    def attends(self, block: int) -> bool:
        """Whether a block looks at other tokens; in a hybrid some have another mixer."""
        return self.blocks[block].attention.context_macs > 0

    def can_fold(self, plan: FoldPlan) -> bool:
        """Whether the blocks that a plan has share weights are of one kind, and one that it runs attends."""
        for name in UNITS:
            kinds = [getattr(block, name).kind for block in self.blocks]
            if name == "attention" and len(set(kinds)) > 1:
                run = [source for _, _, source, _ in plan.runs(name)]
                run += [slot.first for slot in plan.slots if isinstance(slot, Replacement) and slot.is_block]
                if not any(map(self.attends, run)):
                    return False
            if any(
                not own and (EXPERTS in kinds or kinds[source] != kinds[slot.home])
                for _, slot, source, own in plan.runs(name)
            ):
                return False
        return True


@dataclass(frozen=True, slots=True)
class Cost:
    """Every term of a plan's price.

    weight_bytes: stored weights and norms. adapter_bytes: what children carry (adapters, γ) and replacements.
    kv_bytes: at the target's context and batch. activation_bytes: peak working set of one prefill chunk.
    prefill_macs: per token of a prompt of `context` tokens, logits for its last token only.
    decode_macs: for one more token when the cache is full.
    prompt_ms, decode_ms: milliseconds to read a prompt of as many tokens as `CostTable.latencies` says, and to write
    one token after it, on the machine that was measured; None where none was.
    """

    weight_bytes: int
    adapter_bytes: int
    kv_bytes: int
    activation_bytes: int
    prefill_macs: float
    decode_macs: int
    prompt_ms: float | None = None
    decode_ms: float | None = None

    @property
    def memory_bytes(self) -> int:
        """Everything that takes memory while the model runs: what a budget of memory bounds."""
        return self.weight_bytes + self.adapter_bytes + self.kv_bytes + self.activation_bytes

    @property
    def stored_bytes(self) -> int:
        """The weights in the file of an export, adapters and replacements included."""
        return self.weight_bytes + self.adapter_bytes

    @property
    def flops(self) -> int:
        """FLOPs per token at decode: what a budget of FLOPs bounds, and an objective of the search."""
        return 2 * self.decode_macs


@dataclass(frozen=True, slots=True)
class Budget:
    """Upper bounds; None is no bound. A time that was not measured keeps every bound.

    Raises:
        BudgetError: a bound is not positive.
    """

    memory_bytes: int | None = None
    flops: int | None = None
    prompt_ms: float | None = None
    decode_ms: float | None = None

    def __post_init__(self) -> None:
        for name, bound in (
            ("memory is at least 1 byte", self.memory_bytes),
            ("FLOPs per token are at least 1", self.flops),
        ):
            if bound is not None and bound < 1:
                raise BudgetError(f"a budget's {name}, got {bound}. Raise it.")
        for name, ms in (("prompt", self.prompt_ms), ("token", self.decode_ms)):
            if ms is not None and not ms > 0:
                raise BudgetError(
                    f"a budget's milliseconds for a {name} must be above 0, got {ms:g}. Raise it."
                )

    @property
    def is_open(self) -> bool:
        """Whether nothing is bounded."""
        return self == Budget()

    def violations(self, cost: Cost) -> dict[str, float]:
        """For each bound, how far the cost is above it as a share of the bound; feasible where all are <= 0."""
        found = {}
        if self.memory_bytes is not None:
            found["memory"] = cost.memory_bytes / self.memory_bytes - 1
        if self.flops is not None:
            found["flops"] = cost.flops / self.flops - 1
        if self.prompt_ms is not None and cost.prompt_ms is not None:
            found["prompt_ms"] = cost.prompt_ms / self.prompt_ms - 1
        if self.decode_ms is not None and cost.decode_ms is not None:
            found["decode_ms"] = cost.decode_ms / self.decode_ms - 1
        return found

    def excess(self, cost: Cost) -> str:
        """By how much the cost is above the budget, in words; empty where it keeps every bound."""
        above = [f"{name} {share:+.1%}" for name, share in self.violations(cost).items() if share > 0]
        return f"above the budget: {', '.join(above)}" if above else ""

    def admits(self, cost: Cost) -> bool:
        """Whether the cost keeps every bound."""
        return (
            (self.memory_bytes is None or cost.memory_bytes <= self.memory_bytes)
            and (self.flops is None or cost.flops <= self.flops)
            and (self.prompt_ms is None or cost.prompt_ms is None or cost.prompt_ms <= self.prompt_ms)
            and (self.decode_ms is None or cost.decode_ms is None or cost.decode_ms <= self.decode_ms)
        )


def no_less(value: float, digits: int = 6) -> str:
    """A number in so many digits, rounded up: what is told as the least that a budget may be can be typed as one."""
    up = Context(prec=digits, rounding=ROUND_CEILING).create_decimal(Decimal(value))
    return f"{float(up):.{digits}g}"


def parse_flops(text: str, dense: Cost) -> int:
    """A FLOPs bound: `0.8x` of dense, or FLOPs per token such as `2.5e8`.

    Raises:
        BudgetError: not a positive number.
    """
    number = text.strip().removesuffix("x")
    try:
        value = float(number)
    except ValueError:
        value = 0.0
    flops = value * dense.flops if text.strip().endswith("x") else value
    if not 1 <= flops < float("inf"):  # below one: a share of dense whose x was forgotten
        raise BudgetError(
            f"a budget of FLOPs must be FLOPs per token at decode (2.5e8) or a share of dense (0.8x); got '{text}'."
        )
    return int(flops)


def in_stored_units(table: CostTable, target: Target) -> tuple[CostTable, int]:
    """The table with its weights in the units that the target stores, and the bytes of a unit.

    A unit is a number of the target's dtype; where the target has a type of weights, it is a byte. Adapters, networks
    in place of blocks, and what is beside a text part, stay numbers: what has a type holds none of them.
    """
    if not target.weights:
        return table, DTYPE_BYTES[target.dtype]
    for known, weights, found in _latest:
        if known is table and weights == target.weights:
            return found, 1
    found = _in_bytes(table, target.weights)
    _latest[:] = [(table, target.weights, found), *_latest[:15]]
    return found, 1


# Found by identity: hashing a table takes longer than pricing.
_latest: list[tuple[CostTable, str, CostTable]] = []


def _in_bytes(table: CostTable, weights: str) -> CostTable:
    def of(matrices: tuple[Matrix, ...], numbers: int) -> int:
        vectors = numbers - sum(matrix.numbers for matrix in matrices)
        return sum(matrix.stored_bytes(weights) for matrix in matrices) + VECTOR_BYTES * vectors

    def unit(cost: UnitCost) -> UnitCost:
        return replace(
            cost,
            weights=of(cost.matrices, cost.weights),
            norms=VECTOR_BYTES * cost.norms,
            output_norm=VECTOR_BYTES * cost.output_norm,
        )

    blocks = tuple(
        BlockCost(unit(block.attention), unit(block.mlp), VECTOR_BYTES * block.other)
        for block in table.blocks
    )
    return replace(table, blocks=blocks, fixed_weights=of(table.fixed_matrices, table.fixed_weights))


def price(plan: FoldPlan, table: CostTable, target: Target) -> Cost:
    """The cost of a plan, by arithmetic (about 20 µs for 30 blocks).

    Raises:
        BudgetError: the table is of a model with another number of blocks.
    """
    if plan.num_blocks != len(table.blocks):
        raise BudgetError(f"the plan is for {plan.num_blocks} blocks, the model has {len(table.blocks)}.")
    latency = table.latency_on(target)
    table, unit_bytes = in_stored_units(table, target)
    sums = _sum(plan, table, target, latency.tokens if latency else 0)
    return sums.cost(target, unit_bytes, latency)


def work(plan: FoldPlan, table: CostTable, target: Target, tokens: int) -> Work:
    """What the blocks of a plan do for a prompt of so many tokens, and for a token after it."""
    table, unit_bytes = in_stored_units(table, target)
    return _sum(plan, table, target, tokens).work(unit_bytes, target)


def _sum(plan: FoldPlan, table: CostTable, target: Target, tokens: int) -> _Sums:
    """What the positions of a plan add up to, by a table in stored units."""
    sums = _Sums(table, target, tokens)
    seen: set[int] = set()
    for slot in plan.slots:
        if isinstance(slot, Replacement):
            parameters, slot_macs = replacement_cost(slot, table)
            sums.carried += parameters
            sums.macs += slot_macs
            if slot.is_block:  # it attends, as the block that it copies does
                sums.attend(table.blocks[slot.first].attention)
            continue
        home = slot.home
        block = table.blocks[home]
        repeat = home in seen  # it runs again, with the weights of its first run
        seen.add(home)
        sums.weights += (
            block.other
        )  # a position has what is of the block and of neither unit, whatever it borrows
        for source, unit, own_unit in (
            (slot.attention, block.attention, True),
            (slot.mlp, block.mlp, False),
        ):
            if source is None:
                continue
            # Norms, and the work of a run, are its own: borrowed weights are multiplied again.
            sums.weights += unit.norms
            sums.macs += unit.macs
            sums.attend(unit)
            if source == home and not repeat:
                sums.weights += unit.weights
                continue
            # From here on the weights are another position's.
            owner = table.blocks[source]
            sums.borrowed += owner.attention.weights if own_unit else owner.mlp.weights
            if target.shares_weights and slot.rank:
                sums.carried += slot.rank * unit.adapter_width
                sums.macs += slot.rank * unit.adapter_width
            if slot.norm:
                sums.carried += unit.output_norm
    return sums


@dataclass(slots=True)
class _Sums:
    """What the positions of a plan add up to.

    table: in stored units. target: see `Target`. tokens: of the prompt whose time was measured, 0 where none was.
    """

    table: CostTable
    target: Target
    tokens: int
    weights: int = 0
    borrowed: int = 0
    carried: int = 0
    macs: int = 0
    context_macs: int = 0
    decode_context_macs: int = 0
    kv_width_tokens: int = 0
    timed_kv_width_tokens: int = 0

    def attend(self, unit: UnitCost) -> None:
        """What grows with the tokens that are seen; nothing for an MLP."""
        if not (unit.context_macs or unit.kv_width):
            return
        context = self.target.context
        self.context_macs += unit.context_macs
        self.decode_context_macs += unit.context_macs * (
            min(context, unit.window) if unit.window else context
        )
        self.kv_width_tokens += unit.kv_width * self.target.cached_tokens(unit.window, context)
        self.timed_kv_width_tokens += unit.kv_width * self.target.cached_tokens(unit.window, self.tokens)

    def work(self, unit_bytes: int, target: Target) -> Work:
        """What the positions do."""
        read = (self.weights + self.borrowed + self.carried) * unit_bytes
        macs = (self.macs + self.context_macs * self.tokens) * self.tokens
        return Work(macs, read + target.cached_bytes(self.timed_kv_width_tokens))

    def cost(self, target: Target, unit_bytes: int, latency: Latency | None) -> Cost:
        """The sums as a price."""
        table, context, size = self.table, target.context, DTYPE_BYTES[target.dtype]
        activations = table.activation_fixed + table.activation_width * min(target.prefill_chunk, context)
        # Who cannot share stores what is borrowed again, the adapter summed into it.
        stored = self.weights if target.shares_weights else self.weights + self.borrowed
        macs = table.fixed_macs + self.macs
        prompt_ms, decode_ms = None, None
        if latency is not None:
            prompt_ms, decode_ms = latency.times(self.work(unit_bytes, target))
        return Cost(
            weight_bytes=(table.outside_weights(target) + stored) * unit_bytes,
            adapter_bytes=self.carried * unit_bytes,
            kv_bytes=target.batch * target.cached_bytes(self.kv_width_tokens),
            activation_bytes=(activations + table.vocabulary) * target.batch * size,
            # At prefill the head runs for the last token only: its share of one token.
            prefill_macs=macs + self.context_macs * context + table.head_macs / context,
            decode_macs=macs + self.decode_context_macs + table.head_macs,
            prompt_ms=prompt_ms,
            decode_ms=decode_ms,
        )


def replacement_cost(slot: Replacement, table: CostTable) -> tuple[int, int]:
    """Parameters of a replacement, and its MACs per token as far as they do not grow with the context.

    A copy of a block also has a KV cache and work that grows with the context; `price` adds both.
    """
    kind = kind_named(slot.kind)
    if kind.cost is not None:
        return kind.cost(table.width, slot.hidden(table.width))
    block = table.blocks[slot.first]
    parameters = sum(unit.weights + unit.norms for unit in (block.attention, block.mlp)) + block.other
    return parameters, block.attention.macs + block.mlp.macs
