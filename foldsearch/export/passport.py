"""A plan as a small file that other tools take: `foldsearch export --to plan`. No weight is read or written."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foldsearch.model.blocks import BY_BLOCK
from foldsearch.model.fold import layer_map
from foldsearch.model.folded import place_slots
from foldsearch.plan.plan import FoldPlan, Slot
from foldsearch.runtimes import runtime_named

if TYPE_CHECKING:
    from transformers import PretrainedConfig

SCHEMA = 1
# settings that go by block or count blocks
_BY_BLOCK = (
    *("num_hidden_layers", "max_window_layers", "full_attn_idxs", "mlp_only_layers", "decoder_sparse_step"),
    *BY_BLOCK,
)


def is_passport(path: Path) -> bool:
    """Whether a file is what `passport` made."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(value, dict) and {"foldsearch", "plan", "base_model"} <= value.keys()


def passport(
    plan: FoldPlan,
    config: PretrainedConfig,
    *,
    base_model: str,
    dtype: str,
    weights_changed: str,
    part_of: str = "",
) -> dict[str, Any]:
    """What the file holds, as plain JSON.

    Args:
        plan: of the folded model.
        config: of the dense model.
        base_model: as a person names it; where a tool reads the weights from.
        dtype: of what a tool is to write.
        weights_changed: how the weights of the folded model became others than the dense model's, in words; empty where
            they did not.
        part_of: the class of the model that also sees whose text part was folded; empty where it is no part.

    Each tool that cannot do what the plan does has `null`, and "why_not" says what it lacks.
    """
    lacks = _lacks(plan, config)
    if part_of:
        lacks["mergekit"] = lacks["mergekit"] or f"be told to read the text part of a {part_of}"
    why_not = {name: f"it cannot {what}" for name, what in lacks.items() if what}
    return {
        "foldsearch": SCHEMA,
        "plan": str(plan),
        "base_model": base_model,
        **({"part_of": part_of} if part_of else {}),
        "num_blocks": plan.num_blocks,
        "kept_blocks": [slot.home for slot in plan.slots if isinstance(slot, Slot)],
        "dropped_blocks": list(plan.dropped),
        "weights": _weights_words(weights_changed),
        "transformers": None if lacks["transformers"] else _settings(plan, config),
        "llama_quantize": None if lacks["llama_quantize"] else _prune_line(plan),
        "mergekit": None if lacks["mergekit"] else _slices(plan, base_model, dtype),
        "why_not": why_not,
    }


def _weights_words(weights_changed: str) -> str:
    if not weights_changed:
        return "those of the base model: the tools below give the model that was measured"
    return (
        f"others than the base model's: {weights_changed}. The tools below give the same blocks with the base model's "
        "weights, which is another model, and a worse one; the measured one is what `foldsearch export` writes to a "
        "runtime"
    )


def _lacks(plan: FoldPlan, config: PretrainedConfig) -> dict[str, str]:
    """What of the plan each tool cannot do; empty where it can do all of it."""
    slots = [slot for slot in plan.slots if isinstance(slot, Slot)]
    homes = [slot.home for slot in slots]
    whole = len(slots) == len(plan.slots) and all(slot.attention == slot.mlp == slot.home for slot in slots)
    plain = not any(slot.rank or slot.norm for slot in slots)
    once = len(set(homes)) == len(homes)
    lists = [name for name in (*BY_BLOCK, "mlp_only_layers") if getattr(config, name, None)]
    moved = runtime_named("gguf").misplaces(plan, str(config.model_type))
    what = "" if whole else "share, halve or replace blocks"
    carried = "" if plain else "give a block an adapter or an output norm"
    return {
        "transformers": what
        or carried
        or ("" if once else "run a block's weights twice without storing them twice"),
        "llama_quantize": what
        or carried
        or ("" if once else "run a block twice")
        or ("move blocks that do not turn by position" if moved else ""),
        # mergekit 0.1.5 counts the blocks again and leaves the list as it was, which transformers then refuses
        "mergekit": what or carried or (f"cut {lists[0]}, which the config has" if lists else ""),
    }


def _settings(plan: FoldPlan, config: PretrainedConfig) -> dict[str, Any]:
    """The values of config.json that go by block, as they are for the kept ones."""
    cut: Any = copy.deepcopy(config)
    place_slots(cut, layer_map(plan, cut.hidden_size))
    names = {theirs: ours for ours, theirs in getattr(cut, "attribute_map", {}).items()}
    values = {names.get(name, name): getattr(cut, name, None) for name in _BY_BLOCK}
    return {name: value for name, value in values.items() if value is not None}


def _prune_line(plan: FoldPlan) -> str:
    """For a GGUF of the base model."""
    dropped = ",".join(map(str, plan.dropped))
    prune = f"--prune-layers {dropped} " if dropped else ""
    return f"llama-quantize {prune}BASE.gguf FOLDED.gguf F16"


def _slices(plan: FoldPlan, base_model: str, dtype: str) -> str:
    """A file for mergekit-yaml: runs of blocks, passed through."""
    lines = ["merge_method: passthrough", f"dtype: {dtype}", "slices:"]
    for first, last in _runs(plan):
        lines += [
            "- sources:",
            f"  - model: {_quoted(base_model)}",
            f"    layer_range: [{first}, {last + 1}]",
        ]
    return "\n".join(lines) + "\n"


def _runs(plan: FoldPlan) -> Iterator[tuple[int, int]]:
    """Runs of blocks that follow each other, first and last."""
    homes = [slot.home for slot in plan.slots if isinstance(slot, Slot)]
    first = last = homes[0]
    for home in homes[1:]:
        if home != last + 1:
            yield first, last
            first = home
        last = home
    yield first, last


def _quoted(name: str) -> str:
    """A text as YAML has it, whatever is in it: JSON's quotes are YAML's."""
    return json.dumps(name)
