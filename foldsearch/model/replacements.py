"""Fit what replaces a run of blocks to the dense model's residual states before and after it.

A replacement adds to the stream, so its target is what the run added: R = Y − X for states X before and Y after.
The last matrix of a network, `down`, is linear in its features of X, whatever its kind, and so is found in closed form
by ridge regression. The features of `linear` are X itself (ReplaceMe, LinearPatch); those of other kinds are random at
first, except where a kind has some that hold every linear map (`hold_linear_maps`). Ridge is chosen on held-out
sequences.
Then networks with features of their own, and copies of a block (`layer`), train on the same states with mean squared
error (LLM-Streamline section 3). Of all that was found, a network that adds nothing included, the one with the least
held-out error is taken. Random features and this choice are ours.

A token weighs 1 / ‖R‖², so every token's relative error counts the same; the first tokens of a text have states a
hundred times larger than the others', and would be all that is fitted [ours].

Shapes: M tokens, N sequences, T positions, B sequences of a step, D width, H features.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel

from foldsearch.errors import ModelError
from foldsearch.model.blocks import decoder_blocks
from foldsearch.model.evidence import hidden_of, other_inputs
from foldsearch.model.networks import NETWORKS
from foldsearch.model.parts import Replaced
from foldsearch.model.ridge import gram_matrix
from foldsearch.model.states import in_float64
from foldsearch.model.training import LinearStart
from foldsearch.plan.plan import Replacement
from foldsearch.progress import CountProgress

RIDGES = (1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # in mean squares of a feature
CHUNK = 2048  # tokens at a time
LEAST_SIZE = 0.1  # of the mean squared size of what a run adds
ROUNDING = 1e-9  # of a held-out square sum: what the float32 of the states leaves open (its square is 4e-15 a number)
MOST_FEATURES = 8192  # more are not solved for in closed form: their Gram matrix alone would take 0.5 GB


@dataclass(frozen=True, slots=True)
class FitSettings:
    """How replacements are fitted.

    held_out: share of the sequences that ridge and the winner are chosen on; at least one. epochs, learning_rate,
    weight_decay, clip: of the training by AdamW ([C] of LLM-Streamline: 1, 2e-4, 1e-3, 5); epochs 0 is closed form
    alone. batch: sequences of a step. linear: how the kind `linear` is found, by "ridge" or as a "patch" (see
    `align_channels`); None: it adds nothing, for healing to solve.
    """

    held_out: float = 0.25
    epochs: int = 1
    learning_rate: float = 2e-4
    weight_decay: float = 1e-3
    clip: float = 5.0
    batch: int = 2
    seed: int = 0
    linear: LinearStart | None = "ridge"


@dataclass(frozen=True, slots=True, eq=False)
class Fit:
    """A fitted replacement.

    values: parameters by their names in the module, float32 (`layer`: in the model's dtype). errors: mean relative
    squared error on held-out tokens, by what was tried: "nothing" (1 by definition), "closed form" and "trained"; of
    `layer`, "copy" and "trained"; of a patch, "nothing" and "patch". chosen: the one whose values these are: that of
    the least error, but a patch in any case, as in its paper.
    """

    values: dict[str, Tensor]
    errors: dict[str, float]
    chosen: str


def fit_replacement(
    dense: PreTrainedModel,
    slot: Replacement,
    states: Tensor,
    ids_NT: Tensor,
    settings: FitSettings | None = None,
    progress: CountProgress | None = None,
) -> Fit:
    """Fit one replacement.

    Args:
        dense: the dense model.
        slot: which blocks are replaced, and by which kind of network.
        states: (L + 1, N, T, D), from `foldsearch.model.states.residual_states`.
        ids_NT: the tokens of these states; only their length matters (`layer` needs the masks and rotations that the
            dense model makes for it).
        settings: how to fit; None is the defaults.
        progress: called with (done, total) training steps.
    """
    settings = settings or FitSettings()
    run = _Run.cut(states[slot.first], states[slot.last + 1], settings.held_out)
    if slot.is_block:
        return _fit_layer(dense, decoder_blocks(dense)[slot.first], run, ids_NT, settings, progress)
    device = dense.device
    width = dense.config.hidden_size
    net = NETWORKS[slot.kind](width, slot.hidden(width)).to(device)
    net.reset_parameters(torch.Generator().manual_seed(settings.seed))
    tried = {"nothing": _values(net)}
    errors = {"nothing": 1.0}
    if slot.kind == "linear" and settings.linear == "patch":
        net.down.data.copy_(align_channels(*run.train, device))
        return Fit(_values(net), errors | {"patch": run.error(net, settings.batch, device)}, "patch")
    if net.down.shape[1] <= MOST_FEATURES:
        net.hold_linear_maps()
        solve_down(net, run.train, run.held_out)
        tried["closed form"], errors["closed form"] = _values(net), run.error(net, settings.batch, device)
        if errors["closed form"] >= 1:
            _load(net, tried["nothing"])
    # Where only `down` and `bias` can be trained, the closed form has found the best already.
    of_features = {name for name, _ in net.named_parameters()} - {"down", "bias"}
    if of_features and settings.epochs:
        _train(net, net, run.train, settings, progress)
        tried["trained"], errors["trained"] = _values(net), run.error(net, settings.batch, device)
    return _best(tried, errors)


def _best(tried: dict[str, dict[str, Tensor]], errors: dict[str, float]) -> Fit:
    """Take the values with the least held-out error; an error that is no number (training diverged) is never it."""
    chosen = min(errors, key=lambda name: errors[name] if math.isfinite(errors[name]) else math.inf)
    return Fit(tried[chosen], errors, chosen)


@dataclass(frozen=True, slots=True, eq=False)
class _Run:
    """The residual states before and after a run of blocks, each (n, T, D): one part to fit to, one to choose on."""

    train: tuple[Tensor, Tensor]
    held_out: tuple[Tensor, Tensor]

    @classmethod
    def cut(cls, before_NTD: Tensor, after_NTD: Tensor, share: float) -> _Run:
        """Hold out this share of the sequences, the last ones, and at least one."""
        train = len(before_NTD) - max(1, round(share * len(before_NTD)))
        if train <= 0:  # there is one sequence only, so it is fitted to and chosen on
            return cls((before_NTD, after_NTD), (before_NTD, after_NTD))
        return cls((before_NTD[:train], after_NTD[:train]), (before_NTD[train:], after_NTD[train:]))

    @torch.no_grad()
    def error(self, net: Callable[[Tensor], Tensor], batch: int, device: torch.device) -> float:
        """Mean relative squared error, on held-out tokens, of what `net` adds to the stream."""
        parts = [
            _relative(net(before).float(), after - before).flatten()
            for before, after in _pairs(*self.held_out, batch, device)
        ]
        return float(torch.cat(parts).cpu().double().mean())


# ---- closed form


@torch.no_grad()
def solve_down(net: Replaced, train: tuple[Tensor, Tensor], held_out: tuple[Tensor, Tensor]) -> float:
    """Set `down` (and the bias) to the ridge solution with the least error on held-out states.

    Args:
        net: its features stay as they are.
        train, held_out: states before and after the run, each (n, T, D).

    Returns:
        The ridge that was chosen, in mean squares of a feature.

    Raises:
        ModelError: the features are all zero, or not finite.
    """
    bias = net.bias is not None
    gram, cross, _ = _moments(net, *train, bias=bias)
    held_gram, held_cross, held_square = _moments(net, *held_out, bias=bias)
    num_features = net.down.shape[1]
    scale = float(gram.diagonal()[:num_features].mean())
    penalty = torch.zeros(len(gram), dtype=torch.float64, device=gram.device)
    best: tuple[float, float, Tensor] | None = None
    for ridge in RIDGES:
        penalty[:num_features] = ridge * scale  # the bias is free
        penalty[num_features:] = 1e-9 * scale
        factor, failed = torch.linalg.cholesky_ex(gram + penalty.diag())
        if failed:
            continue
        solution_HD = torch.cholesky_solve(cross, factor)
        # ‖R − F·S‖² of the held-out tokens, from their moments alone
        missed = float(
            held_square
            - 2 * (solution_HD * held_cross).sum()
            + (solution_HD * (held_gram @ solution_HD)).sum()
        )
        # Of ridges that miss equally little, but for rounding, the largest: it has the smallest weights.
        if best is None or missed < best[0] + ROUNDING * held_square:
            best = (min(missed, best[0]) if best else missed, ridge, solution_HD)
    if best is None:  # a ridge of the features' own size solves all others
        raise ModelError(
            f"nothing can be fitted on the features of {type(net).__name__}: they are all zero, inf or NaN."
        )
    net.down.copy_(best[2][:num_features].T)
    if net.bias is not None:
        net.bias.copy_(best[2][num_features])
    return best[1]


def _moments(
    net: Replaced, before_NTD: Tensor, after_NTD: Tensor, *, bias: bool
) -> tuple[Tensor, Tensor, float]:
    """Sum over tokens, weighted, in float64: FᵀF (H, H), FᵀR (H, D) and ‖R‖²; F has a column of ones for the bias."""
    size, device = net.down.shape[1] + bias, net.down.device
    gram = in_float64(torch.zeros(size, size, device=device))
    cross = in_float64(torch.zeros(size, net.down.shape[0], device=device))
    square = 0.0
    batch = max(1, CHUNK // before_NTD.shape[1])
    for before_BTD, after_BTD in _pairs(before_NTD, after_NTD, batch, device):
        added = (after_BTD - before_BTD).flatten(0, 1)
        weight_M1 = _sizes(added)[:, None].rsqrt()
        features = net.features(before_BTD.flatten(0, 1))
        if bias:
            features = torch.cat((features, torch.ones_like(features[:, :1])), 1)
        # Products in float64: float32 ones carry the rounding of this processor's kernels, which is about as large as
        # the least ridge, so that the same states gave another solution (a far worse one) on another processor.
        features, added = in_float64(features * weight_M1), in_float64(added * weight_M1)
        gram += gram_matrix(features)
        cross += features.T @ added
        square += float(added.square().sum())
    return gram, cross, square


# ---- LinearPatch


@torch.no_grad()
def align_channels(before_NTD: Tensor, after_NTD: Tensor, device: torch.device) -> Tensor:
    """What LinearPatch adds to the stream for a run of blocks, as one symmetric matrix H (S − 1) Hᵀ, (D, D).

    H is a rotation that spreads the outliers of a few tokens over all channels, S the ratio of each rotated channel's
    mean size after the run to that before it, over all tokens. Source: LinearPatch (arXiv 2505.24680, NeurIPS 2025),
    which multiplies the stream by H S Hᵀ; a network here adds to the stream, hence S − 1. Its H is a Hadamard matrix;
    of widths that are no power of two ours is described at `rotation`.
    """
    turn_DD = rotation(before_NTD.shape[-1]).to(device)
    sizes = torch.zeros(2, len(turn_DD), dtype=torch.float64)
    for pair in _pairs(before_NTD, after_NTD, 1, device):
        for size_D, states_BTD in zip(sizes, pair, strict=True):
            size_D += (states_BTD @ turn_DD).abs().sum((0, 1)).cpu()
    scale_D = (sizes[1] / sizes[0].clamp_min(1e-12)).to(turn_DD)
    return (turn_DD * (scale_D - 1)) @ turn_DD.T


def rotation(width: int) -> Tensor:
    """An orthogonal matrix whose numbers are all of about one size, (D, D).

    The Hadamard matrix of the largest power of two in the width, by Sylvester's construction, times (Kronecker) the
    cosine transform of the odd rest [ours]: of a power of two, a Hadamard matrix over the root of its width.
    """
    odd = width
    turn_DD = torch.ones(1, 1)
    while odd % 2 == 0:
        odd //= 2
        turn_DD = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]) / math.sqrt(2), turn_DD)
    step = torch.arange(odd, dtype=torch.float64)
    cosine = torch.cos(math.pi / odd * (step[None] + 0.5) * step[:, None]) * math.sqrt(2 / odd)
    cosine[0] = math.sqrt(1 / odd)
    return torch.kron(turn_DD, cosine.float())


# ---- training on states


def _train(
    module: nn.Module,
    run: Callable[[Tensor], Tensor],
    states: tuple[Tensor, Tensor],
    settings: FitSettings,
    progress: CountProgress | None,
) -> None:
    """Train with AdamW and a linear decay on the mean relative squared error of what is added to the stream."""
    module.requires_grad_(True)
    parameters = list(module.parameters())
    device = parameters[0].device
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    generator = torch.Generator().manual_seed(settings.seed)
    before_NTD, after_NTD = states
    steps = settings.epochs * math.ceil(len(before_NTD) / settings.batch)
    step = 0
    for _ in range(settings.epochs):
        for rows in torch.randperm(len(before_NTD), generator=generator).split(settings.batch):
            before, after = before_NTD[rows].to(device).float(), after_NTD[rows].to(device).float()
            loss = _relative(run(before).float(), after - before).mean()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, settings.clip)
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * (1 - step / steps)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            if progress is not None:
                progress(step, steps)
    module.requires_grad_(False)


def _fit_layer(
    dense: PreTrainedModel,
    block: nn.Module,
    run: _Run,
    ids_NT: Tensor,
    settings: FitSettings,
    progress: CountProgress | None,
) -> Fit:
    twin = copy.deepcopy(block).float().train(False)
    others, named = tree_map(
        lambda value: value.float() if isinstance(value, Tensor) and value.is_floating_point() else value,
        other_inputs(dense, [block], ids_NT)[0],
    )

    def added(before_BTD: Tensor) -> Tensor:
        """What the block adds to the stream."""
        return hidden_of(twin(before_BTD, *others, **named)) - before_BTD

    errors = {"copy": run.error(added, settings.batch, dense.device)}
    tried = {"copy": _values(block)}
    if settings.epochs:
        _train(twin, added, run.train, settings, progress)
        tried["trained"] = {name: value.to(dense.dtype) for name, value in _values(twin).items()}
        errors["trained"] = run.error(added, settings.batch, dense.device)
    return _best(tried, errors)


# ---- errors and batches


def _relative(made: Tensor, wanted: Tensor) -> Tensor:
    """The squared error of each token as a share of its squared size."""
    return (made - wanted).square().sum(-1) / _sizes(wanted)


def _sizes(added: Tensor) -> Tensor:
    """The squared size of each token, with a lower limit: a token to which a run adds almost nothing must not outweigh
    all others.
    """
    size = added.square().sum(-1)
    return size.clamp_min(max(LEAST_SIZE * float(size.mean()), 1e-12))


def _pairs(
    before_NTD: Tensor, after_NTD: Tensor, batch: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Both tensors in batches, in float32, on the device."""
    for before, after in zip(before_NTD.split(batch), after_NTD.split(batch), strict=True):
        yield before.to(device).float(), after.to(device).float()


def _values(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def _load(module: nn.Module, values: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(values[name])
