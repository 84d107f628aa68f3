"""What stands in for a unit, or for one of its linears, in a folded model.

This file is shipped inside folded exports, so it needs torch only and nothing of foldsearch.

Shapes: B batch, T tokens, D width of the residual stream, I inputs and O outputs of a linear, R rank of an adapter.
A leading `...` is any shape: OPT's MLP sees (B·T, D), the others (B, T, D).
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

GAMMA_START = 0.01  # a child starts near identity; FlexiGPT section 3 says "small" and gives no number
NORM_EPS = 1e-6


class Borrowed(nn.Module):
    """A linear that runs another block's weights, with a low-rank adapter of its own where rank > 0.

        y = owner(x) + up · down · x

    The owner is looked up at every call, by the module that holds it and its name there: it is not a submodule, so
    the state dict holds its weights once, and what is put in the owner's place later is run here too. `copy.deepcopy`
    of the whole model keeps the link inside the copy.

    Parameters: down (R, I), up (O, R). They may be float32 in a bfloat16 model; the product is taken in x's dtype.
    Source: FlexiGPT section 4 and Relaxed Recursive Transformers section 3 for the adapter.
    """

    down: nn.Parameter | None
    up: nn.Parameter | None

    def __init__(self, holder: nn.Module, name: str, inputs: int, outputs: int, rank: int) -> None:
        super().__init__()
        self._owner = (holder, name)  # a tuple hides the module from register_module
        self.inputs, self.outputs, self.rank = inputs, outputs, rank
        if rank:
            self.down = nn.Parameter(torch.empty(rank, inputs))
            self.up = nn.Parameter(torch.empty(outputs, rank))
            self.reset_parameters()
        else:
            self.register_parameter("down", None)
            self.register_parameter("up", None)

    @property
    def owner(self) -> nn.Module:
        """The module whose weights this one runs."""
        holder, name = self._owner
        module: nn.Module = getattr(holder, name)
        return module

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Up is zero, so the adapter starts as nothing; down is random, so that up gets a gradient."""
        if self.down is not None and self.up is not None:
            device = None if generator is None else generator.device
            start_RI = torch.randn(self.rank, self.inputs, generator=generator, device=device)
            self.down.copy_(start_RI * self.inputs**-0.5)
            self.up.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """From x (..., I) to (..., O)."""
        holder, name = self._owner
        y: Tensor = getattr(holder, name)(x)
        if self.down is not None and self.up is not None:
            y = y + functional.linear(functional.linear(x, self.down.to(x.dtype)), self.up.to(x.dtype))
        return y

    def extra_repr(self) -> str:
        """What print(model) shows."""
        return f"inputs={self.inputs}, outputs={self.outputs}, rank={self.rank}"


class OutputNorm(nn.Module):
    """The normalised output of a borrowed unit: (h − mean) / std · γ over the width, in float32 (FlexiGPT section 3).

    It wraps the module whose output is added to the residual stream. Parameter: gamma (D).
    """

    def __init__(self, inner: nn.Module, width: int) -> None:
        super().__init__()
        self.inner = inner
        self.gamma = nn.Parameter(torch.empty(width))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Small, so that the unit starts near nothing. `generator` is not used: the start is not random."""
        self.gamma.fill_(GAMMA_START)

    def forward(self, x: Tensor) -> Tensor:
        """From x (..., I) to (..., D)."""
        h: Tensor = self.inner(x)
        normal = functional.layer_norm(h.float(), h.shape[-1:], eps=NORM_EPS)
        return (normal * self.gamma.float()).to(h.dtype)


class Replaced(nn.Module, ABC):
    """A small network in place of a run of blocks: what they add to the residual stream, as a function of its input.

        down · features(x) + bias

    A kind of network (networks.py) says which parameters there are, by name and shape, and what the features are.
    Parameters: down (D, H) and, in some kinds, bias (D), both found in closed form; the others make the features. They
    may be float32 in a bfloat16 model; products are taken in x's dtype. That the network adds to the stream, and so
    starts as nothing, is ours.

    Attributes:
        divisor: what the block multiplies the output by before it adds it (Granite), which is undone here.
    """

    down: nn.Parameter
    bias: nn.Parameter | None
    divisor: float = 1.0

    def __init__(self, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))
        if "bias" not in shapes:
            self.register_parameter("bias", None)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """It adds nothing at first: down and vectors are zero; matrices are random, so that down gets a gradient.

        A network with a vector that multiplies must set it here: all-zero features fit nothing.
        """
        for name, parameter in self.named_parameters():
            if name != "down" and parameter.dim() > 1:
                start = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(start * parameter.shape[1] ** -0.5)
            else:
                parameter.zero_()

    @abstractmethod
    def features(self, x: Tensor) -> Tensor:
        """What `down` reads, (..., H), from x (..., D)."""

    def hold_linear_maps(self) -> None:
        """Set the features to some of which every linear map is a sum, if the kind has such; else leave them."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """From hidden_states (..., D) to what is added to them, (..., D); over the divisor."""
        bias = None if self.bias is None else self.bias.to(hidden_states.dtype)
        added = functional.linear(self.features(hidden_states), self.down.to(hidden_states.dtype), bias)
        return added if self.divisor == 1 else added / self.divisor

    def extra_repr(self) -> str:
        """What print(model) shows."""
        return f"width={self.down.shape[0]}, hidden={self.down.shape[1]}"


class AbsentAttention(nn.Module):
    """An attention that is not there: it adds nothing to the residual stream and caches nothing."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """hidden_states (B, T, D) to zeros of the same shape, and no attention weights."""
        return torch.zeros_like(hidden_states), None


class AbsentMLP(nn.Module):
    """An MLP, or a convolution, that is not there: it adds nothing to the residual stream and caches nothing."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """hidden_states (..., D) to zeros of the same shape."""
        return torch.zeros_like(hidden_states)
