"""Learnable gates, trained under a FLOPs constraint: the blocks whose gates close first are removed."""

from dataclasses import asdict

from foldsearch.criteria import Choice, Question
from foldsearch.model import gates
from foldsearch.model.training import GateTraining
from foldsearch.progress import counting


def choose(question: Question) -> Choice:
    """The blocks of lowest rank after gated training on the recovery tokens, and how the training went."""
    bench, tokens = question.bench, question.bench.splits.recovery
    assert question.setting is not None, "gates are asked with an eps"
    training = GateTraining(question.count, question.setting, question.gate_steps, question.seed)
    macs = [float(block.attention.macs + block.mlp.macs) for block in bench.table.blocks]
    found, known = bench.once(
        "gates",
        gates.GateResult,
        tokens,
        lambda: gates.train_gates(
            bench.dense, tokens, training, block_macs=macs, progress=counting(question.say, "training gates")
        ),
        **asdict(training),
    )
    summary = {
        "eps": training.eps,
        "steps": found.steps,
        "tokens": found.tokens,
        "polarized": found.polarized,
        "soft_loss": found.soft_loss,
        "hard_loss": found.hard_loss,
        "seconds": found.seconds,
        "from_cache": known,
    }
    return Choice(tuple(sorted(found.ranking[: question.count])), summary)
