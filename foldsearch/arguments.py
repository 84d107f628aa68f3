"""What can be typed after `foldsearch`: one function a verb that adds its arguments. What a verb does is in `cli`."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import get_args

from foldsearch import runtimes
from foldsearch.model.training import HealMethod, Trained
from foldsearch.paths import printable
from foldsearch.plan.extend import DEFAULT_RANK, PATTERNS
from foldsearch.plan.stored import CACHE_TYPES, TYPES
from foldsearch.version import __version__

PLAN = "plan"  # what `export --to` takes beside the names of runtimes

_ABOUT = """\
From a decoder LLM and a device budget to a Pareto front of folded models that were really
built, trained and measured. Pick one, export it.

  foldsearch run --budget-gb 2                      search below 2 GB, with the embedded SmolLM2-135M
  foldsearch run --model ORG/NAME --data wikitext:wikitext-2-raw-v1 --budget-gb 2
  foldsearch front runs/NAME                        what was found
  foldsearch pick runs/NAME --knee                  choose a point
  foldsearch evaluate runs/NAME --questions Q.jsonl what it still knows
  foldsearch export runs/NAME --out DIR             ship it, verified
"""

_RUN = """\
Without a study: foldsearch.toml of the current folder, else the study `default`.
Options win over the study. Ctrl-C stops a run; `foldsearch resume` goes on with it.
Exit codes: 0 done; 2 what was given cannot be used; 3 no trial reached the last rung, so there is no front."""

_CHECK = """\
Looks at every trial: its row in the study, its folder, the weights that it keeps, and who measured which plan.
`resume` mends the same before it goes on, for trials that have not ended.
Exit codes: 0 all is whole and agrees, or was mended; 2 this is no run, or a process is at work in it; 4 something
is left that is not as it should be."""

_INSPECT = """\
Cosines between a block's input and output, and between the model's start and a block's output
(FoldGPT, Fig. 2), as a table and a picture."""

_CACHE = """\
Converted models, and what was computed from them. All of it is made again when it is needed. What a
process makes or uses stays, until it ends."""

_EVALUATE = """\
A question file has one JSON object a line:
  {"question": "The capital of France is", "options": ["Rome", "Paris"], "answer": 1}
answer is an index from 0, or an option as it is written. The choice of a model is the option of
least perplexity per token, given the question.

  accuracy    share of right choices, dense and folded, with its standard error
  agreement   share of questions that both get right or both get wrong
  stability   that share weighted by how far apart the dense model's perplexities of the options
              are (LLM-Streamline); eff. items: how many questions those weights are worth

Tasks are those of lm-evaluation-harness: pip install 'foldsearch[eval]'. Those of --include-path
may run Python code of that folder.
What the search or the recovery saw is refused. Results are kept in RUN/evaluations.
"""

_PLAN_TEXT = """\
a plan, one word a position:
  0-5          blocks 0 to 5, as they are       6=5        block 6 with the weights of block 5
  8a   10m     only its attention; only its MLP 7=9+r8+n   ... an adapter of rank 8, an output norm
  13-18~linear one matrix in place of 13 to 18  3=3+r8     block 3 once more
  A block that is not named is dropped.
"""

_EXTEND = """\
Depth for few stored bytes (FlexiGPT, arXiv 2501.14713): a run of blocks is executed again with
the same weights, each repeat with low-rank adapters and an output norm of its own.

patterns, for --blocks 1-3 of a model of five blocks, 0 to 4:
  block       --to 8   0 1 1 2 2 3 3 4   every block again, right after itself
  sequential  --to 8   0 1 2 3 1 2 3 4   the run again as a whole, after itself

--to counts executed positions. Whole passes over the run come first; where positions are left
over, the first blocks of the run get one more each:
  block       --to 7   0 1 1 2 2 3 4
  sequential  --to 7   0 1 2 3 1 2 4
So of 30 blocks, --blocks 3-18 --to 46 repeats each of the sixteen once, --to 36 the first six.

Output norms start small, so the extended model starts near the base model: rung 0 shows how
near. Memory, KV cache and FLOPs all grow; the price is printed before anything is trained.
Training is the study's, with 0.5 for [recovery] next_token where that is absent. The weights kl
and tail hold the model at the base model; next_token = 1, kl = 0, tail = 0 let it leave. All of
the model is trained, not the repeats alone: what is owed to them shows beside the same training
without them, the second line, with next_token = 0.5 in its study.

  foldsearch extend --blocks 3-18 --to 36 --tokens 8192 --export exports/deeper
  foldsearch try "0-29" --tokens 8192
"""


_EXPORT = """\
  foldsearch export runs/demo --out exports/demo                        the point that was picked
  foldsearch export runs/demo --to gguf --type q8_0 --out exports/gguf  one file for llama.cpp
  foldsearch export runs/demo --front exports/front                     the whole front, each tensor once
  foldsearch verify exports/demo                                        check it again, anywhere
"""

_VERIFY = """\
An export holds card.json: what was checked and how, hashes of its files, figures with their
tolerances. They are compared again: the files by their hashes, then the model, loaded by its runtime
in a fresh process, by what it says of the tokens in check.npz. Neither the run nor the dense model is
needed, and of the code in an export only what this foldsearch ships itself is run.

check.npz holds tokens of the report texts; `foldsearch export --no-text` puts tokens at random there.
Exit codes: 0 it is what the card says; 1 it is not; 2 it is no export.

  foldsearch verify exports/demo
"""

_REPRODUCE = """\
The card has the study, the plan, how it was trained, and hashes of the model and of the tokens; the
model and the text are read again, and must be the same. The run is not looked at. What is made again
is exported, verified, and compared: files by their hashes, figures within tolerances. On the same
kind of machine the weights are expected to be the same to the bit; elsewhere healing and training
round in another way, and the figures say how far.

Exit codes: 0 the figures are those of the card; 1 they are not; 2 the card cannot be followed.

  foldsearch reproduce exports/demo/card.json --out exports/again
"""

_RECOVER = """\
It begins with the trial's model as the run left it, measures it on the search texts as it goes on,
and on the report texts at the end. The best of its states is kept; where training hurt, it goes on
from that one at a lower rate. Stopped in any way, the same command goes on; larger --tokens go on
after the end. In the run the trial stays what it was: all others had as many tokens as it. `front`
tells what came of it beside the table, and `export` ships it.

  foldsearch recover runs/demo --trial 0 --tokens 40960 --time 2h
"""


class _Help(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=26, width=100)


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The options of a command line, and `verb`, the name of its verb; a wrong one ends the process with code 2."""
    parser, verbs = _parsers()
    if not words:
        parser.print_help(sys.stderr)
        parser.exit(2)
    found, left = parser.parse_known_args(words)
    if left:
        verbs[found.verb].error(_left_words(left, verbs[found.verb].format_usage()))
    return found


def _left_words(left: Sequence[str], usage: str) -> str:
    """What to say of words that no argument takes."""
    options = [word.partition("=")[0] for word in left if word.startswith("-")]
    if not options:
        return f"too many words: {printable(' '.join(left))}"
    near = get_close_matches(options[0], re.findall(r"--[a-z-]+", usage), n=1)
    return f"unknown option {printable(options[0])}." + "".join(f" Did you mean {one}?" for one in near)


def _parsers() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser of the whole command line, and that of each verb."""
    parser = argparse.ArgumentParser(prog="foldsearch", description=_ABOUT, formatter_class=_Help)
    parser.add_argument("--version", action="version", version=f"foldsearch {__version__}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", dest="verb", required=True)
    for name, summary, more, add_arguments in _VERBS:
        description = f"{summary[0].upper()}{summary[1:]}."
        added = verbs.add_parser(
            name, help=summary, description=description, epilog=more, formatter_class=_Help
        )
        add_arguments(added)
    return parser, verbs.choices


# ---- one function a verb


def _run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "study", nargs="?", metavar="STUDY", help="a TOML file, or the name of a study that ships"
    )
    _add_study_options(parser)
    parser.add_argument(
        "--budget-gb", type=_number, metavar="X", help="weights + adapters + KV cache + activations"
    )
    parser.add_argument(
        "--budget-flops", metavar="F", help="FLOPs per token at decode: 2.5e8, or 0.8x of dense"
    )
    prompt = (
        "milliseconds to read a prompt of 256 tokens ([target] prompt_tokens) where it ships, on this machine"
    )
    parser.add_argument("--max-prompt-ms", type=_number, metavar="MS", help=prompt)
    token = "milliseconds to write a token after it; both are measured before the search"
    parser.add_argument("--max-decode-ms", type=_number, metavar="MS", help=token)
    parser.add_argument(
        "--space", metavar="S", help="what may be proposed: a TOML file, or a name such as foldgpt"
    )
    parser.add_argument(
        "--sampler", metavar="WHO", choices=("tpe", "nsga2", "random"), help="tpe, nsga2, random"
    )
    trials = "stop after N trials (what every search begins with is run in any case)"
    parser.add_argument("--trials", type=_whole, metavar="N", help=trials)
    time = "stop T (90s, 15m, 2h) after the dense model is asked first"
    parser.add_argument("--time", type=_seconds, metavar="T", help=time)
    one = "a trial that takes longer than T failed"
    parser.add_argument("--trial-time", type=_seconds, metavar="T", help=one)
    parser.add_argument("--jobs", type=_whole, metavar="N", help="trials at a time")
    warm = "begin with the best plans of an earlier run of the same model and text"
    parser.add_argument("--warm-from", metavar="RUN", help=warm)
    _add_storage(parser)
    _add_cluster(parser)
    _add_out(parser, "the run's folder, new (default: runs/STUDY)")
    parser.add_argument(
        "--dry-run", action="store_true", help="say what would be searched, its time and disk, and stop"
    )


def _resume(parser: argparse.ArgumentParser) -> None:
    _add_run(parser)
    instead = "instead of the study's"
    parser.add_argument("--trials", type=_positive, metavar="N", help=f"trials in all, {instead}")
    parser.add_argument("--time", type=_seconds, metavar="T", help=f"time in all, {instead}")
    parser.add_argument("--trial-time", type=_seconds, metavar="T", help=f"time of one trial, {instead}")
    parser.add_argument("--jobs", type=_positive, metavar="N", help=f"trials at a time, {instead}")
    _add_storage(parser)
    _add_cluster(parser)


def _check(parser: argparse.ArgumentParser) -> None:
    _add_run(parser)
    parser.add_argument("--repair", action="store_true", help="mend what has a second source, and say what")
    _add_storage(parser)


def _try(parser: argparse.ArgumentParser) -> None:
    _add_plan(parser)
    _add_study(parser, "settings")
    _add_study_options(parser)
    _add_tokens(parser, "recovery tokens")
    parser.add_argument(
        "--no-heal", action="store_true", help="show the plan as it is, not healed in closed form"
    )
    parser.add_argument(
        "--heal-method",
        choices=get_args(HealMethod),
        metavar="M",
        help="ridge; rivals: fused, fused-cosine, rescale",
    )
    _add_trains(parser, "the first that the space names")
    _add_out(parser, "keep the trained parameters and results here")


def _extend(parser: argparse.ArgumentParser) -> None:
    _add_model(parser, "as for `run --model` (default: the study's)")
    parser.add_argument(
        "--blocks", type=_run_of_blocks, required=True, metavar="A-B", help="the run that is executed again"
    )
    to = "executed positions, more than the model has blocks"
    parser.add_argument("--to", type=_whole, required=True, metavar="N", help=to)
    parser.add_argument(
        "--pattern", choices=PATTERNS, default=PATTERNS[0], help="see below (default: %(default)s)"
    )
    rank = "of the adapters: 36, or 0.0625 of the model's width (the default); 0 is none"
    parser.add_argument("--rank", type=_rank, default=DEFAULT_RANK, metavar="R", help=rank)
    _add_study(parser, "settings")
    _add_study_options(parser, model=False)
    _add_tokens(parser, "tokens to train on")
    _add_out(parser, "keep the trained parameters and results here, new")
    parser.add_argument(
        "--export", type=Path, metavar="DIR", help="write the folded model here, new, verified like `export`"
    )


def _price(parser: argparse.ArgumentParser) -> None:
    _add_plan(parser)
    _add_study(parser, "model and target")
    _add_model_option(parser)
    _add_target_options(parser)


def _inspect(parser: argparse.ArgumentParser) -> None:
    _add_model(parser, "default: the study's")
    _add_study(parser, "data")
    _add_data_options(parser)
    _add_out(parser, "the picture (default: inspect-MODEL.png)", metavar="PNG")


def _front(parser: argparse.ArgumentParser) -> None:
    _add_run(parser)
    parser.add_argument(
        "--all", action="store_true", help="all finished trials, not only the front and the baselines"
    )


def _pick(parser: argparse.ArgumentParser) -> None:
    _add_run(parser)
    _add_choice(parser)


def _export(parser: argparse.ArgumentParser) -> None:
    _add_run(parser)
    _add_choice(parser, several=True)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--out", type=Path, metavar="DIR", help=f"new folder; a new file with --to {PLAN}")
    front = "new folder for all points of the front, or the --trial N named, or those within --max-gb; each tensor once"
    where.add_argument("--front", type=Path, metavar="DIR", help=front)
    titles = "; ".join(f"{runtime.name}: {runtime.title}" for runtime in runtimes.RUNTIMES)
    parser.add_argument(
        "--to",
        choices=(*runtimes.names(), PLAN),
        help=f"what it is to run in. {titles}; {PLAN}: no model, but a small file for other tools. By default the "
        f"study's target.runtime; where that is {runtimes.ALL_CAN}, {runtimes.STOCK} for a plan that stock blocks run "
        "exactly and that shares nothing",
    )
    of = [f"{one.name}: {', '.join(one.types)}" for one in runtimes.RUNTIMES if one.types]
    types = f"how weights are stored in the file. {'; '.join(of)}; by default as the dtype is"
    parser.add_argument("--type", metavar="TYPE", help=types)
    cached = "the type of keys and values with which llama.cpp checks a GGUF, and that the lines of its card name: "
    cached += f"{', '.join(CACHE_TYPES)}; by default as the study's target says"
    parser.add_argument("--kv-cache", metavar="TYPE", help=cached)
    parser.add_argument("--force", action="store_true", help="replace an export that is there")
    parser.add_argument(
        "--no-text",
        action="store_true",
        help="keep the tokens of the report texts out of the export; see `verify`",
    )
    parser.add_argument("--form", action=_CalledTo, help=argparse.SUPPRESS)
    parser.add_argument(
        "--prompt", metavar="TEXT", help="let the exported model and the dense one go on with this text"
    )


def _verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="DIR", help="that `foldsearch export` wrote")


def _reproduce(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("card", type=Path, metavar="CARD", help="card.json of an export, or its folder")
    _add_out(parser, "new folder", required=True)
    moved = "where the model or a text lies now; OLD as the card calls it; may be given more than once"
    parser.add_argument("--moved", type=_moved, action="append", default=[], metavar="OLD=NEW", help=moved)
    parser.add_argument("--force", action="store_true", help="replace an export that is there")


class _CalledTo(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, namespace: object, value: object, *_: object) -> None:
        """The name that `--to` had in earlier versions: refused, with what to type."""
        parser.error(f"--form is called --to now: --to {runtimes.called_now(str(value))}")


def _recover(parser: argparse.ArgumentParser) -> None:
    _add_run(parser)
    parser.add_argument(
        "--trial", type=_whole, metavar="N", required=True, help="trial N, as `foldsearch front` numbers it"
    )
    parser.add_argument(
        "--tokens",
        type=_positive,
        metavar="M",
        required=True,
        help="to train on in all, those of the run too",
    )
    parser.add_argument("--time", type=_seconds, metavar="T", help="train for T (90s, 15m, 2h) at most")
    _add_trains(parser, "what the trial trained")


def _evaluate(parser: argparse.ArgumentParser) -> None:
    _add_run(parser)
    _add_choice(parser)
    questions = "multiple-choice questions, JSONL; may be given more than once"
    parser.add_argument("--questions", type=Path, action="append", default=[], metavar="FILE", help=questions)
    parser.add_argument("--tasks", default="", metavar="A,B", help="tasks of lm-evaluation-harness")
    parser.add_argument("--limit", type=_whole, metavar="N", help="only the first N items of each")
    parser.add_argument("--include-path", type=Path, metavar="DIR", help="a folder of task YAML files")


def _dashboard(parser: argparse.ArgumentParser) -> None:
    _add_run(parser)
    parser.add_argument(
        "--port", type=_whole, default=8080, metavar="P", help="default 8080; 0 takes a free one"
    )


def _cache(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--clear", nargs="*", metavar="KIND", help="remove all, or only what is of these kinds")
    keep = "remove the least recently used until the rest is within N GB"
    what.add_argument("--keep-gb", type=_number, metavar="N", help=keep)


# Name, summary, what follows the options in its help, and what adds its arguments.
_VERBS: tuple[tuple[str, str, str, Callable[[argparse.ArgumentParser], None]], ...] = (
    ("run", "search for folded models within a budget", _RUN, _run),
    ("resume", "go on with a stopped run; nothing finished is lost or repeated", "", _resume),
    ("check", "whether what a run keeps is whole and agrees; mends what can be", _CHECK, _check),
    ("try", "fold, recover and measure one plan in this process", _PLAN_TEXT, _try),
    ("extend", "repeat blocks of a small model, train and measure it, export it", _EXTEND, _extend),
    ("price", "what a plan costs on a device, in memory and FLOPs", _PLAN_TEXT, _price),
    ("inspect", "how redundant the blocks of a model are", _INSPECT, _inspect),
    ("front", "the Pareto front of a run, its plans and every cost", "", _front),
    ("pick", "choose a point of the front; `export` takes it from there", "", _pick),
    ("export", "write a folded model and verify it in a fresh process", _EXPORT, _export),
    ("verify", "check an export again, wherever it lies, by its card", _VERIFY, _verify),
    ("reproduce", "make an export again from its card alone, and compare", _REPRODUCE, _reproduce),
    ("recover", "train a point of a run for longer; it can be stopped and goes on", _RECOVER, _recover),
    (
        "evaluate",
        "what a folded model still knows: questions and harness tasks, beside dense",
        _EVALUATE,
        _evaluate,
    ),
    ("dashboard", "serve the Optuna dashboard of a run, live, on this machine only", "", _dashboard),
    ("cache", "what is kept on this machine between runs, and its size", _CACHE, _cache),
)


# ---- options that several verbs have


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run, such as runs/NAME")


def _add_plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("plan", metavar="PLAN", help='such as "0-12 15-29"')


def _add_model(parser: argparse.ArgumentParser, what: str) -> None:
    either = parser.add_mutually_exclusive_group()
    # without SUPPRESS the absent word would put its default in place of what the option says
    either.add_argument("model", nargs="?", default=argparse.SUPPRESS, metavar="MODEL", help=what)
    either.add_argument("--model", metavar="M", help="the same")


def _add_study(parser: argparse.ArgumentParser, used: str) -> None:
    parser.add_argument(
        "--study", metavar="STUDY", help=f"whose {used} to use, or the folder of a run (default: as `run`)"
    )


def _add_tokens(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--tokens", type=_whole, metavar="N", help=f"{what} (default: the study's last rung)")


def _add_trains(parser: argparse.ArgumentParser, default: str) -> None:
    what = "low-rank deltas everywhere; the last three blocks; the matrices that healing solves"
    parser.add_argument(
        "--trains",
        choices=get_args(Trained),
        metavar="A",
        help=f"deltas, last or healed: {what} (default: {default})",
    )


def _add_storage(parser: argparse.ArgumentParser) -> None:
    where = "URL of a database for the trials, such as postgresql://user@host/db (default: a file in the run folder)"
    parser.add_argument("--storage", metavar="URL", help=where)


def _add_cluster(parser: argparse.ArgumentParser) -> None:
    where = "run trials on the Ray cluster there, host:port or auto (default: RAY_ADDRESS, else this machine alone)"
    parser.add_argument("--address", metavar="HOST:PORT", help=where)
    seen = "a path or URL that all nodes of the cluster see: weights and states go through it"
    parser.add_argument("--run-storage", metavar="PLACE", help=seen)
    parser.add_argument("--cpus-per-trial", type=_positive, metavar="N", help="cores that a trial takes")
    parser.add_argument("--gpus-per-trial", type=_number, metavar="X", help="GPUs that it takes: 0.5, 1, 2")


def _add_out(
    parser: argparse.ArgumentParser, what: str, *, metavar: str = "DIR", required: bool = False
) -> None:
    parser.add_argument("--out", type=Path, metavar=metavar, required=required, help=what)


def _add_choice(parser: argparse.ArgumentParser, *, several: bool = False) -> None:
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--knee", action="store_true", help="the compromise of the objectives")
    number = "trial N, as `foldsearch front` numbers it"
    if several:
        number += "; with --front it may be given more than once"
        choice.add_argument("--trial", type=_whole, metavar="N", action="append", help=number)
    else:
        choice.add_argument("--trial", type=_whole, metavar="N", help=number)
    bounds = (
        ("gb", "X", "the best quality within X GB"),
        ("prompt-ms", "MS", "and within MS milliseconds for a prompt, where the run has measured them"),
        ("decode-ms", "MS", "and within MS milliseconds for a token after it"),
    )
    for name, metavar, what in bounds:
        parser.add_argument(f"--max-{name}", type=_number, metavar=metavar, help=what)


def _add_model_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        metavar="M",
        help="hub id, folder, .gguf file, or package:NAME for a GGUF inside a Python package",
    )


def _add_target_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dtype",
        metavar="TYPE",
        choices=("bfloat16", "float16", "float32"),
        help="of the model that ships: bfloat16, float16, float32",
    )
    parser.add_argument("--context", type=_whole, metavar="T", help="tokens in the KV cache")
    parser.add_argument("--batch", type=_whole, metavar="B", help="sequences served at once")
    parser.add_argument("--runtime", choices=runtimes.names(), help="whether the runtime can share weights")
    types = "of the weights in llama.cpp, priced and measured so: " + ", ".join(TYPES)
    parser.add_argument("--weights", metavar="TYPE", help=types)
    cached = "of llama.cpp's KV cache, priced and measured so: " + ", ".join(CACHE_TYPES)
    parser.add_argument("--kv-cache", metavar="TYPE", help=cached)


def _add_data_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data", metavar="D", action="append",
        help="text: hub data set, folder, package:NAME, or file (.txt, .jsonl, .json, .csv, .parquet, ...); "
        "may be given more than once; own: is text that the model writes itself, to train on",
    )  # fmt: skip
    parser.add_argument(
        "--text-column",
        metavar="C",
        help="the column that holds the text, a.b where it is nested (default: text, else a chat, else prompt and "
        "completion)",
    )
    parser.add_argument(
        "--sample-by",
        choices=("line", "paragraph"),
        help="what a document of a .txt file is, if not all of it (in a folder), or what two blank lines or a form "
        "feed part (one file)",
    )
    parser.add_argument(
        "--unseen",
        metavar="KIND",
        action="append",
        help="a kind of text that is measured on at the end only; may be given more than once",
    )


def _add_study_options(parser: argparse.ArgumentParser, *, model: bool = True) -> None:
    if model:
        _add_model_option(parser)
    _add_data_options(parser)
    _add_target_options(parser)
    parser.add_argument(
        "--device", choices=("cpu", "cuda", "mps"), help="to compute on (default: what is there)"
    )
    parser.add_argument("--seed", type=_whole, metavar="N", help="of everything random")


# ---- how a value is written

_NUMBER = r"(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?"


def _positive(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,18}", text) or int(text) == 0:
        raise argparse.ArgumentTypeError(f"a whole number above 0, got {text!r}")
    return int(text)


def _seconds(text: str) -> float:
    if re.fullmatch(_NUMBER, text):
        value = float(text)
    else:  # 90s, 15m, 1h30m: each unit once, the largest first
        parts = re.fullmatch(f"(?:({_NUMBER})h)?(?:({_NUMBER})m)?(?:({_NUMBER})s)?", text)
        hours, minutes, seconds = (float(part or 0) for part in parts.groups()) if parts else (0.0, 0.0, 0.0)
        value = 3600 * hours + 60 * minutes + seconds
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(
            f"a time is seconds, or 90s, 15m, 2h; got {text!r}. Units are h, m and s, as in 1h30m."
        )
    return value


def _whole(text: str) -> int:
    if not re.fullmatch(r"[+-]?[0-9]{1,18}", text):
        raise argparse.ArgumentTypeError(f"a whole number, in digits and without a unit; got {text!r}")
    return int(text)


def _number(text: str) -> float:
    if not re.fullmatch(f"[+-]?{_NUMBER}", text):
        raise argparse.ArgumentTypeError(f"a number, such as 2 or 0.28, without a unit; got {text!r}")
    return float(text)


def _moved(text: str) -> tuple[str, str]:
    old, equals, new = text.partition("=")
    if not (old and equals and new):
        raise argparse.ArgumentTypeError(f"OLD=NEW, such as data/text=other/text; got {text!r}")
    return old, new


def _run_of_blocks(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", text)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
    if first > last:
        raise argparse.ArgumentTypeError(f"a run of blocks is written 3-18, first before last; got {text!r}")
    return first, last


def _rank(text: str) -> float:
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"a rank is a whole number, or a share of the model's width such as 0.0625; got {text!r}"
        ) from error
