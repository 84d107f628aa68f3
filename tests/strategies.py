"""Hypothesis strategies: lawful plans, cost tables, targets."""

from __future__ import annotations

from hypothesis import strategies as st

from foldsearch.plan.cost import DTYPE_BYTES, BlockCost, CostTable, Target, UnitCost
from foldsearch.plan.kinds import kind_named, kind_names
from foldsearch.plan.latency import Latency, Line
from foldsearch.plan.plan import FoldPlan, Replacement, Slot

small = st.integers(0, 1000)


@st.composite
def plans(
    draw: st.DrawFn,
    num_blocks: int | None = None,
    *,
    replacements: bool = True,
    repeats: bool = True,
) -> FoldPlan:
    """Any lawful plan: kept, halved and dropped blocks, children of one or two earlier or later owners, repeats."""
    count = draw(st.integers(1, 8)) if num_blocks is None else num_blocks
    unit = st.sampled_from(["own", "own", "borrowed", "absent"])
    kinds = [[draw(unit), draw(unit)] for _ in range(count)]
    if all(attention == "absent" for attention, _ in kinds):
        kinds[draw(st.integers(0, count - 1))] = ["own", "own"]
    owners = []
    for which in (0, 1):
        if not any(kind[which] == "own" for kind in kinds):  # the first that would borrow owns instead
            for kind in kinds:
                if kind[which] == "borrowed":
                    kind[which] = "own"
                    break
        owners.append([block for block, kind in enumerate(kinds) if kind[which] == "own"])

    def carried() -> tuple[int, bool]:
        return draw(st.sampled_from([0, 0, 1, 3, 16])), draw(st.booleans())

    slots: list[Slot | Replacement] = []
    block = 0
    while block < count:
        kind = kinds[block]
        if kind == ["absent", "absent"]:
            if replacements and draw(st.booleans()):
                last = block
                while last + 1 < count and kinds[last + 1] == ["absent", "absent"] and draw(st.booleans()):
                    last += 1
                name = draw(st.sampled_from(kind_names()))
                size = draw(st.sampled_from([0, 5, 512])) if kind_named(name).takes_size else 0
                slots.append(Replacement(block, last, name, size))
                block = last
        else:
            sources = [
                block if which == "own" else None if which == "absent" else draw(st.sampled_from(own))
                for which, own in zip(kind, owners, strict=True)
            ]
            slots.append(Slot(block, *sources, *(carried() if "borrowed" in kind else (0, False))))
        block += 1
    for _ in range(draw(st.integers(0, 2)) if repeats else 0):
        homes = [slot.home for slot in slots if isinstance(slot, Slot)]
        home = draw(st.sampled_from(homes))
        first = next(i for i, slot in enumerate(slots) if isinstance(slot, Slot) and slot.home == home)
        units = [draw(st.sampled_from([None, *own])) for own in owners]
        if units != [None, None]:
            slots.insert(draw(st.integers(first + 1, len(slots))), Slot(home, *units, *carried()))
    return FoldPlan(tuple(slots), count)


@st.composite
def tables(draw: st.DrawFn, num_blocks: int, *, alike: bool = False) -> CostTable:
    """Tables whose blocks differ from each other, or do not (`alike`), some with sliding windows."""
    attention = st.builds(
        UnitCost, small, small, small, small, small, small, kv_width=small, window=st.sampled_from([0, 4, 64])
    )
    mlp = st.builds(UnitCost, small, small, small, small, st.just(0), small)
    block = st.builds(BlockCost, attention, mlp, small)
    blocks = (draw(block),) * num_blocks if alike else tuple(draw(block) for _ in range(num_blocks))
    line = st.builds(Line, small, small)
    times = Latency("folded", "", draw(st.integers(1, 300)), draw(line), draw(line), (), "")
    return CostTable(*(draw(small) for _ in range(7)), blocks, latencies=(times,))


targets = st.builds(
    Target,
    dtype=st.sampled_from(sorted(DTYPE_BYTES)),
    context=st.integers(1, 300),
    batch=st.integers(1, 3),
    prefill_chunk=st.integers(1, 300),
    shares_weights=st.booleans(),
)
