"""Ridge regression of what a position lacks on what its matrix reads; see heal.py for what is solved and why.

The text comes in two parts: "fitted", and "held out", which ridges are chosen on. There are two forms, with the same
solutions: sums over tokens (`Moments`), in the size of the features; and the tokens themselves (`Tokens`, the kernel
form), where there are fewer of these.

A ridge is counted in what a column reads, squared, over all of the text: a part takes its tokens' share of it. So a
token weighs against it alike in both parts, and the products of tokens serve both.

Shapes: M tokens, D width of the stream, F features (the last one the bias, where there is one).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
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
# What may be solved in float32: the least eigenvalue is the ridge at least, and the largest one about the number of
# features at most, as each feature that is read adds about 1 to the trace.
MOST_FLOAT32 = 2e4
GRAM_PARTS = 4  # of the columns of a Gram matrix: ten of sixteen products are made, in 0.65 of the time


class RidgeSums(Protocol):
    """What is known of a text, of which a position is solved for.

    Attributes:
        square: of what the fitted tokens lack; no finite number where a state is none.
    """

    square: float

    def add(self, part: str, features_MF: Tensor, wanted_MD: Tensor, weight_M1: Tensor) -> None:
        """Take up the tokens of a batch, all of one part, before anything is solved."""

    def solved(self, ridge: float, parts: Sequence[str]) -> Tensor:
        """The solution on these parts, (F, D), float32, on the writer's device; NaN where rounding leaves none.

        Args:
            ridge: see the top.
            parts: the fitted one, or both.
        """

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


def needs_float64(writer: StreamWriter, ridge: float) -> bool:
    """Whether float32 leaves too little of a solution: a bias is free, so its equations are nearly singular.

    MPS has no float64 and no Cholesky of its own: there, what is in float64 runs on the CPU.
    """
    return writer.has_bias or writer.device.type == "mps" or writer.num_features / ridge > MOST_FLOAT32


def sums_for(writer: StreamWriter, num_tokens: int) -> RidgeSums:
    """What solves faster: sums over features, or over tokens where there are fewer of these."""
    return Tokens(writer) if num_tokens < writer.num_features else Moments(writer)


class Moments:
    """Weighted sums over tokens of each part, float64: FᵀF (F, F), FᵀR (F, D) and ‖R‖²."""

    def __init__(self, writer: StreamWriter) -> None:
        self._writer = writer
        self._grams: dict[str, Tensor] = {}
        self._crosses: dict[str, Tensor] = {}
        self._tokens: dict[str, int] = {}
        self._equations: dict[tuple[tuple[str, ...], torch.dtype], tuple[Tensor, Tensor, Tensor]] = {}
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
        self._tokens[part] = self._tokens.get(part, 0) + len(features_MF)
        if part == "fitted":
            self.square += float(wanted_MD.square().sum(dtype=torch.float64))

    def solved(self, ridge: float, parts: Sequence[str]) -> Tensor:
        """The solution on these parts."""
        dtype = torch.float64 if needs_float64(self._writer, ridge) else torch.float32
        gram_FF, cross_FD, root_F = self._equations_of(tuple(parts), dtype)
        size = len(gram_FF) - self._writer.has_bias
        regular_FF = gram_FF.clone()
        regular_FF.diagonal()[:size] += ridge
        regular_FF.diagonal()[size:] += 1.0
        factor_FF, failed = torch.linalg.cholesky_ex(regular_FF)
        if failed:
            return torch.full_like(cross_FD, math.nan, device=self._writer.device, dtype=torch.float32)
        solution_FD = torch.cholesky_solve(cross_FD, factor_FF) / root_F[:, None]
        return solution_FD.to(self._writer.device, torch.float32)

    def error(self, ridge: float, share: float) -> None:
        """None: a product of two such sums takes longer than the tokens themselves."""

    def _equations_of(self, parts: tuple[str, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Gram matrix and cross products in units in which a ridge is the same for all columns; and these units.

        The latest ones are kept, for the next ridge.
        """
        if (parts, dtype) not in self._equations:
            gram_FF, cross_FD = (_sum_of(sums, parts) for sums in (self._grams, self._crosses))
            size = len(gram_FF) - self._writer.has_bias
            square_F = _sum_of({part: gram.diagonal() for part, gram in self._grams.items()}, self._grams)
            mean = float(square_F[:size].mean())
            square_F[:size].clamp_(min=LEAST_SQUARE * mean)
            square_F[size:] = BIAS_RIDGE * mean
            share = sum(self._tokens[part] for part in parts) / sum(self._tokens.values())
            root_F = (share * square_F).sqrt()
            gram_FF /= root_F
            gram_FF /= root_F[:, None]
            cross_FD /= root_F[:, None]
            made = gram_FF.to(dtype), cross_FD.to(dtype), root_F.to(dtype)
            self._equations = {(parts, dtype): made}
        return self._equations[parts, dtype]


def _sum_of(values: Mapping[str, Tensor], parts: Iterable[str]) -> Tensor:
    """The sum over some parts, in memory of its own."""
    first, *others = (values[part] for part in parts)
    total = first.clone()
    for value in others:
        total += value
    return total


class Tokens:
    """The weighted tokens themselves, for few of them: one equation a token (the kernel form of ridge regression).

    With R the diagonal of the ridges the solution is R⁻¹ Fᵀ (F R⁻¹ Fᵀ + 1)⁻¹ Y.
    """

    def __init__(self, writer: StreamWriter) -> None:
        self._writer = writer
        self._rows: dict[str, list[tuple[Tensor, Tensor]]] = {"fitted": [], "held out": []}
        self._made: _Kernel | None = None  # once, for all ridges and both parts
        self._foretold: dict[float, Tensor | None] = {}  # by the ridge, for any share
        self.square = 0.0

    def add(self, part: str, features_MF: Tensor, wanted_MD: Tensor, weight_M1: Tensor) -> None:
        """Take up the tokens of a batch, all of one part."""
        root_M1 = weight_M1.sqrt()
        self._rows[part].append((features_MF * root_M1, wanted_MD * root_M1))
        if part == "fitted":
            self.square += float(self._rows[part][-1][1].square().sum(dtype=torch.float64))

    def solved(self, ridge: float, parts: Sequence[str]) -> Tensor:
        """The solution on these parts."""
        kernel = self._kernel
        num = kernel.num_fitted if tuple(parts) == ("fitted",) else len(kernel.wanted_MD)
        factor_MM = kernel.factor(num, ridge, exact=needs_float64(self._writer, ridge))
        if factor_MM is None:
            size = (self._writer.num_features, kernel.wanted_MD.shape[1])
            return torch.full(size, math.nan, device=self._writer.device)
        dual_MD = torch.cholesky_solve(kernel.wanted_MD[:num].to(factor_MM), factor_MM)
        return kernel.solution(dual_MD, ridge)

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
        left_HD = self._kernel.wanted_MD[self._kernel.num_fitted :] - share * foretold_HD
        total = float(left_HD.square().sum(dtype=torch.float64))
        return math.inf if math.isnan(total) else total / len(left_HD)

    def _foretell(self, ridge: float) -> Tensor | None:
        """What the solution on the fitted tokens adds to held-out ones; None where rounding leaves none."""
        kernel, exact = self._kernel, needs_float64(self._writer, ridge)
        fitted = slice(kernel.num_fitted)
        factor_MM = kernel.factor(kernel.num_fitted, ridge, exact=exact)
        if factor_MM is None:
            return None
        others_MH = kernel.products(fitted, slice(kernel.num_fitted, None), ridge, exact=exact)
        shares_MH = torch.cholesky_solve(others_MH, factor_MM).to(kernel.wanted_MD)
        return shares_MH.T @ kernel.wanted_MD[fitted]

    @property
    def _kernel(self) -> _Kernel:
        if self._made is None:
            features, wanted = zip(*self._rows["fitted"], *self._rows["held out"], strict=True)
            num_fitted = sum(len(rows) for rows, _ in self._rows["fitted"])
            self._made = _Kernel.of(torch.cat(features), torch.cat(wanted), num_fitted, self._writer.has_bias)
        return self._made


@dataclass(frozen=True, slots=True, eq=False)
class _Kernel:
    """Both parts' tokens, the fitted ones first, whatever the ridge. Features are without the bias.

    Attributes:
        num_fitted: tokens of the first part.
        features_MF: in units in which a ridge is the same for all columns, float32.
        root_F: these units.
        products_MM: of tokens, float32.
        wanted_MD: float32.
        bias_MB: of the bias, in its units, (M, 1), float64; (M, 0) without one.
        bias_root: its units.
    """

    num_fitted: int
    features_MF: Tensor
    root_F: Tensor
    products_MM: Tensor
    wanted_MD: Tensor
    bias_MB: Tensor
    bias_root: float

    @classmethod
    def of(cls, features_MF: Tensor, wanted_MD: Tensor, num_fitted: int, has_bias: bool) -> _Kernel:
        size = features_MF.shape[1] - has_bias
        own_MF = features_MF[:, :size]
        square_F = own_MF.square().sum(0)
        mean = float(square_F.mean())
        root_F = square_F.clamp_min(LEAST_SQUARE * mean).sqrt()
        scaled_MF = own_MF / root_F
        bias_root = (BIAS_RIDGE * mean) ** 0.5
        bias_MB = features_MF[:, size:] / bias_root if has_bias else features_MF[:, :0]
        return cls(
            num_fitted,
            scaled_MF,
            root_F,
            gram_matrix(scaled_MF.T),
            wanted_MD,
            in_float64(bias_MB),
            bias_root,
        )

    def products(self, rows: slice, columns: slice, ridge: float, *, exact: bool) -> Tensor:
        """F R⁻¹ Fᵀ of some tokens with others, where the former are a part that is solved on."""
        share = len(self.wanted_MD[rows]) / len(self.wanted_MD)
        part_MM = self.products_MM[rows, columns]
        part_MM = (in_float64(part_MM) if exact else part_MM) / (ridge * share)
        if self.bias_MB.shape[1]:
            part_MM += self.bias_MB[rows] @ self.bias_MB[columns].T / share
        return part_MM

    def factor(self, num: int, ridge: float, *, exact: bool) -> Tensor | None:
        """Of F R⁻¹ Fᵀ + 1 of the first tokens, by Cholesky; None where rounding leaves none.

        Args:
            num: of tokens.
            ridge: see the top.
            exact: in float64, else in float32.
        """
        regular_MM = self.products(slice(num), slice(num), ridge, exact=exact)
        regular_MM.diagonal().add_(1.0)
        factor_MM, failed = torch.linalg.cholesky_ex(regular_MM)
        return None if failed else factor_MM

    def solution(self, dual_MD: Tensor, ridge: float) -> Tensor:
        """R⁻¹ Fᵀ times what was solved for the first tokens, (F, D), float32, the bias last."""
        num = len(dual_MD)
        share = num / len(self.wanted_MD)
        solution_FD = self.features_MF[:num].T @ (dual_MD / (ridge * share)).to(self.features_MF)
        solution_FD /= self.root_F[:, None]
        bias_1D = self.bias_MB[:num].T @ dual_MD.to(self.bias_MB) / (share * self.bias_root)
        return torch.cat((solution_FD, bias_1D.to(solution_FD))) if len(bias_1D) else solution_FD
