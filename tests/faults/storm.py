"""A storm over real searches: their processes are killed, suspended and interrupted, their clock is moved, their files
are damaged, at random; a dashboard that shows them is killed.

    python -m tests.faults.storm --out DIR --kills 200 --minutes 30 [--patience 240] [--fake]

Each search is one of a tiny random model, through the command line, with one job; with --fake, one whose trials need no
model (`tests/fake_trial.py`), so that a process starts in a third of the time. It is gone on with until it ends, and
then compared with the same search undisturbed: the same proposals, the same figures to the bit, the same trials on each
rung; and `foldsearch check` finds nothing. What was done is written into DIR/events.jsonl after every blow, so that the
same command goes on with the count after it was stopped itself.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil

from foldsearch.files import write_json
from foldsearch.record import Trial
from foldsearch.run import Run
from foldsearch.search.records import read_trials

ROOT = Path(__file__).resolve().parents[2]
BUDGET = "0.00024"  # GB; the dense model needs 0.0003
STUDY = """
model = "{model}"
data = "{data}"
device = "cpu"
precision = "float32"
rungs = [0, 256, 1024]
trials = 8
[space]
name = "tiny"
removal = [0.0, 0.8]
criteria = ["window", "greedy"]
[space.groups]
max_groups = 1
[splits]
sequence_length = 16
search = 8
recovery = 32
report = 4
[screen]
plans = 0
[starts]
tokens = 64
[target]
dtype = "float32"
context = 64
"""
MOST_CRASHES = 2  # of a worker at one trial, after which the search gives the trial up: as it is meant
MOST_STARTS = 20  # of a search that has not begun yet


# ---- a search, and who takes part in it


def make_place(place: Path) -> None:
    """A model, text and the study, in a new folder."""
    from tests.tiny import VOCABULARY, save_model

    rng = random.Random(0)
    model = save_model(place / "model")
    (place / "text").mkdir()
    for number in range(60):
        words = " ".join(f"w{rng.randrange(3, VOCABULARY)}" for _ in range(60))
        (place / "text" / f"{number}.txt").write_text(words)
    (place / "foldsearch.toml").write_text(STUDY.format(model=model, data=place / "text"))


def start(place: Path, run: Path) -> subprocess.Popen[str]:
    """Begin a search, or go on with it, in a process group of its own."""
    is_new = not (run / "study.json").exists()
    if (place / "foldsearch.toml").exists():
        words = [
            "foldsearch",
            *(["run", "--budget-gb", BUDGET, "--out", str(run)] if is_new else ["resume", str(run)]),
        ]
    else:
        words = ["tests.fake_driver", str(run), "run" if is_new else "resume"]

    return subprocess.Popen(
        [sys.executable, "-m", *words],
        cwd=place,
        env=environment(place),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def environment(place: Path) -> dict[str, str]:
    """Of the processes of a search. `tests/faults/clock` lets their clock of the wall be moved."""
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "tests" / "faults" / "clock"), str(ROOT)]),
        "MOVED_CLOCK": str(place / "clock"),
        "FOLDSEARCH_CACHE": str(place / "cache"),
        "OMP_NUM_THREADS": "1",
    }


def make_fakes(place: Path) -> None:
    """Searches without a model: how long a rung takes is said beside them."""
    (place / "faults.json").write_text(json.dumps({"seconds": 0.3}))


def check(place: Path, run: Path) -> subprocess.CompletedProcess[str]:
    """`foldsearch check` of a run."""
    return subprocess.run(
        [sys.executable, "-m", "foldsearch", "check", str(run)],
        cwd=place,
        env=environment(place),
        capture_output=True,
        text=True,
        check=False,
    )


PARTS = {
    "worker": "ray::TrialRunner",
    "raylet": "raylet",
    "gcs": "gcs_server",
    "dashboard agent": "DashboardAgent",
    "runtime agent": "RuntimeEnvAgent",
}


def find(driver: subprocess.Popen[str], part: str) -> psutil.Process | None:
    """A process of a driver's Ray, by what it is called."""
    with suppress(psutil.Error):
        for child in psutil.Process(driver.pid).children(recursive=True):
            with suppress(psutil.Error):
                words = child.name() if part == "raylet" else " ".join([child.name(), *child.cmdline()[:2]])
                if PARTS[part] in words:
                    return child
    return None


# ---- the blows


@dataclass
class Storm:
    """Blows, in a random order, on searches that are gone on with after each."""

    out: Path
    rng: random.Random
    patience: float = 240.0  # seconds in which something must move, or the search is stuck
    kills: int = 0
    events: Counter[str] = field(default_factory=Counter)
    codes: Counter[str] = field(default_factory=Counter)
    resumes: int = 0
    searches: int = 0
    seconds: float = 0.0

    def note(self, what: str, **more: Any) -> None:
        """Write down what was done."""
        self.events[what] += 1
        self.kills += more.get("kill", 0)
        with (self.out / "events.jsonl").open("a") as file:
            file.write(json.dumps({"what": what, **more}) + "\n")

    def recall(self) -> None:
        """What earlier processes did."""
        path = self.out / "events.jsonl"
        for line in path.read_text().splitlines() if path.exists() else ():
            told = json.loads(line)
            self.events[told["what"]] += 1
            self.kills += told.get("kill", 0)
            self.resumes += told["what"] == "process ended"
            self.searches += told["what"] == "search ended"
            self.seconds += told.get("seconds", 0.0)
            if "code" in told:
                self.codes[f"{told['after']}: {told['code']}"] += 1

    # ---- one process

    def live(self, place: Path, run: Path) -> tuple[str, int, str]:
        """Let one process of a search run under blows until it ends; what ended it, its code, what it said."""
        driver, after = start(place, run), "its end"
        # Workers to kill before the last blow: no more than one trial survives, as on a busy machine a worker may be at
        # another trial than the one that was last heard of.
        left = self.rng.randint(0, MOST_CRASHES)
        said: list[str] = []
        began = time.monotonic()
        try:
            while driver.poll() is None:
                if time.monotonic() - began > self.patience:
                    driver.send_signal(signal.SIGABRT)
                    raise AssertionError(f"a search is stuck after {after}; see {run}")
                time.sleep(self.rng.uniform(0.05, 1.2))
                if after != "its end":
                    continue  # it is to end by itself
                self.beside(place, run)
                worker = find(driver, "worker")
                if worker is None:
                    if self.rng.random() < 0.01:
                        # a program that is still importing dies of Ctrl-C as Python programs do
                        after = self._last_blow(driver, ("driver",))
                    continue
                if left:
                    left -= 1
                    with suppress(psutil.NoSuchProcess):
                        worker.kill()
                        self.note("worker", kill=1)
                    began = time.monotonic()
                else:
                    after = self._last_blow(driver, tuple(LAST))
                    began = time.monotonic()
        finally:
            if driver.poll() is None:
                os.killpg(driver.pid, signal.SIGKILL)
            said.append(driver.communicate()[0])
        return after, driver.returncode, "".join(said)

    def _last_blow(self, driver: subprocess.Popen[str], among: tuple[str, ...]) -> str:
        """A blow that may end the process; what it was, or "its end" where it should live on."""
        what = self.rng.choices(among, [LAST[name] for name in among])[0]
        if what == "driver":
            driver.kill()
            self.note(what, kill=1)
            return what
        if what == "Ctrl-C twice":
            with suppress(ProcessLookupError):
                os.killpg(driver.pid, signal.SIGINT)
                time.sleep(self.rng.uniform(0, 0.5))
                os.killpg(driver.pid, signal.SIGINT)
            self.note(what)
            return what
        if what == "suspend":
            of = self.rng.choice(("driver", "worker", "raylet", "gcs", "all"))
            self.suspend(driver, of, self.rng.choice((3, 8, 20, 60)))
            # Ray takes one of its own for dead that says nothing for so long
            return f"suspend {of}" if of in ("raylet", "gcs", "all") else "its end"
        if what == "file limit":
            return self.limit_files(driver)
        if (process := find(driver, what)) is not None:
            with suppress(psutil.NoSuchProcess):
                process.kill()
                self.note(what, kill=1)
                return what
        return "its end"

    def limit_files(self, driver: subprocess.Popen[str]) -> str:
        """No file of the search may become larger than a few bytes, as where a disk is full."""
        most = self.rng.choice((10, 5000))
        with suppress(psutil.Error):
            family = [psutil.Process(driver.pid), find(driver, "worker")]
            for one in family:
                if one is not None:
                    one.rlimit(psutil.RLIMIT_FSIZE, (most, psutil.RLIM_INFINITY))
            self.note("file limit", bytes=most)
            return "file limit"
        return "its end"

    def suspend(self, driver: subprocess.Popen[str], of: str, seconds: float) -> None:
        """Stop a part of a search for some seconds: "driver", one of PARTS, or "all"."""
        family: list[psutil.Process] = []
        with suppress(psutil.Error):
            top = psutil.Process(driver.pid)
            if of == "all":
                family = [top, *top.children(recursive=True)]
            elif (process := top if of == "driver" else find(driver, of)) is not None:
                family = [process]
        for one in family:
            with suppress(psutil.Error):
                one.suspend()
        time.sleep(seconds if family else 0)
        for one in family:
            with suppress(psutil.Error):
                one.resume()
        if family:
            self.note(f"suspend {of}", length=seconds, processes=len(family))

    # ---- blows that no process of a search is to feel

    def beside(self, place: Path, run: Path) -> None:
        """One of them, at times."""
        what = self.rng.choices(("nothing", "clock", "dashboard"), (40, 3, 1))[0]
        if what == "clock":
            self.move_clock(place)
        elif what == "dashboard" and (run / "study.json").exists():
            self.kill_dashboard(place, run)

    def move_clock(self, place: Path) -> None:
        """Let the clock of the wall leap, by up to two days on or back from the true time."""
        hours = self.rng.uniform(-48, 48)
        write_json(place / "clock", 3600 * hours)
        self.note("clock", hours=round(hours, 1))

    def kill_dashboard(self, place: Path, run: Path) -> None:
        """Let `foldsearch dashboard` show the run, and kill it while it answers."""
        command = [sys.executable, "-m", "foldsearch", "dashboard", str(run), "--port", "0"]
        board = subprocess.Popen(
            command,
            cwd=place,
            env=environment(place),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert board.stdout is not None
        if line := board.stdout.readline():
            url = f"{line.split()[1]}api/studies"
            with urllib.request.urlopen(url, timeout=60) as answer:
                studies = json.loads(answer.read())["study_summaries"]
            # none: of a database that was damaged, and is begun again at this moment
            assert len(studies) <= 1
            for study in studies:
                threading.Thread(target=_ask, args=(f"{url}/{study['study_id']}",), daemon=True).start()
                time.sleep(self.rng.uniform(0, 0.05))
        board.kill()  # one that said nothing came too early: there is no study yet
        _, said = board.communicate()
        assert "Traceback" not in said, said
        self.note("dashboard", kill=bool(line))

    # ---- between two processes

    def damage(self, place: Path, run: Path) -> None:
        """Sometimes damage a file while no process is at work."""
        what = self.rng.choices(
            ("nothing", "last file truncated", "checkpoint corrupted", "cache entry corrupted"), (6, 2, 1, 1)
        )[0]
        files = {
            "nothing": [],
            "last file truncated": last_written(run),
            "checkpoint corrupted": [*run.glob("trials/*/optimizer.safetensors")],
            "cache entry corrupted": [
                path
                for path in (place / "cache").glob("*/*")
                if path.is_file() and not path.name.startswith(".") and path.parent.name != "checked"
            ],
        }[what]
        if files:
            chosen = files[0] if what.startswith("last") else self.rng.choice(files)
            (truncate if what.startswith("last") else corrupt)(chosen, self.rng)
            self.note(what, file=chosen.name)

    # ---- a search to its end

    def search(self, place: Path, run: Path, undisturbed: list[Trial]) -> None:
        """Go on with a search under blows until it ends, and hold it against the one undisturbed."""
        began, stuck = time.monotonic(), 0
        while True:
            after, code, said = self.live(place, run)
            self.resumes += 1
            self.codes[f"{after}: {code}"] += 1
            self.note(
                "process ended", after=after, code=code, said=said[-1500:] if code not in (0, -9) else ""
            )
            assert "Traceback" not in said, said[-3000:]
            assert code in CODES, (after, code, said[-3000:])
            assert code != 2 or after not in PARTS or "Go on with: " in said, (after, said[-3000:])
            if code == 0:
                break
            stuck += not (run / "study.json").exists()
            assert stuck < MOST_STARTS, said
            if (run / "study.json").exists():
                self.damage(place, run)
        found = without_seconds(read_trials(Run.open(run)))
        differ = [number for number, (a, b) in enumerate(zip(found, undisturbed, strict=False)) if a != b]
        assert not differ, f"of {run} differ {differ}: {[(found[i], undisturbed[i]) for i in differ[:1]]}"
        assert len(found) == len(undisturbed)
        checked = check(place, run)
        assert checked.returncode == 0 or "killed processes left" in checked.stdout, checked.stdout
        self.searches += 1
        self.seconds += time.monotonic() - began
        self.note("search ended", trials=len(found), seconds=time.monotonic() - began)

    def table(self) -> str:
        """The figures."""
        rows = [
            ("searches to their end, each as the one undisturbed", self.searches),
            ("processes of them (run and resume)", self.resumes),
            ("kills", self.kills),
        ]
        rows += [
            (f"  {name}", self.events[name]) for name in ("driver", *PARTS, "dashboard") if self.events[name]
        ]
        others = sorted(set(self.events) - {*PARTS, "driver", "dashboard", "process ended", "search ended"})
        rows += [(name, self.events[name]) for name in others]
        rows += [(f"exit code after {name}", count) for name, count in sorted(self.codes.items())]
        rows += [("seconds", round(self.seconds))]
        return "\n".join(f"{name:<58}{count:>6}" for name, count in rows)


LAST = {
    "driver": 8.0,
    "raylet": 3.0,
    "gcs": 1.0,
    "dashboard agent": 1.0,
    "runtime agent": 1.0,
    "Ctrl-C twice": 2.0,
    "suspend": 2.0,
    "file limit": 1.5,
}


CODES = (0, 2, 130, -signal.SIGKILL)  # of a process: its end, a sentence, Ctrl-C, `kill -9`


def _ask(url: str) -> None:
    """Ask a server that may be killed meanwhile."""
    with suppress(OSError, http.client.HTTPException), urllib.request.urlopen(url, timeout=60) as answer:
        answer.read()


def last_written(run: Path) -> list[Path]:
    """The file of a run that was written last, of those that `resume` has a second source for."""
    kept = [
        path
        for pattern in ("storage.db", "trials/*/trial.json", "trials/*/*.safetensors", "plans/*.json")
        for path in run.glob(pattern)
    ]
    return sorted(kept, key=lambda path: -path.stat().st_mtime)[:1]


def truncate(path: Path, rng: random.Random) -> None:
    """Cut a file, as where the machine lost its power."""
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(rng.randrange(max(1, size)))


def corrupt(path: Path, rng: random.Random) -> None:
    """Turn some bytes of a file over."""
    content = bytearray(path.read_bytes())
    for _ in range(3):
        content[rng.randrange(len(content))] ^= 0xFF
    path.write_bytes(content)


def without_seconds(trials: list[Trial]) -> list[Trial]:
    """Trials without what no two runs have alike: how long something took, and hashes of files that say so."""
    told = []
    for trial in trials:
        results = tuple(replace(result, seconds=0.0) for result in trial.results)
        healing = trial.healing and replace(trial.healing, seconds=0.0)
        draft = trial.draft and replace(trial.draft, gates=None)
        told.append(replace(trial, results=results, healing=healing, draft=draft, files={}))
    return told


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--patience", type=float, default=Storm.patience)
    parser.add_argument("--fake", action="store_true")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    place = args.out.resolve() / "place"
    if not (place / "made").exists():
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        (make_fakes if args.fake else make_place)(place)
        (place / "made").touch()
    storm = Storm(args.out, random.Random(), args.patience)
    storm.recall()
    storm.rng.seed(f"{args.seed} {storm.kills} {storm.resumes}")
    until = time.monotonic() + 60 * args.minutes
    reference = place / "undisturbed"
    if not (reference / "done").exists():
        shutil.rmtree(reference, ignore_errors=True)
        for _ in range(MOST_STARTS):
            driver = start(place, reference)
            said, _ = driver.communicate()
            if driver.returncode != 2:
                break  # a busy machine may be too slow for Ray to start, which is told
        assert driver.returncode == 0, said
        (reference / "done").touch()
    undisturbed = without_seconds(read_trials(Run.open(reference)))
    while storm.kills < args.kills and time.monotonic() < until:
        run = place / f"run-{storm.searches:03}"
        storm.search(place, run, undisturbed)
        shutil.rmtree(run)
        print(f"{storm.kills} kills in {storm.searches} searches", flush=True)
    print(storm.table())
    return 0


if __name__ == "__main__":
    sys.exit(main())
