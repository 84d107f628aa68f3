"""Recovery: a short training that heals a folded model, and what it trains.

Trained, all in float32 beside frozen dense weights, is what children carry (adapters, γ), and one of (`attach`):

    deltas   a low-rank delta on every linear that runs its own weights, and the norms
    last     all linears and norms of the last three blocks, and the final norm (arXiv 2411.15558, without the head)
    healed   the matrices that healing solves (heal.py)

The head stays the dense model's in every case: KL is exact under one head (judge.py), and a head that is also the
embedding could not be trained alone. Networks in place of blocks keep what they were fitted to: they read the
residual stream itself, where a few numbers are a hundred times the others, and a step of AdamW on their weights undoes
the fit. Deltas and norms are merged into the weights they belong to
before a model is measured or exported, so they cost nothing; merging into an owner changes all its children alike.

Loss, per scored position [ours, after the parts that FoldGPT's abstract names]:

    next_token · next-token loss + kl · KL(dense ‖ folded) + tail · mean((h − h_dense)²) / mean(h_dense²)

with h the hidden states after the final norm: the tail-layer distillation. Next-token loss and KL share their
normaliser log Σ exp z, and their other terms are products of h with one row (see judge.py), so the head runs once.

Steps are relative to what they change. AdamW moves every element by about the learning rate, whatever its size, and the
weights of models differ fivefold (root mean squares of SmolLM2 0.2, of Gemma 3 0.04), their norms a hundredfold. So the
learning rate counts in root mean squares (RMS) of the weights that a parameter changes; see `step_units`.

Shapes: B sequences of a step, P predicting positions, M positions of a chunk, D width, R rank, I inputs, O outputs.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.nn.utils import parametrize
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from foldsearch.errors import FoldsearchError, InputError, is_out_of_memory
from foldsearch.model.blocks import decoder_blocks, family_of
from foldsearch.model.head import head_normaliser, last_hidden, positions_at_once, token_logits
from foldsearch.model.judge import DenseTargets, cross_terms
from foldsearch.model.kept import DamagedFileError, read_tensors, read_words, write_tensors
from foldsearch.model.parts import Borrowed, OutputNorm, Replaced
from foldsearch.model.places import first_touched, places_of
from foldsearch.model.tokens import TokenSet
from foldsearch.model.training import RecoveryTraining, Trained
from foldsearch.paths import printable

TOGETHER = 8  # elements that make one output, of a vector or a factor, which may each move by the whole rate
LEAST = 0.1  # RMS of a vector that is counted at least
# Of AdamW. A recovery is a few dozen steps, so its means forget faster than is usual, 0.9 and 0.999 (docs/log.md).
BETAS = (0.8, 0.99)
LAST_BLOCKS = 3  # arXiv 2411.15558


class Diverged(FoldsearchError):
    """The loss of the recovery, or its gradient, has become infinite or no number."""


class Delta(nn.Module):
    """A linear with a low-rank change to its weights: W + up · down.

    In training mode the change is computed beside the product (a gradient of W itself is never made); in eval mode
    the weights are merged for the length of the call, exactly as the export merges them, so what is measured is
    what ships and no copy of W stays.
    """

    def __init__(self, linear: nn.Module, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self.linear = linear
        weight: Tensor = linear.weight  # type: ignore[assignment]
        inputs, outputs = weight.shape if isinstance(linear, Conv1D) else weight.shape[::-1]
        start_RI = torch.randn(rank, inputs, generator=generator) * inputs**-0.5
        self.down = nn.Parameter(start_RI.to(weight.device))
        self.up = nn.Parameter(torch.zeros(outputs, rank, device=weight.device))

    def merged(self) -> Tensor:
        """The changed weights, in the shape and dtype of the linear's own."""
        weight: Tensor = self.linear.weight  # type: ignore[assignment]
        up, down = self.up.to(weight.dtype), self.down.to(weight.dtype)
        return (
            torch.addmm(weight, down.T, up.T)
            if isinstance(self.linear, Conv1D)
            else torch.addmm(weight, up, down)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., I) to (..., O)."""
        weight: Tensor = self.linear.weight if self.training else self.merged()  # type: ignore[assignment]
        bias: Tensor | None = self.linear.bias  # type: ignore[assignment]
        weight_OI = weight.T if isinstance(self.linear, Conv1D) else weight
        if not self.training:
            return functional.linear(x, weight_OI, bias)
        y: Tensor = _Changed.apply(x, weight_OI, bias, self.down, self.up)  # type: ignore[no-untyped-call]
        return y


class _Changed(torch.autograd.Function):
    """x (W + up · down)' + b, of a frozen W: what the delta adds is added within its product, in both directions.

    Autograd would read and write tensors of the size of x and of y once more for it, 2 % of a training in AVX2
    (docs/log.md).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_OI: Tensor, bias: Tensor | None, down_RI: Tensor, up_OR: Tensor
    ) -> Tensor:
        """Map x (..., I) to (..., O), in the dtype of x."""
        x_MI, down_RI, up_OR = x.flatten(0, -2), down_RI.to(x.dtype), up_OR.to(x.dtype)
        read_MR = x_MI @ down_RI.T
        y_MO: Tensor = functional.linear(x_MI, weight_OI, bias).addmm_(read_MR, up_OR.T)
        ctx.save_for_backward(x_MI, read_MR, weight_OI, down_RI, up_OR)
        return y_MO.view(*x.shape[:-1], len(weight_OI))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, None, None, Tensor, Tensor]:
        """Of x, down and up."""
        x_MI, read_MR, weight_OI, down_RI, up_OR = ctx.saved_tensors
        slope_MO = slope.flatten(0, -2)
        slope_MR = slope_MO @ up_OR
        slope_x: Tensor | None = None
        if ctx.needs_input_grad[0]:
            slope_MI = (slope_MO @ weight_OI).addmm_(slope_MR, down_RI)
            slope_x = slope_MI.view(*slope.shape[:-1], weight_OI.shape[1])
        return slope_x, None, None, slope_MR.T @ x_MI, slope_MO.T @ read_MR


class Shift(nn.Module):
    """A float32 change to a parameter that stays frozen in the model's dtype; together: elements that move as one."""

    def __init__(self, like: Tensor, together: int) -> None:
        super().__init__()
        self.rms, self.together = _rms(like), together
        self.change = nn.Parameter(torch.zeros_like(like, dtype=torch.float32))

    def forward(self, frozen: Tensor) -> Tensor:
        """The changed parameter, in its own dtype."""
        return (frozen.float() + self.change).to(frozen.dtype)


def attach(
    model: PreTrainedModel, delta_rank: int, seed: int = 0, *, trains: Trained = "deltas"
) -> dict[str, nn.Parameter]:
    """Make a folded model trainable in place; the dense weights under it stay frozen and unwritten.

    Args:
        model: a folded one.
        delta_rank: of the deltas, where these are trained.
        seed: of what deltas start from.
        trains: see the top of this module.

    Returns:
        The trained parameters by name, all float32.

    Raises:
        InputError: nothing would be trained.
    """
    _ATTACH[trains](model, delta_rank, seed)
    model.requires_grad_(False)
    trained: dict[str, nn.Parameter] = {}
    for path, module in model.named_modules():
        if isinstance(module, Delta | Borrowed | OutputNorm | Shift):
            for name, parameter in module.named_parameters(recurse=False):
                parameter.requires_grad_(True)
                trained[f"{path}.{name}"] = parameter
    if not trained:
        why = (
            f"trains = '{trains}' is what healing solves, and nothing of this plan is healed. Take trains = 'deltas' "
            "or 'last'."
            if trains == "healed"
            else f"deltas of rank {delta_rank} are none, and nothing else of this plan is trained. Take a rank above 0."
        )
        raise InputError(f"recovery must have something to train, but {why}")
    model.train(model.training)  # what was added is in the model's mode
    return trained


def _attach_deltas(model: PreTrainedModel, delta_rank: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    blocks = decoder_blocks(model)
    for block in blocks:
        for holder in list(block.modules()):
            if isinstance(holder, Delta | Borrowed):
                continue
            for name, child in list(holder.named_children()):
                if delta_rank and isinstance(child, nn.Linear | Conv1D):
                    setattr(holder, name, Delta(child, delta_rank, generator))
    _shift_norms(model, blocks)


def _attach_last(model: PreTrainedModel, *_: int) -> None:
    blocks = list(decoder_blocks(model))[-LAST_BLOCKS:]
    _shift_norms(model, blocks)
    for module in [module for block in blocks for module in block.modules()]:
        if isinstance(module, nn.Linear | Conv1D):
            _shift_weight(module)


def _attach_healed(model: PreTrainedModel, *_: int) -> None:
    places = places_of(model)
    for place in places[first_touched(places) :]:
        for writer in place.writers:
            if isinstance(writer.module, nn.Linear | Conv1D):
                _shift_weight(writer.module)


_ATTACH: dict[Trained, Callable[[PreTrainedModel, int, int], None]] = {
    "deltas": _attach_deltas,
    "last": _attach_last,
    "healed": _attach_healed,
}


def _shift_weight(linear: nn.Linear | Conv1D) -> None:
    inputs = linear.weight.shape[0 if isinstance(linear, Conv1D) else 1]
    parametrize.register_parametrization(linear, "weight", Shift(linear.weight, inputs))


def _shift_norms(model: PreTrainedModel, blocks: Iterable[nn.Module]) -> None:
    final_norm = model.get_submodule(family_of(model.config).final_norm)
    for module in [*(module for block in blocks for module in block.modules()), final_norm]:
        if isinstance(module, nn.Linear | Conv1D | Delta | Borrowed | OutputNorm | Replaced | Shift):
            continue
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.dim() > 1:
                continue  # a short convolution, or experts and what chooses among them: they stay as they are
            parametrize.register_parametrization(module, name, Shift(parameter, parameter.numel()))


@torch.no_grad()
def merge(model: PreTrainedModel) -> PreTrainedModel:
    """Put what `attach` added into the weights, in place: the model is a plain folded model again.

    Merged weights are new tensors; the dense model's are not written.
    """
    for holder in list(model.modules()):
        for name, child in list(holder.named_children()):
            if isinstance(child, Delta):
                child.linear.weight = nn.Parameter(child.merged(), requires_grad=False)
                setattr(holder, name, child.linear)
    for module in list(model.modules()):
        if parametrize.is_parametrized(module):
            for name in list(module.parametrizations):  # type: ignore[arg-type]
                value = getattr(module, name).detach().clone()
                parametrize.remove_parametrizations(module, name, leave_parametrized=False)
                setattr(module, name, nn.Parameter(value, requires_grad=False))
    model.requires_grad_(False).eval()
    return model


def step_units(model: PreTrainedModel) -> dict[str, float]:
    """How far a step at learning rate 1 moves an element of each trained parameter, by name, after `attach` [ours].

    Of low-rank factors: up by the RMS of the weights beside it, down by the RMS of a random start. AdamW moves all
    elements at once, and what D of them do together is D / R times what R of them do. So a vector of width D (norms, γ)
    moves by `TOGETHER` / D of its own RMS, and so it is for the I elements of a matrix that make one output, and for
    the R of a delta, where these are more than `TOGETHER`; adapters of children, which are to become something of their
    own, move by the whole rate. That of a vector counts as `LEAST` at least, so that what starts at or near nothing can
    grow: γ, and biases of norms.
    """
    units: dict[str, float] = {}
    for path, module in model.named_modules():
        if isinstance(module, Delta):
            units[f"{path}.up"] = _share(len(module.down)) * _rms(module.linear.weight)  # type: ignore[arg-type]
        elif isinstance(module, Borrowed) and module.up is not None:
            owner = module.owner
            units[f"{path}.up"] = _rms((owner.linear if isinstance(owner, Delta) else owner).weight)  # type: ignore[arg-type]
        elif isinstance(module, Shift):
            rms = module.rms if module.change.dim() > 1 else max(module.rms, LEAST)
            units[f"{path}.change"] = _share(module.together) * rms
        elif isinstance(module, OutputNorm):
            units[f"{path}.gamma"] = _share(module.gamma.numel()) * max(_rms(module.gamma), LEAST)
        if isinstance(module, Delta | Borrowed) and module.down is not None:
            units[f"{path}.down"] = module.down.shape[1] ** -0.5
    return units


def _share(together: int) -> float:
    return TOGETHER / max(TOGETHER, together)


def _rms(values: Tensor) -> float:
    return float(values.detach().float().square().mean().sqrt())


class Recovery:
    """The recovery training of one folded model; it can stop at any number of tokens and go on, also from disk.

    model: a folded model, changed in place by `attach`. tokens: trained on in this order, then again in random ones.
    targets: what the dense model says on them. total_tokens: where the learning rate's cosine ends. tokens_before: that
    the model was trained on before, in this order of the texts; they count among all others.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        settings: RecoveryTraining,
        tokens: TokenSet,
        targets: DenseTargets,
        total_tokens: int,
        tokens_before: int = 0,
    ) -> None:
        self.model = model
        self.settings = settings
        self.tokens = tokens
        self.targets = targets
        self.total_tokens = max(total_tokens, 1)
        self.tokens_before = self.tokens_done = tokens_before
        self._parts = 1  # that the sequences of a step are taken in
        self.of = ""  # which model it is of, for who finds the state
        self.rate = 1.0  # share of the settings' learning rate that is trained at
        self.trained = attach(model, settings.delta_rank, settings.seed, trains=settings.trains)
        units = step_units(model)
        self._optimizer = torch.optim.AdamW(
            [{"params": [parameter], "unit": units[name]} for name, parameter in self.trained.items()],
            lr=0.0,
            betas=BETAS,
            weight_decay=0.0,
            # Hundreds of small tensors: elsewhere torch takes them together by itself.
            fused=True if model.device.type == "cpu" else None,
        )
        self._order = self._sequences()
        self._pass_over(tokens_before)

    def train(self, until_tokens: int, progress: Callable[[float], None] | None = None) -> None:
        """Train until `until_tokens` tokens in all have been seen.

        Raises:
            Diverged: the loss or its gradient is not finite.
        """
        start = self.tokens_done
        length = self.tokens.ids_NT.shape[1]
        size = self.settings.batch
        self._train_deltas(True)
        try:
            while self.tokens_done < until_tokens:
                rows = [next(self._order) for _ in range(size)]
                self._set_rates(size * length)
                loss = self._step(rows)
                self.tokens_done += size * length
                if not math.isfinite(loss):
                    raise Diverged(
                        f"the recovery's loss or gradient became {loss} after {self.tokens_done} tokens at learning "
                        f"rate {self.settings.learning_rate:g}. Lower the learning rate."
                    )
                if progress is not None:
                    progress(min(1.0, (self.tokens_done - start) / (until_tokens - start)))
        finally:
            self._train_deltas(False)

    def save(self, path: Path) -> None:
        """Write the latest state: all that `load` needs to go on."""
        self._write(path, self._trained_tensors() | self._optimizer_tensors())

    def keep(self, path: Path) -> None:
        """Write the state that is to be rebuilt: what was trained, and nothing else."""
        self._write(path, self._trained_tensors())

    def load(self, path: Path) -> None:
        """Read what `save` wrote: training goes on from there, with the next sequence of the same order.

        Raises:
            DamagedFileError: the file is damaged.
        """
        state = read_tensors(path)
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(state[name])
                if f"{name}.step" in state:
                    self._optimizer.state[parameter] = {
                        key: state[f"{name}.{key}"].to(parameter.device if key != "step" else "cpu")
                        for key in ("step", "exp_avg", "exp_avg_sq")
                    }
        self.tokens_done = saved_tokens(path)
        self._pass_over(self.tokens_done - self.tokens_before)

    @torch.no_grad()
    def go_back(self, trained: Mapping[str, Tensor], rate: float) -> None:
        """Take up an earlier state of the same model, from here on at a lower learning rate.

        Args:
            trained: its parameters by name.
            rate: share of the settings' learning rate.
        """
        for name, parameter in self.trained.items():
            parameter.copy_(trained[name])
        self._optimizer.state.clear()  # Adam's means are of a path that is given up
        self.rate = rate

    def _write(self, path: Path, tensors: dict[str, Tensor]) -> None:
        write_tensors(
            path, tensors, {"tokens": str(self.tokens_done), "trains": self.settings.trains, "of": self.of}
        )

    def _trained_tensors(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self.trained.items()}

    def _optimizer_tensors(self) -> dict[str, Tensor]:
        return {
            f"{name}.{key}": value
            for name, parameter in self.trained.items()
            for key, value in self._optimizer.state.get(parameter, {}).items()
        }

    def _train_deltas(self, mode: bool) -> None:
        """The rest of the model stays in eval mode: the dense answers are without dropout (GPT-2 and OPT have it),
        and its random numbers would make a resumed training another one.
        """
        for module in self.model.modules():
            if isinstance(module, Delta):
                module.train(mode)

    def _sequences(self) -> Iterator[int]:
        """Yield every sequence once, then once more in a random order, and so on without end."""
        generator = random.Random(self.settings.seed)
        order = list(range(len(self.tokens.ids_NT)))
        while True:
            yield from order
            generator.shuffle(order)

    def _pass_over(self, tokens: int) -> None:
        """Leave out the next sequences of the order, which were trained on."""
        for _ in range(tokens // self.tokens.ids_NT.shape[1]):
            next(self._order)

    def _set_rates(self, step_tokens: int) -> None:
        total = max(1, self.total_tokens - self.tokens_before)
        done = (self.tokens_done - self.tokens_before) / total
        warmup = self.settings.warmup
        if done < warmup:
            share = (done + step_tokens / total) / (warmup or 1.0)
        else:
            share = 0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, (done - warmup) / (1 - warmup))))
        for group in self._optimizer.param_groups:
            group["lr"] = self.settings.learning_rate * self.rate * group["unit"] * min(1.0, share)

    def _step(self, rows: list[int]) -> float:
        """One step of the optimizer on these sequences; the loss, or the size of a gradient that is not finite.

        Where memory does not hold them at once they are taken in two halves, from here on: their gradients are summed,
        so the step is the same but for rounding.
        """
        total: float | None = None
        try:
            total = self._gradients(rows)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or self._parts > 1 or len(rows) < 2:
                raise
            self._parts = 2
        if total is None:
            # Not in the handler: its error holds on to what the first try had in memory.
            self._optimizer.zero_grad(set_to_none=True)
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()
            total = self._gradients(rows)
        if not math.isfinite(total):
            return total
        norm = nn.utils.clip_grad_norm_(list(self.trained.values()), self.settings.clip)
        is_finite = math.isfinite(norm)
        if is_finite:  # else a step would leave no number
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return total if is_finite else float(norm)

    def _gradients(self, rows: list[int]) -> float:
        """Compute the gradients of a step, in as many parts as memory asks for; the loss."""
        size = math.ceil(len(rows) / self._parts)
        whole = self._scale(rows)
        total = 0.0
        for start in range(0, len(rows), size):
            total += self._add_gradients(rows[start : start + size], whole)
            if not math.isfinite(total):
                break
        return total

    def _scale(self, rows: list[int]) -> tuple[Tensor, Tensor]:
        """What the loss of a step is divided by: its scored positions, and the power of the dense states there."""
        targets = self.targets.of(rows)
        _, dense_hidden, _ = targets.flat()
        scored = targets.scored_NP.flatten()
        return scored.sum(), dense_hidden[scored].float().square().mean().clamp_min(1e-12)

    def _add_gradients(self, rows: list[int], whole: tuple[Tensor, Tensor]) -> float:
        ids_BT = self.tokens.ids_NT[rows].to(self.model.device)
        hidden = last_hidden(self.model, ids_BT)[:, :-1].flatten(0, 1)
        # The head is frozen, so its part of the graph is walked chunk by chunk and only the gradient of the hidden
        # states is kept: full-vocabulary logits of the batch never exist.
        leaf = hidden.detach().requires_grad_(True)
        total = 0.0
        for loss in self._chunk_losses(leaf, ids_BT[:, 1:].flatten(), rows, whole):
            loss.backward()
            total += float(loss.detach())
        if math.isfinite(total):
            hidden.backward(leaf.grad)
        return total

    def _chunk_losses(
        self, hidden: Tensor, following: Tensor, rows: list[int], whole: tuple[Tensor, Tensor]
    ) -> Iterator[Tensor]:
        """The loss of each chunk of positions, already divided by the scored positions of the step."""
        settings, targets = self.settings, self.targets.of(rows)
        negentropy, dense_hidden, rows_of_head = targets.flat()
        scored = targets.scored_NP.flatten()
        num_scored, power = whole
        size = positions_at_once(self.model)
        for start in range(0, len(hidden), size):
            here = slice(start, start + size)
            hidden_MD = hidden[here]
            normaliser_M = head_normaliser(self.model, hidden_MD)
            next_loss_M = normaliser_M - token_logits(self.model, hidden_MD, following[here])
            cross_M = cross_terms(self.model, hidden_MD, targets, (dense_hidden[here], rows_of_head[here]))
            kl_M = negentropy[here] - cross_M + normaliser_M
            far_M = (hidden_MD.float() - dense_hidden[here].float()).square().mean(-1) / power
            loss_M = settings.next_token * next_loss_M + settings.kl * kl_M + settings.tail * far_M
            yield loss_M.where(scored[here], 0.0).sum() / num_scored


def saved_tokens(path: Path) -> int:
    """How many tokens had been trained on when `Recovery.save` or `Recovery.keep` wrote the file.

    Raises:
        DamagedFileError: the file is damaged.
    """
    words = read_words(path).get("tokens", "")
    if not words.isdecimal():
        raise DamagedFileError(
            f"what was trained says on how many tokens, but '{printable(path)}' says '{printable(words)}'. Put back a "
            "copy of it."
        )
    return int(words)


def saved_trains(path: Path) -> Trained | None:
    """What was trained when `Recovery.save` wrote the file; None where there is no file, or one that does not say.

    Raises:
        DamagedFileError: the file is damaged.
    """
    if not path.exists() or not (words := read_words(path).get("trains", "")):
        return None
    if words not in _ATTACH:
        raise DamagedFileError(
            f"what was trained says how, but '{printable(path)}' says '{printable(words)}'. Put back a copy of it."
        )
    return words


def saved_of(path: Path) -> str | None:
    """Which model the state is of that `Recovery.save` wrote; None where there is no file.

    Raises:
        DamagedFileError: the file is damaged.
    """
    return read_words(path).get("of", "") if path.exists() else None


def load_trained(trained: dict[str, nn.Parameter], path: Path) -> None:
    """Fill the parameters that `attach` returned from what `Recovery.keep` wrote.

    Raises:
        DamagedFileError: the file is damaged.
    """
    saved: dict[str, Any] = read_tensors(path)
    assert saved.keys() == trained.keys(), "the trained parameters are those of the same plan and settings"
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(saved[name])
