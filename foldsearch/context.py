"""What all trials of a run share: its context, which can be sent to another process, and in each process the dense
model with what it says on the three token sets.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from foldsearch import cache
from foldsearch.errors import RunError, quote_error
from foldsearch.files import replace_atomically
from foldsearch.model import source
from foldsearch.model.judge import DenseTargets, dense_targets
from foldsearch.model.tokens import SPLITS, Kinds, Splits, TokenSet
from foldsearch.model.workbench import Workbench
from foldsearch.paths import printable
from foldsearch.plan.cost import Budget, CostTable, Target
from foldsearch.progress import StageProgress, silent
from foldsearch.record import Peers
from foldsearch.run import Run, RunFolder
from foldsearch.spec.study import Study


@dataclass(frozen=True, slots=True)
class TrialContext:
    """All that trials of a run share: paths and plain values, so that it can be sent to another process.

    run: whose study they are of. files: of the dense model. threads: torch threads of a trial; 0 leaves them alone.
    peers: the other trials; None where all of them are in the run's folder. asking_seconds: how long it took to ask the
    dense model. token_seconds: of a forward pass of it over one token, all threads; 0 where the cache had the answers.
    """

    run: Run
    files: source.DenseFiles
    cache_dir: Path
    device: str
    threads: int = 0
    peers: Peers | None = field(default=None, compare=False)
    asking_seconds: float = field(default=0.0, compare=False)
    token_seconds: float = field(default=0.0, compare=False)

    @property
    def study(self) -> Study:
        """The run's: what was asked for, resolved."""
        return self.run.study

    @property
    def table(self) -> CostTable:
        """The run's: the dense model's costs."""
        return self.run.table

    @property
    def target(self) -> Target:
        """The run's: what plans are priced for."""
        return self.run.target

    @property
    def budget(self) -> Budget:
        """The run's: bounds in bytes and FLOPs."""
        return self.run.budget


# ---- token sets


def write_splits(path: Path, splits: Splits) -> None:
    """Keep the token sets of a run."""
    sets = (splits.search, splits.recovery, splits.report)
    tensors = {f"{one.name}.ids": one.ids_NT.contiguous() for one in sets}
    tensors |= {f"{one.name}.document": one.document_N.contiguous() for one in sets}
    tensors |= {f"{one.name}.text": one.text_NT.contiguous() for one in sets}
    tensors |= {f"{one.name}.kind": one.kinds.of_N.contiguous() for one in sets}
    metadata = {
        one.name: json.dumps(
            {
                "documents": one.documents,
                "kinds": one.kinds.names,
                "unseen": one.kinds.unseen,
                "over": one.kinds.over,
            }
        )
        for one in sets
    }
    replace_atomically(path, lambda temporary: save_file(tensors, temporary, metadata))


def read_splits(folder: RunFolder) -> Splits:
    """The token sets of a run.

    Raises:
        RunError: the run folder has none, or they are damaged.
    """
    path = folder.tokens
    if not path.exists():
        raise RunError(
            f"a run folder holds {path.name}, but '{printable(folder.path)}' does not. Start the run anew."
        )
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            sets = [_read_set(file, name, json.loads(metadata[name])) for name in SPLITS]
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        remedy = "Put back a copy of it, or remove it: it is then made again from the texts."
        raise RunError(
            quote_error(f"the token sets of a run, '{printable(path)}', cannot be read", error, remedy)
        ) from error
    return Splits(*sets)


def _read_set(file: Any, name: str, about: dict[str, Any]) -> TokenSet:
    return TokenSet(
        name,
        file.get_tensor(f"{name}.ids"),
        file.get_tensor(f"{name}.document"),
        tuple(about["documents"]),
        file.get_tensor(f"{name}.text"),
        Kinds(tuple(about["kinds"]), file.get_tensor(f"{name}.kind"), tuple(about["unseen"]), about["over"]),
    )


# ---- the dense model


_open: dict[tuple[Any, ...], Workbench] = {}


def open_workbench(context: TrialContext, progress: StageProgress = silent) -> Workbench:
    """The workbench of a run; opened once per process."""
    source.check_unchanged(context.files)
    # By the file of the token sets, not by its path: a run's folder is renamed when the run begins.
    tokens = context.run.tokens.stat() if context.run.tokens.exists() else None
    file = tokens and (tokens.st_dev, tokens.st_ino, tokens.st_mtime_ns)
    key = (file, context.files, context.device, context.study.seed)
    num_trained = sequences_trained(context.study)
    known = _open.get(key)
    if known is None or len(known.trained.ids_NT) < min(num_trained, len(known.splits.recovery.ids_NT)):
        close_workbench()  # one model at a time
        cache.let_go()
        if context.files.folder.is_relative_to(context.cache_dir):
            cache.keep(context.files.folder)
        dense = source.open_dense(context.files, device=context.device)
        splits = read_splits(context.run)

        def ask(tokens: TokenSet) -> DenseTargets:
            return dense_targets(
                dense,
                tokens,
                model_hash=context.files.content_hash,
                cache_dir=context.cache_dir,
                progress=lambda share: progress(f"asking the dense model ({tokens.name})", share),
            )

        # Healing may read far more of the recovery texts than training comes to: of the rest nothing is asked.
        trained = splits.recovery.shuffled(context.study.seed)
        trained = trained.of(list(range(min(num_trained, len(trained.ids_NT)))))
        asked = (ask(splits.search), ask(trained) if num_trained else None, ask(splits.report))
        _open[key] = Workbench(
            dense, context.files, context.table, splits, trained, *asked, context.cache_dir
        )
    return _open[key]


def sequences_trained(study: Study) -> int:
    """How many recovery sequences the last rung's training reads, those that it reads again included."""
    of_step = study.recovery.batch * study.splits.sequence_length
    return math.ceil(study.rungs[-1] / of_step) * study.recovery.batch


def close_workbench() -> None:
    """Let go of the dense model and of the memory of its device; the next `open_workbench` opens it again."""
    _open.clear()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
