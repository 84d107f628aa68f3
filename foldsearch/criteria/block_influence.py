"""Block Influence: the blocks that turn their input least are removed."""

from foldsearch.criteria import Choice, Question
from foldsearch.model.evidence import influence_order


def choose(question: Question) -> Choice:
    """The blocks of least influence on the search tokens."""
    order = influence_order(question.bench.evidence(question.say))
    return Choice(tuple(sorted(order[: question.count])))
