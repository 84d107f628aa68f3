"""Greedy removal: one block after the other, each time the one whose absence hurts least."""

from foldsearch.criteria import Choice, Request
from foldsearch.model.evidence import GreedyResult, greedy_order
from foldsearch.model.tokens import TokenSet
from foldsearch.progress import counting

GREEDY_TOKENS = 1024  # SLEB calibrates on few; each of its hundreds of runs goes over them


def greedy_rows(tokens: TokenSet) -> list[int]:
    """The sequences of a token set that removals are tried on."""
    return list(range(min(len(tokens.ids_NT), max(1, GREEDY_TOKENS // tokens.ids_NT.shape[1]))))


def choose(request: Request) -> Choice:
    """The first blocks of the greedy order; one order serves every count of a space."""
    bench, tokens = request.bench, request.bench.splits.search
    rows, most = greedy_rows(tokens), request.most
    found, _ = bench.once(
        "greedy",
        GreedyResult,
        tokens,
        lambda: greedy_order(
            bench.dense, tokens.of(rows), max(most, 1), progress=counting(request.say, "greedy removal")
        ),
        rows=len(rows),
        most=most,
    )
    return Choice(tuple(sorted(found.order[: request.count])))
