"""Block Influence: the blocks that turn their input least are removed."""

from foldsearch.criteria import Choice, Request
from foldsearch.model.evidence import influence_order


def choose(request: Request) -> Choice:
    """The blocks of least influence on the search tokens."""
    order = influence_order(request.bench.evidence(request.say))
    return Choice(tuple(sorted(order[: request.count])))
