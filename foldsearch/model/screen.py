"""Many folded models measured on little text: each is built, healed in closed form and judged in seconds.

The text that is healed on and the text that is judged on go through the blocks together, one block at a time, and
what plans have in common up to a block is computed once (see `foldsearch.model.heal.Healer`). Source: ours.

Shapes: N sequences, T positions, D width.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from foldsearch.model.blocks import family_of
from foldsearch.model.fold import fold
from foldsearch.model.heal import Healer
from foldsearch.model.judge import DenseTargets, judge
from foldsearch.model.states import FitText
from foldsearch.model.tokens import TokenSet
from foldsearch.plan.plan import FoldPlan
from foldsearch.plan.result import Quality
from foldsearch.progress import CountProgress

KEPT_BYTES = 2 * 10**9  # of states and solved matrices that plans have in common


class Screen:
    """Measures plans of one dense model on one text."""

    def __init__(
        self,
        text: FitText,
        tokens: TokenSet,
        targets: DenseTargets,
        *,
        progress: CountProgress | None = None,
    ) -> None:
        """Asks the dense model for its states.

        Args:
            text: that plans are healed on, at least two sequences.
            tokens: that they are judged on, of the same length.
            targets: what the dense model says on these.
            progress: called with (done, total) sequences.

        Raises:
            InputError: there is only one sequence to heal on.
        """
        self._dense, self._tokens, self._targets = text.dense, tokens, targets
        every = replace(text, ids_NT=torch.cat((text.ids_NT, tokens.ids_NT)))
        states = every.states(progress)
        assert states.shape[1] == len(every.ids_NT), "a screen's text is little"
        self._healer = Healer(states, every.ids_NT, num_led=len(tokens.ids_NT), most_bytes=KEPT_BYTES)

    @torch.no_grad()
    def measure(self, plan: FoldPlan) -> Quality:
        """The quality of a plan, healed. Plans that begin alike are measured faster one after the other.

        Raises:
            ModelError: a state is no finite number.
        """
        assert plan.adds_nothing, "what is new in a plan is fitted before it is healed"
        model = fold(self._dense, plan)
        _, own_NTD = self._healer.heal(model)
        norm = model.get_submodule(family_of(model.config).final_norm)
        return judge(model, self._tokens, self._targets, hidden_NTD=norm(own_NTD))
