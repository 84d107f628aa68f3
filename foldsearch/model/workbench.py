"""What trials of one process share: the dense model, and what is computed of it once per machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from transformers import PreTrainedModel

from foldsearch import cache
from foldsearch.codec import from_json, to_json
from foldsearch.model.children import base_blocks, base_distances
from foldsearch.model.evidence import Evidence, measure_evidence
from foldsearch.model.judge import DenseTargets
from foldsearch.model.source import DenseFiles
from foldsearch.model.states import FitText, text_to_fit
from foldsearch.model.tokens import Splits, TokenSet
from foldsearch.plan.cost import CostTable
from foldsearch.progress import StageProgress, counting

Value = TypeVar("Value")
BASE_RANK = 1 / 16  # of the base-block metric, in widths of the model: FlexiGPT's 256 for 4,096
# Of what is kept. The keys hold what can be set; raise it when the code, or a constant, that computes them changes.
SCHEMA = 7


def base_rank(table: CostTable) -> int:
    """Of the base-block metric: `BASE_RANK`, or less where few heads make narrow keys and values."""
    matrices = [
        one for block in table.blocks for unit in (block.attention, block.mlp) for one in unit.matrices
    ]
    narrowest = min(min(one.rows, one.length) for one in matrices)
    return max(1, min(round(BASE_RANK * table.width), narrowest // 2))


@dataclass(frozen=True, slots=True, eq=False)
class Workbench:
    """The dense model, mapped, and what it says on the token sets.

    files: that it was opened from. table: what its blocks cost. splits: the token sets, whole. trained: the recovery
    sequences that training comes to, in its order; recovery: what the dense model says on these. cache_dir: of all that
    is computed from it.
    """

    dense: PreTrainedModel
    files: DenseFiles
    table: CostTable
    splits: Splits
    trained: TokenSet
    search: DenseTargets
    recovery: DenseTargets | None  # None where nothing is trained
    report: DenseTargets
    cache_dir: Path

    def once(
        self, name: str, kind: type[Value], tokens: TokenSet, compute: Callable[[], Value], **settings: Any
    ) -> tuple[Value, bool]:
        """What `compute` gives, and whether it was known: a function of model, tokens and settings.

        It is computed once per machine; trials that want the same at one time wait for it.

        Args:
            name: of the folder that it is kept in.
            kind: its type.
            tokens, settings: with the model, all that it depends on.
            compute: asked where it is not known.
        """
        value, known = cache.json_once(self._entry(name, tokens, settings), lambda: to_json(compute()))
        return from_json(kind, value), known

    def knows(self, name: str, tokens: TokenSet, **settings: Any) -> bool:
        """Whether `once` has the answer on this machine."""
        return self._entry(name, tokens, settings).exists()

    def _entry(self, name: str, tokens: TokenSet, settings: dict[str, Any]) -> Path:
        kinds = tokens.kinds
        of_kinds = [kinds.over, list(kinds.names), sorted(kinds.unseen)] if len(kinds.names) > 1 else []
        text = [tokens.content_hash, *of_kinds]
        key = cache.key(SCHEMA, self.files.content_hash, self.files.dtype, text, settings)
        return self.cache_dir / name / f"{key}.json"

    def fit_text(self, tokens: int) -> FitText:
        """The beginnings of as many sequences of the recovery text as hold so many tokens in all."""
        ids_NT = text_to_fit(self.splits.recovery.ids_NT, tokens)
        return FitText(self.dense, ids_NT, self.files.content_hash, self.cache_dir)

    def evidence(self, say: StageProgress) -> Evidence:
        """What each block does on the search tokens."""
        tokens = self.splits.search
        found, _ = self.once(
            "evidence",
            Evidence,
            tokens,
            lambda: measure_evidence(self.dense, tokens, progress=counting(say, "block influence")),
        )
        return found

    def base_distances(self, say: StageProgress) -> list[list[float]]:
        """FlexiGPT's distances between the blocks; of the weights alone, so they serve every text."""
        rank = base_rank(self.table)
        key = cache.key(SCHEMA, self.files.content_hash, self.files.dtype, rank)
        say("distances between the blocks", 0.0)
        path = self.cache_dir / "bases" / f"{key}.json"
        value, _ = cache.json_once(path, lambda: base_distances(self.dense, rank).tolist())
        return value  # type: ignore[no-any-return]

    def base_blocks(self, removed: Sequence[int], say: StageProgress) -> dict[int, int]:
        """FlexiGPT's base block of each removed one: the kept block that is nearest by `base_distances`."""
        return base_blocks(self.base_distances(say), removed)
