"""Which run: model, data, target, budget, objectives, rungs, sampler, seed, as a person writes it.

Relative paths in a study are read from the current folder, as on the command line.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, field_validator, model_validator

from foldsearch.plan.cost import DTYPE_BYTES, Budget, Cost, CostTable, Target, parse_flops, price
from foldsearch.plan.plan import FoldPlan
from foldsearch.spec.space import Share01, Space, TomlTable, as_toml, narrow

Positive = Annotated[int, Field(gt=0)]
Weight = Annotated[float, Field(ge=0)]
Objective = Literal["kl", "memory", "flops"]
OBJECTIVES: tuple[Objective, ...] = get_args(Objective)


MOST = 1e9  # gigabytes, or seconds: beyond any machine's, and safe in arithmetic


class TargetSettings(TomlTable):
    """The device side of the price; see `foldsearch.plan.cost.Target` for the units."""

    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    context: Positive = 2048
    batch: Positive = 1
    prefill_chunk: Positive = 512
    runtime: Literal["folded", "expanded"] = "folded"

    def value(self) -> Target:
        """As the plan floor knows it."""
        return Target(self.dtype, self.context, self.batch, self.prefill_chunk, self.runtime)


class BudgetSettings(TomlTable):
    """gb: decimal gigabytes of weights + adapters + KV cache + activations.

    flops: FLOPs per token at decode, or a share of dense as text ("0.8x"). Absent: no bound.
    """

    gb: Annotated[float, Field(gt=0, le=MOST)] | None = None
    flops: float | str | None = None

    @field_validator("flops", mode="before")  # before: one law for numbers and text, so one fault
    @classmethod
    def _readable(cls, value: Any) -> Any:
        if value is not None and not _is_bound(value):
            raise ValueError(
                f'FLOPs per token (2.5e8) or a share of dense in quotes ("0.8x"); got {as_toml(value)}'
            )
        return value

    def value(self, dense: Cost) -> Budget:
        """As the plan floor knows it; `dense` is what shares are of."""
        memory = None if self.gb is None else round(self.gb * 10**9)
        return Budget(memory, None if self.flops is None else parse_flops(str(self.flops), dense))


class SplitSettings(TomlTable):
    """Token sets from different documents, in sequences.

    sequence_length: tokens of a sequence. search, recovery, report: how many sequences are measured on during the
    search, trained on, and measured on for the final table only.
    """

    sequence_length: Annotated[int, Field(ge=2)] = 256
    search: Positive = 16
    recovery: Positive = 64
    report: Positive = 32


class GateSettings(TomlTable):
    """Gated training (see `foldsearch.model.gates.GateSettings`). steps: training steps."""

    steps: Positive = 20


class StartSettings(TomlTable):
    """What replacements and adapters start from. tokens: of the recovery text, that they are fitted to."""

    tokens: Positive = 8192


class RecoverySettings(TomlTable):
    """Recovery training (see `foldsearch.model.recover.RecoverySettings`).

    batch: sequences of a step. next_token, kl, tail: weights of the next-token loss, of the KL divergence to the
    dense model, and of the tail-layer distillation.
    """

    batch: Positive = 2
    next_token: Weight = 0.3
    kl: Weight = 0.7
    tail: Weight = 0.1

    @model_validator(mode="after")
    def _some_loss(self) -> RecoverySettings:
        if self.next_token == self.kl == self.tail == 0:
            raise ValueError("at least one of next_token, kl and tail is above 0; got 0 for all three")
        return self


class HalvingSettings(TomlTable):
    """Which trials go on after a rung (see `foldsearch.search.halving`).

    keep: share of the trials of about the same cost that goes on after a rung. at_least: results of a rung before
    any trial is stopped. band: how near two costs are to be about the same, as a share of the span of costs seen.
    """

    keep: Annotated[float, Field(gt=0, le=1)] = 0.5
    at_least: Positive = 4
    band: Share01 = 0.25


class Sources(TomlTable):
    """One source of text a split, where the study does not split a single one."""

    search: str
    recovery: str
    report: str


class Study(TomlTable):
    """Everything that makes a run, resolved.

    model, data: references, as `foldsearch.model.source` and `foldsearch.model.text` read them; data is one source,
    split by document, or a table of three. text_column: key or column that holds the text. revision: branch, tag or
    commit of a hub model.
    device: "auto" takes CUDA, then MPS, then the CPU. precision: what trials compute in; "auto" is bfloat16 where the
    device multiplies it fast (CUDA, CPUs with AMX), else float32. trust_remote_code: let a model's own code run.
    rungs: recovery tokens trained on when each rung is measured. trials, seconds: when the search ends, whichever
    comes first; absent is no limit; the seconds are those of asking the dense model and of all trials. jobs: trials
    at a time. seed: of everything random.
    """

    model: str
    revision: str | None = None
    data: str | Sources
    text_column: str | None = None
    trust_remote_code: bool = False
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    space: Space
    target: TargetSettings = TargetSettings()
    budget: BudgetSettings = BudgetSettings()
    objectives: tuple[Objective, ...] = OBJECTIVES
    rungs: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] = (0, 2048, 8192)
    sampler: Literal["tpe", "nsga2", "random"] = "tpe"
    trials: Positive | None = 24
    seconds: Annotated[float, Field(gt=0, le=MOST)] | None = None
    jobs: Positive = 1
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    splits: SplitSettings = SplitSettings()
    gates: GateSettings = GateSettings()
    starts: StartSettings = StartSettings()
    recovery: RecoverySettings = RecoverySettings()
    halving: HalvingSettings = HalvingSettings()

    @field_validator("objectives")
    @classmethod
    def _a_trade_off(cls, value: tuple[Objective, ...]) -> tuple[Objective, ...]:
        if len(set(value)) < len(value) or "kl" not in value or len(value) < 2:
            raise ValueError(f"'kl' and at least one of 'memory' and 'flops', each once; got {list(value)}")
        return value

    @field_validator("rungs")
    @classmethod
    def _ascending(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if any(a >= b for a, b in pairwise(value)):
            raise ValueError(f"each rung trains on more tokens than the one before; got {list(value)}")
        return value

    @field_validator("model", "data")
    @classmethod
    def _named(cls, value: str | Sources) -> str | Sources:
        if isinstance(value, str) and not value.strip():
            raise ValueError("a reference is not empty; write a hub id, a folder or a file")
        return value

    def narrowed(self, table: CostTable) -> Space:
        """The space, cut to what can keep the budget on a model of these costs.

        Raises:
            BudgetError: no plan of the space can.
        """
        target = self.target.value()
        dense = price(FoldPlan.identity(len(table.blocks)), table, target)
        return narrow(self.space, table, target, self.budget.value(dense))


def _is_bound(value: Any) -> bool:
    """Whether it is a positive number, or such a share as text."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return False
    try:
        return 0 < float(value.removesuffix("x") if isinstance(value, str) else value) < float("inf")
    except (ValueError, OverflowError):
        return False


assert set(DTYPE_BYTES) == {"float32", "bfloat16", "float16"}  # TargetSettings.dtype names the same ones
