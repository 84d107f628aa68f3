"""The linear window: the run of blocks that a linear map stands for with the least KL is removed (ours)."""

from foldsearch.criteria import Choice, Question
from foldsearch.criteria.greedy import greedy_rows
from foldsearch.model.starts import linear_window
from foldsearch.progress import counting


def choose(question: Question) -> Choice:
    """The run whose fitted linear map has the least KL on some of the search tokens."""
    bench, tokens, fitted = question.bench, question.bench.splits.search, question.fitted_tokens
    rows = greedy_rows(tokens)

    def compute() -> tuple[int, ...]:
        states = bench.fit_text(fitted).states(counting(question.say, "residual states"))
        say = counting(question.say, "linear windows")
        return linear_window(bench.dense, question.count, states, tokens.of(rows), bench.search.of(rows), say)

    found, _ = bench.once(
        "windows",
        tuple[int, ...],
        tokens,
        compute,
        count=question.count,
        rows=len(rows),
        fitted=[fitted, bench.splits.recovery.content_hash],
    )
    return Choice(found)
