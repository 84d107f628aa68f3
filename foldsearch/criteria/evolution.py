"""Evolution: plans of a count are mutated and selected by KL, from those of the window and Block Influence on."""

from dataclasses import asdict

from foldsearch.criteria import Choice, Question
from foldsearch.model.evidence import best_window, influence_order
from foldsearch.model.evolution import EvolutionResult, EvolutionSettings, evolve
from foldsearch.plan.plan import FoldPlan
from foldsearch.progress import counting


def choose(question: Question) -> Choice:
    """The whole blocks that the best plan found drops."""
    bench, tokens, count = question.bench, question.bench.splits.search, question.count
    evidence = bench.evidence(question.say)
    starts = [
        FoldPlan.dropping(blocks, len(bench.table.blocks))
        for blocks in (best_window(evidence, count), influence_order(evidence)[:count])
    ]
    settings = EvolutionSettings(seed=question.seed)
    found, _ = bench.once(
        "evolution",
        EvolutionResult,
        tokens,
        lambda: evolve(
            bench.dense, tokens, bench.search, starts, settings, progress=counting(question.say, "evolution")
        ),
        count=count,
        evolution=asdict(settings),
    )
    return Choice(found.plan.dropped)
