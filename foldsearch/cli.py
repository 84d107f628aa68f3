"""The `foldsearch` command: one function a verb. What can be typed is in `arguments`.

Heavy libraries are imported by the verb that needs them, so `foldsearch --help` answers at once.
Exit codes: 0 done; 1 an export is not the model that was measured; 2 what was given cannot be used; 3 a search ended
without a front, as no trial reached the last rung; 4 a run is not whole (`check`); 128 and the number of the signal
that stopped it: 129 (SIGHUP), 130 (Ctrl-C), 141 (nobody reads on), 143 (SIGTERM).
"""

from __future__ import annotations

import argparse
import errno
import io
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from foldsearch.arguments import PLAN, parse
from foldsearch.errors import InputError, VerificationError, is_out_of_memory
from foldsearch.files import check_writable, disk_is_full
from foldsearch.machine import collect_seldom, spin_briefly
from foldsearch.paths import check_path, command, printable, stem_beside
from foldsearch.plan.extend import extended, rank_of
from foldsearch.plan.plan import FoldPlan
from foldsearch.signals import exit_code, ignore_stops, stops_raise, uninterrupted

if TYPE_CHECKING:
    from rich.console import Console

    from foldsearch.export.recheck import Rechecked
    from foldsearch.progress import StageProgress
    from foldsearch.record import Trial
    from foldsearch.report.view import RunView
    from foldsearch.search.dry_run import DryRun
    from foldsearch.spec.study import Study

DEFAULT_PLACE = Path("runs")
NOT_WHOLE = 4
_LONGEST_NAME = 60  # characters that a file name repeats of a model's: of four bytes at most
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP)


def entry() -> None:
    """The console script."""
    collect_seldom()
    spin_briefly()
    code = main()
    ignore_stops()
    sys.exit(code)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code.

    Args:
        argv: the words after `foldsearch`; those of the process if None.
    """
    words = sys.argv[1:] if argv is None else argv
    _print_everything()
    args = parse(words)
    try:
        with stops_raise():
            return _do(args, words)
    except KeyboardInterrupt as stop:
        with suppress(OSError):  # the terminal may be gone
            _say("\nStopped." if sys.stderr.isatty() else "Stopped.")  # after the ^C that it echoes
        return exit_code(stop)


def _do(args: argparse.Namespace, words: Sequence[str]) -> int:
    """Run one verb; what it was given that cannot be used is told in a sentence."""
    try:
        _check_text(words)
        code = _VERBS[args.verb](args)
        sys.stdout.flush()
        return code
    except VerificationError as error:
        return _fail(error, 1)
    except InputError as error:
        return _fail(error, 2)
    except BrokenPipeError:  # `foldsearch front RUN | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        sentence = _of_the_machine(error, getattr(args, "out", None))
        if sentence is None:
            raise  # ours: the traceback is wanted
        return _fail(sentence, 2)


def _of_the_machine(error: Exception, out: Path | None) -> str | None:
    """What a person can do about an error that is the machine's, wherever it was raised; None of another one."""
    named = getattr(error, "filename", None)
    where = f" '{printable(named)}'" if isinstance(error, OSError) and isinstance(named, str) else ""
    if isinstance(error, OSError) and _is_out(named, out):
        return f"{where.strip()} cannot be written: {error.strerror}. Choose another --out."
    if disk_is_full(error):
        of = where and f" ({where.strip()})"
        return f"the disk is full{of}. Nothing half-written was kept. Make room, then run it again."
    if isinstance(error, OSError) and error.errno in _REFUSED:
        return f"a file or folder{where} cannot be used: {error.strerror}. {_remedy(named)}"
    if is_out_of_memory(error):
        return "the machine's memory is full. Nothing half-written was kept. Free some of it, or take a smaller model."
    if isinstance(error, BlockingIOError) or "can't start new thread" in str(error):
        return "the machine lets no further process or thread begin. End some, or raise the limit: ulimit -u 4096"
    if isinstance(error, FileNotFoundError) and "No usable temporary directory" in str(error):
        return "a folder for temporary files is needed, but there is none that can be written to. Set TMPDIR to one."
    if isinstance(error, RuntimeError) and "home directory" in str(error):  # of Path.home
        return "libraries keep settings in a home folder, but this user has none. Set HOME to a folder."
    return None


def _remedy(named: object) -> str:
    """What helps where a file cannot be used: libraries let their own folders be elsewhere."""
    if "huggingface" in str(named):
        return "Set HF_HOME to a folder that can be written to."
    return "Choose another place, or change its permissions."


def _is_out(path: object, out: Path | None) -> bool:
    """Whether a path that could not be written is what `--out` asked for, or in it, or a temporary file beside it."""
    if out is None or not isinstance(path, str):
        return False
    place, wanted = Path(path).absolute(), out.absolute()
    is_beside = place.parent == wanted.parent and place.name.startswith(stem_beside(wanted))
    return is_beside or place.is_relative_to(wanted)


def _fail(message: object, code: int) -> int:
    sys.stdout.flush()
    _say(f"error: {message}")
    return code


def _print_everything() -> None:
    """A character that the terminal's encoding lacks is printed as an escape, and never an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _check_text(words: Sequence[str]) -> None:
    """Refuse what could not be written down: studies, records and reports are UTF-8."""
    for word in words:
        try:
            word.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"the command line must be UTF-8 text; got '{printable(word)}'. Rename the file or folder."
            ) from error


# ---- the study of the options

_OVERRIDES = {
    "model": "model", "data": "data", "text_column": "text_column", "sample_by": "sample_by", "unseen": "kinds.unseen",
    "space": "space", "warm_from": "warm_from",
    "sampler": "sampler", "trials": "trials", "time": "seconds",
    "trial_time": "trial_seconds",
    "jobs": "jobs", "seed": "seed", "device": "device", "budget_gb": "budget.gb", "budget_flops": "budget.flops",
    "max_prompt_ms": "budget.prompt_ms", "max_decode_ms": "budget.decode_ms",
    "dtype": "target.dtype", "context": "target.context", "batch": "target.batch", "runtime": "target.runtime",
    "weights": "target.weights", "kv_cache": "target.kv_cache",
    "address": "cluster.address", "run_storage": "cluster.run_storage",
    "cpus_per_trial": "cluster.cpus_per_trial", "gpus_per_trial": "cluster.gpus_per_trial",
}  # fmt: skip


def _study(args: argparse.Namespace, **more: Any) -> Study:
    """The study that is named, with the options of the command line over it."""
    from foldsearch.spec.load import load_study

    given = vars(args)
    overrides = {key: given.get(option) for option, key in _OVERRIDES.items()}
    if (data := given.get("data")) and len(data) == 1:
        overrides["data"] = data[0]  # one source is not a list of them
    options = {key: f"--{option.replace('_', '-')}" for option, key in _OVERRIDES.items()}
    options["rungs"] = "--tokens"
    return load_study(given.get("study"), {**overrides, **more}, options=options)


# ---- the verbs


def _run(args: argparse.Namespace) -> int:
    study = _study(args)
    if args.dry_run:
        from foldsearch.api import dry_run
        from foldsearch.run import Run

        Run.check_new(args.out or _new_folder(args.study))
        with _status() as progress:
            found = dry_run(study, progress, _say)
        _print_dry_run(study, found)
        return 0
    return _search(study, args.out or _new_folder(args.study), resume=False, storage=args.storage)


def _resume(args: argparse.Namespace) -> int:
    from foldsearch.run import Run
    from foldsearch.spec.load import cluster_settings

    study = Run.open(args.run).study  # what cannot be resumed is told at once
    limits = {
        "trials": args.trials,
        "seconds": args.time,
        "trial_seconds": args.trial_time,
        "jobs": args.jobs,
    }
    given: dict[str, Any] = {name: value for name, value in limits.items() if value is not None}
    given["cluster"] = cluster_settings(
        study,
        {
            key.partition(".")[2]: vars(args)[option]
            for option, key in _OVERRIDES.items()
            if key.startswith("cluster.")
        },
    )
    return _search(study.model_copy(update=given), args.run, resume=True, storage=args.storage)


def _check(args: argparse.Namespace) -> int:
    from foldsearch.api import check_run
    from foldsearch.report.terminal import check_lines, console

    if args.storage is not None:
        from foldsearch.run import Run
        from foldsearch.search.storage import use_storage

        use_storage(Run.open(args.run), args.storage)
    with _status() as progress:
        progress("looking at the run", 0.0)
        found = check_run(args.run, repair=args.repair)
    out = console()
    for line in check_lines(found, args.run, repair=args.repair):
        _print_line(out, line)
    return NOT_WHOLE if found.left else 0


def _search(study: Study | None, folder: Path, *, resume: bool, storage: str | None = None) -> int:
    from foldsearch.api import open_run, write_report
    from foldsearch.report.live import RunDisplay
    from foldsearch.report.terminal import console, front_report
    from foldsearch.run import RunFolder
    from foldsearch.search.outcome import why_no_front
    from foldsearch.search.run import run_search

    out = console()
    try:
        with RunDisplay(out) as display:
            run_search(study, folder, resume=resume, storage=storage, on_event=display)
    except BrokenPipeError:  # what it was piped into has ended: not the end of a run
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if RunFolder(folder).study_file.is_file():
            _say(f"Stopped, as nobody reads on. Go on with: {command('resume', folder)}")
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt as stop:
        with suppress(OSError):  # the terminal may be gone
            if not RunFolder(folder).study_file.is_file():
                _say("Stopped before the first trial; nothing was kept.")
        return exit_code(stop)
    finally:
        with suppress(OSError):  # refused: the folder made for it is empty, and rmdir takes no other
            DEFAULT_PLACE.rmdir()
    view = open_run(folder)
    page = write_report(view)
    if not view.finished:
        _print_line(out, f"\nPictures: {printable(page)}")
        return _fail(
            f"a search ends with a front of trials that reached the last rung, but this one has none: "
            f"{why_no_front(view.trials)}. Mend it in a new run, or go on with: {command('resume', folder)}",
            3,
        )
    out.print()
    out.print(front_report(view, width=out.width))
    _print_line(out, f"\nPictures: {printable(page)}")
    _print_line(out, f"Choose:   {command('pick', folder, '--knee')}    (or --max-gb X, or --trial N)")
    _print_line(out, f"Ship:     {command('export', folder, '--out', 'DIR')}")
    return 0


def _try(args: argparse.Namespace) -> int:
    from foldsearch.api import try_plan

    _check_new(args)
    study = _tried_study(args)
    with _whole_or_absent(args.out), _status() as progress:
        *_, trial = try_plan(
            args.plan, study, folder=args.out, trains=args.trains, progress=progress, notice=_say
        )
    return _show_results(trial)


def _extend(args: argparse.Namespace) -> int:
    from foldsearch.api import export_tried, measure_model, try_plan
    from foldsearch.report.terminal import console, export_table, extension_note, price_table

    _check_new(args)
    study = _tried_study(args)
    study = study.model_copy(update={"rungs": tuple(sorted({0, *study.rungs}))})  # the start is measured too
    with _status() as progress:
        table = measure_model(study, progress)
    (first, last), target = args.blocks, study.target.value()
    dense = FoldPlan.identity(len(table.blocks))
    plan = extended(dense, first, last, args.to, args.pattern, rank_of(args.rank, table.width))
    out = console()
    out.print(price_table(plan, table, target))
    out.print(extension_note(plan, table, target))
    out.print()
    with TemporaryDirectory(prefix="foldsearch-extend-") as elsewhere:
        folder = args.out or Path(elsewhere)
        with _whole_or_absent(args.out), _status() as progress:
            *_, trial = try_plan(plan, study, folder=folder, progress=progress, notice=_say)
        code = _show_results(trial)
        if args.export is None or code:
            return code
        _quiet_bars()
        with _status() as progress:
            report = export_tried(study, folder, args.export, progress=progress)
    out.print()
    out.print(export_table(report, args.export))
    return 0


def _check_new(args: argparse.Namespace) -> None:
    """What is written to is told before hours of training, not after."""
    export = getattr(args, "export", None)
    for option, folder in (("--out", args.out), ("--export", export)):
        if folder is None:
            continue
        check_path(folder, option)
        if folder.exists():
            raise InputError(
                f"{option} is a new folder, but '{printable(folder)}' is there already. Choose another."
            )
        check_writable(folder.parent, option)
    if args.out is not None and export is not None and args.out.resolve() == export.resolve():
        raise InputError(
            f"--out and --export are two folders, got '{printable(args.out)}' for both. Choose another."
        )


@contextmanager
def _whole_or_absent(folder: Path | None) -> Iterator[None]:
    """A new folder that an error or Ctrl-C cuts short goes: nothing could go on with it."""
    try:
        yield
    except BaseException:
        if folder is not None:
            with uninterrupted():
                shutil.rmtree(folder, ignore_errors=True)
        raise


def _tried_study(args: argparse.Namespace) -> Study:
    """The study whose last rung is `--tokens`, without healing where `--no-heal` says so."""
    more: dict[str, Any] = {} if args.tokens is None else {"rungs": sorted({0, args.tokens})}
    if getattr(args, "no_heal", False):
        more["healing.tokens"] = 0
    if getattr(args, "heal_method", None):
        more["healing.method"] = args.heal_method
    return _study(args, **more)


def _show_results(trial: Trial) -> int:
    """Print the rungs of one trial; returns the exit code."""
    from foldsearch.report.terminal import console, results_table

    console().print(results_table(trial))
    failed = trial.state == "failed" or trial.last.training_diverged
    if failed:
        print(f"error: the trial {trial.reason}", file=sys.stderr)
    return 2 if failed else 0


def _price(args: argparse.Namespace) -> int:
    from foldsearch.api import check_plan_text, measure_model
    from foldsearch.plan.plan import check_ranks
    from foldsearch.report.terminal import console, price_table
    from foldsearch.runtimes import runtime_named

    check_plan_text(args.plan)
    study = _study(args)
    with _status() as progress:
        table = measure_model(study, progress, _say)
    plan = FoldPlan.parse(args.plan, len(table.blocks))
    check_ranks(plan, table.width)
    out = console()
    target = study.target.value()
    out.print(price_table(plan, table, target))
    refusal = runtime_named(target.runtime).refusal(plan, by_position=table.by_position, family=table.family)
    if refusal is not None:
        what = (
            f"no export holds this plan in {target.types}" if target.rounds else "no export holds this plan"
        )
        _say(f"{what}: {target.runtime} has nothing for {refusal[0]}.")
    return 0


def _inspect(args: argparse.Namespace) -> int:
    from foldsearch.api import inspect_model
    from foldsearch.report.picture import draw_evidence
    from foldsearch.report.terminal import console, evidence_table

    study = _study(args)
    named = Path(study.model.replace(":", "/")).name[:_LONGEST_NAME]
    picture = args.out or Path(f"inspect-{named}.png")
    check_path(picture, "--out")
    if picture.is_dir():
        raise InputError(f"--out is a file, but '{printable(picture)}' is a folder. Give a name in it.")
    check_writable(picture.parent, "--out")
    with _status() as progress:
        evidence = inspect_model(study, progress, _say)
    out = console()
    out.print(evidence_table(evidence))
    draw_evidence(evidence, picture, title=f"{study.model}: cosines of hidden states")
    _print_line(out, f"\nMeans over {evidence.tokens:,} tokens. Picture: {printable(picture)}")
    return 0


def _front(args: argparse.Namespace) -> int:
    from foldsearch.api import open_run, write_report
    from foldsearch.report.terminal import console, front_report

    view = open_run(args.run)
    out = console()
    out.print(front_report(view, width=out.width, every=args.all))
    _print_line(out, f"\nPictures: {printable(write_report(view))}")
    return 0


def _pick(args: argparse.Namespace) -> int:
    from foldsearch.api import open_run, pick
    from foldsearch.report.terminal import latency_words, runtimes_words, times_words

    view = open_run(args.run)
    trial = pick(view, number=args.trial, **_bounds(args))
    _say(f"trial {trial.number}: {trial.plan}")
    latency = view.folder.table.latency_on(view.folder.target.storing(trial.types))
    if latency is not None:
        _say(f"{times_words(trial.cost)} {latency_words(latency)}")
    _say(runtimes_words(view, trial.plan, trial.types))
    print(trial.number)
    return 0


def _chosen(args: argparse.Namespace, view: RunView) -> Trial:
    """The trial that the options name; what was picked if they name none."""
    from foldsearch.api import picked

    bounds = _bounds(args)
    named = args.knee or args.trial is not None or bounds
    trial = view.pick(number=args.trial, **bounds) if named else picked(view)
    _say(f"trial {trial.number}: {trial.plan}")
    return trial


def _bounds(args: argparse.Namespace) -> dict[str, float]:
    """The bounds that the best trial is to keep.

    Raises:
        InputError: a trial is named in another way too.
    """
    names = ("max_gb", "max_prompt_ms", "max_decode_ms")
    found = {name: value for name in names if (value := vars(args)[name]) is not None}
    if found and (args.knee or args.trial is not None):
        options = " and ".join(f"--{name}" for name in found).replace("_", "-")
        raise InputError(f"{options} may not stand beside --knee or --trial. Leave one of them out.")
    return found


def _evaluate(args: argparse.Namespace) -> int:
    from foldsearch.api import open_run
    from foldsearch.evaluate import Asked, evaluate_trial
    from foldsearch.report.terminal import console, evaluation_table, kinds_table

    view = open_run(args.run)
    trial = _chosen(args, view)
    tasks = [task.strip() for task in args.tasks.split(",") if task.strip()]
    asked = Asked(args.questions, tasks, args.limit, args.include_path)
    with _status() as progress:
        found = evaluate_trial(view, trial.number, asked, progress=progress, notice=_say)
    out = console()
    trial = view.latest(trial)
    _print_line(out, f"Trial {trial.number}: {trial.tokens_words}.\n")
    if (by_kind := kinds_table(trial)) is not None:
        out.print(by_kind)
        out.print()
    questions = {one.name: one.choices for one in found if one.choices is not None}
    out.print(evaluation_table(questions, [score for one in found for score in one.scores]))
    for one in found:
        _print_line(out, f"Written: {printable(one.file)}")
    return 0


def _export(args: argparse.Namespace) -> int:
    from foldsearch.api import ExportForm, export_trial, open_run, write_passport
    from foldsearch.report.terminal import console, export_table, passport_lines, words_table

    _quiet_bars()
    view = open_run(args.run)
    if args.front is not None:
        return _export_front(args, view)
    if len(args.trial or ()) > 1:
        raise InputError("--trial is given once, unless --front DIR takes several. Name one trial.")
    args.trial = args.trial[0] if args.trial else None
    if args.to == PLAN:
        _refuse(f"--to {PLAN} writes no model", args, "--type", "--kv-cache", "--prompt", "--no-text")
    if args.prompt is not None and not args.prompt.strip():
        raise InputError("--prompt is a text to go on from, and it is blank. Write some words.")
    trial = _chosen(args, view)
    if args.to == PLAN:
        with _status() as progress:
            value = write_passport(view, trial.number, args.out, overwrite=args.force, progress=progress)
        console().print(passport_lines(value, args.out))
        return 0
    with _status() as progress:
        form = ExportForm(
            args.to,
            args.type or "",
            args.force,
            shows_text=not args.no_text,
            kv_cache=args.kv_cache or "",
        )
        report = export_trial(view, trial.number, args.out, form=form, progress=progress, notice=_say)
    out = console()
    out.print(export_table(report, args.out))
    if args.prompt:
        from foldsearch.api import compare_words

        exported, dense = compare_words(view, args.out, args.prompt)
        out.print()
        out.print(words_table(args.prompt, {report.runtime: exported, "dense": dense}))
    return 0


def _export_front(args: argparse.Namespace, view: RunView) -> int:
    """Several points in one folder: those that are named, else the front, within --max-gb."""
    from foldsearch.api import ExportForm, export_front
    from foldsearch.report.terminal import console, family_table

    what = "--front writes whole models, several of them"
    _refuse(what, args, "--type", "--kv-cache", "--prompt", "--knee")
    if args.to == PLAN:
        raise InputError(f"{what}, and takes no --to {PLAN}. Leave that out.")
    bounds = _bounds(args)
    if bounds:
        view.pick(number=None, **bounds)  # which says what there is, where nothing is within them
    numbers = args.trial or [one.number for one in view.within(view.front, **bounds)]
    if not numbers:
        raise InputError("no point of the front keeps these bounds. Raise them, or name trials by --trial.")
    with _status() as progress:
        form = ExportForm(args.to, "", args.force, shows_text=not args.no_text)
        family = export_front(view, numbers, args.front, form=form, progress=progress, notice=_say)
    console().print(family_table(family, args.front))
    return 0


def _refuse(what: str, args: argparse.Namespace, *options: str) -> None:
    """Refuse options that would do nothing beside others, which `what` tells of."""
    for option in options:
        if getattr(args, option.removeprefix("--").replace("-", "_")):
            raise InputError(f"{what}, and takes no {option}. Leave that out.")


def _verify(args: argparse.Namespace) -> int:
    from foldsearch.api import verify_export
    from foldsearch.report.terminal import console, rechecked_lines

    _quiet_bars()
    found: list[tuple[Path, Rechecked]] = []
    try:
        with _status() as progress:
            for one in verify_export(args.folder, progress):
                found.append(one)  # what was found before an error is told too
    finally:
        for place, checked in found:
            console().print(rechecked_lines(checked, place))
    if wrong := [printable(place) for place, checked in found if checked.faults]:
        return _fail(f"not what its card says: {', '.join(wrong)}", 1)
    return 0


def _reproduce(args: argparse.Namespace) -> int:
    from foldsearch.api import reproduce_export
    from foldsearch.report.terminal import console, reproduced_lines

    _quiet_bars()
    with _status() as progress:
        found = reproduce_export(
            args.card,
            args.out,
            moved=dict(args.moved),
            overwrite=args.force,
            progress=progress,
            notice=_say,
        )
    console().print(reproduced_lines(found, args.out))
    if found.faults:
        return _fail(f"what was made again is not what the card says: {'; '.join(found.faults)}", 1)
    return 0


def _recover(args: argparse.Namespace) -> int:
    from foldsearch.api import open_run, recover_trial
    from foldsearch.model.training import FurtherTraining
    from foldsearch.report.live import duration
    from foldsearch.report.terminal import console, results_table

    view = open_run(args.run)
    before = view.pick(number=args.trial)
    trial = view.latest(before)
    start, began = trial.last.recovery_tokens, time.monotonic()
    asked = FurtherTraining(args.tokens, args.trains, args.time)
    trains = ("--trains", args.trains) if args.trains else ()
    again = command("recover", args.run, "--trial", str(args.trial), "--tokens", str(args.tokens), *trains)
    try:
        with _status() as progress:
            for step in recover_trial(view, args.trial, asked, progress=progress, notice=_say):
                trial, done = step, step.last.recovery_tokens
                left = (time.monotonic() - began) * (args.tokens - done) / max(1, done - start)
                _say(trial.step_words + (f"; about {duration(left)} left" if not trial.ended else ""))
    except KeyboardInterrupt:
        with suppress(OSError):  # the terminal may be gone
            _say(f"Nothing that was measured is lost. Go on with: {again}")
        raise
    console().print(results_table(trial, len(before.results)))
    if trial.state == "failed":
        return _fail(f"the training of trial {trial.number} {trial.reason}", 2)
    if trial.last.recovery_tokens < args.tokens:
        _say(f"It ended before {args.tokens:,} tokens. Go on with: {again}")
    return 0


def _dashboard(args: argparse.Namespace) -> int:
    from foldsearch.report.board import serve

    try:
        serve(
            args.run,
            port=args.port,
            on_ready=lambda url: print(f"Dashboard: {url}  (Ctrl-C ends it)", flush=True),
        )
    except KeyboardInterrupt as stop:
        code = exit_code(stop)
        return 0 if code == 128 + signal.SIGINT else code  # Ctrl-C is how it is meant to end
    return 0


def _cache(args: argparse.Namespace) -> int:
    from foldsearch import cache
    from foldsearch.report.terminal import cache_table, console

    folder = cache.default_cache_dir()
    found = cache.entries(folder)
    if args.clear is None and args.keep_gb is None:
        console().print(cache_table(found))
        _print_line(console(), f"\nFolder: {printable(folder)}")
        return 0
    if args.keep_gb is not None and not 0 <= args.keep_gb < float("inf"):
        raise InputError(f"--keep-gb must be 0 or more; got {args.keep_gb}. Use a number such as 5.")
    chosen = (
        cache.to_fit(found, args.keep_gb * 1e9) if args.clear is None else cache.of_kinds(found, args.clear)
    )
    gone, held = cache.remove(chosen)
    print(f"Removed entries: {len(gone):,}, freed: {sum(entry.size_bytes for entry in gone) / 1e9:.3f} GB.")
    if held:
        _say(
            f"There are {len(held):,} entries that stay, as another process makes or uses them. Run it again later."
        )
    return 0


_VERBS: dict[str, Callable[[argparse.Namespace], int]] = {
    "run": _run,
    "resume": _resume,
    "check": _check,
    "try": _try,
    "extend": _extend,
    "price": _price,
    "inspect": _inspect,
    "front": _front,
    "pick": _pick,
    "export": _export,
    "verify": _verify,
    "reproduce": _reproduce,
    "recover": _recover,
    "evaluate": _evaluate,
    "dashboard": _dashboard,
    "cache": _cache,
}


# ---- words around the verbs


def _quiet_bars() -> None:
    """The bars of transformers, of a second or two, would cut through our own lines."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


def _say(words: str) -> None:
    """On standard error, so that standard output holds only what was asked for."""
    print("\n".join(map(printable, words.split("\n"))), file=sys.stderr)


def _print_line(out: Console, words: str) -> None:
    """A line that stays one, however narrow the terminal: what is in it is copied."""
    out.print(words, soft_wrap=True)


@contextmanager
def _status() -> Iterator[StageProgress]:
    """One line on the terminal that says what is being done; in a log file, lines (see `StageLines`)."""
    from rich.text import Text  # a stage may name a path, which is no mark-up

    from foldsearch.report.live import StageLines
    from foldsearch.report.terminal import console

    err: Console = console(stderr=True)
    if not err.is_terminal:
        lines = StageLines(_say)
        with lines.pulse:
            yield lines
        return
    words = StageLines(lambda _: None)
    with err.status("starting") as line:

        def show(stage: str, share: float) -> None:
            words(stage, share)
            line.update(Text(words.words()))

        yield show


def _new_folder(study: str | None) -> Path:
    """runs/STUDY, or the first of runs/STUDY-2, -3, ... that is not there."""
    from foldsearch.spec.load import FOLDER_STUDY

    name = Path(study or (FOLDER_STUDY if Path(FOLDER_STUDY).is_file() else "default")).stem
    folder, number = DEFAULT_PLACE / name, 2
    while folder.exists():
        folder, number = DEFAULT_PLACE / f"{name}-{number}", number + 1
    return folder


def _print_dry_run(study: Study, found: DryRun) -> None:
    from foldsearch.report.terminal import console, dry_run_table

    console().print(dry_run_table(study, found))
