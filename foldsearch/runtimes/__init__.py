"""What an export is run by: the contract, and the list of all runtimes.

A new runtime is one file beside this one and one entry in `RUNTIMES`: the command line, studies, prices, spaces and
exports read the list. Nothing here imports torch; the file of a runtime, which does, is loaded when an export needs it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from foldsearch.errors import InputError, PlanError, find_named
from foldsearch.plan.cost import CostTable, Target, WindowCache, price
from foldsearch.plan.plan import UNITS, FoldPlan
from foldsearch.plan.stored import CACHE_TYPES, DTYPE_TYPES, TYPES
from foldsearch.runtimes.needs import WORDS, Need, homes_of, needs

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "ALL_CAN",
    "NOTHING",
    "RUNTIMES",
    "STOCK",
    "Beside",
    "Engine",
    "Loader",
    "Need",
    "Runtime",
    "Writer",
    "called_now",
    "exported_bytes",
    "names",
    "runtime_for",
    "runtime_named",
]


@dataclass(frozen=True, slots=True)
class Beside:
    """What goes into an export beside the model.

    tokenizer: of the model; None writes none. weights: how weights are stored, a dtype or one of the runtime's types.
    base_model, plan: what was folded, and how. gguf: the files of the GGUF that the base model was read from.
    context: tokens that the model is to see; 0 where nobody says. whole: the folder of the model that also sees whose
    text part was folded, where the export is that whole model.
    """

    tokenizer: PreTrainedTokenizerBase | None = None
    weights: str = "float32"
    base_model: str = ""
    plan: str = ""
    gguf: tuple[Path, ...] = ()
    context: int = 0
    whole: Path | None = None


NOTHING = Beside()


class Writer(Protocol):
    """The file of a runtime: how a folded model becomes what the runtime reads."""

    def check_model(self, config: PretrainedConfig, context: int) -> tuple[str, ...]:
        """Whether the runtime runs such a model, dense or folded, on texts of `context` tokens.

        Returns:
            What it computes in another way than transformers does, in sentences for the model card.

        Raises:
            ModelError: it does not.
        """

    def before_rounding(self, model: PreTrainedModel) -> tuple[PreTrainedModel, bool]:
        """The model to write, and whether it computes the same to the bit.

        It is asked before the weights are rounded to the dtype that ships, so that what is summed here (a weight and
        its adapter) is rounded once. `model` is not changed.
        """

    def rounded(self, model: PreTrainedModel, weights: str) -> PreTrainedModel:
        """A copy with the numbers that an export with such weights holds; in float32 where that is no dtype."""

    def write(self, model: PreTrainedModel, folder: Path, beside: Beside) -> tuple[str, ...]:
        """Write that model, rounded, to `folder`, which exists.

        Returns:
            What of the tokenizer the runtime does in another way, in sentences for the model card.

        Raises:
            ModelError: the runtime has no such tokenizer.
        """


class Loader(Protocol):
    """A file that reads what transformers cannot read by itself."""

    def load(self, folder: str, dtype: str, attention: str | None) -> tuple[PreTrainedModel, list[str]]:
        """The model, and every weight that is missing, unexpected or of another shape."""


@dataclass(frozen=True, slots=True)
class Engine:
    """A program that runs exports and is not transformers, as a Python package that may be there or not.

    name: of the program. package: as it is imported. extra: of foldsearch, which installs it. module: has the class
    `Answers`, which loads an export in a process of its own and answers questions (see `foldsearch.export.engine`).
    python: what loads an export and lets it write, with {where} and {prompt} for the folder and a text; commands: what
    else can be done with it, with {folder}. library: as the hub names what loads such files. most_stops: tokens that
    end an answer for which its files have a place; None for any number. cached: what goes into {cache} of python and of
    commands where the KV cache has a type, with {type}, and {TYPE} in capitals. unrounded: more commands, where
    matrices are not stored in few bits; rounded: instead of them, where they are.
    """

    name: str
    package: str
    extra: str
    module: str
    python: str
    commands: str
    library: str
    most_stops: int | None = None
    cached: tuple[str, str] = ("", "")
    unrounded: str = ""
    rounded: str = ""

    def python_for(self, where: str, prompt: str, kv_cache: str) -> str:
        """What loads an export and lets it write."""
        return self.python.format(where=where, prompt=prompt, cache=self._cached(0, kv_cache))

    def commands_for(self, folder: str, weights: str, kv_cache: str) -> str:
        """What else can be done with it."""
        is_rounded = weights in TYPES and TYPES[weights].block > 1
        lines = filter(None, (self.commands, self.rounded if is_rounded else self.unrounded))
        return "\n".join(lines).format(folder=folder, cache=self._cached(1, kv_cache))

    def _cached(self, number: int, kv_cache: str) -> str:
        return self.cached[number].format(type=kv_cache, TYPE=kv_cache.upper()) if kv_cache else ""

    @property
    def is_installed(self) -> bool:
        """Whether the package can be imported."""
        return find_spec(self.package) is not None

    @property
    def absence(self) -> str:
        """What is not checked where the package is missing, and what installs it."""
        return f"not checked in {self.name}: install foldsearch[{self.extra}]"


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
    types: in which weights can be stored, and own_types: which of them is a dtype's own. Empty where weights are stored
    in the dtype that ships. other_types: how one gets others, in the words of a message.
    families: the model types of transformers that it runs; empty for all.
    periods: the families of which it takes the last of each so many positions for a block of another kind.
    lacks: dtypes that it does not compute in: what is in these is stored in float32.
    own_kernels: whether a loaded export is computed by others than torch's, which sum in another order.
    engine: the program itself, where it is not transformers.
    puts_back: whether an export of the text part of a model that also sees is the whole model. apart: else, what
    becomes of the rest of it, in words.
    own_cache, window_cache: how keys and values are kept where nobody names a type (see `foldsearch.plan.cost.Target`).
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
    types: tuple[str, ...] = ()
    own_types: Mapping[str, str] = field(default_factory=dict)
    other_types: str = ""
    families: frozenset[str] = frozenset()
    periods: Mapping[str, int] = field(default_factory=dict)
    lacks: frozenset[str] = frozenset()
    own_kernels: bool = False
    engine: Engine | None = None
    puts_back: bool = False
    apart: str = "The whole model is what an export to stock holds."
    own_cache: str = ""
    window_cache: WindowCache = "window"

    @property
    def needs_only_transformers(self) -> bool:
        """Whether an export runs where foldsearch is not installed, and brings no code of its own."""
        return not (self.carries_code or self.loader)

    @property
    def writer(self) -> Writer:
        """The file of the runtime, loaded now; it needs torch."""
        return cast("Writer", import_module(self.file))

    def stored_as(self, dtype: str, weights: str = "") -> str:
        """How weights are stored: as `weights` says, else in the way that is the dtype's own.

        Raises:
            InputError: the runtime does not store weights so.
        """
        if not self.types:
            if weights:
                raise InputError(
                    f"an export to {self.name} stores weights in its dtype, {dtype}; got the type '{weights}'. Leave "
                    "the type out."
                )
            return dtype
        weights = weights or self.own_types[dtype]
        if weights not in self.types:
            raise InputError(
                f"an export to {self.name} stores weights as {', '.join(self.types)}; got the type '{weights}'. "
                f"Choose one of these{self.other_types}."
            )
        return weights

    def check_cache_type(self, kv_cache: str) -> None:
        """Whether the runtime can be told to hold keys and values in a type.

        Raises:
            InputError: it cannot, or there is no such type.
        """
        if self.engine is None or not self.engine.cached[0]:
            raise InputError(
                f"an export to {self.name} holds keys and values as its program does; got the type '{kv_cache}' for "
                "them. Export to gguf, or leave the type out."
            )
        if kv_cache not in CACHE_TYPES:
            raise InputError(
                f"llama.cpp holds keys and values as {', '.join(CACHE_TYPES)}; got the type '{kv_cache}'. Choose one "
                "of these."
            )

    def takes(self, block: int, position: int, family: str, *, by_position: bool = False) -> bool:
        """Whether a block may run at a position, where the runtime has blocks of another kind at some (`periods`).

        Other arguments as for `refusal`.
        """
        if by_position and "moved block" in self.cannot and block != position:
            return False
        period = self.periods.get(family, 1)
        return ((block + 1) % period == 0) == ((position + 1) % period == 0)

    def misplaces(self, plan: FoldPlan, family: str, *, by_position: bool = False) -> bool:
        """Whether a block comes to a position at which it may not run (`takes`)."""
        homes = homes_of(plan)
        return not all(self.takes(home, at, family, by_position=by_position) for at, home in enumerate(homes))

    def refusal(
        self, plan: FoldPlan, *, by_position: bool = False, family: str = ""
    ) -> tuple[str, str] | None:
        """What of a plan the runtime cannot do, and what to do about it; None where it can do all of it.

        Args:
            plan: of the folded model.
            by_position: whether the model scales attention by a block's position (`CostTable.by_position`).
            family: the model's (`CostTable.family`); empty where it is not known.
        """
        if family and self.families and family not in self.families:
            return f"blocks of a {family} model", "take another runtime"
        if self.misplaces(plan, family):
            return (
                f"blocks moved in or out of each {self.periods[family]}th position, where this model has blocks of "
                "another kind",
                f"drop {self.periods[family]} blocks that follow each other, or blocks at the end",
            )
        found = (need for need in needs(plan, by_position=by_position) if need in self.cannot)
        return next((WORDS[need] for need in found), None)

    def holds(self, plan: FoldPlan, table: CostTable) -> bool:
        """Whether the runtime can hold a plan of the table's model."""
        return self.refusal(plan, by_position=table.by_position, family=table.family) is None

    def check(self, plan: FoldPlan, *, by_position: bool = False, family: str = "") -> None:
        """Whether the runtime can hold a plan; arguments as for `refusal`.

        Raises:
            PlanError: it cannot; the message says what.
        """
        if (found := self.refusal(plan, by_position=by_position, family=family)) is not None:
            what, remedy = found
            raise PlanError(f"{self.refused(plan, what)} Export it to {ALL_CAN}, or {remedy}.")

    def refused(self, plan: FoldPlan, what: str) -> str:
        """The sentence that the runtime cannot hold a plan; `what` of it, as `refusal` says."""
        return f"the {self.name} runtime runs {self.blocks} only, but the plan '{plan}' has {what}, which it cannot do."


LLAMA_CPP = Engine(
    name="llama.cpp",
    package="xllamacpp",
    extra="gguf",
    module="foldsearch.runtimes.llama_cpp",
    python="""import os

import xllamacpp  # pip install xllamacpp: llama.cpp with Python

{where}
settings = xllamacpp.CommonParams()
settings.model.path = os.path.join(FOLDER, "model.gguf")
settings.n_ctx = 1024{cache}
server = xllamacpp.Server(settings)
print(server.handle_completions({{"prompt": {prompt}, "n_predict": 20}})["choices"][0]["text"], flush=True)
os._exit(0)  # its threads would keep the process""",
    commands="llama-server -m {folder}/model.gguf{cache}",
    unrounded="""# K-quants are made by llama.cpp's own program:
llama-quantize {folder}/model.gguf model-Q4_K_M.gguf Q4_K_M""",
    rounded="# K-quants are made by llama-quantize, which takes no file that is rounded: export with --type f16",
    library="gguf",
    most_stops=3,
    cached=(
        "\nsettings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_{TYPE}",
        " --cache-type-k {type} --cache-type-v {type}",
    ),
)

ONNX_RUNTIME = Engine(
    name="onnxruntime",
    package="onnxruntime",
    extra="onnx",
    module="foldsearch.runtimes.onnx_runtime",
    python="""import sys

from tokenizers import Tokenizer  # pip install onnxruntime tokenizers

{where}
sys.path.insert(0, FOLDER)
from onnx_decoder import Decoder  # a file of that folder: numpy and onnxruntime

tokenizer = Tokenizer.from_file(FOLDER + "/tokenizer.json")
ids = tokenizer.encode({prompt}).ids
print(tokenizer.decode(ids + Decoder(FOLDER).write(ids, 20)))""",
    commands="python {folder}/onnx_decoder.py 'The state of our union'",
    library="onnx",
)

EXECUTORCH = Engine(
    name="ExecuTorch",
    package="executorch",
    extra="executorch",
    module="foldsearch.runtimes.executorch_runtime",
    python="""import sys

from tokenizers import Tokenizer  # pip install executorch tokenizers

{where}
sys.path.insert(0, FOLDER)
from executorch_decoder import Decoder  # a file of that folder: torch and executorch

tokenizer = Tokenizer.from_file(FOLDER + "/tokenizer.json")
ids = tokenizer.encode({prompt}).ids
print(tokenizer.decode(ids + Decoder(FOLDER).write(ids, 20)))""",
    commands="python {folder}/executorch_decoder.py 'The state of our union'",
    library="executorch",
)

# onnxruntime has next to no bfloat16 on processors: what was bfloat16 is stored in float32, its numbers unchanged.
# Of the others the matrices are in 8 and 4 bits, and one float32 for each 32 numbers of a row.
ONNX_TYPES = ("float32", "float16", "int8", "int4")

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
        puts_back=True,
    ),
    Runtime(
        name="gguf",
        title="one file for llama.cpp",
        blocks="stock blocks",
        shares_weights=False,
        cannot=frozenset({"network", "norm", "half block", "moved block"}),
        file="foldsearch.runtimes.gguf",
        carries_code=False,
        card="One file, `model.gguf`, for llama.cpp and what is made with it: the weights, the tokenizer and the chat "
        "template.",
        loader="foldsearch.runtimes.gguf",
        weights="*.gguf",
        types=tuple(TYPES),
        own_types=DTYPE_TYPES,
        other_types=", or export it in f16 and run: llama-quantize model.gguf Q4_K_M",
        families=frozenset(
            "llama mistral qwen2 qwen3 gemma gemma2 gemma3_text phi3 olmo2 gpt2 gpt_neox smollm3 granite "
            "stablelm".split()
        ),
        periods={"smollm3": 4},
        engine=LLAMA_CPP,
        apart="llama.cpp reads the rest from a file of its own (mmproj), and the one of the base model goes with this "
        "file: what the blocks read and write is as wide as before.",
        own_cache="f16",
        window_cache="chunk",
    ),
    Runtime(
        name="onnx",
        title="a graph with its KV cache for onnxruntime, of any plan, shared weights stored once",
        blocks="graphs",
        shares_weights=True,
        cannot=frozenset(),
        file="foldsearch.runtimes.onnx",
        carries_code=False,
        card="A graph, `model.onnx`, with its weights beside it, for onnxruntime and whatever else reads ONNX. It "
        "takes token ids and the keys and values of the tokens before them; `onnx_decoder.py` (Apache-2.0) shows how, "
        "and needs numpy and onnxruntime only.",
        loader="foldsearch.runtimes.onnx",
        weights="*.onnx.data",
        types=ONNX_TYPES,
        own_types={"float32": "float32", "float16": "float16", "bfloat16": "float32"},
        lacks=frozenset({"bfloat16"}),
        own_kernels=True,
        engine=ONNX_RUNTIME,
        window_cache="all",
    ),
    Runtime(
        name="executorch",
        title="a program with a cache of fixed size for ExecuTorch (XNNPACK), of any plan",
        blocks="programs",
        shares_weights=True,
        cannot=frozenset(),
        file="foldsearch.runtimes.executorch",
        carries_code=False,
        card="A program, `model.pte`, for ExecuTorch with its XNNPACK backend, in float32, with a cache for as many "
        "tokens as `executorch.json` says; `executorch_decoder.py` (Apache-2.0) shows how it is fed, and needs torch "
        "and executorch only.",
        loader="foldsearch.runtimes.executorch",
        weights="*.pte",
        types=("float32",),
        own_types=dict.fromkeys(("float32", "float16", "bfloat16"), "float32"),
        families=frozenset("llama mistral qwen2 qwen3 gemma phi3 olmo2 gpt2 gpt_neox opt".split()),
        lacks=frozenset({"bfloat16", "float16"}),
        own_kernels=True,
        engine=EXECUTORCH,
    ),
)


def names() -> tuple[str, ...]:
    """Of all runtimes, in the order of the list."""
    return tuple(runtime.name for runtime in RUNTIMES)


def runtime_named(name: str) -> Runtime:
    """The runtime of that name.

    Raises:
        InputError: there is none.
    """
    return find_named(RUNTIMES, name, "a runtime", InputError)


def called_now(name: str) -> str:
    """The name of a runtime that was called `name` in an earlier version; any other name as it is."""
    return _CALLED_NOW.get(name, name)


def exported_bytes(plan: FoldPlan, table: CostTable, target: Target) -> dict[str, int | None]:
    """Bytes of a plan's weights in an export to each runtime, stored as it stores the target's dtype.

    None where it cannot hold the plan.
    """
    found: dict[str, int | None] = {}
    for runtime in RUNTIMES:
        is_held = runtime.holds(plan, table)
        dtype = "float32" if target.dtype in runtime.lacks else target.dtype
        weights = runtime.own_types.get(dtype, "")
        if runtime.name == target.runtime:
            weights = target.weights
        there = replace(
            target,
            dtype=dtype,
            runtime=runtime.name,
            shares_weights=runtime.shares_weights,
            weights=weights if weights in TYPES else "",
            holds_rest=runtime.puts_back,
        )
        found[runtime.name] = price(plan, table, there).stored_bytes if is_held else None
    return found


def runtime_for(plan: FoldPlan, target: str, *, by_position: bool = False) -> Runtime:
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
