"""What a plan costs on a device: arithmetic over a table that fvcore measured once on the dense model.

Units: sizes in bytes, compute in MACs (one multiply and add; 1 MAC = 2 FLOPs) per token, gigabytes decimal.
A gigabyte budget bounds weights + adapters + KV cache + activations, for one target.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from foldsearch.errors import BudgetError
from foldsearch.plan.kinds import kind_named
from foldsearch.plan.plan import FoldPlan, Replacement
from foldsearch.plan.stored import DTYPE_TYPES, VECTOR_BYTES, Matrix

GB = 10**9
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class Target:
    """The device side of the price.

    dtype: of the stored weights, the KV cache and the activations.
    context: tokens held in the KV cache. batch: sequences served at once.
    prefill_chunk: tokens that go through the model at once when a prompt is read.
    runtime: the name of what runs the export (see `foldsearch.runtimes`).
    shares_weights: whether it stores a shared weight once; else it stores it again for every child, adapters merged.
    weights: the type that matrices are stored in (`foldsearch.plan.stored`); empty where all weights are of the dtype.
    """

    dtype: str = "bfloat16"
    context: int = 2048
    batch: int = 1
    prefill_chunk: int = 512
    runtime: str = "folded"
    shares_weights: bool = True
    weights: str = ""

    @property
    def rounds(self) -> bool:
        """Whether what is stored has other numbers than the dtype's: it is then another model, and measured as one."""
        return self.weights not in ("", DTYPE_TYPES[self.dtype])

    def storing(self, weights: str) -> Target:
        """The same with weights of another type; itself where that is empty."""
        return replace(self, weights=weights) if weights else self


@dataclass(frozen=True, slots=True)
class UnitCost:
    """The attention or the MLP of one block, as measured on the dense model.

    weights: parameters of its linears (they can be borrowed). norms: parameters that stay with the block.
    output_norm: parameters of an output norm γ on this unit.
    macs: per token, whatever the context. context_macs: per token and per token of context.
    adapter_width: sum over its linears of inputs + outputs (parameters, and MACs per token, of rank 1).
    kv_width: numbers cached per token. window: tokens its attention can see (0: all of them).
    matrices: of its linears; the rest of `weights` are biases.
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


@dataclass(frozen=True, slots=True)
class Cost:
    """Every term of a plan's price.

    weight_bytes: stored weights and norms. adapter_bytes: what children carry (adapters, γ) and replacements.
    kv_bytes: at the target's context and batch. activation_bytes: peak working set of one prefill chunk.
    prefill_macs: per token of a prompt of `context` tokens, logits for its last token only.
    decode_macs: for one more token when the cache is full.
    """

    weight_bytes: int
    adapter_bytes: int
    kv_bytes: int
    activation_bytes: int
    prefill_macs: float
    decode_macs: int

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
    """Upper bounds; None is no bound.

    Raises:
        BudgetError: a bound is not positive.
    """

    memory_bytes: int | None = None
    flops: int | None = None

    def __post_init__(self) -> None:
        for name, bound in (("memory", self.memory_bytes), ("FLOPs per token", self.flops)):
            if bound is not None and bound < 1:
                raise BudgetError(f"a budget's {name} is at least 1, got {bound}. Raise it.")

    def violations(self, cost: Cost) -> dict[str, float]:
        """For each bound, how far the cost is above it as a share of the bound; feasible where all are <= 0."""
        found = {}
        if self.memory_bytes is not None:
            found["memory"] = cost.memory_bytes / self.memory_bytes - 1
        if self.flops is not None:
            found["flops"] = cost.flops / self.flops - 1
        return found

    def excess(self, cost: Cost) -> str:
        """By how much the cost is above the budget, in words; empty where it keeps every bound."""
        above = [f"{name} {share:+.1%}" for name, share in self.violations(cost).items() if share > 0]
        return f"above the budget: {', '.join(above)}" if above else ""

    def admits(self, cost: Cost) -> bool:
        """Whether the cost keeps every bound."""
        return (self.memory_bytes is None or cost.memory_bytes <= self.memory_bytes) and (
            self.flops is None or cost.flops <= self.flops
        )


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

    A unit is a number of the target's dtype; where the target has a type of weights, it is a byte. Adapters, and
    networks in place of blocks, stay numbers: what has a type holds neither.
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
    context = target.context
    table, unit_bytes = in_stored_units(table, target)
    weights, carried, kv_width_tokens = table.fixed_weights, 0, 0
    macs, prefill_context_macs, decode_context_macs = table.fixed_macs, 0, 0
    seen: set[int] = set()
    for slot in plan.slots:
        if isinstance(slot, Replacement):
            parameters, slot_macs = replacement_cost(slot, table)
            carried += parameters
            macs += slot_macs
            if slot.is_block:  # it attends, as the block that it copies does
                attention = table.blocks[slot.first].attention
                seen_tokens = min(context, attention.window) if attention.window else context
                prefill_context_macs += attention.context_macs
                decode_context_macs += attention.context_macs * seen_tokens
                kv_width_tokens += attention.kv_width * seen_tokens
            continue
        home = slot.home
        block = table.blocks[home]
        repeat = home in seen  # it runs again, with the weights of its first run
        seen.add(home)
        weights += block.other  # a position has what is of the block and of neither unit, whatever it borrows
        for source, unit, own_unit in (
            (slot.attention, block.attention, True),
            (slot.mlp, block.mlp, False),
        ):
            if source is None:
                continue
            # Norms, and the work of a run, are its own: borrowed weights are multiplied again.
            weights += unit.norms
            macs += unit.macs
            if unit.context_macs:
                prefill_context_macs += unit.context_macs
                decode_context_macs += unit.context_macs * (
                    min(context, unit.window) if unit.window else context
                )
            if unit.kv_width:
                kv_width_tokens += unit.kv_width * (min(context, unit.window) if unit.window else context)
            if source == home and not repeat:
                weights += unit.weights
                continue
            # From here on the weights are another position's.
            if not target.shares_weights:  # stored again, the adapter summed into them
                owner = table.blocks[source]
                weights += owner.attention.weights if own_unit else owner.mlp.weights
            elif slot.rank:
                carried += slot.rank * unit.adapter_width
                macs += slot.rank * unit.adapter_width
            if slot.norm:
                carried += unit.output_norm
    size = DTYPE_BYTES[target.dtype]
    activations = table.activation_fixed + table.activation_width * min(target.prefill_chunk, context)
    return Cost(
        weight_bytes=weights * unit_bytes,
        adapter_bytes=carried * unit_bytes,
        kv_bytes=kv_width_tokens * target.batch * size,
        activation_bytes=(activations + table.vocabulary) * target.batch * size,
        # At prefill the head runs for the last token only: its share of one token.
        prefill_macs=macs + prefill_context_macs * context + table.head_macs / context,
        decode_macs=macs + decode_context_macs + table.head_macs,
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
