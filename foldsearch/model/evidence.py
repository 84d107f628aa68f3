"""What the dense model tells about its blocks, with nothing trained.

Three rankings come from here: Block Influence (ShortGPT, arXiv 2403.03853; FlexiGPT, section 3), the cosine window
(LLM-Streamline, arXiv 2403.19135) and greedy removal (SLEB, arXiv 2402.09025). FoldGPT's two cosines (its Fig. 2)
are the same measurement.

Shapes: N sequences, B sequences of a batch, T positions, D width, V vocabulary, C positions of a chunk, L blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from foldsearch.errors import InputError
from foldsearch.model.blocks import decoder_blocks, family_of, residual_multiplier
from foldsearch.model.head import judged_logits, last_hidden
from foldsearch.model.tokens import TokenSet
from foldsearch.progress import CountProgress

RunBlock = Callable[[int, Tensor, Callable[[Tensor], Tensor]], Tensor]
"""Called with a block's number, its input and the block itself; returns its output."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """Cosines between the hidden states of the dense model, each a mean over the tokens of the text.

    All states are taken on the residual stream, before the final norm.

    Attributes:
        block_cosine: per block, between its input and its output. Block Influence is 1 minus this.
        start_cosine: per block, between its output and the input of block 0.
        window_cosine: `[first][length - 1]`, between the input of block `first` and the output of block
            `first + length - 1`.
        attention_cosine: per block, between its input and the same with what its attention adds.
        tokens: how many tokens the means are over.
    """

    block_cosine: tuple[float, ...]
    start_cosine: tuple[float, ...]
    window_cosine: tuple[tuple[float, ...], ...]
    attention_cosine: tuple[float, ...]
    tokens: int


@dataclass(frozen=True, slots=True)
class GreedyResult:
    """The order in which greedy removal drops blocks.

    Attributes:
        order: blocks, first dropped first. To drop n, take the first n.
        losses: next-token loss (nats a token) after each drop.
        dense_loss: the same loss of the dense model.
        tokens: length of the text in tokens.
        evaluations: how often the text was run, counting a run that starts in the middle as one.
    """

    order: tuple[int, ...]
    losses: tuple[float, ...]
    dense_loss: float
    tokens: int
    evaluations: int


@torch.no_grad()
def measure_evidence(
    dense: PreTrainedModel, tokens: TokenSet, *, batch_size: int = 4, progress: CountProgress | None = None
) -> Evidence:
    """Measure the cosines of FoldGPT's Fig. 2 and those of every window of blocks.

    Args:
        dense: a causal language model of transformers, in eval mode.
        tokens: the text. What a tokenizer puts in front of it runs too, but its cosines do not count: its states are
            the same in every sequence, and far out (docs/log.md).
        batch_size: sequences that run together.
        progress: called after every batch.

    Raises:
        InputError: `tokens` is empty.
    """
    ids_NT = tokens.ids_NT
    _check_ids(ids_NT, least=1)
    blocks = decoder_blocks(dense)
    num_states = len(blocks) + 1
    dot_LL = torch.zeros(num_states, num_states, dtype=torch.float64)
    states_BTD: list[Tensor] = []
    added_BTD: list[Tensor] = []
    attention = torch.zeros(len(blocks), dtype=torch.float64)
    family, multiplier = family_of(dense.config), residual_multiplier(dense.config)
    handles = [block.register_forward_pre_hook(_keep_input(states_BTD), with_kwargs=True) for block in blocks]
    handles.append(
        blocks[-1].register_forward_hook(lambda _module, _args, out: states_BTD.append(hidden_of(out)))
    )
    handles += [
        block.get_submodule(family.attention_of(block).output).register_forward_hook(
            lambda _module, _args, out: added_BTD.append(out)
        )
        for block in blocks
    ]
    try:
        for start in range(0, len(ids_NT), batch_size):
            states_BTD.clear()
            added_BTD.clear()
            last_hidden(dense, ids_NT[start : start + batch_size].to(dense.device))
            of_text_BT = tokens.text_NT[start : start + batch_size].to(dense.device)
            unit_LX = torch.stack(
                [nn.functional.normalize(state[of_text_BT].float(), dim=-1).flatten() for state in states_BTD]
            )
            # The unit vectors of all tokens in one row: the product sums the cosines over tokens.
            dot_LL += (unit_LX @ unit_LX.T).cpu().double()
            attention += (
                torch.stack(
                    [
                        nn.functional.cosine_similarity(
                            state.float(), (state + multiplier * added).float(), dim=-1
                        )[of_text_BT].sum()
                        for state, added in zip(states_BTD, added_BTD, strict=False)  # one state more
                    ]
                )
                .cpu()
                .double()
            )
            if progress is not None:
                progress(min(start + batch_size, len(ids_NT)), len(ids_NT))
    finally:
        for handle in handles:
            handle.remove()
    num_tokens = int(tokens.text_NT.sum())
    cosine = (dot_LL / num_tokens).clamp(-1.0, 1.0).tolist()
    num_blocks = len(blocks)
    return Evidence(
        block_cosine=tuple(cosine[i][i + 1] for i in range(num_blocks)),
        start_cosine=tuple(cosine[0][i + 1] for i in range(num_blocks)),
        window_cosine=tuple(tuple(cosine[i][i + 1 :]) for i in range(num_blocks)),
        attention_cosine=tuple((attention / num_tokens).tolist()),
        tokens=num_tokens,
    )


def influence_order(evidence: Evidence) -> tuple[int, ...]:
    """Blocks by Block Influence, least first: to drop n, take the first n."""
    return tuple(sorted(range(len(evidence.block_cosine)), key=lambda i: (-evidence.block_cosine[i], i)))


def attention_order(evidence: Evidence) -> tuple[int, ...]:
    """Blocks by how little their attention turns the residual stream, least first [ours, after Block Influence]."""
    return tuple(
        sorted(range(len(evidence.attention_cosine)), key=lambda i: (-evidence.attention_cosine[i], i))
    )


def best_window(evidence: Evidence, count: int) -> tuple[int, ...]:
    """The `count` consecutive blocks whose input and output are most alike.

    Raises:
        InputError: `count` is not between 1 and the number of blocks.
    """
    num_blocks = len(evidence.block_cosine)
    _check_count(count, num_blocks)
    first = max(range(num_blocks - count + 1), key=lambda i: (evidence.window_cosine[i][count - 1], -i))
    return tuple(range(first, first + count))


@torch.no_grad()
def greedy_order(
    dense: PreTrainedModel,
    tokens: TokenSet,
    max_count: int,
    *,
    exact: bool = False,
    progress: CountProgress | None = None,
) -> GreedyResult:
    """Drop the block whose absence costs least next-token loss, and repeat (SLEB, arXiv 2402.09025, section 3).

    Two savings [ours]. A candidate run starts from the stored input of the first block that differs. And a round tries
    candidates by the increase they last caused, and stops at the first whose old increase is above the best new
    one (the lazy greedy of Minoux, 1978): increases nearly always grow as blocks go, so the order is nearly always
    that of `exact`, which tries every candidate in every round.

    Args:
        dense: a causal language model of transformers, in eval mode; unchanged afterwards.
        tokens: the text, all of it in one batch.
        max_count: how many blocks to drop.
        progress: called with (dropped, max_count).

    Raises:
        InputError: `max_count` is not between 1 and the number of blocks less one, or sequences are too short.
    """
    blocks = decoder_blocks(dense)
    _check_ids(tokens.ids_NT, least=2)
    ids_NT, scored_NP = tokens.ids_NT.to(dense.device), tokens.scored.to(dense.device)
    _check_count(max_count, len(blocks) - 1)
    order: list[int] = []
    losses: list[float] = []
    evaluations = 0
    inputs: dict[int, Tensor] = {}  # of the blocks, with `order` dropped
    candidate: int | None = None

    def run(i: int, hidden_BTD: Tensor, block: Callable[[Tensor], Tensor]) -> Tensor:
        if candidate is None:
            inputs[i] = hidden_BTD
        elif i <= candidate:
            return inputs[candidate]
        return hidden_BTD if i in order else block(hidden_BTD)

    def loss() -> float:
        nonlocal evaluations
        evaluations += 1
        return float(next_token_losses(dense, last_hidden(dense, ids_NT), ids_NT)[scored_NP].mean())

    with BlockRun(blocks, run):
        dense_loss = current = loss()
        increase = dict.fromkeys(range(len(blocks)), float("-inf"))
        while len(order) < max_count:
            measured: dict[int, float] = {}
            for candidate in sorted(increase, key=lambda i: (increase[i], i)):
                if not exact and measured and increase[candidate] >= min(measured.values()):
                    break
                measured[candidate] = loss() - current
            increase |= measured
            order.append(min(measured, key=lambda i: (measured[i], i)))
            del increase[order[-1]]
            candidate = None
            current = loss()  # stores the inputs that the next round starts from
            losses.append(current)
            if progress is not None:
                progress(len(order), max_count)
    return GreedyResult(tuple(order), tuple(losses), dense_loss, ids_NT.numel(), evaluations)


def hidden_of(output: Any) -> Tensor:
    """The hidden states in what a block returns: a tensor, or a tuple that starts with one."""
    hidden_BTD: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden_BTD


def other_inputs(
    model: PreTrainedModel, blocks: Sequence[nn.Module], ids_NT: Tensor
) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """What the model hands each block besides the hidden states (masks, rotations), by position and by name.

    It is asked for one sequence: without padding all have the same, and it broadcasts over a batch of any size.
    """
    found: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def keep(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append((args[1:], {name: value for name, value in kwargs.items() if name != "hidden_states"}))

    handles = [block.register_forward_pre_hook(keep, with_kwargs=True) for block in blocks]
    try:
        with torch.no_grad():
            last_hidden(model, ids_NT[:1].to(model.device))
    finally:
        for handle in handles:
            handle.remove()
    return found


def block_runs(model: PreTrainedModel, ids_NT: Tensor) -> list[Callable[[Tensor], Tensor]]:
    """For each position, a function from the state that it reads to its output, both (B, T, D), on such a text."""
    blocks = list(decoder_blocks(model))

    def running(
        block: nn.Module, others: tuple[Any, ...], named: dict[str, Any]
    ) -> Callable[[Tensor], Tensor]:
        return lambda own_BTD: hidden_of(block(own_BTD, *others, **named))

    inputs = other_inputs(model, blocks, ids_NT)
    return [running(block, *given) for block, given in zip(blocks, inputs, strict=True)]


def next_token_losses(dense: PreTrainedModel, hidden_BTD: Tensor, ids_BT: Tensor) -> Tensor:
    """Next-token loss of each position but the last, (B, T - 1), in nats, without all their logits in memory."""
    hidden_MD, next_M = hidden_BTD[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten()
    normaliser_M, logit_M, _ = judged_logits(dense, hidden_MD, next_M, next_M)
    return (normaliser_M - logit_M).view(len(ids_BT), -1)


class BlockRun:
    """Decides, while entered, how every block of a model runs: left out, blended, or started from stored states.

    It stands in for the blocks' `forward` and gives that back on exit. No weight is touched, every family works alike,
    and a block that is left out costs nothing (a hook could only undo the block after it ran).

    `run(i, hidden_BTD, block)` returns the output of block i for its input; `block(hidden_BTD)` computes it as the
    model would. Run the model once with every block before leaving any out: what a block returns besides hidden states
    is learnt then.
    """

    def __init__(self, blocks: nn.ModuleList, run: RunBlock) -> None:
        self._blocks = blocks
        self._run = run
        self._own = [vars(block).get("forward") for block in blocks]
        self._forwards: list[Callable[..., Any]] = [block.forward for block in blocks]
        self._is_tuple = [False] * len(blocks)

    def __enter__(self) -> None:
        for i, block in enumerate(self._blocks):
            block.forward = self._forward(i)

    def __exit__(self, *_exception: object) -> None:
        for block, own in zip(self._blocks, self._own, strict=True):
            del block.forward  # the class's is there again
            if own is not None:
                block.forward = own  # somebody else had wrapped it

    def _forward(self, i: int) -> Callable[..., Any]:
        def forward(hidden_BTD: Tensor, *args: Any, **kwargs: Any) -> Any:
            def block(input_BTD: Tensor) -> Tensor:
                output = self._forwards[i](input_BTD, *args, **kwargs)
                self._is_tuple[i] = isinstance(output, tuple)
                return hidden_of(output)

            output_BTD = self._run(i, hidden_BTD, block)
            return (output_BTD, None) if self._is_tuple[i] else output_BTD

        return forward


def _keep_input(states_BTD: list[Tensor]) -> Callable[..., None]:
    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states_BTD.append(args[0] if args else kwargs["hidden_states"])

    return hook


def _check_ids(ids_NT: Tensor, least: int) -> None:
    if ids_NT.ndim != 2 or len(ids_NT) == 0 or ids_NT.shape[1] < least:
        raise InputError(
            f"Token ids come as (sequences, positions), at least 1 by {least}, but here they are "
            f"{tuple(ids_NT.shape)}. Give longer or more text."
        )


def _check_count(count: int, most: int) -> None:
    if not 1 <= count <= most:
        raise InputError(f"From 1 to {most} blocks can be dropped here, but count is {count}.")
