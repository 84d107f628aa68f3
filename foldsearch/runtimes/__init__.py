"""What an export is run by: the contract, and the list of all runtimes.

A new runtime is one file beside this one and one entry in `RUNTIMES`: the command line, studies, prices, spaces and
exports read the list. Nothing here imports torch; the file of a runtime, which does, is loaded when an export needs it.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from foldsearch.errors import InputError, PlanError, find_named
from foldsearch.plan.plan import UNITS, FoldPlan
from foldsearch.runtimes.needs import WORDS, Need, needs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "ALL_CAN",
    "RUNTIMES",
    "Loader",
    "Need",
    "Runtime",
    "Writer",
    "called_now",
    "listed",
    "names",
    "runtime_for",
    "runtime_named",
]


class Writer(Protocol):
    """The file of a runtime: how a folded model becomes what the runtime reads."""

    def before_rounding(self, model: PreTrainedModel) -> tuple[PreTrainedModel, bool]:
        """The model to write, and whether it computes the same to the bit.

        It is asked before the weights are rounded to the dtype that ships, so that what is summed here (a weight and
        its adapter) is rounded once. `model` is not changed.
        """

    def write(self, model: PreTrainedModel, folder: Path) -> None:
        """Write that model, rounded, to `folder`, which exists."""


class Loader(Protocol):
    """A file that reads what transformers cannot read by itself."""

    def load(self, folder: str, dtype: str, attention: str | None) -> tuple[PreTrainedModel, list[str]]:
        """The model, and every weight that is missing, unexpected or of another shape."""


@dataclass(frozen=True, slots=True)
class Runtime:
    """What an export is run by.

    name: as a person writes it. title: what an export for it is, in a few words.
    blocks: what the runtime runs, in the words of a message.
    shares_weights: whether a weight that several blocks use is stored once; else it is stored again for each of them,
    adapters merged. So plans are priced.
    cannot: what of a plan the runtime cannot do.
    file: the module that writes (see `Writer`).
    carries_code: whether the folder holds the code that runs it. card: what the model card says of loading it.
    loader: the module that loads a folder (see `Loader`); empty where transformers does.
    weights: the files of a folder that hold weights, as a pattern.
    """

    name: str
    title: str
    blocks: str
    shares_weights: bool
    cannot: frozenset[Need]
    file: str
    carries_code: bool
    card: str
    loader: str = ""
    weights: str = "*.safetensors"

    @property
    def needs_only_transformers(self) -> bool:
        """Whether an export runs where foldsearch is not installed, and brings no code of its own."""
        return not (self.carries_code or self.loader)

    @property
    def writer(self) -> Writer:
        """The file of the runtime, loaded now; it needs torch."""
        return cast("Writer", import_module(self.file))

    def refusal(self, plan: FoldPlan, *, by_position: bool = False) -> tuple[str, str] | None:
        """What of a plan the runtime cannot do, and what to do about it; None where it can do all of it.

        Args:
            plan: of the folded model.
            by_position: whether the model scales attention by a block's position (`CostTable.by_position`).
        """
        found = (need for need in needs(plan, by_position=by_position) if need in self.cannot)
        return next((WORDS[need] for need in found), None)

    def check(self, plan: FoldPlan, *, by_position: bool = False) -> None:
        """Whether the runtime can hold a plan; arguments as for `refusal`.

        Raises:
            PlanError: it cannot; the message says what.
        """
        if (found := self.refusal(plan, by_position=by_position)) is not None:
            what, remedy = found
            raise PlanError(
                f"the {self.name} runtime runs {self.blocks} only, but the plan '{plan}' has {what}, which it cannot "
                f"do. Export it to {ALL_CAN}, or {remedy}."
            )


ALL_CAN = "folded"  # the runtime that holds every plan
STOCK = "stock"  # the one that needs no code of ours

# Names that runs and habits of earlier versions have, and what they are called now.
_CALLED_NOW = {"expanded": STOCK}

RUNTIMES: tuple[Runtime, ...] = (
    Runtime(
        name="folded",
        title="shared weights stored once, needs its own code",
        blocks="blocks of foldsearch",
        shares_weights=True,
        cannot=frozenset(),
        file="foldsearch.runtimes.folded",
        carries_code=True,
        card="The folder holds the code that runs it (`folded.py`, `networks.py`, `parts.py`, `blocks.py`, Apache-2.0):"
        " transformers runs it only where `trust_remote_code=True` allows it, for the model and for the tokenizer. "
        "After `import foldsearch` it is not needed.",
    ),
    Runtime(
        name="stock",
        title="the stock architecture of transformers, shared weights written out",
        blocks="stock blocks",
        shares_weights=False,
        cannot=frozenset({"network", "norm", "half block", "moved block"}),
        file="foldsearch.runtimes.stock",
        carries_code=False,
        card="A stock transformers model: it needs nothing else.",
    ),
)


def names() -> tuple[str, ...]:
    """Of all runtimes, in the order of the list."""
    return tuple(runtime.name for runtime in RUNTIMES)


def listed() -> str:
    """The names in quotes, as a message has them."""
    *others, last = map(repr, names())
    return f"{', '.join(others)} or {last}" if others else last


def runtime_named(name: str) -> Runtime:
    """The runtime of that name.

    Raises:
        InputError: there is none.
    """
    return find_named(RUNTIMES, name, "a runtime", InputError)


def called_now(name: str) -> str:
    """The name of a runtime that was called `name` in an earlier version; any other name as it is."""
    return _CALLED_NOW.get(name, name)


def runtime_for(plan: FoldPlan, target: str, *, by_position: bool) -> Runtime:
    """The runtime that a plan is exported to where nobody says another.

    That of the target, where it was priced for one that cannot hold everything. Else the stock architecture, if it runs
    the plan to the bit from as few bytes: nothing is shared, and no block needs code of ours.

    Args:
        plan: of the folded model.
        target: the name of the target's runtime.
        by_position: as for `Runtime.refusal`.
    """
    if target != ALL_CAN:
        return runtime_named(target)
    shares = not all(own for unit in UNITS for *_, own in plan.runs(unit))
    stock = runtime_named(STOCK)
    fits = not shares and stock.refusal(plan, by_position=by_position) is None
    return stock if fits else runtime_named(ALL_CAN)
