"""Which run: model, data, target, budget, objectives, rungs, sampler, seed, as a person writes it.

Relative paths in a study are read from the current folder, as on the command line.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Any, Literal, get_args
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Discriminator,
    Field,
    Tag,
    field_validator,
    model_validator,
)

from foldsearch.model.text import own_name
from foldsearch.model.training import (
    FITTED_TOKENS,
    GATE_STEPS,
    HEALED_TOKENS,
    HealMethod,
    LinearStart,
    RecoveryTraining,
)
from foldsearch.paths import printable
from foldsearch.plan.cost import DTYPE_BYTES, Budget, Cost, CostTable, Target, parse_flops, price
from foldsearch.plan.plan import FoldPlan
from foldsearch.plan.stored import DTYPE_TYPES, TYPES, StoredTypes, every_types
from foldsearch.runtimes import ALL_CAN, called_now, names, runtime_named
from foldsearch.spec.fit import narrow
from foldsearch.spec.space import CacheType, Space, WeightType
from foldsearch.toml import Share01, TomlTable, as_toml, one_of

Positive = Annotated[int, Field(gt=0)]
Weight = Annotated[float, Field(ge=0)]
Objective = Literal["kl", "memory", "flops", "prompt_ms", "decode_ms"]
OBJECTIVES: tuple[Objective, ...] = get_args(Objective)
TIMES: tuple[Objective, ...] = ("prompt_ms", "decode_ms")  # that are measured before a search
RECOVERY = RecoveryTraining()  # the defaults


OWN = "own:"  # as a source: text that the dense model writes itself
LONGEST_KIND = 24  # characters: it heads a column of every table
TYPED = "gguf"  # the runtime whose types of weights are priced and measured
MOST = 1e9  # gigabytes, or seconds: beyond any machine's, and safe in arithmetic


def _of_today(name: Any) -> Any:
    """A run of an earlier version may have a runtime by the name of then."""
    return called_now(name) if isinstance(name, str) else name


RuntimeName = Annotated[str, one_of(names), BeforeValidator(_of_today)]


class TargetSettings(TomlTable):
    """The device side of the price; see `foldsearch.plan.cost.Target` for the units.

    weights: the type that the runtime stores matrices in; absent: as the dtype is. Beside the runtime that is the
    default it means llama.cpp, which has these types. kv_cache: the type that it stores keys and values in; so too.
    rivals: types that the dense model is measured in too, beside a
    budget of bytes. prompt_tokens: of the prompt whose milliseconds are bounded, or an objective; a context that is
    shorter is read whole.
    """

    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    context: Positive = 2048
    batch: Positive = 1
    prefill_chunk: Positive = 512
    runtime: RuntimeName = "folded"
    weights: WeightType | None = None
    kv_cache: CacheType | None = None
    rivals: tuple[WeightType, ...] = ("q8_0", "q5_0", "q4_0")
    prompt_tokens: Positive = 256

    @model_validator(mode="after")
    def _is_stored(self) -> TargetSettings:
        if (self.weights or self.kv_cache) and self.runtime == ALL_CAN:
            object.__setattr__(self, "runtime", TYPED)
        if self.kv_cache and self.runtime != TYPED:
            raise FaultOf(
                ("kv_cache",),
                f"a KV cache of a type is the {TYPED} runtime's, and so are its bytes; got '{self.kv_cache}' for the "
                f"runtime '{self.runtime}'. Take the runtime '{TYPED}', or leave kv_cache out",
            )
        if self.weights and self.weights not in runtime_named(self.runtime).types:
            raise FaultOf(
                ("weights",),
                f"weights of a type are those of the {TYPED} runtime, and so are their bytes; got '{self.weights}' for "
                f"the runtime '{self.runtime}'. Take the runtime '{TYPED}', or leave the weights out",
            )
        return self

    def value(self) -> Target:
        """As the plan floor knows it."""
        return self.stored_in(self.weights or "")

    def stored_in(self, weights: str, runtime: str = "") -> Target:
        """The same with weights of another type, or for another runtime."""
        known = runtime_named(runtime or self.runtime)
        dtype = "float32" if self.dtype in known.lacks else self.dtype  # in which it stores and computes then
        if not weights and known.name == TYPED:
            weights = DTYPE_TYPES[dtype]
        return Target(
            dtype,
            self.context,
            self.batch,
            self.prefill_chunk,
            known.name,
            known.shares_weights,
            weights,
            known.puts_back,
            (self.kv_cache or "") if known.name == TYPED else "",
            known.own_cache,
            known.window_cache,
        )


class BudgetSettings(TomlTable):
    """gb: decimal gigabytes of weights + adapters + KV cache + activations.

    flops: FLOPs per token at decode, or a share of dense as text ("0.8x"). prompt_ms: milliseconds to read a prompt of
    `target.prompt_tokens`; decode_ms: to write a token after it; both in the target's runtime, on this machine. Absent:
    no bound.
    """

    gb: Annotated[float, Field(gt=0, le=MOST)] | None = None
    flops: float | str | None = None
    prompt_ms: Annotated[float, Field(gt=0, le=MOST)] | None = None
    decode_ms: Annotated[float, Field(gt=0, le=MOST)] | None = None

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
        flops = None if self.flops is None else parse_flops(str(self.flops), dense)
        return Budget(memory, flops, self.prompt_ms, self.decode_ms)


class SplitSettings(TomlTable):
    """Token sets from different documents, in sequences.

    sequence_length: tokens of a sequence. search, recovery, report: how many sequences are measured on during the
    search, trained on, and measured on for the final table only.
    """

    sequence_length: Annotated[int, Field(ge=2)] = 256
    search: Positive = 16
    recovery: Positive = 128
    report: Positive = 32


class GateSettings(TomlTable):
    """Gated training (see `foldsearch.model.training.GateTraining`). steps: training steps."""

    steps: Positive = GATE_STEPS


class StartSettings(TomlTable):
    """What replacements and adapters start from.

    tokens: of the recovery text, that they are fitted to. linear: how a linear map in place of blocks is found.
    """

    tokens: Positive = FITTED_TOKENS
    linear: LinearStart = "ridge"


class HealingSettings(TomlTable):
    """Healing in closed form, between fold and recovery (see `foldsearch.model.healing`).

    tokens: of the recovery text, that it is fitted to; all of its sequences, cut, at least two. 0 heals nothing.
    method: how; all but "ridge" are rivals.
    """

    tokens: Annotated[int, Field(ge=0)] = HEALED_TOKENS
    method: HealMethod = "ridge"


class RecoverySettings(TomlTable):
    """Recovery training (see `foldsearch.model.training.RecoveryTraining`).

    batch: sequences of a step. kl, tail, next_token: weights of the KL divergence to the dense model, of the tail-layer
    distillation, and of the next-token loss; the last is None where the trial chooses it by its plan.
    """

    batch: Positive = RECOVERY.batch
    kl: Weight = RECOVERY.kl
    tail: Weight = RECOVERY.tail
    next_token: Weight | None = None

    @model_validator(mode="after")
    def _some_loss(self) -> RecoverySettings:
        if self.kl == self.tail == (self.next_token or 0.0) == 0:
            raise ValueError("at least one of kl, tail and next_token is above 0; got 0 for all three")
        return self


class ScreenSettings(TomlTable):
    """Plans that are healed and measured on little text before any is trained (see `foldsearch.search.screening`).

    plans: that are measured, unless the time for them is up; 0 screens nothing. share: of the run's time, about: the
    rest is to hold whole rounds of trials. promoted: how many of them are trained. healed_tokens: of the recovery text,
    that each plan is healed on; judged_tokens: of the search text, that it is measured on.
    """

    plans: Annotated[int, Field(ge=0)] = 200
    share: Annotated[float, Field(gt=0, lt=1)] = 0.45
    promoted: Positive = 6
    healed_tokens: Positive = 768
    judged_tokens: Positive = 1024


class HalvingSettings(TomlTable):
    """Which trials go on after a rung (see `foldsearch.search.halving`).

    keep: share of the trials of about the same cost that goes on after a rung. at_least: results of a rung before
    any trial is stopped. band: how near two costs are to be about the same, as a share of the span of costs seen.
    """

    keep: Annotated[float, Field(gt=0, le=1)] = 0.5
    at_least: Positive = 4
    band: Share01 = 0.25


def _gpus(value: float) -> float:
    if value > 1 and not value.is_integer():
        raise ValueError(f"a trial takes a part of one GPU, or whole ones; got {value:g}")
    return value


def _run_storage(value: str) -> str:
    if "@" in urlsplit(value).netloc:  # not repeated: what stands before it may be a password
        raise ValueError(
            "a run storage is a path or a URL without user and password; give these to its library"
        )
    return value


class ClusterSettings(TomlTable):
    """Where trials run, and what one of them takes (see `foldsearch.search.cluster`).

    address: of a running Ray cluster, host:port or "auto"; absent is what RAY_ADDRESS says, else "local": a Ray of our
    own on this machine. run_storage: a path or a URL that all nodes see. cpus_per_trial, gpus_per_trial: absent is an
    equal share for as many as run at a time, of a cluster with GPUs a whole one.
    """

    address: str | None = None
    run_storage: Annotated[str, AfterValidator(_run_storage)] | None = None
    cpus_per_trial: Positive | None = None
    gpus_per_trial: Annotated[float, Field(ge=0, le=MOST), AfterValidator(_gpus)] | None = None


class FaultOf(ValueError):
    """A fault that only several settings together show, and the keys that lead to what is to be mended."""

    def __init__(self, keys: tuple[str, ...], words: str) -> None:
        super().__init__(words)
        self.keys = keys


class KindSettings(TomlTable):
    """What becomes of the kinds of text (see `foldsearch.model.tokens.Kinds`).

    unseen: kinds that are in the report texts only: nothing is fitted to them, trained or chosen on them. objective:
    the KL that a search lowers is the mean over the other kinds, each counting the same, or that of the worst.
    """

    unseen: tuple[str, ...] = ()
    objective: Literal["mean", "worst"] = "mean"


def _reference(value: str) -> str:
    if not value.strip():
        raise ValueError("a reference is not empty; write a hub id, a folder or a file")
    return value


def _kind_name(value: str) -> str:
    if not value.strip() or not value.isprintable() or len(value) > LONGEST_KIND:
        raise ValueError(f"a kind of text is a name of 1 to {LONGEST_KIND} characters; got {as_toml(value)}")
    return value


Reference = Annotated[str, AfterValidator(_reference)]
SampleBy = Literal["line", "paragraph"]


class SourceSettings(TomlTable):
    """A source of text, and how it is read (see `foldsearch.model.text.Source`).

    source: a reference. kind: of text, such as "prose"; several sources may be of one. text_column, sample_by: if they
    differ from the study's. weight: its share of the sequences of every split, relative to the other sources'; either
    each of them has one or none.
    """

    source: Reference
    kind: Annotated[str, AfterValidator(_kind_name)] | None = None
    text_column: str | None = None
    sample_by: SampleBy | None = None
    weight: Annotated[float, Field(gt=0, le=MOST)] | None = None


def _shape(value: Any) -> str:
    """Which way of naming text a value is written in."""
    if isinstance(value, dict):
        return EACH if any(split in value for split in Sources.model_fields) else SOURCE
    if isinstance(value, list | tuple):
        return SEVERAL
    if isinstance(value, Sources):
        return EACH
    return SOURCE if isinstance(value, SourceSettings) else NAME


# Spaces keep these tags of pydantic's apart from the keys of a study.
NAME, SOURCE, SEVERAL, EACH = "a name", "a source", "several sources", "a source a split"
OneSource = Annotated[
    Annotated[Reference, Tag(NAME)] | Annotated[SourceSettings, Tag(SOURCE)], Discriminator(_shape)
]
SeveralSources = Annotated[tuple[OneSource, ...], Field(min_length=1)]
AnySources = Annotated[
    Annotated[Reference, Tag(NAME)]
    | Annotated[SourceSettings, Tag(SOURCE)]
    | Annotated[SeveralSources, Tag(SEVERAL)],
    Discriminator(_shape),
]


class Sources(TomlTable):
    """Text of its own for each split, where the study does not split one text."""

    search: AnySources
    recovery: AnySources
    report: AnySources


Data = Annotated[
    Annotated[Reference, Tag(NAME)]
    | Annotated[SourceSettings, Tag(SOURCE)]
    | Annotated[SeveralSources, Tag(SEVERAL)]
    | Annotated[Sources, Tag(EACH)],
    Discriminator(_shape),
]


def _names_of(splits: Sequence[Sequence[str]]) -> dict[str, str]:
    """A name of its own for each source of a split: the short one, with its folder, or whole, as far as it takes."""
    names = {source: own_name(source) for of in splits for source in of}
    for longer in (lambda source: "/".join(source.rstrip("/").split("/")[-2:]), str):
        for of in splits:
            alike = Counter(names[source] for source in set(of))
            names |= {source: printable(longer(source)) for source in of if alike[names[source]] > 1}
    return names


class Study(TomlTable):
    """Everything that makes a run, resolved.

    model: a reference, as `foldsearch.model.source` reads it. revision: branch, tag or commit of a hub model.
    data: one source of text or a list of them, split by document, or a table of search, recovery and report. A source
    is a reference, as `foldsearch.model.text` reads it, or a table of `SourceSettings`; "own:" is text that the dense
    model writes itself (`foldsearch.model.own_text`), a kind of the recovery texts only. text_column: key or column
    that holds the text of a row, dotted where it is nested. sample_by: what a document of a plain text file is, if not
    what stands between two blank lines or form feeds.
    device: "auto" takes CUDA, then MPS, then the CPU. precision: what trials compute in; "auto" is bfloat16 where the
    device multiplies it fast (CUDA, CPUs with AMX), else float32. trust_remote_code: let a model's own code run.
    rungs: recovery tokens trained on when each rung is measured. trials, seconds: when the search ends, whichever
    comes first; absent is no limit; the seconds are those of asking the dense model and of all trials. trial_seconds:
    that one trial may take, else it failed; absent is no limit. jobs: trials at a time. warm_from: folder of
    an earlier run of the same model and text, whose best plans are tried first. kinds: which kinds of text are unseen,
    and how one KL is made of several. seed: of everything random.
    """

    model: Reference
    revision: str | None = None
    data: Data
    text_column: str | None = None
    sample_by: SampleBy | None = None
    trust_remote_code: bool = False
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    space: Space
    target: TargetSettings = TargetSettings()
    budget: BudgetSettings = BudgetSettings()
    objectives: tuple[Objective, ...] = ("kl", "memory", "flops")
    rungs: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] = (0, 2048, 8192)
    sampler: Literal["tpe", "nsga2", "random"] = "tpe"
    trials: Positive | None = 24
    seconds: Annotated[float, Field(gt=0, le=MOST)] | None = None
    trial_seconds: Annotated[float, Field(gt=0, le=MOST)] | None = None
    jobs: Positive = 1
    warm_from: str | None = None
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    splits: SplitSettings = SplitSettings()
    kinds: KindSettings = KindSettings()
    gates: GateSettings = GateSettings()
    starts: StartSettings = StartSettings()
    healing: HealingSettings = HealingSettings()
    recovery: RecoverySettings = RecoverySettings()
    screen: ScreenSettings = ScreenSettings()
    halving: HalvingSettings = HalvingSettings()
    cluster: ClusterSettings = ClusterSettings()

    @field_validator("objectives")
    @classmethod
    def _a_trade_off(cls, value: tuple[Objective, ...]) -> tuple[Objective, ...]:
        if len(set(value)) < len(value) or "kl" not in value or len(value) < 2:
            others = " and ".join((", ".join(map(repr, OBJECTIVES[1:-1])), repr(OBJECTIVES[-1])))
            raise ValueError(f"'kl' and at least one of {others}, each once; got {list(value)}")
        return value

    @field_validator("rungs")
    @classmethod
    def _ascending(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if any(a >= b for a, b in pairwise(value)):
            raise ValueError(f"each rung trains on more tokens than the one before; got {list(value)}")
        return value

    @model_validator(mode="after")
    def _types_are_stored(self) -> Study:
        for key, what in (("weights", "weights"), ("kv_cache", "a KV cache")):
            if not getattr(self.space, key):
                continue
            if self.target.runtime == ALL_CAN:
                object.__setattr__(self, "target", self.target.model_copy(update={"runtime": TYPED}))
            said = getattr(self.target, key)
            if said or self.target.runtime != TYPED:
                raise FaultOf(
                    ("space", key),
                    f"several types of {what} are searched for the {TYPED} runtime, with no type in the target; got "
                    f"'{said or self.target.runtime}'. Leave target.{key} and target.runtime out, or space.{key}",
                )
        return self

    @property
    def has_times(self) -> bool:
        """Whether milliseconds are bounded, or an objective: they are measured then, before anything else is dear."""
        bounds = (self.budget.prompt_ms, self.budget.decode_ms)
        return any(bound is not None for bound in bounds) or not set(TIMES).isdisjoint(self.objectives)

    def targets(self) -> tuple[Target, ...]:
        """The target in all types that the space allows."""
        return tuple(self.target.value().storing(types) for types in self.space.types)

    def rivals(self) -> list[StoredTypes]:
        """The types that the dense model is measured in too: of its weights, with each KV cache of the space."""
        return every_types(self.target.rivals, self.space.kv_cache) if self.target.rivals else []

    def narrowest(self) -> Target:
        """The target, with the fewest bytes that the types of the space allow: what bounds what can fit."""

        def fewest(types: tuple[str, ...]) -> str:
            return min(types, key=lambda name: TYPES[name].bits, default="")

        return self.target.value().storing(
            StoredTypes(fewest(self.space.weights), fewest(self.space.kv_cache))
        )

    @model_validator(mode="after")
    def _can_heal(self) -> Study:
        if self.healing.tokens and self.splits.recovery < 2:
            raise ValueError(
                "healing needs a recovery sequence to fit to and another to choose on: splits.recovery is at least 2, "
                f"or healing.tokens is 0; got {self.splits.recovery} and {self.healing.tokens}"
            )
        return self

    @field_validator("data")
    @classmethod
    def _weighted(cls, value: Any) -> Any:
        for given in value.model_dump().values() if isinstance(value, Sources) else (value,):
            weights = [
                one["weight"] if isinstance(one, dict) else getattr(one, "weight", None)
                for one in (given if isinstance(given, list | tuple) else ())
            ]
            if weights.count(None) not in (0, len(weights)):
                raise ValueError(
                    f"either each source of a list has a weight or none; {weights.count(None)} of {len(weights)} have "
                    "none"
                )
        return value

    @model_validator(mode="after")
    def _own_text_is_not_all(self) -> Study:
        splits = self._by_split()
        for split in ("search", "report"):
            others = [one for one in splits[split] if one.source != OWN]
            if not others or (isinstance(self.data, Sources) and len(others) < len(splits[split])):
                raise FaultOf(
                    ("data",),
                    f"the {split} texts must be of other sources than the model itself; got '{OWN}' for them. "
                    "Add a source, and keep it for data.recovery where each split has text of its own",
                )
        if any(one.kind in self.kinds.unseen for one in splits["recovery"] if one.source == OWN):
            raise FaultOf(
                ("kinds", "unseen"),
                f"an unseen kind must be in the report texts only; got that of '{OWN}', which is trained on. "
                "Leave one of them out",
            )
        kinds = {one.kind for one in splits["recovery"] if one.source != OWN}
        own = next((one for one in splits["recovery"] if one.source == OWN), None)
        if own is not None and own.weight is None and own.kind in kinds:
            raise FaultOf(
                ("data",),
                f"without weights each kind has an equal share, so '{OWN}' must be a kind of its own; got "
                f"{as_toml(own.kind)}, which others are too. Name another one, or give each source a weight",
            )
        if own is not None and not self.own_text()[1]:
            raise FaultOf(
                ("data",),
                f"'{OWN}' must be at least one of the recovery sequences; got none of {self.splits.recovery}. Raise "
                "splits.recovery or its weight, or leave it out",
            )
        return self

    @model_validator(mode="after")
    def _known_kinds(self) -> Study:
        unseen = self.kinds.unseen
        if not unseen:
            return self
        splits = self._by_split()
        known = list(dict.fromkeys(one.kind for one in splits["report"] if one.source != OWN))
        if unknown := [name for name in unseen if name not in known]:
            raise FaultOf(
                ("kinds", "unseen"),
                f"an unseen kind must be one of {', '.join(map(str, known))}, the kinds of the report texts; got "
                f"{as_toml(unknown[0])}. Name one of these in kinds.unseen, or leave it out",
            )
        for split in ("search", "recovery") if isinstance(self.data, Sources) else ():
            if shared := [one.kind for one in splits[split] if one.kind in unseen]:
                raise FaultOf(
                    ("kinds", "unseen"),
                    f"an unseen kind must be in the report texts only; got {as_toml(shared[0])} in those of {split}. "
                    "Leave it out there, or in kinds.unseen",
                )
        if set(known) == set(unseen):
            raise FaultOf(
                ("kinds", "unseen"),
                f"at least one kind of text must be seen; got all of {', '.join(map(str, known))} in kinds.unseen. "
                "Leave one out",
            )
        return self

    def _by_split(self) -> dict[str, tuple[SourceSettings, ...]]:
        """The sources of each split, the model itself among them, with the study's way of reading them.

        Where kinds of text are named, a source that names none is of a kind of its own name; of one with its folder
        where another source has that name too.
        """
        given = {
            split: self._settings(getattr(self.data, split) if isinstance(self.data, Sources) else self.data)
            for split in Sources.model_fields
        }
        every = [one for of in given.values() for one in of]
        if not self.kinds.unseen and not any(one.kind or one.source == OWN for one in every):
            return given
        names = _names_of([[one.source for one in of if one.kind is None] for of in given.values()])
        return {
            split: tuple(one.model_copy(update={"kind": one.kind or names[one.source]}) for one in of)
            for split, of in given.items()
        }

    def sources(self) -> tuple[SourceSettings, ...] | dict[str, tuple[SourceSettings, ...]]:
        """The sources of the text, or those of each split, with the study's way of reading them and their kinds.

        The model itself is not among them, see `own_text`.
        """
        found = {
            split: tuple(one for one in of if one.source != OWN) for split, of in self._by_split().items()
        }
        return found if isinstance(self.data, Sources) else found["search"]

    @property
    def healed_tokens(self) -> int:
        """What trials are healed on: of the recovery text, which may hold fewer than `healing.tokens`."""
        return min(self.healing.tokens, self.splits.recovery * self.splits.sequence_length)

    def own_text(self) -> tuple[str, int]:
        """The kind of the text that the dense model writes itself, and how many of the recovery sequences are of it."""
        sources = [one for one in self._by_split()["recovery"] if one.kind not in self.kinds.unseen]
        own = [one for one in sources if one.source == OWN]
        if not own:
            return "", 0
        whole = sum(one.weight or 0.0 for one in sources)  # 0 where nobody has a weight: equal shares then
        share = (
            sum(one.weight or 0.0 for one in own) / whole if whole else 1 / len({one.kind for one in sources})
        )
        return str(own[0].kind), round(share * self.splits.recovery)

    def all_sources(self) -> tuple[SourceSettings, ...]:
        """The sources of all splits, each once."""
        found = self.sources()
        every = found if isinstance(found, tuple) else [one for of in found.values() for one in of]
        return tuple(dict.fromkeys(every))

    def _settings(self, given: Any) -> tuple[SourceSettings, ...]:
        every = given if isinstance(given, tuple) else (given,)
        tables = (SourceSettings(source=one) if isinstance(one, str) else one for one in every)
        return tuple(
            one.model_copy(
                update={
                    "text_column": one.text_column or self.text_column,
                    "sample_by": one.sample_by or self.sample_by,
                }
            )
            for one in tables
        )

    def narrowed(self, table: CostTable) -> Space:
        """The space, cut to what can keep the budget on a model of these costs.

        Raises:
            BudgetError: no plan of the space can.
        """
        target = self.narrowest()
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
