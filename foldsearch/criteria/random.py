"""Any blocks: what every other criterion has to beat."""

from random import Random

from foldsearch.criteria import Choice, Request


def choose(request: Request) -> Choice:
    """Blocks drawn with the seed; every choice is as likely as any other."""
    return Choice(random_blocks(request.count, len(request.bench.table.blocks), request.seed))


def random_blocks(count: int, num_blocks: int, seed: int) -> tuple[int, ...]:
    """So many different blocks, in order."""
    return tuple(sorted(Random(seed).sample(range(num_blocks), count)))
