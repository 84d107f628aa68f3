"""The table of docs/exports.md: which runtime holds which kind of slot, of which family, found by doing it.

`python tests/export_matrix.py` writes it anew, and its sums into README.md; tests/integration/test_export_matrix.py
holds both files to it.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from transformers import AutoModelForCausalLM

from foldsearch.model.fold import fold
from foldsearch.model.parts import Borrowed, OutputNorm, Replaced
from foldsearch.model.register import register
from foldsearch.plan.plan import FoldPlan
from foldsearch.runtimes import RUNTIMES, Beside, Runtime
from foldsearch.runtimes import gguf as gguf_file
from foldsearch.runtimes.verify import relative_rms, wrong_keys
from tests.tiny import CONFIGS, EXPERTS, NUM_BLOCKS, WINDOW, can_fold, dense_model

FILE = Path(__file__).parents[1] / "docs" / "exports.md"
README = Path(__file__).parents[1] / "README.md"
MARK = "<!-- made by tests/export_matrix.py -->\n"  # before and after the sums
SLOTS = {
    "kept, dropped": "0 2-4",
    "`~layer`": "0 1-2~layer 3-4",
    "child `1=3`": "0 1=3 2-4",
    "repeat `3=3`": "0-4 3=3",
    "adapter `+r`": "0 1=3+r4 2-4",
    "output norm `+n`": "0 1=3+n 2-4",
    "half block `1a`": "0 1a 2-4",
    "network `~linear`": "0 1-2~linear 3-4",
}
# As wide as the windows of the tiny models: llama.cpp has none in some families.
IDS = torch.randint(3, 96, (2, WINDOW), generator=torch.Generator().manual_seed(1))
TABLES = [
    runtime for runtime in RUNTIMES if runtime.name not in ("onnx", "executorch")
]  # half a minute a cell
ROUNDING = 1e-3  # of the logits' RMS, as for an export in float32
SAME, ROUNDED, REFUSED, NOT_FOLDED = "=", "≈", "–", "x"
WORDS = f"""\
# What can be exported where

Made by `python tests/export_matrix.py`, and held to by `make test` (three families) and `make runtimes`: each cell was
folded, written, read back and compared, on tiny random models in float32. A plan is held by a runtime if all of its
slots are.

`{SAME}` the same logits to the bit; `{ROUNDED}` but for rounding: an adapter merged into a weight, products
with experts, which sum by where their weights come to lie in memory, and for llama.cpp the scale of attention of these
tiny Gemmas, which is put into their weights, and the GELU of GPT-NeoX by tanh.
`{REFUSED}` refused, with the nearest plan that is held and its bytes
([decision 33](decisions/0033-the-nearest-plan.md)).
Which blocks of SmolLM3 do not turn by position goes by position in llama.cpp, every fourth: plans that keep these in
their places are held there, such as `0-3 8-35`.
Where a runtime does not share weights, a child and a repeat are written out: the same
model, and no smaller. What llama.cpp itself computes from such files is compared in
`tests/integration/test_gguf_export.py`. `--to onnx` holds every plan, but for rounding: `make runtimes` runs one
with all kinds of slots in onnxruntime, of every family; and `--to executorch` such a plan, and dropped blocks of every
family without windows that it has been tried with: SmolLM3, Granite, StableLM, LFM2 and Qwen3-MoE are refused there.
LFM2's blocks attend or convolve, and share weights with those that do the same. Of Qwen3-MoE no MLP runs at another
position, so `1=3` and `3=3` are not folded at all (`x`); `1=3a` is. What llama.cpp has of these two is not written.
Of a vision-language model the text part is held as its family is; `stock` puts it back into the whole
(`tests/integration/test_seeing.py`), the others hold it alone.
"""


@torch.no_grad()
def cell(family: str, text: str, runtime: Runtime, folder: Path) -> str:
    """How a runtime holds a plan of a tiny model: written to `folder`, loaded again, compared."""
    plan, dense = FoldPlan.parse(text, NUM_BLOCKS), dense_model(family)
    if runtime.refusal(plan, family=family) is not None:
        return REFUSED
    if not can_fold(family, text):
        return NOT_FOLDED
    model = fold(dense, plan)
    generator = torch.Generator().manual_seed(2)
    for part in model.modules():
        if isinstance(part, (Borrowed, OutputNorm, Replaced)):
            for parameter in part.parameters(recurse=False):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    written, is_exact = runtime.writer.before_rounding(model)
    runtime.writer.write(written, folder, Beside(weights=runtime.stored_as("float32")))
    attention = model.config._attn_implementation
    if runtime.loader:
        loaded, wrong = gguf_file.load(str(folder), "float32", attention)
    else:
        loaded, info = AutoModelForCausalLM.from_pretrained(
            folder, attn_implementation=attention, output_loading_info=True
        )
        wrong = wrong_keys(info)
    assert not wrong, (family, text, runtime.name, wrong)
    ours, theirs = loaded.eval()(IDS, use_cache=False).logits, model(IDS, use_cache=False).logits
    if torch.equal(ours, theirs) and (is_exact or family not in EXPERTS):
        return SAME
    assert relative_rms(ours, theirs) < ROUNDING, (family, text, runtime.name)
    return ROUNDED


def row(family: str, runtime: Runtime) -> str:
    """A line of a runtime's table."""
    cells = []
    for text in SLOTS.values():
        with tempfile.TemporaryDirectory() as folder:
            cells.append(cell(family, text, runtime, Path(folder)))
    return f"| {family} | " + " | ".join(cells) + " |"


def page(row: Callable[[str, Runtime], str]) -> str:
    """The whole file; row: makes a line of a runtime's table of a family."""
    register()
    parts = [WORDS]
    for runtime in TABLES:
        parts.append(f"## `--to {runtime.name}`: {runtime.title}\n")
        lines = ["| | " + " | ".join(SLOTS) + " |", "|---|" + ":-:|" * len(SLOTS)]
        lines += [row(family, runtime) for family in sorted(CONFIGS)]
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def sums(written: str) -> str:
    """By runtime and slot, how many families hold it, by the page; of the runtimes without cells, by what they refuse.

    Those are run with such plans by tests/integration/test_onnx.py and test_executorch.py.
    """
    register()
    cells = (
        line.split(" | ")[1:] for line in written.splitlines() if line.startswith("| ") and "|---" not in line
    )
    marks = [[mark.strip(" |") for mark in line] for line in cells if "kept, dropped" not in line]
    lines = ["| `--to` | " + " | ".join(SLOTS) + " |", "|---|" + ":-:|" * len(SLOTS)]
    for runtime in sorted(RUNTIMES, key=lambda one: one not in TABLES):
        if runtime in TABLES:
            own, marks = marks[: len(CONFIGS)], marks[len(CONFIGS) :]
            held = [sum(mark in (SAME, ROUNDED) for mark in column) for column in zip(*own, strict=True)]
        else:
            held = [sum(_is_held(family, text, runtime) for family in CONFIGS) for text in SLOTS.values()]
        counts = (str(count) if count else REFUSED for count in held)
        lines.append(f"| `{runtime.name}` | " + " | ".join(counts) + " |")
    return "\n".join(lines) + "\n"


def _is_held(family: str, text: str, runtime: Runtime) -> bool:
    plan = FoldPlan.parse(text, NUM_BLOCKS)
    return runtime.refusal(plan, family=family) is None and can_fold(family, text)


def readme(written: str) -> str:
    """README.md with the sums of the page between its marks."""
    before, _, after = README.read_text(encoding="utf-8").split(MARK)
    return MARK.join((before, sums(written), after))


if __name__ == "__main__":
    FILE.write_text(page(row), encoding="utf-8")
    README.write_text(readme(FILE.read_text(encoding="utf-8")), encoding="utf-8")
