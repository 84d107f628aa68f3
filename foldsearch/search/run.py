"""Run a study: Ray Tune runs the trials, the Optuna study proposes them and remembers, the run folder keeps the rest.

A run that was stopped, by Ctrl-C or by `kill -9`, goes on from two things only: the study (finished trials are rows;
a trial that was being run is RUNNING) and the trial folders (the state at the last rung). Tune starts afresh over
them: its own restore would bring back a second, older account of the same trials.
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ray import tune

from foldsearch import cache
from foldsearch.errors import RunError, SpecError, describe_error, quote_error
from foldsearch.files import disk_is_full
from foldsearch.machine import num_cpus
from foldsearch.paths import command, printable
from foldsearch.plan.cost import GB, CostTable
from foldsearch.proposal import Proposal
from foldsearch.record import Trial, point
from foldsearch.run import Run, RunFolder
from foldsearch.search.check import mend_for_resume
from foldsearch.search.cluster import Workplace, on_device, workplace
from foldsearch.search.dry_run import dense_fits, is_tight, lacks_memory
from foldsearch.search.events import (
    Event,
    Notice,
    OnEvent,
    Preparing,
    Progress,
    RungDone,
    SearchDone,
    SearchInterrupted,
    SearchStarted,
    TrialEnded,
    TrialProgress,
    TrialRetried,
    TrialStarted,
    ignore,
)
from foldsearch.search.halving import Halving, decide
from foldsearch.search.messages import (
    DiskIsFull,
    EndedEarly,
    Failed,
    Measured,
    Message,
    Probed,
    StorageLost,
    TimeIsUp,
    decode,
)
from foldsearch.search.own_ray import check_ray, own_ray
from foldsearch.search.pace import Pace, screening_seconds
from foldsearch.search.proposer import Line, Proposer
from foldsearch.search.records import Records, read_rows, read_trials
from foldsearch.search.screened import Promoted, is_screened, write_screened
from foldsearch.search.shipping import Shipping, fetch_interrupted, shared_cache
from foldsearch.search.storage import network_words, place_of, storage_errors, use_storage
from foldsearch.search.warm import (
    Trained,
    begun_with,
    check_warm,
    check_warm_made,
    keep_trained,
    known_trained,
    known_words,
    warm_plans,
)
from foldsearch.search.worker import PROGRESS_SECONDS, load_function, runner_for
from foldsearch.signals import check_stopped, stops_raise, uninterrupted
from foldsearch.spec.largest import largest_to_train, too_large_words
from foldsearch.spec.study import OBJECTIVES, Study
from foldsearch.spec.unused import unused_settings
from foldsearch.store import StoreError

TRIAL = "foldsearch.trial:run_trial"
PREPARE = "foldsearch.prepare:prepare_context"
MAX_CRASHES = 2  # a worker that dies is started again this often for the same trial


# ---- the search


def run_search(
    study: Study | None,
    folder: Path | str,
    *,
    resume: bool = False,
    storage: str | None = None,
    on_event: OnEvent = ignore,
    trial: str = TRIAL,
    prepare: str = PREPARE,
) -> Run:
    """Run a study into a new folder, or go on with the run in `folder`.

    Args:
        study: what to run. With `resume`, None takes the folder's; another one may differ in its limits
            (`foldsearch.run.LIMITS`) only.
        folder: of the run; it appears when everything that can be refused was not refused.
        resume: go on with a run: interrupted trials first, from their last rung.
        storage: URL of the database that holds the study; None for a SQLite file in the folder, or where the run that
            goes on has its own. Its password is kept nowhere.
        on_event: told what happens, in this process.
        trial: "module:function" with the signature of `foldsearch.trial.run_trial`; workers import it.
        prepare: "module:function" with the signature of `foldsearch.prepare.prepare_context`; its result, a dataclass
            with `run`, `cache_dir`, `threads` and `device`, is what trials get as their context.

    Raises:
        BudgetError: no plan of the space can keep the budget.
        RunError: the folder exists already, or is not the run it should be; or the disk is full.
        KeyboardInterrupt: after Ctrl-C, SIGTERM or SIGHUP (`foldsearch.signals.Stopped`); the run can be resumed.
    """
    folder = Path(folder)
    with stops_raise():

        def tell(event: Event) -> None:
            check_stopped()
            on_event(event)

        asking = _Asking(study.seconds if study is not None else None)

        def say(stage: str, share: float) -> None:
            asking.check(stage, share)
            tell(Preparing(stage, share))

        def note(words: str) -> None:
            tell(Notice(words))

        run: Run
        again = command("resume", folder)
        if resume:
            run = Run.open(folder)
            limited = run.with_limits(study or run.study)
            with (
                workplace(limited.study, again) as place,
                _resumable(run, on_event),
                shared_cache(place.storage),
            ):
                if storage is not None:
                    use_storage(run, storage)
                for words in mend_for_resume(run):
                    note(words)
                fetch_interrupted(run, [row.trial.number for row in read_rows(run) if row.is_open])
                run = limited
                context = load_function(prepare)(
                    run.study, folder, check=run.study.narrowed, progress=say, notice=note
                )
                if context.run.table != run.table:
                    raise RunError(
                        f"the model of '{printable(folder)}' is not the one it was started with. Start a new run."
                    )
                run.keep_limits()  # not before: what is refused changes nothing
                _search(replace(context, run=run), trial, tell, place)
            return run
        if study is None:
            raise ValueError("a new run needs a study.")
        Run.check_new(folder)
        check_warm(study)
        with workplace(study, again) as place, shared_cache(place.storage):
            for words in unused_settings(study):
                note(words)
            with Run.draft(folder) as draft:
                if storage is not None:
                    use_storage(RunFolder(draft), storage)
                elif words := network_words(folder):
                    note(words)
                context = load_function(prepare)(
                    study,
                    draft,
                    check=partial(_check, study),
                    accept=partial(check_warm_made, study),
                    progress=say,
                    notice=note,
                )
                run = context.run.begin(folder)
            with _resumable(run, on_event):
                _search(replace(context, run=run), trial, tell, place)
        return run


def _check(study: Study, table: CostTable) -> None:
    """Whether a model of such blocks can keep the study's budget, and begin with what the study names."""
    study.narrowed(table)
    check_warm(study, table)


class _Asking:
    """Refuses to ask the dense model for longer than the whole run may take."""

    def __init__(self, seconds: float | None) -> None:
        self._seconds = seconds
        self._began: float | None = None
        self._stage = ("", 0.0, 0.0)  # its name, and when it was first told of, at which share

    def check(self, stage: str, share: float) -> None:
        """Told where the preparation is.

        Raises:
            SpecError: what is asked now takes more than the time of the run.
        """
        if self._seconds is None or not stage.startswith("asking the dense model"):
            return
        now = time.monotonic()
        if self._began is None:
            self._began = now
        if self._stage[0] != stage:
            self._stage = (stage, now, share)
        _, then, first = self._stage
        to_come = (now - then) * (1 - share) / (share - first) if share > first else 0.0
        if (takes := now - self._began + to_come) > self._seconds:
            raise SpecError(
                "the time of a run holds asking the dense model, screening and all trials, but asking takes at least "
                f"{takes:.0f} s here, and the time is {self._seconds:g} s. Give it more (--time), or take fewer "
                "sequences ([splits])."
            )


@contextmanager
def _resumable(run: Run, on_event: OnEvent) -> Iterator[None]:
    """Alone at work in a run's folder; from here on it can be resumed, and Ctrl-C says how."""
    try:
        with run.held(), _disk_full_is_an_error(run), _storage_told(run), _store_told(run):
            yield
    except KeyboardInterrupt:
        with uninterrupted():
            running = sum(trial.state == "running" for trial in read_trials(run))
            with suppress(OSError):  # whoever is told may be gone, as a terminal is after SIGHUP
                on_event(SearchInterrupted(run, running, command("resume", run.path)))
        raise


def _search(context: Any, trial: str, on_event: OnEvent, place: Workplace) -> None:
    run: Run = context.run
    notices = [dense_fits(run)]
    if _is_real(context) and context.device == "cpu" and place.joined is None:
        notices.append(lacks_memory(run, context.files.dtype))
    for notice in filter(None, notices):
        on_event(Notice(notice))
    records = Records(run)
    began, asking = time.monotonic(), getattr(context, "asking_seconds", 0.0)
    place = on_device(place, run.study, context.device)
    threads = min(place.share.cpus, num_cpus()) if place.joined is None else place.share.cpus
    # Trials have fewer cores than the asking had, and those of one machine share its processor.
    slower = max(num_cpus() / threads, run.study.jobs if place.joined is None else 1)
    token_seconds = getattr(context, "token_seconds", 0.0) * slower
    closing = _closing_seconds(context)
    earlier = [] if records.all() else warm_plans(run)
    seconds = math.inf
    if run.study.seconds is not None:
        one = Pace(run, token_seconds).largest(records.space) if token_seconds else 0.0
        seconds = screening_seconds(run.study, run.study.seconds - asking - records.elapsed, closing, one)
    promoted = _screened(records, context, asking, earlier, on_event, seconds)
    promoted = begun_with(promoted, earlier, run.study.screen.promoted)
    if context.device != "cpu":
        from foldsearch.context import close_workbench

        close_workbench()  # the workers open their own: the driver's copy would take their room
    # At once: a process that is killed before a trial ends has spent it too.
    records.note_elapsed(records.elapsed + asking + time.monotonic() - began)
    line = Line(
        records,
        promoted=promoted,
        closing=closing,
        token_seconds=token_seconds,
    )
    if words := line.begin_words():
        on_event(Notice(words))
    try:
        device = context.device
        if place.joined is not None:  # not what this machine has counts, but what a trial takes
            device = "cuda" if place.share.gpus else device.replace("cuda", "cpu")
        of_trials = replace(context, threads=threads, device=device)
        probe = _probe(records, context, place)
        Search(records, line, on_event, probe).run_trials(of_trials, trial, place)
    finally:
        if _is_real(context):
            keep_trained(run, records.all(), context.cache_dir)


@contextmanager
def _ray_of(place: Workplace, again: str) -> Iterator[Path]:
    """Ray, and a folder for Tune's state: where a cluster was joined, that one."""
    if place.joined is not None:
        yield place.joined
        return
    with own_ray(place.cpus, place.gpus, again) as folder:
        yield folder


def _closing_seconds(context: Any) -> float:
    """Of the time of a run, what is needed after the last trial."""
    if not _is_real(context):
        return 0.0
    from foldsearch.shipped import rivals_seconds  # it needs torch, which fakes do without

    return rivals_seconds(context)


def _is_real(context: Any) -> bool:
    """Whether trials have a model; those of tests may have none."""
    return getattr(context, "files", None) is not None


def _probe(records: Records, context: Any, place: Workplace) -> Proposal | None:
    """What is to be trained for a step before the first trial, to see whether memory holds it; None for nothing.

    A step takes a second on a GPU and several on a CPU, where the estimate of memory is looked at first.
    """
    run = records.run
    if not _is_real(context) or not run.study.rungs[-1] or any(trial.has_trained for trial in records.all()):
        return None
    if context.device == "cpu" and place.joined is None and not is_tight(run, context.files.dtype):
        return None
    return largest_to_train(run.study, records.space, run.table, run.target, run.budget)


def _screened(
    records: Records,
    context: Any,
    asking: float,
    earlier: Sequence[Trained],
    on_event: OnEvent,
    seconds: float = math.inf,
) -> Promoted:
    """Screen plans for a run that has no trials yet; what of them is to be trained. What it took up is let go of.

    What is known of the model and the text is told first.

    Args:
        records: of the run.
        context: of its trials.
        asking: seconds that the dense model was asked for.
        earlier: plans that are measured first.
        on_event: told what happens.
        seconds: that the screening may take.
    """
    run, study = records.run, records.run.study
    if records.all() or not _is_real(context):
        return Promoted()
    trained = [*earlier, *known_trained(run, context.cache_dir)]
    if not is_screened(study, records.space):
        if words := known_words(run, (), trained):
            on_event(Notice(words))
        return Promoted()
    from foldsearch.search.screening import Screening  # it needs torch, which fakes do without

    began = time.monotonic()
    try:
        screening = Screening(
            context,
            records.space,
            seconds=max(1.0, seconds),
            progress=lambda stage, share: on_event(Preparing(stage, share)),
        )
        if words := known_words(run, screening.take_over(), trained):
            on_event(Notice(words))
        found = screening.run(asked=[one.plan for one in earlier])
    except KeyboardInterrupt:
        with uninterrupted():  # a run that goes on has less time left
            records.note_elapsed(records.elapsed + asking + time.monotonic() - began)
        raise
    write_screened(records.run.screened, found)
    promoted = screening.promoted()
    records.note_screened(screening.num_new, len(promoted.plans))
    return promoted


class Search:
    """One process's part of a run: between Tune, the line of trials, the study, and whoever listens."""

    def __init__(
        self, records: Records, line: Line, on_event: OnEvent, probe: Proposal | None = None
    ) -> None:
        """`on_event`: told what happens. `probe`: to be trained for a step before the first trial."""
        self.records = records
        self.line = line
        self.run = records.run
        self._tell = on_event
        self._probe = probe
        self._error: BaseException | None = None
        self._shipping: Shipping | None = None  # where workers may not see the run's folder

    def run_trials(self, context: Any, trial: str, place: Workplace) -> None:
        """Run trials until the line is empty."""
        known = self.records.all()
        ended_before = sum(trial.ended for trial in known)
        self._tell(SearchStarted(self.run, ended_before, self.line.planned()))
        try:
            with _ray_of(place, command("resume", self.run.path)) as folder:
                if place.storage:
                    self._shipping = Shipping(context, place.storage, place.home, self.line.deadline)
                tune.run(
                    runner_for(
                        context=context,
                        trial=trial,
                        deadline=self.line.deadline,
                        cargo=None if self._shipping is None else self._shipping.cargo,
                    ),
                    name=time.strftime("%Y%m%d-%H%M%S"),
                    storage_path=str(folder),
                    search_alg=Proposer(self.line, self._probe),
                    scheduler=Halving(self.judge),
                    callbacks=[Watcher(self)],
                    num_samples=-1,
                    resources_per_trial=place.resources(),
                    max_failures=MAX_CRASHES,
                    reuse_actors=True,
                    raise_on_failed_trial=False,
                    trial_dirname_creator=lambda trial: f"{trial.config['number']:05}-{trial.trial_id}",
                    verbose=0,
                )
        except KeyboardInterrupt:
            with uninterrupted():
                self.records.note_elapsed(self.line.elapsed())
            raise
        except Exception:
            if self._error is not None:
                raise self._error from None  # Tune wraps what `judge` raises into text
            raise
        self.records.note_elapsed(self.line.elapsed())
        if self._shipping is not None:
            self._shipping.end()
        if _is_real(context) and self.records.front():
            from foldsearch.shipped import measure_rivals

            seconds = self.line.study.seconds
            try:
                measure_rivals(
                    context,
                    progress=lambda stage, share: self._tell(Preparing(stage, share)),
                    notice=lambda words: self._tell(Notice(words)),
                    is_late=lambda: seconds is not None and self.line.elapsed() >= seconds,
                )
            finally:  # a part of the run's time, whatever ends it
                with uninterrupted():
                    self.records.note_elapsed(self.line.elapsed())
        self._trim_cache(context.cache_dir)
        known = self.records.all()
        states = [trial.state for trial in known]
        self._tell(
            SearchDone(
                self.run,
                num_finished=states.count("finished"),
                num_stopped=states.count("stopped"),
                num_cut=states.count("cut"),
                num_repeated=sum(trial.state == "repeat" and trial.is_trial for trial in known),
                num_failed=states.count("failed"),
                elapsed_seconds=self.line.elapsed(),
                front=tuple(trial.number for trial in self.records.front()),
                words=self.line.end_words(),
                num_screened=self.records.num_screened,
                num_trained=sum(trial.has_trained for trial in known),
            )
        )

    def _trim_cache(self, cache_dir: Path) -> None:
        if gone := cache.trim(cache_dir):
            freed = sum(entry.size_bytes for entry in gone) / GB
            words = f"the cache is kept within {cache.MOST_BYTES / GB:.0f} GB: {freed:.1f} GB that were used least "
            self._tell(Notice(f"{words}recently were removed (see `foldsearch cache`)."))

    def judge(self, number: int, message: str) -> bool:
        """Record what a worker says of a trial; whether the trial ends now."""
        try:
            return self._judge(number, decode(message))
        except BaseException as error:
            self._error = error
            raise

    def _judge(self, number: int, message: Message) -> bool:
        if self._shipping is not None and not isinstance(message, StorageLost | Probed):
            self._shipping.fetch(number)  # before the study is told: what it says is in the folder
        match message:
            case Measured(told, again):
                return self._take(told, again=again)
            case TimeIsUp(reason):
                self.line.is_over = True
                self.records.cut(number, reason)
                self._ended(number)
            case DiskIsFull(reason):
                raise RunError(
                    f"trial {number} could not be written: {reason}\nFree some space; nothing that was finished is "
                    f"lost. Go on with: {command('resume', self.run.path)}"
                )
            case StorageLost(reason):
                raise StoreError(f"trial {number} could not hand in what it learnt: {reason}")
            case Probed(words):
                self._probe = None
                if words:
                    self._tell(Notice(words))
                return False
            case EndedEarly(reason):
                self._end_early(number, reason)
            case Failed(reason):
                self.lost(number, reason)
        return True

    def _take(self, told: Trial, *, again: bool) -> bool:
        """Record what a worker tells of a trial; whether the trial ends with it."""
        number, known = told.number, self.records.get(told.number)
        if again and len(told.results) <= len(known.results) and not told.ended:
            return False  # it went on from here before it was interrupted
        if not told.ended:
            told = self._halved(told)
        self.records.record(
            told
        )  # with what halving says of it: else a run that is killed here would go on with it
        if self._shipping is not None and told.results:
            self._shipping.note(told)
        self.line.began(number)
        self._tell(RungDone(told))
        if not told.ended:
            return False
        state = self.records.finish(number)
        front = {trial.number for trial in self.records.front()}
        self._ended(number, on_front=state == "finished" and number in front)
        return True

    def _end_early(self, number: int, reason: str) -> None:
        """Record a trial that ended between two rungs: as a repeat, where another trial measures its plan just now."""
        other = self.records.get(number).known_from
        if other is None:
            self.lost(number, reason)
            return
        self.records.repeat(number, other, f"trial {other} measures the same plan at this moment")
        self._ended(number)

    def _halved(self, trial: Trial) -> Trial:
        """The trial as it stands after a rung: stopped or not, beside what others reached there."""
        if trial.exempt:
            return trial
        settings, rung = self.run.study.halving, len(trial.results) - 1
        # Halving wants quality first, in whichever order the study names its objectives.
        objectives = sorted(self.records.objectives, key=OBJECTIVES.index)
        others = {
            (other.plan, other.types): point(other, objectives, rung)
            for other in self.records.all()
            # A plan does not compete with itself; in other types it is another model.
            if len(other.results) > rung and (other.plan, other.types) != (trial.plan, trial.types)
        }
        decision = decide(
            point(trial, objectives),
            list(others.values()),
            keep=settings.keep,
            at_least=settings.at_least,
            band=settings.band,
        )
        return trial if decision.goes_on else replace(trial, state="stopped", reason=decision.reason)

    def started(self, number: int) -> None:
        """A worker has the trial."""
        self.run.trial(number).progress.unlink(missing_ok=True)  # of an earlier process
        self.line.began(number)
        self._tell(TrialStarted(self.records.get(number)))

    def retried(self, number: int, reason: str) -> None:
        """The worker died, another one takes over."""
        if self._shipping is not None:
            self._shipping.release(number)
        self._tell(TrialRetried(number, reason))

    def probe_ended_worker(self, reason: str) -> None:
        """The worker that was to probe memory died; it may have done that before."""
        if self._probe is not None:
            self._tell(Notice(too_large_words(self._probe, self.run.study, f"ended its process ({reason})")))
            self._probe = None

    def lost(self, number: int, reason: str) -> None:
        """A trial gave no result: it raised an error, or workers died too often over it."""
        self.records.fail(number, reason)
        self._ended(number)

    def progress(self, number: int) -> None:
        """Pass on what the worker said about where it is."""
        if self._shipping is not None:
            if (told := self._shipping.progress(number)) is not None:
                self._tell(TrialProgress(number, *told))
            return
        try:
            value = json.loads(self.run.trial(number).progress.read_text())
            phase, share = str(value["phase"]), float(value["share"])
        except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
            return  # none yet, or damaged: the next one says more
        self._tell(TrialProgress(number, phase, share))

    def _ended(self, number: int, *, on_front: bool = False) -> None:
        if self._shipping is not None:
            self._shipping.release(number)
        self._tell(TrialEnded(self.records.get(number), on_front))
        self.records.note_elapsed(self.line.elapsed())
        self.tell_progress()

    def check_workers(self) -> None:
        """Raise what ends the run where Ray is lost."""
        try:
            check_ray()
        except RunError as error:
            self._error = error
            raise

    def tell_progress(self) -> None:
        """How far the whole run is."""
        num_ended = sum(trial.ended and trial.is_trial for trial in self.records.all())
        self._tell(Progress(num_ended, self.line.planned(), self.line.elapsed(), self.line.remaining()))


class Watcher(tune.Callback):
    """Tune's side of the events that are not results."""

    def __init__(self, search: Search) -> None:
        """`search`: is told."""
        self._search = search
        self._looked = 0.0
        self._begun: set[str] = set()  # Tune's ids of trials that a worker has had
        self._recovered: set[str] = set()
        self._put_back: Counter[int] = Counter()  # by the number of the trial

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A worker has the trial."""
        self._begun.add(trial.trial_id)
        self._search.started(trial.config["number"])

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A worker died; Tune starts the trial again."""
        self._search.check_workers()  # where Ray is lost, so are its workers: that is no fault of the trial
        self._recovered.add(trial.trial_id)
        self._search.retried(trial.config["number"], _reason(trial))
        if trial.config.get("probe"):
            trial.config["probe"] = None  # the next worker begins with the trial
            self._search.probe_ended_worker(_reason(trial))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Tune gave the trial up: its worker died too often, or died before it had let go of the trial before."""
        self._search.check_workers()
        number = trial.config["number"]
        # Tune has no second try for a worker that dies between two trials, and may have begun one all the same.
        is_between = trial.trial_id not in self._begun and trial.num_failures <= MAX_CRASHES
        if not is_between or self._put_back[number] == MAX_CRASHES:
            self._search.lost(number, _reason(trial))
            return
        self._put_back[number] += 1
        self._search.records.put_back(number)
        if trial.trial_id not in self._recovered:
            self._search.retried(number, _reason(trial))

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Look whether Ray lives, and where the running trials are, about once a second."""
        self._search.check_workers()
        if time.monotonic() - self._looked >= PROGRESS_SECONDS:
            self._looked = time.monotonic()
            self._search.tell_progress()
            for trial in trials:
                if trial.status == "RUNNING":
                    self._search.progress(trial.config["number"])


def _reason(trial: Any) -> str:
    error = trial.get_pickled_error() or trial.get_error() or "the worker was lost"
    return f"crashed: {describe_error(error) if isinstance(error, BaseException) else error}"


@contextmanager
def _storage_told(run: Run) -> Iterator[None]:
    """Tell of a database that goes away while the run goes on."""
    with storage_errors(place_of(run)):
        yield


@contextmanager
def _store_told(run: Run) -> Iterator[None]:
    """Tell of a run storage that goes away while the run goes on."""
    try:
        yield
    except StoreError as error:
        again = command("resume", run.path)
        raise RunError(f"{error} Nothing that was finished is lost. Go on with: {again}") from error


@contextmanager
def _disk_full_is_an_error(run: Run) -> Iterator[None]:
    from optuna.exceptions import StorageInternalError

    try:
        yield
    except (OSError, StorageInternalError) as error:
        full = disk_is_full(error)
        if not full and isinstance(error, OSError):
            raise
        # SQLite says "disk I/O error" of a limit on the size of a file.
        remedy = "Free some space" if full else "Look at the disk and its limits (df, ulimit -f)"
        raise RunError(
            quote_error(
                f"the run folder '{printable(run.path)}' cannot be written",
                error,
                f"{remedy}; nothing that was finished is lost. Go on with: {command('resume', run.path)}",
            )
        ) from error
