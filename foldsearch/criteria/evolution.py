"""Evolution: plans of a count are mutated and selected by KL, from those of the window and Block Influence on."""

from dataclasses import asdict

from foldsearch.criteria import Choice, Request
from foldsearch.model.evidence import best_window, influence_order
from foldsearch.model.evolution import EvolutionResult, EvolutionSettings, evolve
from foldsearch.plan.plan import FoldPlan
from foldsearch.progress import counting


def choose(request: Request) -> Choice:
    """The whole blocks that the best plan found drops."""
    bench, tokens, count = request.bench, request.bench.splits.search, request.count
    evidence = bench.evidence(request.say)
    starts = [
        FoldPlan.dropping(blocks, len(bench.table.blocks))
        for blocks in (best_window(evidence, count), influence_order(evidence)[:count])
    ]
    settings = EvolutionSettings(seed=request.seed)
    found, _ = bench.once(
        "evolution",
        EvolutionResult,
        tokens,
        lambda: evolve(
            bench.dense, tokens, bench.search, starts, settings, progress=counting(request.say, "evolution")
        ),
        count=count,
        evolution=asdict(settings),
    )
    return Choice(found.plan.dropped)
