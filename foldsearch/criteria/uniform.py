"""Blocks at even distances: nothing is asked of the model."""

from foldsearch.criteria import Choice, Question
from foldsearch.plan.proposal import uniform_drop


def choose(question: Question) -> Choice:
    """Blocks at even distances; the first and the last block stay while others are left."""
    return Choice(uniform_drop(question.count, len(question.bench.table.blocks)))
