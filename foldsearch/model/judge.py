"""How near a folded model is to the dense one: KL, perplexity, agreement, with errors clustered by document.

The dense model is asked once per token set. What is kept is exact and small: with a linear head W the cross term of
the KL is  Σ_v p_v z_v = h · (Σ_v p_v W_v),  so the mean head row under the dense distribution, D numbers a token,
stands for the V dense logits. (V is 49,152 in SmolLM2, D is 576; no top-K, nothing lost.) Where the head is not
linear (Gemma 2's soft cap, a bias) the dense logits are made again from its last hidden states.

Shapes: N sequences, T positions of a sequence, P = T − 1 of them predict a known token, M positions of a chunk,
D width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from foldsearch import cache
from foldsearch.files import replace_atomically
from foldsearch.model.head import (
    POSITIONS_AT_ONCE,
    has_linear_head,
    head_logits,
    judged_logits,
    last_hidden,
    log_normaliser,
    logits_divisor,
)
from foldsearch.model.tokens import Over, TokenSet
from foldsearch.plan.result import KindQuality, Quality
from foldsearch.progress import CountProgress

TOKENS_AT_ONCE = 4096  # of the blocks, when judging
SCHEMA = 2  # of the kept answers: 2 has the positions that are scored


@dataclass(frozen=True, slots=True, eq=False)
class DenseTargets:
    """What the dense model says on a token set.

    hidden_NPD: after its final norm, in the dtype of the model. mean_row_NPD: float32, Σ_v p_v W_v; of zero size
    where the head is not linear. negentropy_NP: Σ_v p_v log p_v, nats. loss_NP: of the next token, nats.
    likeliest_NP: int32, the most likely next token. scored_NP: bool, whether the position counts (see `TokenSet`); the
    others are answered too, but their answers say nothing of a text.
    """

    hidden_NPD: Tensor
    mean_row_NPD: Tensor
    negentropy_NP: Tensor
    loss_NP: Tensor
    likeliest_NP: Tensor
    scored_NP: Tensor

    def of(self, sequences: slice | list[int] | Tensor) -> DenseTargets:
        """The targets of some of the sequences."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return DenseTargets(
            **{name: value[sequences] if value.numel() else value for name, value in values.items()}
        )

    def to(self, device: torch.device | str) -> DenseTargets:
        """The targets on a device."""
        return DenseTargets(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})

    def flat(self) -> tuple[Tensor, Tensor, Tensor]:
        """Negentropies, dense hidden states and mean head rows, one position after the other.

        Where the head is not linear there are no rows, and the hidden states stand in for them.
        """
        hidden = self.hidden_NPD.flatten(0, 1)
        rows = self.mean_row_NPD.flatten(0, 1) if self.mean_row_NPD.numel() else hidden
        return self.negentropy_NP.flatten(), hidden, rows

    @property
    def perplexity(self) -> float:
        """The dense model's, on these tokens."""
        return math.exp(float(self.loss_NP[self.scored_NP].cpu().double().mean()))


def batches(
    num_sequences: int, sequence_length: int, tokens_at_once: int = TOKENS_AT_ONCE
) -> Iterator[slice]:
    """Slices of sequences of at most `tokens_at_once` tokens, one sequence at least."""
    size = max(1, tokens_at_once // sequence_length)
    for start in range(0, num_sequences, size):
        yield slice(start, min(start + size, num_sequences))


@torch.inference_mode()
def ask_dense(
    dense: PreTrainedModel, tokens: TokenSet, *, progress: Callable[[float], None] | None = None
) -> DenseTargets:
    """Run the dense model over a token set; `progress` gets the share done, first 0."""
    if progress is not None:
        progress(0.0)
    rows_VD = dense.get_output_embeddings().weight
    linear = has_linear_head(dense)
    parts: dict[str, list[Tensor]] = {field.name: [] for field in fields(DenseTargets)}
    for batch in batches(*tokens.ids_NT.shape):
        ids_BT = tokens.ids_NT[batch].to(dense.device)
        hidden_BPD = last_hidden(dense, ids_BT)[:, :-1]
        hidden, following = hidden_BPD.flatten(0, 1), ids_BT[:, 1:].flatten()
        # Room for all answers before the first logits: small tensors that are kept would split the room that a
        # chunk's logits leave, and the next chunk's would need new.
        numbers = hidden.new_empty(len(hidden), dtype=torch.float32)
        found = {"negentropy_NP": numbers, "loss_NP": torch.empty_like(numbers)}
        found["likeliest_NP"] = torch.empty_like(numbers, dtype=torch.int32)
        found["mean_row_NPD"] = torch.empty_like(hidden if linear else hidden[:0], dtype=torch.float32)
        for start in range(0, len(hidden), POSITIONS_AT_ONCE):
            here = slice(start, start + POSITIONS_AT_ONCE)
            hidden_MD, next_M1 = hidden[here], following[here, None]
            logits_MV = head_logits(dense, hidden_MD)
            normaliser_M = log_normaliser(logits_MV)
            p_MV = (logits_MV - normaliser_M[:, None]).exp_()
            if linear:  # rounded as the folded model's will be
                # The product runs in the head's dtype, over what sums to 1 again.
                rounded_MV = p_MV.to(rows_VD.dtype)
                total_M1 = rounded_MV.sum(-1, keepdim=True, dtype=torch.float32)
                mean_row_MD = (rounded_MV @ rows_VD).float() / (total_M1 * logits_divisor(dense))
                found["mean_row_NPD"][here] = mean_row_MD
                cross_M = (hidden_MD.float() * mean_row_MD).sum(-1)
            else:
                cross_M = (p_MV * logits_MV).sum(-1)
            found["negentropy_NP"][here] = cross_M - normaliser_M
            found["loss_NP"][here] = normaliser_M - logits_MV.gather(1, next_M1)[:, 0]
            found["likeliest_NP"][here] = logits_MV.argmax(-1)
        parts["hidden_NPD"].append(hidden_BPD.cpu())
        parts["scored_NP"].append(tokens.scored[batch].cpu())
        for name, values in found.items():
            if len(values):
                parts[name].append(values.unflatten(0, hidden_BPD.shape[:2]).cpu())
        if progress is not None:
            progress(batch.stop / len(tokens.ids_NT))
    empty = torch.zeros(0)
    return DenseTargets(**{name: torch.cat(values) if values else empty for name, values in parts.items()})


def dense_targets(
    dense: PreTrainedModel,
    tokens: TokenSet,
    *,
    model_hash: str,
    cache_dir: Path,
    progress: Callable[[float], None] | None = None,
) -> DenseTargets:
    """`ask_dense`, kept on disk by content and memory-mapped, so that trials share it."""

    def ask(path: Path) -> None:
        found = ask_dense(dense, tokens, progress=progress)
        tensors = {field.name: getattr(found, field.name).contiguous() for field in fields(DenseTargets)}
        replace_atomically(path, lambda temporary: save_file(tensors, temporary))

    def read(path: Path) -> DenseTargets:
        return DenseTargets(**load_file(path, device=str(dense.device)))

    key = cache.key(SCHEMA, model_hash, str(dense.dtype), tokens.content_hash)
    return cache.once(cache_dir / "targets" / f"{key}.safetensors", ask, read, keep=True)[0]


def cross_terms(
    model: PreTrainedModel,
    hidden_MD: Tensor,
    targets: DenseTargets,
    chunk: tuple[Tensor, Tensor],
    dense: PreTrainedModel | None = None,
) -> Tensor:
    """Σ_v p_v z_v of a chunk, (M): p the dense distribution, z the folded model's logits.

    chunk: the dense hidden states and the mean head rows of the same positions. dense: the dense model, where the
    folded model has another head.
    """
    dense_hidden_MD, mean_row_MD = chunk
    if targets.mean_row_NPD.numel() and dense is None:
        return (hidden_MD.float() * mean_row_MD).sum(-1)
    with torch.no_grad():
        p_MV = head_logits(dense or model, dense_hidden_MD).softmax(-1)
    return (p_MV * head_logits(model, hidden_MD)).sum(-1)


@torch.inference_mode()
def judge(
    model: PreTrainedModel,
    tokens: TokenSet,
    targets: DenseTargets,
    *,
    hidden_NTD: Tensor | None = None,
    dense: PreTrainedModel | None = None,
    progress: CountProgress | None = None,
) -> Quality:
    """The quality of a model on a token set, beside the dense one.

    hidden_NTD: of the model on these tokens, after its final norm, where that is known already. dense: the dense model,
    where `model` has a head of its own (rounded weights); else its head is the dense one's. progress: told how many
    sequences are done.

    KL(dense ‖ model), the next-token loss and agreement are means over the scored positions (see `TokenSet`); where
    there are several kinds of text, the KL is one figure made of those of the kinds (see `Kinds`). A
    position agrees where no logit is above that of the dense model's likeliest token (equal ones are common in
    bfloat16). Standard errors are clustered by document (sequences of a document are not independent), the
    perplexity's by the delta method.
    """
    kl_parts, loss_parts, same_parts = [], [], []
    negentropy, dense_hidden, rows = targets.flat()
    likeliest = targets.likeliest_NP.flatten()
    done = 0
    for batch in batches(*tokens.ids_NT.shape):
        ids_BT = tokens.ids_NT[batch].to(model.device)
        hidden_BTD = last_hidden(model, ids_BT) if hidden_NTD is None else hidden_NTD[batch]
        hidden = hidden_BTD[:, :-1].flatten(0, 1)
        here = slice(done, done + len(hidden))
        done = here.stop
        normaliser, next_logit, same = judged_logits(
            model, hidden, ids_BT[:, 1:].flatten(), likeliest[here].long()
        )
        cross = torch.cat(
            [
                cross_terms(model, hidden_MD, targets, (dense_hidden_MD, row_MD), dense)
                for hidden_MD, dense_hidden_MD, row_MD in zip(
                    *(part.split(POSITIONS_AT_ONCE) for part in (hidden, dense_hidden[here], rows[here])),
                    strict=True,
                )
            ]
        )
        kl_parts.append(negentropy[here] - cross + normaliser)
        loss_parts.append(normaliser - next_logit)
        same_parts.append(same)
        if progress is not None:
            progress(batch.stop, len(tokens.ids_NT))
    shape = targets.loss_NP.shape
    kl_NP, loss_NP, same_NP = (
        torch.cat(parts).cpu().double().view(shape) for parts in (kl_parts, loss_parts, same_parts)
    )
    seen_N = tokens.kinds.counted()
    assert seen_N.any(), "a set that is measured on holds a kind of text that counts"
    seen = targets if seen_N.all() else targets.of(seen_N)
    scored_NP = seen.scored_NP.cpu()
    loss_NP, same_NP, document_N = loss_NP[seen_N], same_NP[seen_N], tokens.document_N[seen_N]
    loss = float(loss_NP[scored_NP].mean())
    perplexity = math.exp(min(loss, 700.0))
    kinds = _by_kind(kl_NP, tokens, targets.scored_NP.cpu())
    kl, kl_se = _over_kinds(kinds, tokens.kinds.over)
    return Quality(
        kl=kl,
        kl_se=kl_se,
        perplexity=perplexity,
        perplexity_se=perplexity * clustered_error(loss_NP, document_N, scored_NP),
        dense_perplexity=seen.perplexity,
        agreement=float(same_NP[scored_NP].mean()),
        tokens=int(scored_NP.sum()),
        kinds=kinds,
    )


def _by_kind(kl_NP: Tensor, tokens: TokenSet, scored_NP: Tensor) -> tuple[KindQuality, ...]:
    """The KL of each kind of text that has sequences here."""
    found = []
    for index, name in enumerate(tokens.kinds.names):
        of_kind_N = tokens.kinds.of_N == index
        if of_kind_N.any():
            mine_NP, mine_scored_NP = kl_NP[of_kind_N], scored_NP[of_kind_N]
            error = clustered_error(mine_NP, tokens.document_N[of_kind_N], mine_scored_NP)
            mean, count = float(mine_NP[mine_scored_NP].mean()), int(mine_scored_NP.sum())
            found.append(KindQuality(name, mean, error, count, name in tokens.kinds.unseen))
    return tuple(found)


def _over_kinds(kinds: Sequence[KindQuality], over: Over) -> tuple[float, float]:
    """One KL of those of the seen kinds, and its standard error: kinds have no document in common."""
    seen = [kind for kind in kinds if not kind.unseen]
    if len(seen) == 1 or over == "worst":
        # A KL that is no number is the worst: `max` alone would pass over it.
        worst = max(seen, key=lambda kind: math.inf if math.isnan(kind.kl) else kind.kl)
        return worst.kl, worst.kl_se
    mean = sum(kind.kl for kind in seen) / len(seen)
    return mean, math.sqrt(sum(kind.kl_se**2 for kind in seen)) / len(seen)


def clustered_error(values_NP: Tensor, document_N: Tensor, scored_NP: Tensor | None = None) -> float:
    """Standard error of the mean of values that are not independent inside a document; infinite for one document.

    Args:
        values_NP: one value a position.
        document_N: the document of each sequence.
        scored_NP: bool, which values the mean is over; None is all. Documents may have different numbers of them.

    Source: the cluster-robust variance of a mean (Liang and Zeger 1986), with the factor G / (G − 1).
    """
    if scored_NP is None:
        scored_NP = torch.ones_like(values_NP, dtype=torch.bool)
    values_NP = values_NP.double()
    residual_N = (values_NP - values_NP[scored_NP].mean()).where(scored_NP, 0.0).sum(1)
    documents, index_N = document_N.unique(return_inverse=True)
    groups = len(documents)
    if groups < 2:
        return math.inf
    sums = torch.zeros(groups, dtype=torch.float64).index_add_(0, index_N, residual_N)
    return float((sums.square().sum() * groups / (groups - 1)).sqrt() / scored_NP.sum())
