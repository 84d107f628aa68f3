"""The cosine window: the run of blocks whose output is nearest to its input in direction is removed."""

from foldsearch.criteria import Choice, Question
from foldsearch.model.evidence import best_window


def choose(question: Question) -> Choice:
    """The run of blocks of highest cosine on the search tokens."""
    return Choice(best_window(question.bench.evidence(question.say), question.count))
