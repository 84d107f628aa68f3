"""The networks that can stand in place of a run of blocks, one class a kind; plan/kinds.py has their names and prices.

This file is shipped inside folded exports, so it needs torch only and nothing of foldsearch.

A network reads n = x / rms(x) where its features are not linear in x [ours]: the states of the first tokens of a text
are a hundred times larger than the others', and products of them drown everything.

Shapes: D width of the residual stream, H hidden width.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from .parts import NORM_EPS, Replaced


class Linear(Replaced):
    """down · x + bias: one matrix; with the stream itself, x + down · x + bias (ReplaceMe, LinearPatch)."""

    def __init__(self, width: int, _hidden: int) -> None:
        super().__init__(down=(width, width), bias=(width,))

    def features(self, x: Tensor) -> Tensor:
        """The input itself, (..., D)."""
        return x


class FeedForward(Replaced):
    """down · relu(up · n + up_bias) + bias (LLM-Streamline section 3). up (H, D), up_bias (H)."""

    up: nn.Parameter
    up_bias: nn.Parameter

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__(down=(width, hidden), up=(hidden, width), bias=(width,), up_bias=(hidden,))

    def features(self, x: Tensor) -> Tensor:
        """From x (..., D) to (..., H)."""
        return functional.relu(functional.linear(_normal(x), self.up.to(x.dtype), self.up_bias.to(x.dtype)))

    @torch.no_grad()
    def hold_linear_maps(self) -> None:
        """relu of n and of −n come first: n = relu(n) − relu(−n)."""
        width, hidden = self.down.shape
        if hidden >= 2 * width:
            identity = torch.eye(width, device=self.up.device)
            self.up[:width] = identity
            self.up[width : 2 * width] = -identity


class SwiGLU(Replaced):
    """down · (silu(gate · n) * up · n), without biases (LLM-Streamline section 3). up and gate (H, D)."""

    up: nn.Parameter
    gate: nn.Parameter

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__(down=(width, hidden), up=(hidden, width), gate=(hidden, width))

    def features(self, x: Tensor) -> Tensor:
        """From x (..., D) to (..., H)."""
        n = _normal(x)
        up = functional.linear(n, self.up.to(x.dtype))
        return functional.silu(functional.linear(n, self.gate.to(x.dtype))) * up


def _normal(x: Tensor) -> Tensor:
    return functional.rms_norm(x.float(), x.shape[-1:], eps=NORM_EPS).to(x.dtype)


# By the names of plan/kinds.py: from the model's width and the hidden width to a network that adds nothing yet.
NETWORKS: dict[str, Callable[[int, int], Replaced]] = {
    "linear": Linear,
    "ffn": FeedForward,
    "swiglu": SwiGLU,
}
