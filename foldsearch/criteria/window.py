"""The cosine window: the run of blocks whose output is nearest to its input in direction is removed."""

from foldsearch.criteria import Choice, Request
from foldsearch.model.evidence import best_window


def choose(request: Request) -> Choice:
    """The run of blocks of highest cosine on the search tokens."""
    return Choice(best_window(request.bench.evidence(request.say), request.count))
