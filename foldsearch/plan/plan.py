"""A fold plan: what runs at each depth of a folded model, as a frozen value with a text people can type.

A *slot* is one executed position. A kept block is a slot whose two units, attention and MLP, run the block's own
weights; a *child* borrows a unit from an *owner*, a block that runs its own weights somewhere in the plan; a
*repeat* is a child of the first occurrence of its own block. A *replacement* is one small network in place of a
run of blocks. A dropped block is simply not there.

The text form, one word a slot:

    0-5        blocks 0 to 5, as they are
    8a   10m   only the attention of block 8; only the MLP of block 10
    6=5        block 6 runs with the weights of block 5 and norms of its own
    7=9+r8+n   … with a low-rank adapter of rank 8 and an output norm
    7=9a       only its attention is borrowed;  7=9m only its MLP;  7=9a5m one from each
    7a=9       its attention is borrowed, its MLP is absent
    3=3+r8     block 3 once more (its first occurrence stands earlier)
    13-18~linear    one trained matrix in place of blocks 13 to 18;  13-18~ffn512: a hidden width of 512
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal, get_args

from foldsearch.errors import PlanError
from foldsearch.plan.kinds import DEFAULT_EXPANSION, kind_named

SCHEMA = 1
MOST_BLOCKS = 10_000  # that a file may speak of: more than any model has
AdapterStart = Literal["zero", "svd", "data"]
UnitName = Literal["attention", "mlp"]
UNITS: tuple[UnitName, ...] = get_args(UnitName)


@dataclass(frozen=True, slots=True)
class Slot:
    """One executed position that runs (parts of) a block.

    home: the block whose norms, attention type and positional rotation this position keeps.
    attention, mlp: the block whose weights the unit runs, or None where the unit is absent.
    rank: rank of the low-rank adapters on every linear of the borrowed units (0: none).
    norm: whether the outputs of the borrowed units are normalised (FlexiGPT section 3).
    """

    home: int
    attention: int | None
    mlp: int | None
    rank: int = 0
    norm: bool = False


@dataclass(frozen=True, slots=True)
class Replacement:
    """One network, or one copied block, in place of blocks first..last (LLM-Streamline).

    kind: its name in `foldsearch.plan.kinds`. size: its hidden width, where the kind takes one; 0 means the default,
    four times the model's width.
    """

    first: int
    last: int
    kind: str
    size: int = 0

    @property
    def is_block(self) -> bool:
        """Whether it is a block like the model's own, with attention and a KV cache."""
        return kind_named(self.kind).is_block

    def hidden(self, width: int) -> int:
        """Its hidden width in a model of this width."""
        return self.size or DEFAULT_EXPANSION * width


@dataclass(frozen=True, slots=True)
class FoldPlan:
    """What runs at each depth; laws are checked on construction.

    slots: in execution order. num_blocks: blocks of the dense model.

    Raises:
        PlanError: a law is broken; the message names it, the value and a remedy.
    """

    slots: tuple[Slot | Replacement, ...]
    num_blocks: int

    def __post_init__(self) -> None:
        _check(self)

    # ---- constructors

    @classmethod
    def identity(cls, num_blocks: int) -> FoldPlan:
        """The dense model itself."""
        return cls(tuple(Slot(block, block, block) for block in range(num_blocks)), num_blocks)

    @classmethod
    def dropping(cls, blocks: Iterable[int], num_blocks: int) -> FoldPlan:
        """A plan of every block except `blocks`."""
        dropped = set(blocks)
        if out_of_range := sorted(dropped - set(range(num_blocks))):
            raise PlanError(f"only blocks 0 to {num_blocks - 1} can be dropped, got {out_of_range}.")
        kept = [block for block in range(num_blocks) if block not in dropped]
        return cls(tuple(Slot(block, block, block) for block in kept), num_blocks)

    @classmethod
    def parse(cls, text: str, num_blocks: int) -> FoldPlan:
        """Read the text form; `FoldPlan.parse(str(plan), plan.num_blocks) == plan`.

        Raises:
            PlanError: a word cannot be read, or the plan breaks a law.
        """
        return _parse(text, num_blocks)

    @classmethod
    def from_json(cls, text: str) -> FoldPlan:
        """Read what `to_json` wrote.

        Raises:
            PlanError: not a plan, or of another schema.
        """
        try:
            value: dict[str, Any] = json.loads(text)
            schema, words, num_blocks = value["schema"], value["plan"], value["num_blocks"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise PlanError(
                f"a plan in JSON has the keys schema, num_blocks and plan; got {text[:80]!r}."
            ) from error
        if schema != SCHEMA:
            raise PlanError(f"this version reads plans of schema {SCHEMA}, got schema {schema!r}.")
        return cls.from_words(words, num_blocks)

    @classmethod
    def from_words(cls, words: Any, num_blocks: Any) -> FoldPlan:
        """Read the text form and the number of blocks as they stood in a file, where they may be anything.

        Raises:
            PlanError: they are not what they should be, or `parse` says so.
        """
        if not (isinstance(words, str) and isinstance(num_blocks, int) and num_blocks <= MOST_BLOCKS):
            raise PlanError(
                f"a plan in JSON has a text and a whole number of blocks, at most {MOST_BLOCKS:,}; got "
                f"{words!r:.200} and {num_blocks!r:.80}."
            )
        return cls.parse(words, num_blocks)

    # ---- forms

    def __str__(self) -> str:
        return " ".join(_words(self))

    @property
    def id(self) -> str:
        """Twelve hex digits that name the plan, the same in every process."""
        return hashlib.sha256(f"{self.num_blocks}:{self}".encode()).hexdigest()[:12]

    def to_json(self) -> str:
        """JSON that holds the text, the number of blocks and the schema number."""
        return json.dumps({"schema": SCHEMA, "num_blocks": self.num_blocks, "plan": str(self)})

    # ---- what the plan says

    @property
    def adds_nothing(self) -> bool:
        """Whether its blocks and units are the dense model's, each run once at most, and some may be gone."""
        homes = {slot.home for slot in self.slots if isinstance(slot, Slot)}
        units = (own for unit in UNITS for _, _, _, own in self.runs(unit))
        return len(homes) == len(self.slots) and all(units)

    @property
    def needs_no_fit(self) -> bool:
        """Whether healing alone gives what is new in it its values: nothing is, or one matrix in place of blocks."""
        own = tuple(slot for slot in self.slots if isinstance(slot, Slot) or slot.kind != "linear")
        return not own or FoldPlan(own, self.num_blocks).adds_nothing

    @property
    def only_drops(self) -> bool:
        """Whether every position is a block as it is in the dense model, and runs once."""
        own = all(isinstance(slot, Slot) and slot.attention == slot.mlp == slot.home for slot in self.slots)
        return own and self.depth + len(self.dropped) == self.num_blocks

    @property
    def depth(self) -> int:
        """Number of executed positions."""
        return len(self.slots)

    @property
    def is_extension(self) -> bool:
        """Whether it runs more positions than the dense model, so that it can become better and not only as good."""
        return self.depth > self.num_blocks

    def owners(self, unit: UnitName) -> frozenset[int]:
        """Blocks that run their own weights in this unit."""
        return frozenset(source for _, _, source, own in self.runs(unit) if own)

    def runs(self, unit: UnitName) -> Iterator[tuple[int, Slot, int, bool]]:
        """Every run of the unit: position, slot, the block whose weights it runs, and whether they are its own."""
        seen: set[int] = set()
        for position, slot in enumerate(self.slots):
            if isinstance(slot, Slot):
                source = slot.attention if unit == "attention" else slot.mlp
                if source is not None:
                    yield position, slot, source, source == slot.home and slot.home not in seen
                seen.add(slot.home)

    @property
    def dropped(self) -> tuple[int, ...]:
        """Blocks that no slot and no replacement stands for, in order."""
        present: set[int] = set()
        for slot in self.slots:
            present |= set(range(slot.first, slot.last + 1)) if isinstance(slot, Replacement) else {slot.home}
        return tuple(block for block in range(self.num_blocks) if block not in present)

    def share(self, child: int, owner: int, *, rank: int = 0, norm: bool = False) -> FoldPlan:
        """The same plan with the whole of block `child` run by `owner`'s weights."""
        if not any(isinstance(slot, Slot) and slot.home == child for slot in self.slots):
            raise PlanError(
                f"only a block that runs can be made a child, but block {child} does not run in '{self}'."
            )
        slots = tuple(
            replace(slot, attention=owner, mlp=owner, rank=rank, norm=norm)
            if isinstance(slot, Slot) and slot.home == child
            else slot
            for slot in self.slots
        )
        return FoldPlan(slots, self.num_blocks)


# ---- laws


def _check(plan: FoldPlan) -> None:
    if plan.num_blocks < 1:
        raise PlanError(f"a model has at least one block, got num_blocks={plan.num_blocks}.")
    if not plan.slots:
        raise PlanError("a plan runs at least one block, but every block is dropped. Keep one.")
    _check_slots(plan)
    _check_order(plan)
    _check_owners(plan)
    _check_attention(plan)


def _check_slots(plan: FoldPlan) -> None:
    last_block = plan.num_blocks - 1
    for position, slot in enumerate(plan.slots):
        where = f"position {position}"
        if isinstance(slot, Replacement):
            if not 0 <= slot.first <= slot.last <= last_block:
                raise PlanError(
                    f"{where} replaces blocks {slot.first} to {slot.last}, but blocks go from 0 to {last_block}, "
                    "first before last."
                )
            if not kind_named(slot.kind).takes_size and slot.size:
                raise PlanError(
                    f"{where}: a '{slot.kind}' replacement has no size to set, got {slot.size}. Leave it out."
                )
            if slot.size < 0:
                raise PlanError(f"{where}: the size of a replacement is positive, got {slot.size}.")
            continue
        for name, block in (("home", slot.home), ("attention", slot.attention), ("mlp", slot.mlp)):
            if block is not None and not 0 <= block <= last_block:
                raise PlanError(
                    f"{where} ({name}) names block {block}, but blocks go from 0 to {last_block}."
                )
        if slot.attention is None and slot.mlp is None:
            raise PlanError(f"{where} runs neither unit of block {slot.home}. Drop the block instead.")
        if slot.rank < 0:
            raise PlanError(f"{where}: an adapter's rank is 0 or more, got {slot.rank}.")


def _check_order(plan: FoldPlan) -> None:
    seen: set[int] = set()
    replaced: set[int] = set()
    latest = -1
    for position, slot in enumerate(plan.slots):
        if isinstance(slot, Replacement):
            first, last = slot.first, slot.last
            replaced |= set(range(first, last + 1))
        elif slot.home in seen:
            continue  # a repeat may stand anywhere after its first occurrence
        else:
            first = last = slot.home
            seen.add(slot.home)
        if first <= latest:
            raise PlanError(
                f"blocks keep their order, but block {first} at position {position} stands after block {latest}. "
                "Write the blocks in ascending order; only repeats (3=3) may come later."
            )
        latest = last
    if both := sorted(seen & replaced):
        raise PlanError(f"a block is either run or replaced, but blocks {both} are both.")


def _check_owners(plan: FoldPlan) -> None:
    borrowers: set[int] = set()
    present = {slot.home for slot in plan.slots if isinstance(slot, Slot)}
    for unit in UNITS:
        owners = plan.owners(unit)
        for position, slot, source, own in plan.runs(unit):
            if not own:
                borrowers.add(position)
            if source in owners:
                continue
            if source not in present:
                raise PlanError(
                    f"block {slot.home} shares the {unit} of block {source}, but block {source} does not run. "
                    f"Keep block {source}, or leave block {slot.home} out too."
                )
            raise PlanError(
                f"block {slot.home} shares the {unit} of block {source}, but block {source} has no {unit} weights "
                f"of its own (it borrows, or lacks, that unit). Share from a block that runs its own."
            )
    for position, carrier in enumerate(plan.slots):
        if isinstance(carrier, Slot) and (carrier.rank or carrier.norm) and position not in borrowers:
            raise PlanError(
                f"only a child carries an adapter or an output norm, but block {carrier.home} at position {position} "
                "runs its own weights. Leave +r and +n out."
            )


def _check_attention(plan: FoldPlan) -> None:
    if not any(
        slot.attention is not None if isinstance(slot, Slot) else slot.is_block for slot in plan.slots
    ):
        # No token would know of another one, and there would be no KV cache to decode with.
        raise PlanError(
            f"a plan attends at one position at least, but '{plan}' has no attention. Keep the attention of a block, "
            "or replace blocks by ~layer, which has one."
        )


# ---- text

LONGEST_WORD = 64  # characters
_WORD = re.compile(
    r"(?P<home>\d+)(?:-(?P<last>\d+))?(?P<unit>[am])?"
    r"(?:=(?P<source>\d+)(?P<source_unit>[am])?(?:(?P<source_mlp>\d+)m)?)?"
    r"(?:~(?P<kind>[a-z]+)(?P<size>\d+)?)?(?:\+r(?P<rank>\d+))?(?P<norm>\+n)?"
)


@lru_cache(maxsize=4096)  # a run's records name each plan at every rung
def _parse(text: str, num_blocks: int) -> FoldPlan:
    slots: list[Slot | Replacement] = []
    seen: set[int] = set()
    if not text.strip():
        raise PlanError("a plan runs at least one block, but it is empty. Name the blocks to run, as in 0-5.")
    for word in text.split():
        for slot in _parse_word(word, seen, num_blocks):
            slots.append(slot)
            if isinstance(slot, Slot):
                seen.add(slot.home)
    return FoldPlan(tuple(slots), num_blocks)


def _parse_word(word: str, seen: set[int], num_blocks: int) -> list[Slot | Replacement]:
    match = _WORD.fullmatch(word) if len(word) <= LONGEST_WORD else None
    if match is None:
        raise PlanError(
            f"'{word[:LONGEST_WORD]}' is not a word of a plan. "
            "Examples: 0-5  8a  10m  6=5  7=9+r8+n  7=9a  3=3+r8  13-18~linear."
        )
    part = match.groupdict()
    home, last = int(part["home"]), int(part["last"] or part["home"])
    carried = part["rank"] is not None or part["norm"] is not None
    highest = max(int(part[name] or 0) for name in ("home", "last", "source", "source_mlp"))
    if 0 < num_blocks <= highest:  # before a list of that length is made
        raise PlanError(
            f"'{word}' names block {highest}, but blocks go from 0 to {num_blocks - 1}. Name blocks that there are."
        )
    if last < home:
        up = word.replace(f"{part['home']}-{part['last']}", f"{part['last']}-{part['home']}", 1)
        raise PlanError(f"'{word}': a range goes up. Write {up}.")
    if part["kind"] is not None:
        if part["unit"] or part["source"] or carried:
            raise PlanError(f"'{word}': a replacement is written first-last~kind, with nothing else.")
        return [Replacement(home, last, part["kind"], int(part["size"] or 0))]
    if part["last"] is not None and (part["unit"] or part["source"] or carried):
        raise PlanError(f"'{word}': a range is of whole blocks. Write the blocks one by one.")
    if part["source"] is None:
        for block in range(home, last + 1):
            if block in seen:
                raise PlanError(
                    f"'{word}': block {block} has run already. Write {block}={block} to run it again with the same "
                    "weights."
                )
        attention = part["unit"] != "m"
        mlp = part["unit"] != "a"
        rank, norm = int(part["rank"] or 0), part["norm"] is not None
        return [
            Slot(block, block if attention else None, block if mlp else None, rank, norm)
            for block in range(home, last + 1)
        ]
    return [_parse_child(word, part, home, seen)]


def _parse_child(word: str, part: dict[str, str | None], home: int, seen: set[int]) -> Slot:
    source = int(part["source"] or 0)
    attention: int | None
    mlp: int | None
    if part["unit"] is not None:
        if part["source_unit"] or part["source_mlp"]:
            raise PlanError(f"'{word}': the unit is named once. Write {home}{part['unit']}={source}.")
        attention, mlp = (source, None) if part["unit"] == "a" else (None, source)
    elif part["source_mlp"] is not None:
        if part["source_unit"] != "a":
            raise PlanError(f"'{word}': two owners are written {home}=9a5m, the attention's first.")
        attention, mlp = source, int(part["source_mlp"])
    elif part["source_unit"] is not None:
        attention, mlp = (source, home) if part["source_unit"] == "a" else (home, source)
    else:
        attention = mlp = source
    if home not in seen and {attention, mlp} <= {home, None}:
        raise PlanError(
            f"'{word}': a block does not borrow from itself at its first occurrence. Write {home}."
        )
    return Slot(home, attention, mlp, int(part["rank"] or 0), part["norm"] is not None)


def word_of(slot: Slot | Replacement, *, repeat: bool = False) -> str:
    """A position as a word of the text form; repeat: its block has run before."""
    if isinstance(slot, Replacement):
        return f"{_run_word([slot.first, slot.last])}~{slot.kind}{slot.size or ''}"
    if slot.attention == slot.mlp == slot.home and not repeat:
        return str(slot.home)
    return _slot_word(slot, repeat)


def _words(plan: FoldPlan) -> Iterator[str]:
    seen: set[int] = set()
    run: list[int] = []
    for slot in plan.slots:
        whole = (
            isinstance(slot, Slot)
            and slot.attention == slot.mlp == slot.home
            and not (slot.rank or slot.norm or slot.home in seen)
        )
        if run and not (whole and isinstance(slot, Slot) and slot.home == run[-1] + 1):
            yield _run_word(run)
            run = []
        if isinstance(slot, Replacement):
            yield word_of(slot)
            continue
        if whole:
            run.append(slot.home)
        else:
            yield word_of(slot, repeat=slot.home in seen)
        seen.add(slot.home)
    if run:
        yield _run_word(run)


def _run_word(run: list[int]) -> str:
    return str(run[0]) if run[0] == run[-1] else f"{run[0]}-{run[-1]}"


def _slot_word(slot: Slot, repeat: bool) -> str:
    home, attention, mlp = slot.home, slot.attention, slot.mlp
    if attention is None or mlp is None:
        unit, source = ("m", mlp) if attention is None else ("a", attention)
        word = f"{home}{unit}" if source == home and not repeat else f"{home}{unit}={source}"
    elif attention == mlp:
        word = f"{home}={attention}"
    elif mlp == home:
        word = f"{home}={attention}a"
    elif attention == home:
        word = f"{home}={mlp}m"
    else:
        word = f"{home}={attention}a{mlp}m"
    return word + (f"+r{slot.rank}" if slot.rank else "") + ("+n" if slot.norm else "")


def is_foldable(plan: FoldPlan, width: int) -> bool:
    """Whether a model of this width can be folded by the plan: no adapter is wider than the model."""
    return max((slot.rank for slot in plan.slots if isinstance(slot, Slot)), default=0) <= width


def check_ranks(plan: FoldPlan, width: int) -> None:
    """Refuse adapters that are wider than the model, which a plan alone cannot know.

    Raises:
        PlanError: a rank is above the width.
    """
    for slot in plan.slots:
        if isinstance(slot, Slot) and slot.rank > width:
            raise PlanError(
                f"an adapter's rank is at most the model's width, {width}, but block {slot.home} asks for {slot.rank}. "
                "Lower it: at that rank it would cost more than the block's own weights."
            )


def adapter_start(start: AdapterStart, rank: int) -> AdapterStart:
    """How children of this rank start: without adapters, only "data" starts the output norms in a way of its own."""
    return start if rank or start == "data" else "zero"
