"""Speeds in turns, and when none is quoted. Oracles: processes whose speeds are known, cases by hand."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from rich.console import Console

from foldsearch.export import dense
from foldsearch.export.figures import MOST_BUSY, ExportReport, ModelFigures, Speed, spread
from foldsearch.report.terminal import export_table
from foldsearch.runtimes import NOTHING, process, runtime_named
from foldsearch.runtimes.process import ProcessError


class Fake:
    """Answers turns with the speeds it is given, and writes down who was asked."""

    def __init__(self, name: str, log: list[str], speeds: Iterator[float]) -> None:
        self.name, self.log, self.speeds = name, log, speeds

    def ask(self, what: str, **arguments: Any) -> dict[str, float]:
        assert what == "turn"
        self.log.append(self.name)
        value = next(self.speeds)
        return {"prompt": 10 * value, "decode": value}


def fakes(ours: list[float], theirs: list[float]) -> tuple[list[str], Fake, Fake]:
    log: list[str] = []
    return log, Fake("folded", log, iter(ours)), Fake("dense", log, iter(theirs))


def test_two_models_take_turns_and_the_first_round_warms_up() -> None:
    log, ours, theirs = fakes([1000.0, *[6.0] * 9], [1.0, *[4.0] * 9])
    speeds = dense.take_turns(ours, theirs)  # type: ignore[arg-type]
    assert log == ["folded", "dense"] * 10
    assert speeds["decode"] == Speed((6.0,) * 9, (4.0,) * 9)
    assert speeds["prompt"] == Speed((60.0,) * 9, (40.0,) * 9)
    assert speeds["decode"].words == ("6", "4", "1.50 (1.50–1.50)")


def test_a_slow_machine_ends_the_turns_after_some_seconds_and_three_rounds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = iter(range(0, 10_000, 100))
    monkeypatch.setattr(process, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    _, ours, theirs = fakes([6.0] * 10, [4.0] * 10)
    assert len(dense.take_turns(ours, theirs)["decode"].dense) == dense.FEWEST_ROUNDS  # type: ignore[arg-type]


def test_a_machine_that_slows_both_models_leaves_their_ratio() -> None:
    """Speeds of a round halve and double; the ratio of neighbours stays."""
    moments = [1.0, 0.5, 2.0, 0.25, 1.0, 3.0, 0.5]
    speed = Speed(tuple(6.0 * m for m in moments), tuple(4.0 * m for m in moments))
    assert speed.ratio == (1.5, 1.5, 1.5)
    assert speed.unsteady == ""


def test_one_hiccup_does_no_harm_and_a_busy_machine_is_told() -> None:
    dense = (10.0,) * 7
    assert Speed((11, 12, 12, 12, 13, 75, 12), dense).words[2] == "1.20 (1.20–1.30)"
    busy = Speed((9, 75, 30, 10, 60, 12, 75), dense)
    assert busy.words == ("—", "—", "")
    assert busy.unsteady == "not measured: the machine was busy (1–7.5)"
    alone = Speed((9, 75, 30, 10, 60, 12, 75), ())
    assert alone.words == ("—", "—", "")
    assert Speed((17.0, 17.5, 18.0), ()).words == ("17.5", "—", "")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([3.0], (3.0, 3.0, 3.0)),
        ([1.0, 9.0, 2.0], (1.0, 2.0, 9.0)),  # of so few, none is left out
        ([1.0, 2.0, 3.0, 99.0], (2.0, 2.5, 3.0)),
        ([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 99.0], (3.0, 5.0, 7.0)),
    ],
)
def test_a_spread_is_of_the_middle_half(values: list[float], expected: tuple[float, ...]) -> None:
    assert spread(values) == expected
    assert spread(values[::-1]) == expected


def test_the_rule_for_a_busy_machine() -> None:
    assert spread([1.0, 1.2, 1.0 * MOST_BUSY]).is_steady
    assert not spread([1.0, 1.2, 1.01 * MOST_BUSY]).is_steady


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("ours", [(1313.0, 1320.0, 1290.0), (100.0, 1320.0, 1290.0)])
def test_no_figure_of_the_table_is_cut_whatever_the_width(width: int, ours: tuple[float, ...]) -> None:
    speed = Speed(ours, (1121.0, 1100.0, 1150.0))
    report = ExportReport(
        runtime="stock", exported=ModelFigures(113_300_000, 226_600_000, 328_000_000, 41.63),
        dense=ModelFigures(134_500_000, 269_000_000, 372_000_000, 30.71), dense_note="", tokens=4096,
        dtype="bfloat16", weights="bfloat16", logits_tolerance=0.0, logits_max_difference=0.0, logits_difference=0.0,
        decode_difference=0.015, decode_tolerance=0.05, measured_perplexity=41.63, num_blocks=30, plan="0-12 19-29",
        threads=2, base_model="x", details={}, file_bytes=1, prompt_tokens=256, prompt=speed, decode=speed,
        loads_without_foldsearch=True, refused_without_code=None, has_tokenizer=True, versions={},
    )  # fmt: skip
    out = io.StringIO()
    Console(file=out, width=width).print(export_table(report, Path("exports/demo")))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    words = " ".join(" ".join(lines).split())
    assert "weights in bfloat16, MB 226.6 269.0 0.84" in words  # the ratio of the parameters
    assert "computing in" not in words
    assert "computing in float32, as the processor has no" in replace(report, dtype="float32").how_measured
    if speed.unsteady:
        assert "speed of reading: not measured: the machine was busy (0.089–1.2)" in words
        assert "reading, tokens/s — —" in words
    else:
        assert "reading, tokens/s 1,313 1,121 1.17 (1.12–1.20)" in words


class _Weights:
    def parameters(self) -> list[Any]:
        return [SimpleNamespace(numel=lambda: 10**9)]


@pytest.mark.parametrize(("disk", "memory", "what"), [(1, 10**10, "disk"), (10**10, 1, "memory")])
def test_where_there_is_no_room_for_the_dense_model_the_export_is_measured_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, disk: int, memory: int, what: str
) -> None:
    monkeypatch.setattr(dense.shutil, "disk_usage", lambda path: SimpleNamespace(free=disk))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=memory))
    _, ours, _ = fakes([6.0] * 10, [])
    job = SimpleNamespace(
        folder=tmp_path / "out",
        dtype="bfloat16",
        weights="bfloat16",
        runtime=runtime_named("stock"),
        beside=NOTHING,
        rest_parameters=0,
    )
    found = dense.compare_in_torch(job, ours, _Weights(), tmp_path)  # type: ignore[arg-type]
    assert found.dense is None
    assert f"needs 2.20 GB of {what} beside the export, and 0.00 GB are free" in found.note
    assert found.speeds["decode"] == Speed((6.0,) * 9, ())


def test_a_dense_model_that_cannot_be_measured_is_no_fault_of_the_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise ProcessError("the process ended with exit code -9: it said nothing")

    monkeypatch.setattr(dense, "_lacks_room", lambda job, dense: "")
    monkeypatch.setattr(dense, "in_dtype", fail)
    _, ours, _ = fakes([6.0] * 10, [])
    job = SimpleNamespace(
        folder=tmp_path / "out",
        dtype="bfloat16",
        weights="bfloat16",
        runtime=runtime_named("stock"),
        beside=NOTHING,
        rest_parameters=0,
    )
    found = dense.compare_in_torch(job, ours, _Weights(), tmp_path)  # type: ignore[arg-type]
    assert found.dense is None
    assert found.note.startswith("The dense model could not be measured: the process ended with exit code -9")
    assert len(found.speeds["decode"].exported) == 9
