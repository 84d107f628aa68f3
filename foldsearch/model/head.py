"""The head of a causal language model: from tokens to the last hidden states, and on to logits in chunks.

Shapes: B sequences, T positions, M positions of a chunk, D width, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

POSITIONS_AT_ONCE = (
    64  # 64 × V logits in float32 are 12 MB at V = 49,152: a whole sequence's would not stay in cache
)


def last_hidden(model: PreTrainedModel, ids_BT: Tensor) -> Tensor:
    """What the head reads: hidden states after the final norm, (B, T, D)."""
    hidden_BTD: Tensor = model.base_model(input_ids=ids_BT, use_cache=False).last_hidden_state
    return hidden_BTD


def head_logits(model: PreTrainedModel, hidden_MD: Tensor) -> Tensor:
    """Logits in float32, (M, V)."""
    logits_MV: Tensor = model.get_output_embeddings()(hidden_MD).float()
    softcap = getattr(model.config, "final_logit_softcapping", None)  # Gemma 2
    return logits_MV if softcap is None else softcap * torch.tanh(logits_MV / softcap)


def has_linear_head(model: PreTrainedModel) -> bool:
    """Whether logits are a matrix product of hidden states and nothing else."""
    capped = getattr(model.config, "final_logit_softcapping", None) is not None
    return not capped and model.get_output_embeddings().bias is None


def log_normaliser(logits_MV: Tensor) -> Tensor:
    """log Σ_v exp(logit), (M); three passes where torch.logsumexp takes more."""
    highest_M1 = logits_MV.detach().amax(-1, keepdim=True)
    return (logits_MV - highest_M1).exp_().sum(-1).log() + highest_M1[:, 0]
