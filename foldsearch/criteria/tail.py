"""The last blocks: what a model loses least by, as is often said; the very last one stays while others are left."""

from foldsearch.criteria import Choice, Request


def choose(request: Request) -> Choice:
    """The blocks before the last one."""
    last = len(request.bench.table.blocks) - 1
    return Choice(tuple(range(last - request.count, last)))
