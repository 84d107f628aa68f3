"""The linear window: the run of blocks that a linear map stands for with the least KL is removed (ours)."""

from foldsearch.criteria import Choice, Request
from foldsearch.criteria.greedy import greedy_rows
from foldsearch.model.starts import linear_window
from foldsearch.progress import counting


def choose(request: Request) -> Choice:
    """The run whose fitted linear map has the least KL on some of the search tokens."""
    bench, tokens, fitted = request.bench, request.bench.splits.search, request.fitted_tokens
    rows = greedy_rows(tokens)

    def compute() -> tuple[int, ...]:
        states = bench.fit_text(fitted).states(counting(request.say, "residual states"))
        say = counting(request.say, "linear windows")
        return linear_window(bench.dense, request.count, states, tokens.of(rows), bench.search.of(rows), say)

    found, _ = bench.once(
        "windows",
        tuple[int, ...],
        tokens,
        compute,
        count=request.count,
        rows=len(rows),
        fitted=[fitted, bench.splits.recovery.content_hash],
    )
    return Choice(found)
