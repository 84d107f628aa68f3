"""The dashboard of a run, asked over HTTP from another process.

Oracle: the run's own records; the dashboard's API is what its page is drawn from.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from optuna_dashboard._note import get_note

from foldsearch.plan.strip import strip
from foldsearch.run import Run
from foldsearch.search.records import METRIC_NAMES, Records, read_trials
from tests.fake_trial import trial_at


@pytest.fixture
def board(run_path: Path) -> Iterator[str]:
    """Address of a dashboard that serves the run."""
    command = [sys.executable, "-m", "foldsearch", "dashboard", str(run_path), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        yield line.split()[1]
        process.terminate()


def send(url: str, method: str, body: dict[str, Any]) -> None:
    asked = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}, method=method
    )
    with urllib.request.urlopen(asked, timeout=60) as answer:
        answer.read()


def get(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=60) as answer:
        return json.loads(answer.read())


def test_the_dashboard_shows_trials_constraints_and_notes_live(board: str, run_path: Path) -> None:
    assert board.startswith("http://127.0.0.1:")
    (summary,) = get(f"{board}api/studies")["study_summaries"]
    study = get(f"{board}api/studies/{summary['study_id']}")
    records = read_trials(Run.open(run_path))
    names = [METRIC_NAMES[name] for name in Run.open(run_path).study.objectives]
    assert study["objective_names"] == names

    states = {record.number: record.state for record in records}
    shown = {trial["number"]: trial for trial in study["trials"]}
    assert set(shown) == set(states)
    named = {"finished": "Complete", "stopped": "Pruned", "failed": "Fail", "repeat": "Fail"}
    assert {n: trial["state"] for n, trial in shown.items()} == {n: named[s] for n, s in states.items()}

    first = records[0]
    assert shown[0]["values"] == pytest.approx(
        [first.quality.kl, first.cost.memory_bytes / 1e9, first.cost.flops]
    )
    (above,) = shown[0]["constraints"]
    assert above == pytest.approx(first.cost.memory_bytes / 0.0070e9 - 1)
    assert above <= 0
    assert strip(first.plan) in shown[0]["note"]["body"]
    assert "KV cache" in shown[0]["note"]["body"]

    # a trial that ends while the page is open
    writer = Records(Run.open(run_path))
    number, proposal = writer.ask()
    writer.record(trial_at(first.plan, writer.run.study, 2, proposal, number))
    writer.finish(number)
    until = time.monotonic() + 60
    while True:  # the dashboard reads the storage again every two seconds
        live = get(f"{board}api/studies/{summary['study_id']}?after={len(states)}")
        found = [trial["state"] for trial in live["trials"] if trial["number"] == number]
        if found or time.monotonic() > until:
            break
        time.sleep(0.5)
    assert found == ["Complete"]


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "api/trials/{row}/tell", {"state": "Fail"}),
        ("DELETE", "api/studies/{study}", {}),
        ("POST", "api/studies/{study}/rename", {"study_name": "another"}),
    ],
)
def test_a_run_is_changed_by_foldsearch_alone(
    board: str, run_path: Path, method: str, path: str, body: dict[str, str]
) -> None:
    """A button that fails a trial, or deletes the study, would take rows from a search that is at work."""
    writer = Records(Run.open(run_path))
    number, _ = writer.ask()
    (summary,) = get(f"{board}api/studies")["study_summaries"]
    row = writer._rows[number]._trial_id
    before = read_trials(Run.open(run_path))
    with pytest.raises(urllib.error.HTTPError) as told:
        send(board + path.format(row=row, study=summary["study_id"]), method, body)
    assert told.value.code == 403
    assert "only notes can be written" in json.loads(told.value.read())["reason"]
    assert read_trials(Run.open(run_path)) == before
    send(f"{board}api/studies/{summary['study_id']}/note", "PUT", {"body": "look here", "version": 1})
    assert get_note(writer.study) == "look here"


def test_a_taken_port_is_told(board: str, run_path: Path) -> None:
    port = board.rstrip("/").rpartition(":")[2]
    command = [sys.executable, "-m", "foldsearch", "dashboard", str(run_path), "--port", port]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert f"port {port} of 127.0.0.1 cannot be served" in done.stderr
    assert "--port" in done.stderr
