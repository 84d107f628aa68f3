"""Children: which block's weights a pruned block borrows, and how its adapters and output norms start.

Base blocks by FlexiGPT's low-rank metric (arXiv 2501.14713, section 3): with Ŵ the rank-r SVD reconstruction of a
weight matrix and Δ the rank-r approximation of Ŵ_i − Ŵ_j, block i takes the unpruned j of least ‖Ŵ_i − (Ŵ_j + Δ)‖,
which is the energy of the singular values r + 1 … 2r of Ŵ_i − Ŵ_j; summed over a block's linears as squares [ours].

Adapters: `svd` is the truncated SVD of the difference W_i − W_j (FlexiGPT section 3, Relaxed Recursive Transformers
section 3). `data` asks for the least error of the linear's outputs on calibration states instead, with C the second
moment of its inputs in the dense model: min ‖(W_i − W_j − up · down) C^½‖, whose `up` spans the first eigenvectors of
(W_i − W_j) C (W_i − W_j)ᵀ [ours; the whitened SVD of SVD-LLM, arXiv 2403.07378, for a difference]. With `data` the
output norm's γ starts at the least squares fit of what the dense unit added, per channel [ours].

Between a block and itself, as in the repeat of an owner, the difference is zero, and factors of zero would never learn:
each waits for the other. So such adapters keep the start of `fold` (down random, up zero). A repeat that runs another
block's weights has adapters that start as any child's. A repeat stands for nothing in the dense model, so there is no γ
to fit: it stays small, and an extended model starts near the dense one.

Shapes: N sequences, T positions, M tokens, D width, I inputs and O outputs of a linear, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from foldsearch.errors import PlanError
from foldsearch.model.blocks import decoder_blocks, family_of
from foldsearch.model.folded import linears
from foldsearch.model.head import last_hidden
from foldsearch.model.parts import NORM_EPS, Borrowed, OutputNorm
from foldsearch.model.ridge import gram_matrix
from foldsearch.model.states import in_float64
from foldsearch.plan.plan import AdapterStart
from foldsearch.progress import CountProgress

Metric = Literal["low_rank", "frobenius"]
BATCH_TOKENS = 2048
GAMMA_RIDGE = 0.01  # of the normalised output's mean square, which is 1


# ---- which block


@torch.no_grad()
def base_distances(dense: PreTrainedModel, rank: int, metric: Metric = "low_rank") -> Tensor:
    """How far block j is from standing in for block i, (L, L), float64; the diagonal is 0.

    Args:
        rank: r of the metric; the paper's 256 was for a width of 4,096, so scale it with the width. Not used by
            "frobenius", the plain distance of the weights, which serves for comparison: it makes nearly every block
            choose the one of smallest norm (FlexiGPT, section 3, says so of block 0; tests show it).

    Raises:
        PlanError: the rank is not between 1 and half the smallest side of the linears; or blocks are of several kinds.
    """
    of_blocks = [_linears(dense, block) for block in decoder_blocks(dense)]
    if len({tuple(_matrix(linear).shape for linear in of_block) for of_block in of_blocks}) != 1:
        raise PlanError(
            "a base block stands in for any other, but blocks of this model are of several kinds. Drop or replace them."
        )
    smallest = min(side for linear in of_blocks[0] for side in _matrix(linear).shape)
    if metric == "low_rank" and not 1 <= rank <= smallest // 2:
        raise PlanError(
            f"the rank of the base-block metric is between 1 and {smallest // 2}, half the smallest side of the "
            f"linears, got {rank}."
        )
    distance_LL = torch.zeros(len(of_blocks), len(of_blocks), dtype=torch.float64)
    for linears_L in zip(*of_blocks, strict=True):
        weights = [_matrix(linear) for linear in linears_L]  # float32 copies, of one linear a block at a time
        if metric == "frobenius":
            flat = in_float64(torch.stack([weight.flatten() for weight in weights]))
            distance_LL += torch.cdist(flat, flat).square().cpu()
            continue
        factors = [_truncated(weight, rank) for weight in weights]
        for i, (left_i, right_i) in enumerate(factors):
            for j, (left_j, right_j) in enumerate(factors[:i]):
                # Ŵ_i − Ŵ_j = [L_i, −L_j] [R_i, R_j]ᵀ has rank 2r: its singular values are those of a 2r × 2r core
                _, core_left = torch.linalg.qr(torch.cat((left_i, -left_j), 1), mode="r")
                _, core_right = torch.linalg.qr(torch.cat((right_i, right_j), 1), mode="r")
                energy = in_float64(torch.linalg.svdvals(core_left @ core_right.T)[rank:]).square().sum()
                distance_LL[i, j] += energy.cpu()
                distance_LL[j, i] += energy.cpu()
    return distance_LL


def base_blocks(distance_LL: Tensor | Sequence[Sequence[float]], pruned: Sequence[int]) -> dict[int, int]:
    """For each pruned block the unpruned one of least distance; it may stand earlier or later.

    Raises:
        PlanError: every block is pruned.
    """
    rows = distance_LL.tolist() if isinstance(distance_LL, Tensor) else distance_LL
    kept = [block for block in range(len(rows)) if block not in set(pruned)]
    if not kept:
        raise PlanError("a pruned block borrows from one that is kept, but every block is pruned. Keep one.")
    return {block: min(kept, key=lambda j: (rows[block][j], abs(block - j))) for block in pruned}


def _linears(dense: PreTrainedModel, block: nn.Module) -> list[nn.Module]:
    """Those of both units."""
    units = family_of(dense.config).units_of(block)
    return [block.get_submodule(path) for _, unit in units for path in linears(block, unit)]


def _matrix(linear: nn.Module) -> Tensor:
    """Its weights, (O, I), float32."""
    weight: Tensor = linear.weight  # type: ignore[assignment]
    return (weight.T if isinstance(linear, Conv1D) else weight).detach().float()  # Conv1D keeps (I, O)


def _truncated(weight_OI: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(O, R) and (I, R) whose product is the rank-R SVD reconstruction."""
    u, s, vh = torch.linalg.svd(weight_OI, full_matrices=False)
    return u[:, :rank] * s[:rank], vh[:rank].T


# ---- how adapters start


def low_rank(
    difference_OI: Tensor, rank: int, second_moment_II: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`up` (O, R) and `down` (R, I) of least ‖(difference − up · down) C^½‖, float32.

    Args:
        second_moment_II: C, of the inputs; None is the identity, and the result the truncated SVD.

    The two factors have columns and rows of one size, as training with one learning rate wants them.
    """
    difference = in_float64(difference_OI)
    rank = min(rank, *difference.shape)
    if second_moment_II is None:
        u, s, vh = torch.linalg.svd(difference, full_matrices=False)
        up, down = u[:, :rank], s[:rank, None] * vh[:rank]
    else:
        # C = F Fᵀ; the left singular vectors of difference · F are the eigenvectors of difference · C · differenceᵀ
        spread_OO = difference @ in_float64(second_moment_II) @ difference.T
        _, vectors = torch.linalg.eigh((spread_OO + spread_OO.T) / 2)
        up = vectors[:, -rank:].flip(1)
        down = up.T @ difference
    size_R = down.norm(dim=1).clamp_min(1e-30).sqrt()
    return (up * size_R).float(), (down / size_R[:, None]).float()


@torch.no_grad()
def start_adapters(
    model: PreTrainedModel,
    dense: PreTrainedModel,
    ids_NT: Tensor,
    start: AdapterStart,
    progress: CountProgress | None = None,
) -> None:
    """Set the adapters of a folded model's children, in place, and with `data` their output norms.

    Args:
        model: from `fold`; only its adapters and γ are written, which are its own.
        dense: the model it was folded from. ids_NT: calibration tokens, for `data`.
        progress: called with (done, total) sequences.

    `zero` leaves the start of `fold`: adapters that add nothing, a small γ. So do repeats of an owner (see above).
    """
    children = _children(model, dense)
    if start == "zero" or not children:
        return
    done, total = 0, 2 * len(ids_NT)

    def advance(sequences: int) -> None:
        nonlocal done
        done += sequences
        if progress is not None:
            progress(done, total)

    if start == "data":
        moments = _second_moments(dense, children, ids_NT, advance)
    for child in children:
        for path, part in child.parts.items():
            if part.down is not None and part.up is not None:
                home = child.home.get_submodule(path)
                difference_OI = _matrix(home) - _matrix(part.owner)
                if not difference_OI.any():
                    continue  # a block and itself
                moment = moments[home] if start == "data" else None
                up, down = low_rank(difference_OI, part.rank, moment)
                part.up.copy_(_padded(up, part.up.shape))
                part.down.copy_(_padded(down, part.down.shape))
    if start == "data":
        _start_norms(dense, children, ids_NT, advance)


def _padded(value: Tensor, shape: torch.Size) -> Tensor:
    """With zeros where a linear is too small for the rank."""
    padded = value.new_zeros(shape)
    padded[: value.shape[0], : value.shape[1]] = value
    return padded


@dataclass(slots=True, eq=False)
class _Child:
    """A position that borrows: the folded block, the dense block that its home is, and what the folded one carries.

    repeat: whether its home has run before.
    """

    block: nn.Module
    home: nn.Module
    index: int
    repeat: bool
    parts: dict[str, Borrowed] = field(default_factory=dict)
    norms: dict[str, OutputNorm] = field(default_factory=dict)


def _children(model: PreTrainedModel, dense: PreTrainedModel) -> list[_Child]:
    found = []
    seen: set[int] = set()
    for block, slot in zip(decoder_blocks(model), model.config.fold["slots"], strict=True):
        child = _Child(block, decoder_blocks(dense)[slot["home"]], slot["home"], slot["home"] in seen)
        seen.add(slot["home"])
        for path, part in block.named_modules():
            if isinstance(part, Borrowed):
                child.parts[path.replace(".inner", "")] = part
            elif isinstance(part, OutputNorm):
                child.norms[path] = part
        if child.parts:
            found.append(child)
    return found


def _second_moments(
    dense: PreTrainedModel, children: list[_Child], ids_NT: Tensor, advance: Callable[[int], None]
) -> dict[nn.Module, Tensor]:
    """Σ x xᵀ of the inputs of the children's dense linears, (I, I), float64."""
    moments: dict[nn.Module, Tensor] = {}
    read: Tensor | None = None
    product = torch.empty(0)

    def keep(linear: nn.Module, args: tuple[Tensor, ...]) -> None:
        nonlocal read, product
        if args[0] is not read:  # linears that read the same states share their product
            (read,) = args
            x_MI = read.detach().flatten(0, -2).float()
            product = in_float64(gram_matrix(x_MI))
        moments[linear] = moments[linear] + product if linear in moments else product

    with ExitStack() as stack:
        for linear in {child.home.get_submodule(path) for child in children for path in child.parts}:
            stack.callback(linear.register_forward_pre_hook(keep).remove)
        for ids_BT in _batches(ids_NT):
            last_hidden(dense, ids_BT.to(dense.device))
            advance(len(ids_BT))
    return moments


def _start_norms(
    dense: PreTrainedModel, children: list[_Child], ids_NT: Tensor, advance: Callable[[int], None]
) -> None:
    """γ = Σ n·y / (1 + ridge) Σ n², n the child's normalised output, y what the dense unit added, on the same inputs.

    The child runs beside the dense block, on its inputs; what its attention adds is replaced by what the dense one
    adds, so that its MLP too reads what the dense MLP reads.
    """
    sums: dict[OutputNorm, list[Tensor]] = {}
    wanted: dict[tuple[nn.Module, str], Tensor] = {}

    def stand_in(child: _Child, path: str) -> Callable[..., Tensor]:
        def hook(norm: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            assert isinstance(norm, OutputNorm)
            h = norm.inner(args[0])
            n_MD = nn.functional.layer_norm(h.float(), h.shape[-1:], eps=NORM_EPS).flatten(0, -2)
            y = wanted[child.home, path].view_as(output)
            y_MD = y.float().flatten(0, -2)
            # every token counts alike: the first of a text would outweigh all others
            weight_M1 = 1 / y_MD.square().sum(-1, keepdim=True).clamp_min(1e-12)
            found = [
                in_float64((weight_M1 * n_MD * y_MD).sum(0)),
                in_float64((weight_M1 * n_MD.square()).sum(0)),
            ]
            known = sums.get(norm)
            sums[norm] = found if known is None else [a + b for a, b in zip(known, found, strict=True)]
            return y

        return hook

    def run_child(child: _Child) -> Callable[..., None]:
        def hook(_block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _output: Any) -> None:
            child.block(*args, **kwargs)

        return hook

    with ExitStack() as stack:
        for child in (child for child in children if child.norms and not child.repeat):
            for path, norm in child.norms.items():
                home = child.home

                def keep(_module: nn.Module, _args: Any, output: Tensor, key: Any = (home, path)) -> None:
                    wanted[key] = output.detach()

                stack.callback(home.get_submodule(path).register_forward_hook(keep).remove)
                stack.callback(norm.register_forward_hook(stand_in(child, path)).remove)
            stack.callback(child.home.register_forward_hook(run_child(child), with_kwargs=True).remove)
        for ids_BT in _batches(ids_NT):
            last_hidden(dense, ids_BT.to(dense.device))
            advance(len(ids_BT))
    for norm, (product_D, square_D) in sums.items():
        norm.gamma.copy_((product_D / ((1 + GAMMA_RIDGE) * square_D).clamp_min(1e-30)).float())


def _batches(ids_NT: Tensor) -> tuple[Tensor, ...]:
    parts: tuple[Tensor, ...] = ids_NT.split(max(1, BATCH_TOKENS // ids_NT.shape[1]))
    return parts
