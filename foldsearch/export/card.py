"""The model card: README.md of an exported folder."""

from __future__ import annotations

import json
import re
from typing import Any

from foldsearch.paths import printable

_LOAD_FOLDED = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype="auto", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(FOLDER)
"""
_LOAD_EXPANDED = _LOAD_FOLDED.replace(", trust_remote_code=True", "")


def model_card(report: dict[str, Any]) -> str:
    """The card of an export, from `ExportReport.to_json()`: plan, cost, quality, checks, how to load."""
    folded = report["form"] == "folded"
    exported, dense = report["exported"], report["dense"]
    rows = [
        ("stored parameters", "parameters", "{:,}"),
        ("weight files, MB", "disk_bytes", "{:.1f}"),
        ("resident memory after the first forward, MB", "resident_bytes", "{:.0f}"),
        (f"perplexity on {report['tokens']:,} tokens", "perplexity", "{:.2f}"),
        ("prompt, tokens per second", "prefill_tokens_per_second", "{:.1f}"),
        ("decoding, tokens per second", "decode_tokens_per_second", "{:.1f}"),
    ]

    def cell(figures: dict[str, Any] | None, key: str, form: str) -> str:
        value = None if figures is None else figures[key]
        if value is None:
            return "not taken"
        return form.format(value / 1e6 if key.endswith("_bytes") else value)

    table = "\n".join(
        f"| {label} | {cell(exported, key, form)} | {cell(dense, key, form)} |" for label, key, form in rows
    )
    how = (
        "The folder holds the code that runs it (`folded.py`, `parts.py`, `blocks.py`, Apache-2.0): transformers asks "
        "for `trust_remote_code=True`, and refuses without it. After `import foldsearch` it is not needed."
        if folded
        else "A stock transformers model: it needs nothing else."
    )
    tolerance = (
        f"tolerance {report['logits_tolerance']:g}" if report["logits_tolerance"] else "equal to the bit"
    )
    checks = [
        "no weight missing, unexpected or of another shape",
        f"logits against the measured model in {report['dtype']}: largest difference "
        f"{report['logits_max_difference']:.3g}, {report['logits_difference']:.3g} of their RMS ({tolerance})",
        "decoding token by token with the KV cache against one full forward: "
        f"{report['decode_difference']:.3g} of the logits' RMS (tolerance {report['decode_tolerance']:g})",
        f"perplexity {exported['perplexity']:.4f}, the measured model's {report['measured_perplexity']:.4f}",
    ]
    if folded:
        checks.append("loaded where foldsearch cannot be imported, with the same logits")
    details = ""
    if report["details"]:
        details = f"\n## Details\n\n```json\n{json.dumps(report['details'], indent=1)}\n```\n"
    base_model = _escaped(report["base_model"])
    return f"""---
library_name: transformers
tags: [foldsearch, text-generation]
---
# {base_model}, folded

Made by foldsearch from **{base_model}** ({report["num_blocks"]} blocks). The weights derive from that model:
its licence and its terms of use apply to them.

What runs at each depth, in {report["dtype"]}, shared weights {"stored once" if folded else "written out"}:

    {report["plan"]}

| | this model | dense |
|---|---|---|
{table}

Figures of fresh processes on the machine that exported, {report["threads"]} thread(s).

## Load

```python
{_LOAD_FOLDED if folded else _LOAD_EXPANDED}```

{how}

## Verified

Reloaded in a fresh process and compared with the model that was measured:

{chr(10).join(f"- {check}" for check in checks)}
{details}"""


def _escaped(name: str) -> str:
    """A model's name, which may be a path, as Markdown that shows it as it is."""
    return re.sub(r"[\\`*\[\]<>|~$&#!]|(?<!\w)_|_(?!\w)", r"\\\g<0>", printable(name))
