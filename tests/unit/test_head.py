"""What the head says of hidden states, without all logits in memory.

Oracle: full logits in float64, and autograd through them.
"""

from __future__ import annotations

import pytest
import torch

from foldsearch.model.head import head_normaliser, last_hidden, token_logits
from tests.tiny import dense_model, token_set

# Gemma 2 has a soft-capped head, Granite one whose products are divided, GPT-2 a tied one
NAMES = ("llama", "gemma2", "granite", "gpt2")
IDS_NT = token_set(sequences=3, length=9).ids_NT  # 27 positions: six pieces of four rows and a rest


@pytest.mark.parametrize("name", NAMES)
def test_normaliser_and_logits_with_their_slopes_are_those_of_full_logits(name):
    model = dense_model(name)
    hidden_MD = last_hidden(model, IDS_NT).detach().flatten(0, 1).requires_grad_()
    token_M, slope_M = IDS_NT.flatten(), torch.linspace(-1, 2, IDS_NT.numel())
    found_M = head_normaliser(model, hidden_MD), token_logits(model, hidden_MD, token_M)

    exact_MD = hidden_MD.detach().double().requires_grad_()
    divisor = getattr(model.config, "logits_scaling", 1.0)
    logits_MV = exact_MD @ model.get_output_embeddings().weight.double().T / divisor
    if (cap := getattr(model.config, "final_logit_softcapping", None)) is not None:
        logits_MV = cap * torch.tanh(logits_MV / cap)
    expected_M = logits_MV.logsumexp(-1), logits_MV.gather(1, token_M[:, None])[:, 0]
    for found, expected in zip(found_M, expected_M, strict=True):
        torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
        (slope_MD,) = torch.autograd.grad((found * slope_M).sum(), hidden_MD)
        (expected_MD,) = torch.autograd.grad((expected * slope_M).sum(), exact_MD, retain_graph=True)
        torch.testing.assert_close(slope_MD.double(), expected_MD, atol=1e-5, rtol=1e-4)


def test_a_bias_of_the_head_counts(monkeypatch):
    """No family of ours has one; a fine-tuned model may."""
    model = dense_model("llama")
    head = torch.nn.Linear(*model.get_output_embeddings().weight.shape[::-1])
    hidden_MD, token_M = torch.randn(5, head.in_features), torch.arange(5)
    monkeypatch.setattr(model, "get_output_embeddings", lambda: head)
    logits_MV = head(hidden_MD)
    torch.testing.assert_close(head_normaliser(model, hidden_MD), logits_MV.logsumexp(-1))
    torch.testing.assert_close(
        token_logits(model, hidden_MD, token_M), logits_MV.gather(1, token_M[:, None])[:, 0]
    )
