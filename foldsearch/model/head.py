"""The head of a causal language model: from tokens to the last hidden states, and on to logits in chunks.

Shapes: B sequences, T positions, M positions, C of a chunk, R rows of it, D width, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

POSITIONS_AT_ONCE = (
    64  # 64 × V logits in float32 are 12 MB at V = 49,152: a whole sequence's would not stay in cache
)
JUDGED_AT_ONCE = 512  # the head's weights are read once for so many; 50 MB of bfloat16 logits
ROWS_IN_CACHE = 4  # of those, in float32 at a time: 0.8 MB


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


@torch.inference_mode()
def judged_logits(
    model: PreTrainedModel, hidden_MD: Tensor, next_M: Tensor, likeliest_M: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What judging asks of the logits, each read once and in float32.

    Args:
        hidden_MD: after the final norm. next_M, likeliest_M: indices into the vocabulary, int64.

    Returns:
        log Σ_v exp(logit); the logit of `next_M`; whether no logit is above that of `likeliest_M`. Each (M).
    """
    softcap = getattr(model.config, "final_logit_softcapping", None)  # Gemma 2
    head = model.get_output_embeddings()
    asked_M2 = torch.stack((next_M, likeliest_M), 1)
    # One buffer for all chunks: fresh pages for 50 MB a chunk cost as much as the product itself.
    buffer_CV = hidden_MD.new_empty(min(len(hidden_MD), JUDGED_AT_ONCE), head.weight.shape[0])
    normaliser_M, logit_M2, highest_M = [], [], []
    for chunk_CD, asked_C2 in zip(
        hidden_MD.split(JUDGED_AT_ONCE), asked_M2.split(JUDGED_AT_ONCE), strict=True
    ):
        logits_CV = buffer_CV[: len(chunk_CD)]
        torch.mm(chunk_CD, head.weight.T, out=logits_CV)
        if head.bias is not None:
            logits_CV.add_(head.bias)
        rows = ROWS_IN_CACHE if logits_CV.device.type == "cpu" else len(logits_CV)
        found_C2 = logits_CV.gather(1, asked_C2).float()
        logit_M2.append(found_C2 if softcap is None else softcap * torch.tanh(found_C2 / softcap))
        for part_RV in logits_CV.split(rows):
            part_RV = part_RV.to(torch.float32, copy=True)
            if softcap is not None:
                part_RV.div_(softcap).tanh_().mul_(softcap)
            highest_R1 = part_RV.amax(-1, keepdim=True)
            highest_M.append(highest_R1[:, 0])
            normaliser_M.append(part_RV.sub_(highest_R1).exp_().sum(-1).log_().add_(highest_R1[:, 0]))
    found_M2 = torch.cat(logit_M2)
    return torch.cat(normaliser_M), found_M2[:, 0], found_M2[:, 1] >= torch.cat(highest_M)


def log_normaliser(logits_MV: Tensor) -> Tensor:
    """log Σ_v exp(logit), (M); three passes where torch.logsumexp takes more."""
    highest_M1 = logits_MV.detach().amax(-1, keepdim=True)
    return (logits_MV - highest_M1).exp_().sum(-1).log() + highest_M1[:, 0]
