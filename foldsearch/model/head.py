"""The head of a causal language model: from tokens to the last hidden states, and on to logits in chunks.

Shapes: B sequences, T positions, M positions, C of a chunk, R rows of it, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers import PreTrainedModel

POSITIONS_AT_ONCE = (
    64  # 64 × V logits in float32 are 12 MB at V = 49,152: a whole sequence's would not stay in cache
)
TRAINED_AT_ONCE = 256  # where one copy of them is made, not the four that autograd makes; 50 MB in float32
JUDGED_AT_ONCE = 512  # the head's weights are read once for so many; 50 MB of bfloat16 logits
ROWS_IN_CACHE = 4  # of logits, in float32 at a time: 0.8 MB


def last_hidden(model: PreTrainedModel, ids_BT: Tensor) -> Tensor:
    """What the head reads: hidden states after the final norm, (B, T, D)."""
    hidden_BTD: Tensor = model.base_model(input_ids=ids_BT, use_cache=False).last_hidden_state
    return hidden_BTD


def logits_divisor(model: PreTrainedModel) -> float:
    """What the products of hidden states and the head are divided by: 1 but for Granite."""
    return float(getattr(model.config, "logits_scaling", 1.0))


def head_logits(model: PreTrainedModel, hidden_MD: Tensor) -> Tensor:
    """Logits in float32, (M, V)."""
    logits_MV: Tensor = model.get_output_embeddings()(hidden_MD).float()
    if (divisor := logits_divisor(model)) != 1:
        logits_MV = logits_MV / divisor
    softcap = getattr(model.config, "final_logit_softcapping", None)  # Gemma 2
    return logits_MV if softcap is None else softcap * torch.tanh(logits_MV / softcap)


def token_logits(model: PreTrainedModel, hidden_MD: Tensor, token_M: Tensor) -> Tensor:
    """The logit of one token a position, in float32, (M): products with the rows of these tokens alone."""
    head = model.get_output_embeddings()
    logit_M: Tensor = (hidden_MD.float() * head.weight[token_M].float()).sum(-1)
    if head.bias is not None:
        logit_M = logit_M + head.bias[token_M].float()
    logit_M = logit_M / logits_divisor(model)
    softcap = getattr(model.config, "final_logit_softcapping", None)
    return logit_M if softcap is None else softcap * torch.tanh(logit_M / softcap)


def positions_at_once(model: PreTrainedModel) -> int:
    """How many positions `head_normaliser` should be given at a time."""
    return TRAINED_AT_ONCE if has_linear_head(model) else POSITIONS_AT_ONCE


def head_normaliser(model: PreTrainedModel, hidden_MD: Tensor) -> Tensor:
    """log Σ_v exp(logit) in float32, (M). The head is frozen: a gradient is that of the hidden states."""
    if not has_linear_head(model):
        return log_normaliser(head_logits(model, hidden_MD))
    weight_VD = model.get_output_embeddings().weight
    normaliser_M: Tensor = _Normaliser.apply(hidden_MD, weight_VD, logits_divisor(model))  # type: ignore[no-untyped-call]
    return normaliser_M


class _Normaliser(torch.autograd.Function):
    """log Σ_v exp(h · W_v / divisor) of a linear head, and its slope in h, which is the mean row Σ_v p_v W_v / divisor.

    The slope is made at once, while a few rows of logits are in cache. Walked back by autograd, each chunk of logits
    would be read and written in full about ten times (docs/log.md).
    """

    @staticmethod
    def forward(ctx: Any, hidden_MD: Tensor, weight_VD: Tensor, divisor: float) -> Tensor:
        """The normaliser, (M), float32."""
        p_MV = functional.linear(hidden_MD, weight_VD)
        rows = ROWS_IN_CACHE if hidden_MD.device.type == "cpu" else len(p_MV)
        normaliser_M = torch.empty(len(p_MV), dtype=torch.float32, device=p_MV.device)
        for part_RV, normaliser_R in zip(p_MV.split(rows), normaliser_M.split(rows), strict=True):
            exact_RV = part_RV.float()
            exact_RV /= divisor
            highest_R1 = exact_RV.amax(-1, keepdim=True)
            total_R1 = exact_RV.sub_(highest_R1).exp_().sum(-1, keepdim=True)
            normaliser_R.copy_((total_R1.log() + highest_R1)[:, 0])
            if ctx.needs_input_grad[0]:
                part_RV.copy_(exact_RV.div_(total_R1))
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(p_MV @ weight_VD / divisor)
        return normaliser_M

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope_M: Tensor) -> tuple[Tensor, None, None]:
        """Of the hidden states alone."""
        (mean_row_MD,) = ctx.saved_tensors
        return (slope_M[:, None] * mean_row_MD.float()).to(mean_row_MD.dtype), None, None


def has_linear_head(model: PreTrainedModel) -> bool:
    """Whether logits are a matrix product of hidden states, over a number at most (`logits_divisor`)."""
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
    head, divisor = model.get_output_embeddings(), logits_divisor(model)
    asked_M2 = torch.stack((next_M, likeliest_M), 1)
    # Two buffers for all chunks. Fresh pages for 50 MB of logits a chunk cost as much as the product itself, and
    # float32 copies made and freed between small tensors that stay would each leave a hole that the next does not
    # fit into: 300 MB of them after 4,080 positions.
    buffer_CV = hidden_MD.new_empty(min(len(hidden_MD), JUDGED_AT_ONCE), head.weight.shape[0])
    rows = ROWS_IN_CACHE if hidden_MD.device.type == "cpu" else len(buffer_CV)
    scratch_RV = torch.empty_like(buffer_CV[:rows], dtype=torch.float32)
    normaliser_M = scratch_RV.new_empty(len(hidden_MD))
    highest_M = torch.empty_like(normaliser_M)
    found_M2 = scratch_RV.new_empty(len(hidden_MD), 2)
    for start in range(0, len(hidden_MD), JUDGED_AT_ONCE):
        here = slice(start, start + JUDGED_AT_ONCE)
        chunk_CD = hidden_MD[here]
        logits_CV = buffer_CV[: len(chunk_CD)]
        torch.mm(chunk_CD, head.weight.T, out=logits_CV)
        if head.bias is not None:
            logits_CV.add_(head.bias)
        found_M2[here] = logits_CV.gather(1, asked_M2[here])
        for part_RV, highest_R, normaliser_R in zip(
            logits_CV.split(rows), highest_M[here].split(rows), normaliser_M[here].split(rows), strict=True
        ):
            exact_RV = scratch_RV[: len(part_RV)].copy_(part_RV)
            if divisor != 1:
                exact_RV.div_(divisor)
            if softcap is not None:
                exact_RV.div_(softcap).tanh_().mul_(softcap)
            torch.amax(exact_RV, -1, out=highest_R)
            exact_RV.sub_(highest_R[:, None]).exp_()
            torch.sum(exact_RV, -1, out=normaliser_R).log_().add_(highest_R)
    found_M2.div_(divisor)
    if softcap is not None:
        found_M2.div_(softcap).tanh_().mul_(softcap)
    return normaliser_M, found_M2[:, 0], found_M2[:, 1] >= highest_M


def log_normaliser(logits_MV: Tensor) -> Tensor:
    """log Σ_v exp(logit), (M); three passes where torch.logsumexp takes more."""
    highest_M1 = logits_MV.detach().amax(-1, keepdim=True)
    return (logits_MV - highest_M1).exp_().sum(-1).log() + highest_M1[:, 0]
