"""README.md of an export: the model card, for people."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable
from pathlib import Path

from foldsearch.export.card import CARD, PROBE, Card, Probe
from foldsearch.export.figures import ExportReport
from foldsearch.model.checks import SHARED
from foldsearch.paths import printable
from foldsearch.runtimes import runtime_named

PROMPT = "The history of the world is"
BESIDE_SHARED = (
    f"Its weights lie in `../{SHARED}`: keep both folders side by side. `foldsearch export RUN --trial N` writes it "
    "alone."
)


def model_card(card: Card, folder: Path) -> str:
    """README.md of an export: plan, cost, quality, checks, how to load.

    Args:
        card: of the export.
        folder: where it lies, as the loading lines name it.
    """
    report = card.report
    runtime = runtime_named(report.runtime)
    table = "\n".join(f"| {' | '.join(row)} |" for row in report.rows)
    told = [*(f"Speed of {words}." for words in report.unsteady), report.how_measured, report.latency_words]
    notes = "\n\n".join(filter(None, told))
    details = ""
    if report.details:
        details = f"\n## Details\n\n```json\n{json.dumps(report.details, indent=1)}\n```\n"
    base_model = _escaped(report.base_model)
    stored = "stored once" if runtime.shares_weights else "written out"
    beside = [BESIDE_SHARED] if shares_files(card.files) else []
    parts = [f"```python\n{card.loading}```", *beside, runtime.card, *report.notes]
    if runtime.engine:
        commands = runtime.engine.commands_for(shlex.quote(str(folder)), report.weights, report.kv_cache)
        # its programs need a tokenizer
        parts = [*parts[: int(report.has_tokenizer)], f"```sh\n{commands}\n```", *parts[1:]]
    loading = "\n\n".join(parts)
    return f"""---
library_name: {runtime.engine.library if runtime.engine else "transformers"}
tags: [foldsearch, {"image-text-to-text" if report.whole else "text-generation"}]
---
# {base_model}, folded

Made by foldsearch from **{base_model}** ({report.num_blocks} blocks). The weights derive from that model:
its licence and its terms of use apply to them. {_licence_words(card)}

What runs at each depth, in {report.weights}, shared weights {stored}:

    {report.plan}

| | this model | dense | this / dense |
|---|--:|--:|--:|
{table}

{notes}

## Load

{loading}

## Verified

Reloaded in a fresh process and compared with the model that was measured:

{chr(10).join(f"- {check}" for check in card.checked)}

Not verified:

{chr(10).join(f"- {what}" for what in card.not_checked)}

`{CARD}` has all of this for programs, with hashes of the files; `{PROBE}` has {card.probe.of}, and what
the measured model says of each. DIR is this folder, NEW another one:

```sh
{chr(10).join(card.commands.values())}
```
{details}"""


def _licence_words(card: Card) -> str:
    """What is known of licences, as sentences."""
    texts = "".join(
        f" Licence of the text {_escaped(name)}: {_escaped(licence)}."
        for name, licence in card.licences.text.items()
    )
    return f"Licence of the base model: {_escaped(card.licences.model)}.{texts}"


def shares_files(names: Iterable[str]) -> bool:
    """Whether files of an export lie in the folder that the points of a family share."""
    return any(name.startswith(f"../{SHARED}/") for name in names)


def loading_lines(report: ExportReport, folder: Path, *, is_shared: bool = False) -> str:
    """Python that loads an export and lets it write: it runs as it stands, and asks nothing.

    is_shared: whether its weights lie beside its folder, so that the hub cannot hold it.
    """
    runtime = runtime_named(report.runtime)
    on_hub = "" if is_shared else ", or the name of the model on the hub"
    if runtime.engine:
        where = f"FOLDER = {str(folder)!r}  # where this file lies"
        return runtime.engine.python_for(where, f'"{PROMPT}"', report.kv_cache) + "\n"
    trust = ", trust_remote_code=True" if runtime.carries_code else ""
    auto = "AutoModelForImageTextToText" if report.whole else "AutoModelForCausalLM"
    classes = [
        *([] if runtime.loader else [auto]),
        *(["AutoTokenizer"] if report.has_tokenizer else []),
    ]
    lines = [
        *([] if report.has_tokenizer else ["import torch"]),
        *([f"from transformers import {', '.join(classes)}"] if classes else []),
        *([f"from {runtime.loader} import load"] if runtime.loader else []),
        "",
        f"FOLDER = {str(folder)!r}  # where this file lies{on_hub}",
        'model, _ = load(FOLDER, "auto", None)'
        if runtime.loader
        else f'model = {auto}.from_pretrained(FOLDER, dtype="auto"{trust})',
    ]
    if report.has_tokenizer:
        lines += [
            f"tokenizer = AutoTokenizer.from_pretrained(FOLDER{trust})",
            f'prompt = tokenizer("{PROMPT}", return_tensors="pt")',
            "written = model.generate(prompt.input_ids, attention_mask=prompt.attention_mask, max_new_tokens=20)",
            "print(tokenizer.decode(written[0], skip_special_tokens=True))",
            *(
                ["# images and text go in through AutoProcessor.from_pretrained(FOLDER)"]
                if report.whole
                else []
            ),
        ]
    else:
        lines += [
            "prompt = torch.tensor([[1, 2, 3]])  # token ids: the model was exported without a tokenizer",
            "print(model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=20))",
        ]
    return "\n".join(lines) + "\n"


def checked(report: ExportReport) -> list[str]:
    """What an export passed, a line each."""
    tolerance = f"tolerance {report.logits_tolerance:g}" if report.logits_tolerance else "equal to the bit"
    checks = [
        "no weight missing, unexpected or of another shape",
        f"logits against {report.held_against}: largest difference "
        f"{report.logits_max_difference:.3g}, {report.logits_difference:.3g} of their RMS ({tolerance})",
        "decoding token by token with the KV cache against one full forward: "
        f"{report.decode_difference:.3g} of the logits' RMS (tolerance {report.decode_tolerance:g})",
        f"perplexity {report.perplexity:.4f}, the measured model's {report.measured_perplexity:.4f}",
        *([report.engine.check] if report.engine else []),
        *([report.chat.check] if report.chat else []),
    ]
    if report.loads_without_foldsearch:
        checks.append("loaded where foldsearch cannot be imported, with the same logits")
    return checks


def not_checked(report: ExportReport, probe: Probe) -> list[str]:
    """What nobody looked at, a line each."""
    runtime = runtime_named(report.runtime)
    longest = max(probe.ids_NT.shape[1], report.prompt_tokens)
    return [
        *([report.engine_note] if report.engine_note else []),
        *([] if report.dense else [report.dense_note or "the dense model beside it"]),
        *(f"speed of {words}" for words in report.unsteady),
        *([report.chat.note] if report.chat and report.chat.note else []),
        *([] if report.chat else ["a chat: the tokenizer has no chat template that takes a single question"]),
        f"texts of more than {longest:,} tokens; what the model knows, which `foldsearch evaluate` asks",
        *(["what it says of images: its text part was measured, on text"] if report.whole else []),
        *(["other programs that read such models, such as vLLM"] if not runtime.engine else []),
        "other devices than the processor",
    ]


def _escaped(name: str) -> str:
    """A model's name, which may be a path, as Markdown that shows it as it is."""
    return re.sub(r"[\\`*\[\]<>|~$&#!]|(?<!\w)_|_(?!\w)", r"\\\g<0>", printable(name))
