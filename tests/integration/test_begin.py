"""A sequence begins as the model's tokenizer begins one, whatever runs it.

Oracle: the ids that reach the embedding of any model in this process, watched from outside, against what a tokenizer
of our own making puts in front of a text (two tokens, and an end token after it, which is no beginning).
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from foldsearch import Asked, api, evaluate_trial
from foldsearch import export as exporting
from foldsearch.context import TrialContext, open_workbench, read_splits, write_splits
from foldsearch.draft import choose_blocks, choose_plan
from foldsearch.fates import Replace, Share
from foldsearch.model import own_text
from foldsearch.model.source import open_tokenizer
from foldsearch.model.tokens import Kinds, Splits, TokenSet
from foldsearch.plan.plan import FoldPlan
from foldsearch.prepare import prepare_context
from foldsearch.proposal import Proposal
from foldsearch.run import RunFolder
from foldsearch.spec.study import SplitSettings, Study
from foldsearch.trial import run_trial
from tests.contexts import begin_run, of_run, run_queued, tiny_study
from tests.proposals import removing
from tests.tiny import VOCABULARY, write_corpus

FRONT = [2, 1]  # </s> <s>: as odd as any tokenizer may be
LENGTH = 32


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("begin")


@pytest.fixture(scope="module")
def study(place: Path) -> Study:
    splits = SplitSettings(sequence_length=LENGTH, search=6, recovery=8, report=6)
    return tiny_study(place, around="</s> <s> $A </s>", splits=splits)


@contextlib.contextmanager
def watched() -> Iterator[list[torch.Tensor]]:
    """The first ids of every sequence that any model reads in here, and how often."""
    begun: list[torch.Tensor] = []

    def watch(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if not isinstance(module, nn.Embedding) or module.num_embeddings != VOCABULARY:
            return
        (ids_BT,) = args
        # pricing runs on no data at all, and decoding goes on token by token
        if not ids_BT.is_meta and ids_BT.shape[1] > 1:
            begun.append(ids_BT[:, : len(FRONT)].clone())

    handle = register_module_forward_pre_hook(watch)
    try:
        yield begun
    finally:
        handle.remove()
    assert begun, "something was run"
    for ids_BF in begun:
        assert ids_BF.tolist() == [FRONT] * len(ids_BF)


@pytest.fixture(scope="module")
def context(place: Path, study: Study) -> TrialContext:
    with watched():
        begin_run(study, place / "run", cache_dir=place / "cache")
    return prepare_context(study, place / "run", cache_dir=place / "cache")


def test_the_kinds_of_a_runs_texts_are_read_as_they_were_written(
    context: TrialContext, tmp_path: Path
) -> None:
    splits = read_splits(context.run)

    def of_kinds(tokens: TokenSet) -> TokenSet:
        kinds = Kinds(("prose", 'a "b"'), torch.arange(len(tokens.ids_NT)) % 2, ("prose",), "worst")
        return replace(tokens, kinds=kinds)

    told = Splits(*map(of_kinds, (splits.search, splits.recovery, splits.report)))
    write_splits(tmp_path / "tokens.safetensors", told)
    for name in ("search", "recovery", "report"):
        one, other = getattr(told, name).kinds, getattr(read_splits(RunFolder(tmp_path)), name).kinds
        assert (one.names, one.unseen, one.over) == (other.names, other.unseen, other.over)
        assert torch.equal(one.of_N, other.of_N)


@pytest.mark.parametrize("alone", [False, True])
def test_what_the_model_writes_itself_is_among_the_recovery_texts_and_is_written_once(
    place: Path, study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alone: bool
) -> None:
    corpus = str(place / "corpus")
    data = {"search": corpus, "recovery": "own:", "report": corpus} if alone else [corpus, "own:"]
    if alone:  # search and report texts of their own have no document in common
        write_corpus(tmp_path / "other", seed=9)
        data = {"search": corpus, "recovery": "own:", "report": str(tmp_path / "other")}
    mixed = Study.model_validate({**study.model_dump(mode="json"), "data": data}, strict=False)
    told: list[tuple[str, float]] = []
    with watched():
        context = prepare_context(
            mixed, tmp_path / "run", cache_dir=tmp_path / "cache", progress=lambda *words: told.append(words)
        )
    splits = read_splits(context.run)
    counted = [splits.recovery.kinds.names[index] for index in splits.recovery.kinds.of_N].count("own")
    assert (counted, len(splits.recovery.ids_NT)) == (8 if alone else 4, 8)
    assert "own" not in [*splits.search.kinds.names, *splits.report.kinds.names]
    assert splits.recovery.text_NT.tolist() == [[False] * 2 + [True] * (LENGTH - 2)] * 8
    stage = f"the dense model writes {counted} sequences itself"
    assert (stage, 1.0) in told
    # again, from what is kept: in the run, and where that is gone in the cache
    monkeypatch.setattr(own_text, "write_text", None)
    assert replace(context, asking_seconds=0) == prepare_context(
        mixed, tmp_path / "run", cache_dir=tmp_path / "cache"
    )
    (tmp_path / "run" / "tokens.safetensors").unlink()
    prepare_context(mixed, tmp_path / "run", cache_dir=tmp_path / "cache")
    assert read_splits(context.run).recovery.content_hash == splits.recovery.content_hash


def test_the_token_sets_of_a_run_know_what_is_text(context: TrialContext) -> None:
    splits = read_splits(context.run)
    for tokens in (splits.search, splits.recovery, splits.report):
        assert isinstance(tokens, TokenSet)
        assert tokens.ids_NT[:, : len(FRONT)].tolist() == [FRONT] * len(tokens.ids_NT)
        assert tokens.text_NT.tolist() == [[False] * 2 + [True] * (LENGTH - 2)] * len(tokens.ids_NT)
        assert not torch.isin(tokens.ids_NT[:, len(FRONT) :], torch.tensor([1, 2])).any()


@pytest.mark.parametrize("criterion", ["gate", "block_influence", "linear_window", "greedy", "evolution"])
def test_what_chooses_blocks(context: TrialContext, criterion: str) -> None:
    proposal = removing(criterion, 1)
    with watched():
        choose_blocks(proposal.removed, context, lambda stage, share: None)


@pytest.mark.parametrize(
    "proposal",
    [
        removing("window", 1, Share(2, "data"), delta_rank=2),
        removing("window", 1, Replace("ffn"), delta_rank=2),
        removing("window", 1, attention=1, delta_rank=2),
    ],
    ids=["children", "replacement", "attention"],
)
def test_what_starts_trains_and_measures(context: TrialContext, tmp_path: Path, proposal: Proposal) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tokens.safetensors").hardlink_to(context.run.path / "tokens.safetensors")
    with watched():
        *_, last = run_trial(proposal, of_run(context, path=tmp_path / "run"), number=0)
    # one position of each sequence predicts the second token in front of its text
    assert last.quality.tokens == 6 * (LENGTH - 2)


def test_what_is_inspected(study: Study, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOLDSEARCH_CACHE", str(place / "cache"))
    with watched():
        evidence = api.inspect_model(study)
    assert evidence.tokens == 6 * (LENGTH - 2)


def test_what_is_exported_prompted_and_evaluated(
    context: TrialContext, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FOLDSEARCH_CACHE", str(place / "cache"))
    number = run_queued(context, "window", 1)
    run = api.open_run(place / "run")
    asked: list[exporting.Shipment] = []
    monkeypatch.setattr(exporting, "export", lambda *given, overwrite: asked.append(given[-1]))
    monkeypatch.setattr(exporting, "load_exported", lambda folder: (open_workbench(context).dense, None))
    with watched():
        api.export_trial(run, number, str(place / "out"))
        api.compare_words(run, place / "out", "w5 w6", num_tokens=3)
    # what the fresh processes of an export read is the report text (see test_export.py for what they make of it)
    report = read_splits(context.run).report
    assert torch.equal(asked[0].ids_NT, report.ids_NT)
    assert torch.equal(asked[0].text_NT, report.text_NT)

    questions = [{"question": f"w{5 + i} w6", "options": ["w7 w8", "w9"], "answer": 0} for i in range(3)]
    (place / "q.jsonl").write_text("\n".join(map(json.dumps, questions)))
    with watched():
        evaluate_trial(run, number, Asked([str(place / "q.jsonl")]))


def test_a_plan_that_is_typed(context: TrialContext, study: Study, place: Path, monkeypatch) -> None:
    monkeypatch.setenv("FOLDSEARCH_CACHE", str(place / "cache"))
    with watched():
        *_, last = api.try_plan("0-2 4", study)
    assert last.plan == FoldPlan.parse("0-2 4", 5)
    drafted = choose_plan(removing("window", 1).fold, context, lambda stage, share: None)
    assert drafted.plan.num_blocks == 5
    assert open_tokenizer(context.files)("w5").input_ids == [*FRONT, 5, 2]
