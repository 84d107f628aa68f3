"""What is measured of a folded model, and of one rung of a trial."""

from __future__ import annotations

from dataclasses import dataclass, field

from foldsearch.plan.plan import FoldPlan


@dataclass(frozen=True, slots=True)
class KindQuality:
    """How near a folded model is to the dense one on one kind of text.

    kl: mean KL(dense ‖ folded), nats per token. kl_se: its standard error, clustered by document. tokens: predicted
    positions. unseen: nothing was fitted to texts of this kind or chosen on them.
    """

    name: str
    kl: float
    kl_se: float
    tokens: int
    unseen: bool = False

    @property
    def title(self) -> str:
        """What a table calls the kind."""
        return f"unseen: {self.name}" if self.unseen else self.name


@dataclass(frozen=True, slots=True)
class Quality:
    """How near a folded model is to the dense one on the same tokens.

    kl: mean KL(dense ‖ folded), nats per token; of several kinds of text their mean, each counting the same, or that of
    the worst, as the study chose. *_se: standard errors, clustered by document. agreement: share of positions with the
    same most likely next token. tokens: predicted positions. kinds: each kind of text apart. Kinds that are unseen
    count in none of the other figures.
    """

    kl: float
    kl_se: float
    perplexity: float
    perplexity_se: float
    dense_perplexity: float
    agreement: float
    tokens: int
    kinds: tuple[KindQuality, ...] = ()

    @property
    def shown_kinds(self) -> tuple[KindQuality, ...]:
        """The kinds that a table has columns for: none where there is one only."""
        return self.kinds if len(self.kinds) > 1 else ()


def rounded(value: float, form: str) -> str:
    """A figure in a format such as ".3f" or "+.3f".

    What rounds to zero is 0.000: the KL of a model that equals the dense one is often a rounding error below zero, and
    -0.000 is no KL. A figure that is below zero by more than that is shown as it is.
    """
    sign = form[: len(form) - len(form.lstrip("+- "))]
    return f"{value:{sign}z{form.removeprefix(sign)}}"


def trained_for(plan: FoldPlan, quality: Quality) -> float:
    """What recovery is to lower, and by which the states of a trial are compared: KL to the dense model.

    Of an extension it is perplexity: it begins as good as the dense model and is trained to become better, so its KL
    can only grow.
    """
    return quality.perplexity if plan.is_extension else quality.kl


@dataclass(frozen=True, slots=True)
class Setback:
    """Training that left a model worse than it had been, so that an earlier state of it is kept.

    kept_tokens: recovery tokens of the state that is kept; 0 is the untrained model. latest: on the search tokens, of
    the state after all tokens; None where the training diverged.
    """

    kept_tokens: int
    latest: Quality | None


@dataclass(frozen=True, slots=True)
class Healing:
    """What healing in closed form did to a folded model, before anything was trained (see `foldsearch.model.heal`).

    Attributes:
        tokens: of the text that it was fitted to, which go forward only.
        solved: positions whose output was solved again.
        changed: of them, those that were changed.
        before: relative squared error of what these positions give, mean over them, on held-out tokens: as they were.
        after: the same, as they were solved.
        seconds: that it took.
        method: by which, see `foldsearch.model.healing`.
    """

    tokens: int
    solved: int
    changed: int
    before: float
    after: float
    seconds: float = field(compare=False)
    method: str = "ridge"

    @property
    def words(self) -> str:
        """In one line of a report."""
        how = "in closed form" if self.method == "ridge" else f"by the method '{self.method}'"
        return (
            f"healed {how} on {self.tokens:,} tokens, forward only: {self.changed} of {self.solved} positions "
            f"changed, held-out error {self.before:.3f} → {self.after:.3f}, {self.seconds:.0f} s"
        )


@dataclass(frozen=True, slots=True)
class RungResult:
    """What one rung of a trial came to: the best of its states so far (see `trained_for`), the untrained one counts.

    quality: of the kept state, on the search tokens, which objectives come from. recovery_tokens: trained on so far,
    whichever state is kept. seconds: spent by the trial so far. report: quality of the same state on the report
    tokens, at the last rung only. setback: where the kept state is not the latest one; else None. known_from: the
    number of the trial that measured this, where another one of the same plan did; nothing was trained then.
    """

    quality: Quality
    recovery_tokens: int
    seconds: float
    report: Quality | None = None
    setback: Setback | None = None
    known_from: int | None = None

    @property
    def kept_tokens(self) -> int:
        """Recovery tokens of the state that is kept: the one that is reported, rebuilt and exported."""
        return self.recovery_tokens if self.setback is None else self.setback.kept_tokens

    @property
    def training_diverged(self) -> bool:
        """Whether a state from before the divergence is kept."""
        return self.setback is not None and self.setback.latest is None
