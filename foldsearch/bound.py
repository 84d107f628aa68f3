"""The price of a proposal from its counts alone, before a criterion has chosen any block."""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

from foldsearch.errors import PlanError
from foldsearch.fates import Bound
from foldsearch.plan.cost import DTYPE_BYTES, Cost, CostTable, Target, in_stored_units, price
from foldsearch.plan.latency import Latency, Work
from foldsearch.proposal import Given, Proposal, check_attention_left


class _Sums(NamedTuple):
    """Sums over the k cheapest blocks, at index k (`most…`: over the k dearest attentions), and minima.

    Parameters, MACs, cached numbers.
    """

    weights: list[int]
    norms: list[int]
    decode_macs: list[int]
    prefill_macs: list[int]
    kv: list[int]
    most_attention: list[int]
    most_attention_decode: list[int]
    most_attention_prefill: list[int]
    most_kv: list[int]
    smallest_weights: int
    smallest_adapter: int
    smallest_norm: int


# A search prices against one table. Found by identity: hashing a table takes longer than pricing.
_latest: list[tuple[CostTable, tuple[object, ...], _Sums]] = []


def _sums(table: CostTable, context: int, target: Target) -> _Sums:
    """What the blocks add up to at so many tokens, cached as the target does it."""
    what = (context, target.window_cache, target.prefill_chunk)
    for known, of_what, sums in _latest:
        if known is table and of_what == what:
            return sums
    sums = _sum(table, context, target)
    _latest[:] = [(table, what, sums), *_latest[:15]]
    return sums


def _sum(table: CostTable, context: int, target: Target) -> _Sums:
    weights, norms, decode, prefill, kv, adapters, output_norms = [], [], [], [], [], [], []
    attentions, attention_decode, attention_prefill = [], [], []
    for block in table.blocks:
        units = (block.attention, block.mlp)
        seen = [min(context, unit.window) if unit.window else context for unit in units]
        weights.append(sum(unit.weights for unit in units))
        norms.append(sum(unit.norms for unit in units) + block.other)
        decode.append(sum(unit.macs + unit.context_macs * n for unit, n in zip(units, seen, strict=True)))
        prefill.append(sum(unit.macs + unit.context_macs * context for unit in units))
        kv.append(sum(unit.kv_width * target.cached_tokens(unit.window, context) for unit in units))
        adapters.append(sum(unit.adapter_width for unit in units))
        output_norms.append(sum(unit.output_norm for unit in units))
        attention = block.attention
        attentions.append(attention.weights + attention.norms)
        attention_decode.append(attention.macs + attention.context_macs * seen[0])
        attention_prefill.append(attention.macs + attention.context_macs * context)

    return _Sums(
        weights=_cheapest(weights),
        norms=_cheapest(norms),
        decode_macs=_cheapest(decode),
        prefill_macs=_cheapest(prefill),
        kv=_cheapest(kv),
        most_attention=_cheapest(attentions, dearest=True),
        most_attention_decode=_cheapest(attention_decode, dearest=True),
        most_attention_prefill=_cheapest(attention_prefill, dearest=True),
        most_kv=_cheapest(kv, dearest=True),
        smallest_weights=min(weights),
        smallest_adapter=min(adapters),
        smallest_norm=min(output_norms),
    )


def _cheapest(values: list[int], *, dearest: bool = False) -> list[int]:
    return list(accumulate(sorted(values, reverse=dearest), initial=0))


def lower_bound(proposal: Proposal, table: CostTable, target: Target) -> Cost:
    """A price that no plan of the proposal can be below, term by term.

    Exact where all blocks cost the same, attention stays, and what takes the place of blocks costs what its fate's own
    bound says. A proposal that holds its plan is priced exactly.

    Raises:
        PlanError: as many blocks are removed as there are, or no kept block keeps its attention.
        BudgetError: the plan it holds is for another number of blocks.
    """
    fold, num_blocks, target = proposal.fold, len(table.blocks), target.storing(proposal.types)
    if isinstance(fold, Given):
        return price(fold.plan, table, target)
    count = fold.removed.count if fold.removed is not None else 0
    kept = num_blocks - count
    if kept < 1:
        raise PlanError(f"a plan runs at least one block, but {count} of {num_blocks} are dropped. Keep one.")
    check_attention_left(fold, kept)
    latency = table.latency_on(target)
    table, unit_bytes = in_stored_units(table, target)
    sums = _sums(table, target.context, target)
    instead = fold.removed.fate.bound(count, table) if fold.removed is not None else Bound()
    grouped = 0 if fold.groups is None else sum(last - first - 1 for first, last in fold.groups.spans(kept))
    children, running = grouped + instead.children, kept + instead.children
    thinned = min(fold.attention_removed, kept - grouped)
    weights = sums.weights[kept - grouped] + sums.norms[running] - sums.most_attention[thinned]
    again = (
        children * sums.smallest_weights
    )  # that children borrow: read again, and stored again by who cannot share
    carried = children * sums.smallest_norm + instead.parameters
    new_macs = instead.macs
    if target.shares_weights:
        ranks = instead.children * instead.rank + (grouped * fold.groups.rank if fold.groups else 0)
        carried += ranks * sums.smallest_adapter
        new_macs += ranks * sums.smallest_adapter
    size = DTYPE_BYTES[target.dtype]
    activations = table.activation_fixed + table.activation_width * min(target.prefill_chunk, target.context)
    kv = max(0, sums.kv[running] - sums.most_kv[thinned])
    macs = table.fixed_macs + new_macs
    prompt_ms, decode_ms = None, None
    if latency is not None:
        read_bytes = max(0, weights + again + carried) * unit_bytes
        prompt_ms, decode_ms = _times(latency, table, running, thinned, (new_macs, read_bytes, target))
    return Cost(
        weight_bytes=(table.outside_weights(target) + weights + (0 if target.shares_weights else again))
        * unit_bytes,
        adapter_bytes=carried * unit_bytes,
        kv_bytes=target.batch * target.cached_bytes(kv),
        activation_bytes=(activations + table.vocabulary) * target.batch * size,
        prefill_macs=macs
        + sums.prefill_macs[running]
        - sums.most_attention_prefill[thinned]
        + table.head_macs / target.context,
        decode_macs=macs + sums.decode_macs[running] - sums.most_attention_decode[thinned] + table.head_macs,
        prompt_ms=prompt_ms,
        decode_ms=decode_ms,
    )


def _times(
    latency: Latency, table: CostTable, running: int, thinned: int, new: tuple[int, int, Target]
) -> tuple[float, float]:
    """Milliseconds that no plan is below; new: MACs of what is new, bytes that are read, and what is stored how."""
    new_macs, read_bytes, target = new
    sums = _sums(table, latency.tokens, target)
    macs = new_macs + max(0, sums.prefill_macs[running] - sums.most_attention_prefill[thinned])
    cached = max(0, sums.kv[running] - sums.most_kv[thinned])
    return latency.times(Work(macs * latency.tokens, read_bytes + target.cached_bytes(cached)))
