"""Ridge regression of what a position lacks on what its matrix reads; see heal.py for what is solved and why.

The text comes in two parts: "fitted", and "held out", which ridges are chosen on. There are two forms, with the same
solutions: sums over tokens (`Moments`), in the size of the features; and the tokens themselves (`Tokens`, the kernel
form), where there are fewer of these.

Shapes: M tokens, D width of the stream, F features (the last one the bias, where there is one).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from foldsearch.model.places import StreamWriter
from foldsearch.model.states import in_float64

LEAST_SQUARE = (
    1e-6  # of the mean square: a column that reads next to nothing counts as one that reads so much
)
BIAS_RIDGE = 1e-9  # a bias is free
# What is factored in float32 where a ridge is only tried: the least eigenvalue is 1, and the largest one at most the
# number of features over the ridge, as each feature adds 1 over the ridge to the trace.
MOST_FLOAT32 = 2e4
GRAM_PARTS = 4  # of the columns of a Gram matrix: ten of sixteen products are made, in 0.65 of the time


class RidgeSums(Protocol):
    """What is known of a text, of which a position is solved for.

    Attributes:
        square: of what the fitted tokens lack; no finite number where a state is none.
    """

    square: float

    def add(self, part: str, features_MF: Tensor, wanted_MD: Tensor, weight_M1: Tensor) -> None:
        """Take up the tokens of a batch, all of one part."""

    def solved(self, ridge: float, parts: Sequence[str]) -> Tensor:
        """The solution on these parts, (F, D), float32, on the writer's device; NaN where rounding leaves none."""

    def error(self, ridge: float, share: float) -> float | None:
        """Mean relative squared error on the held-out tokens of a share of the solution on the fitted ones, which is
        not made; None where it is faster to make it and to run the tokens, or the sums do not tell.
        """


def gram_matrix(features_MF: Tensor) -> Tensor:
    """FᵀF (F, F). It is symmetric, so parts below the diagonal are copies of those above it."""
    parts = features_MF.tensor_split(GRAM_PARTS, dim=1)
    gram_FF = features_MF.new_empty(features_MF.shape[1], features_MF.shape[1])
    start = 0
    for part_MP in parts:
        end = start + part_MP.shape[1]
        gram_FF[start:end, start:] = part_MP.T @ features_MF[:, start:]
        gram_FF[end:, start:end] = gram_FF[start:end, end:].T
        start = end
    return gram_FF


def sums_for(writer: StreamWriter, num_tokens: int) -> RidgeSums:
    """What solves faster: sums over features, or over tokens where there are fewer of these."""
    return Tokens(writer) if num_tokens < writer.num_features else Moments(writer)


class Moments:
    """Weighted sums over tokens of each part, float64: FᵀF (F, F), FᵀR (F, D) and ‖R‖²."""

    def __init__(self, writer: StreamWriter) -> None:
        self._writer = writer
        self._grams: dict[str, Tensor] = {}
        self._crosses: dict[str, Tensor] = {}
        self.square = 0.0

    def add(self, part: str, features_MF: Tensor, wanted_MD: Tensor, weight_M1: Tensor) -> None:
        """Take up the tokens of a batch, all of one part."""
        root_M1 = weight_M1.sqrt()
        features_MF, wanted_MD = features_MF * root_M1, wanted_MD * root_M1
        # The products of a batch in float32, their sums over batches in float64: the least ridge is far above what
        # that leaves open, and products in float64 take twice the time.
        for sums, product in (
            (self._grams, gram_matrix(features_MF)),
            (self._crosses, features_MF.T @ wanted_MD),
        ):
            product = in_float64(product)
            sums[part] = sums[part] + product if part in sums else product
        if part == "fitted":
            self.square += float(wanted_MD.square().sum(dtype=torch.float64))

    def solved(self, ridge: float, parts: Sequence[str]) -> Tensor:
        """The solution on these parts."""
        gram_FF, cross_FD = (self._over(sums, parts) for sums in (self._grams, self._crosses))
        size = len(gram_FF) - self._writer.has_bias
        diagonal = gram_FF.diagonal().clone()
        mean = float(diagonal[:size].mean())
        gram_FF.diagonal()[:size] += ridge * diagonal[:size].clamp_min(LEAST_SQUARE * mean)
        gram_FF.diagonal()[size:] += BIAS_RIDGE * mean
        factor_FF, failed = torch.linalg.cholesky_ex(gram_FF)
        if failed:
            return torch.full_like(cross_FD, math.nan, device=self._writer.device, dtype=torch.float32)
        return torch.cholesky_solve(cross_FD, factor_FF).to(self._writer.device, torch.float32)

    def error(self, ridge: float, share: float) -> None:
        """None: a product of two such sums takes longer than the tokens themselves."""

    @staticmethod
    def _over(sums: dict[str, Tensor], parts: Sequence[str]) -> Tensor:
        total = sums[parts[0]].clone()
        for part in parts[1:]:
            total += sums[part]
        return total


class Tokens:
    """The weighted tokens themselves, for few of them: one equation a token (the kernel form of ridge regression).

    With R the diagonal of the ridges the solution is R⁻¹ Fᵀ (F R⁻¹ Fᵀ + 1)⁻¹ Y.
    """

    def __init__(self, writer: StreamWriter) -> None:
        self._writer = writer
        self._rows: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self._kernels: dict[tuple[str, ...], _Kernel] = {}  # once, for all ridges
        self._foretold: dict[float, Tensor | None] = {}  # by the ridge, for any share
        self.square = 0.0

    def add(self, part: str, features_MF: Tensor, wanted_MD: Tensor, weight_M1: Tensor) -> None:
        """Take up the tokens of a batch, all of one part."""
        root_M1 = weight_M1.sqrt()
        self._rows.setdefault(part, []).append((features_MF * root_M1, wanted_MD * root_M1))
        if part == "fitted":
            self.square += float(self._rows[part][-1][1].square().sum(dtype=torch.float64))

    def solved(self, ridge: float, parts: Sequence[str]) -> Tensor:
        """The solution on these parts."""
        kernel = self._kernel(*parts)
        factor_MM = kernel.factor(ridge)
        if factor_MM is None:
            size = (kernel.scaled_MF.shape[1] + self._writer.has_bias, kernel.wanted_MD.shape[1])
            return torch.full(size, math.nan, device=self._writer.device)
        dual_MD = torch.cholesky_solve(in_float64(kernel.wanted_MD), factor_MM)
        solution_FD = kernel.scaled_MF.T @ (dual_MD / ridge).to(kernel.scaled_MF)
        if self._writer.has_bias:
            solution_FD = torch.cat((solution_FD, (kernel.scaled_bias_1M @ dual_MD).to(solution_FD)))
        return solution_FD

    def error(self, ridge: float, share: float) -> float | None:
        """In the size of the tokens: with k the products of rows, held-out ones are foretold as k_hf (k_ff + 1)⁻¹ Y.

        None through a norm, where what a token lacks is no linear function of what is added.
        """
        if self._writer.norm is not None:
            return None
        if ridge not in self._foretold:
            self._foretold[ridge] = self._foretell(ridge)
        foretold_HD = self._foretold[ridge]
        if foretold_HD is None:
            return math.inf
        _, wanted_HD = self._joined("held out")
        left_HD = wanted_HD - share * foretold_HD
        total = float(left_HD.square().sum(dtype=torch.float64))
        return math.inf if math.isnan(total) else total / len(left_HD)

    def _foretell(self, ridge: float) -> Tensor | None:
        """What the solution on the fitted tokens adds to held-out ones; None where rounding leaves none."""
        kernel = self._kernel("fitted")
        exact = self._writer.has_bias or self._writer.device.type == "mps"
        exact = exact or kernel.scaled_MF.shape[1] / ridge > MOST_FLOAT32
        factor_MM = kernel.factor(ridge, exact=exact)
        if factor_MM is None:
            return None
        held_out_HF, _ = self._joined("held out")
        if kernel.others_MH is None:
            kernel.others_MH = kernel.products_with(held_out_HF)
        others_MH = (in_float64(kernel.others_MH) if exact else kernel.others_MH) / ridge
        if self._writer.has_bias:
            others_MH += kernel.scaled_bias_1M.T @ in_float64(held_out_HF[:, -1:].T)
        shares_MH = torch.cholesky_solve(others_MH, factor_MM).to(kernel.wanted_MD)
        return shares_MH.T @ kernel.wanted_MD

    def _joined(self, *parts: str) -> tuple[Tensor, Tensor]:
        features, wanted = zip(*(row for part in parts for row in self._rows[part]), strict=True)
        return (features[0], wanted[0]) if len(features) == 1 else (torch.cat(features), torch.cat(wanted))

    def _kernel(self, *parts: str) -> _Kernel:
        if parts not in self._kernels:
            self._kernels[parts] = _Kernel.of(*self._joined(*parts), self._writer.has_bias)
        return self._kernels[parts]


@dataclass(slots=True, eq=False)
class _Kernel:
    """Tokens that are fitted to, whatever the ridge. Features are without the bias.

    Attributes:
        scaled_MF: features over the squares that their penalty goes by, float32.
        products_MM: of features and scaled features, float32.
        wanted_MD: float32.
        scaled_bias_1M, bias_products_MM: of the bias, its ridge in them, float64; 0 without one.
        others_MH: of scaled features and those of held-out tokens, float32; when it was asked for.
    """

    scaled_MF: Tensor
    products_MM: Tensor
    wanted_MD: Tensor
    scaled_bias_1M: Tensor
    bias_products_MM: Tensor
    others_MH: Tensor | None = None

    @classmethod
    def of(cls, features_MF: Tensor, wanted_MD: Tensor, has_bias: bool) -> _Kernel:
        size = features_MF.shape[1] - has_bias
        own_MF = features_MF[:, :size]
        square_F = own_MF.square().sum(0)
        mean = float(square_F.mean())
        scaled_MF = own_MF / square_F.clamp_min(LEAST_SQUARE * mean)
        products_MM = scaled_MF @ own_MF.T
        bias_1M = in_float64(features_MF[:, size:].T if has_bias else products_MM.new_zeros(1, 1))
        scaled_1M = bias_1M / (BIAS_RIDGE * mean) if has_bias else bias_1M
        return cls(scaled_MF, products_MM, wanted_MD, scaled_1M, bias_1M.T @ scaled_1M)

    def products_with(self, features_HF: Tensor) -> Tensor:
        """With the features of other tokens, without the bias."""
        return self.scaled_MF @ features_HF[:, : self.scaled_MF.shape[1]].T

    def factor(self, ridge: float, *, exact: bool = True) -> Tensor | None:
        """Of F R⁻¹ Fᵀ + 1, by Cholesky; None where rounding leaves none. `exact`: in float64, else in float32."""
        regular_MM = (in_float64(self.products_MM) if exact else self.products_MM) / ridge
        if exact:
            regular_MM += self.bias_products_MM
        regular_MM.diagonal().add_(1.0)
        factor_MM, failed = torch.linalg.cholesky_ex(regular_MM)
        return None if failed else factor_MM
