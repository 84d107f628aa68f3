"""What a worker says is what the search hears. Oracle: the message itself."""

from __future__ import annotations

from typing import get_args

import pytest

from foldsearch.plan.plan import FoldPlan
from foldsearch.search import messages
from foldsearch.search.messages import Message, decode, encode
from foldsearch.spec.load import load_study
from tests.fake_trial import NUM_BLOCKS, trial_at

STUDY = load_study("default", {"space": "foldgpt", "rungs": [0, 100, 400]})
SAID = (
    messages.Measured(trial_at(FoldPlan.dropping([3], NUM_BLOCKS), STUDY, 1)),
    messages.Measured(trial_at(FoldPlan.dropping([3], NUM_BLOCKS), STUDY, 2), again=True),
    messages.TimeIsUp("the time was up in its recovery"),
    messages.DiskIsFull("No space left on device"),
    messages.StorageLost("the run storage 's3://x' cannot be used"),
    messages.Failed('RuntimeError: "é"\n'),
    messages.EndedEarly(),
    messages.Probed("a step of training has to fit"),
)


@pytest.mark.parametrize("said", SAID, ids=lambda said: type(said).__name__)
def test_it_is_heard_as_it_was_said(said: Message) -> None:
    assert decode(encode(said)) == said


def test_every_kind_is_tried() -> None:
    assert {type(said) for said in SAID} == set(get_args(Message))
