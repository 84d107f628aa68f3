"""The last blocks: what a model loses least by, as is often said; the very last one stays while others are left."""

from foldsearch.criteria import Choice, Question


def choose(question: Question) -> Choice:
    """The blocks before the last one."""
    last = len(question.bench.table.blocks) - 1
    return Choice(tuple(range(last - question.count, last)))
