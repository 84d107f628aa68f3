"""What a trial found out: one result a rung."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from foldsearch.plan.cost import Cost
from foldsearch.plan.plan import FoldPlan

State = Literal["measured", "known", "infeasible", "diverged", "failed"]


@dataclass(frozen=True, slots=True)
class Quality:
    """How near a folded model is to the dense one on the same tokens.

    kl: mean KL(dense ‖ folded), nats per token. *_se: standard errors, clustered by document.
    agreement: share of positions with the same most likely next token. tokens: predicted positions.
    """

    kl: float
    kl_se: float
    perplexity: float
    perplexity_se: float
    dense_perplexity: float
    agreement: float
    tokens: int


@dataclass(frozen=True, slots=True)
class TrialResult:
    """One plan at one rung.

    state: "measured"; "known": the same plan was measured before as trial `known_from`, nothing was trained;
    "infeasible": priced above the budget, never built; "diverged" or "failed": see `reason`.
    quality: on the search tokens, which objectives come from. report: on the report tokens, at the last rung only.
    recovery_tokens: tokens trained on so far. seconds: spent by this trial so far.
    gates: summary of the gated training behind the plan (steps, tokens, polarized, ranking, whether from the cache).
    """

    plan: FoldPlan
    cost: Cost
    quality: Quality | None
    rung: int
    is_last_rung: bool
    recovery_tokens: int
    seconds: float
    state: State = "measured"
    reason: str = ""
    known_from: int | None = None
    gates: dict[str, Any] | None = None
    report: Quality | None = None

    def objectives(self) -> tuple[float, float, float]:
        """KL in nats per token, memory in bytes, FLOPs per token at decode: each to be minimised."""
        assert self.quality is not None
        return self.quality.kl, float(self.cost.memory_bytes), float(self.cost.flops)

    def to_json(self) -> dict[str, Any]:
        """Plain dicts; the plan as its text and number of blocks."""
        value = asdict(self)
        value["plan"], value["num_blocks"] = str(self.plan), self.plan.num_blocks
        return value

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> TrialResult:
        """Read what `to_json` made."""
        value = dict(value)
        plan = FoldPlan.parse(value["plan"], value.pop("num_blocks"))
        qualities = {name: Quality(**value[name]) if value[name] else None for name in ("quality", "report")}
        return cls(**{**value, "plan": plan, "cost": Cost(**value["cost"]), **qualities})
