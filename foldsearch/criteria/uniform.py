"""Blocks at even distances: nothing is asked of the model."""

from foldsearch.criteria import Choice, Request


def choose(request: Request) -> Choice:
    """Blocks at even distances; the first and the last block stay while others are left."""
    return Choice(uniform_blocks(request.count, len(request.bench.table.blocks)))


def uniform_blocks(count: int, num_blocks: int) -> tuple[int, ...]:
    """Blocks at even distances, in order. Of the first and the last block, the last one goes first."""
    inner = num_blocks - 2
    if count > inner:
        return tuple(range(1, num_blocks))
    # The middles of `count` equal stretches of the inner blocks.
    return tuple(1 + (2 * i + 1) * inner // (2 * count) for i in range(count))
