"""Learnable gates, trained under a FLOPs constraint: the blocks whose gates close first are removed."""

from dataclasses import asdict

from foldsearch.criteria import Choice, Request
from foldsearch.model import gates
from foldsearch.model.training import GateTraining
from foldsearch.progress import counting


def choose(request: Request) -> Choice:
    """The blocks of lowest rank after gated training on the recovery tokens, and how the training went."""
    bench, tokens = request.bench, request.bench.splits.recovery
    assert request.setting is not None, "gates are asked with an eps"
    training = GateTraining(request.count, request.setting, request.gate_steps, request.seed)
    macs = [float(block.attention.macs + block.mlp.macs) for block in bench.table.blocks]
    found, known = bench.once(
        "gates",
        gates.GateResult,
        tokens,
        lambda: gates.train_gates(
            bench.dense, tokens, training, block_macs=macs, progress=counting(request.say, "training gates")
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
    return Choice(tuple(sorted(found.ranking[: request.count])), summary)
