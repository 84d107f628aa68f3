"""The sums that ridge regression solves from; what it solves is in test_heal.py."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foldsearch.model.ridge import gram_matrix


@given(tokens=st.integers(1, 9), features=st.integers(1, 11), seed=st.integers(0, 99))
def test_half_of_the_products_make_the_gram_matrix(tokens: int, features: int, seed: int) -> None:
    """Of fewer features than parts too. Oracle: the product itself, in whole numbers, so to the bit."""
    generator = torch.Generator().manual_seed(seed)
    features_MF = torch.randint(-9, 10, (tokens, features), generator=generator).float()
    assert torch.equal(gram_matrix(features_MF), features_MF.T @ features_MF)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_gram_matrix_is_of_the_dtype(dtype: torch.dtype) -> None:
    """And the product of rounded numbers too, as far as their type tells it."""
    features_MF = torch.randn(50, 33, generator=torch.Generator().manual_seed(0), dtype=dtype)
    found = gram_matrix(features_MF)
    assert found.dtype == dtype
    torch.testing.assert_close(found, features_MF.T @ features_MF)
