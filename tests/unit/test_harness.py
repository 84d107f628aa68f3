"""What the harness is handed: a tokenizer that begins a text as the model's does, and puts nothing after it.

Oracle: ids written down by hand.
"""

from __future__ import annotations

import pytest

from foldsearch.model.harness import _without_end
from tests.tiny import tokenizer


@pytest.mark.parametrize(
    ("around", "ids"),
    [("<s> $A </s>", [1, 5, 6]), ("</s> <s> $A </s>", [2, 1, 5, 6]), ("$A </s>", [5, 6])],
)
def test_nothing_stands_between_a_context_and_what_follows(around: str, ids: list[int]) -> None:
    """With the end token after a context, the harness would score options on a text that is over."""
    given = tokenizer(around)
    handed = _without_end(given)
    assert handed("w5 w6").input_ids == ids
    assert handed("w5 w6", add_special_tokens=False).input_ids == [5, 6]
    assert given("w5 w6").input_ids == [*ids, 2]  # the model's own is as it was


@pytest.mark.parametrize("around", ["$A", "<s> $A"])
def test_a_tokenizer_that_ends_nothing_is_handed_as_it_is(around: str) -> None:
    given = tokenizer(around)
    assert _without_end(given) is given
