"""Any blocks: what every other criterion has to beat."""

from foldsearch.criteria import Choice, Question
from foldsearch.plan.proposal import random_drop


def choose(question: Question) -> Choice:
    """Blocks drawn with the seed; every choice is as likely as any other."""
    return Choice(random_drop(question.count, len(question.bench.table.blocks), question.seed))
