"""Times of plans: lines through what was measured, and prices, bounds and budgets that come of them.

Oracles: lines and prices by hand; rounds of a machine whose speed is known.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from foldsearch import calibrate
from foldsearch.bound import lower_bound
from foldsearch.calibrate import Rounds, Subject, calibrated
from foldsearch.codec import from_json, to_json
from foldsearch.errors import BudgetError, InputError
from foldsearch.export.figures import Predicted, Speed
from foldsearch.fates import Drop
from foldsearch.model.measure import measure
from foldsearch.plan.cost import BlockCost, Budget, CostTable, Target, UnitCost, price, work
from foldsearch.plan.latency import Latency, Line, Timed, fit_line, timed
from foldsearch.plan.plan import FoldPlan
from foldsearch.proposal import Fold, Proposal, Removed
from foldsearch.runtimes import runtime_named
from foldsearch.spec.fit import narrow
from foldsearch.spec.space import Space
from tests.tiny import CONFIGS, tokenizer

# weights, norms, output_norm, macs, context_macs, adapter_width, kv_width, window
BLOCK = BlockCost(UnitCost(100, 2, 4, 100, 3, 20, 5), UnitCost(300, 2, 4, 300, 0, 30), other=1)
SLIDING = BlockCost(UnitCost(110, 2, 4, 110, 3, 22, 5, 8), UnitCost(300, 2, 4, 300, 0, 30))
LATENCY = Latency("folded", "", 10, Line(2.0, 0.001), Line(1.0, 0.01), (Timed(3, 1.0, 1.0, 0.0),), "here")
TABLE = CostTable(4, 1000, 7, 64, 10, 6, 16, (BLOCK, SLIDING, BLOCK), latencies=(LATENCY,))
TARGET = Target("bfloat16", context=16)


# ---- lines


@pytest.mark.parametrize(("fixed", "unit"), [(3.0, 0.5), (0.0, 2.0), (1e-3, 1e-9)])
def test_an_exact_line_is_found(fixed: float, unit: float) -> None:
    points = [(work, fixed + unit * work) for work in (10.0, 20.0, 30.0)]
    line = fit_line(points, "")
    assert (line.fixed_ms, line.unit_ms) == (pytest.approx(fixed, abs=1e-9), pytest.approx(unit))
    assert line.at(0) >= 0


def test_noise_is_shared_out_by_relative_errors() -> None:
    """Two measurements of one amount of work, 10 and 30 ms: their relative errors are least at 12, not at 20."""
    line = fit_line([(1, 10.0), (1, 30.0), (2, 24.0)], "")
    least = (10 / 100 + 30 / 900) / (1 / 100 + 1 / 900)
    assert line.at(1) == pytest.approx(least) == pytest.approx(12)


def test_a_constant_part_below_zero_is_clamped() -> None:
    line = fit_line([(1, 1.0), (2, 3.0), (3, 5.0)], "")  # 2 x − 1
    assert line.fixed_ms == 0
    assert line.unit_ms == pytest.approx(
        (1 + 6 / 9 + 15 / 25) / (1 + 4 / 9 + 9 / 25)
    )  # least relative squares


def test_between_what_was_measured_times_are_on_straight_pieces() -> None:
    """By hand; below the first one towards nothing, where its piece would end below zero."""
    line = fit_line([(20, 3.0), (10, 1.0), (40, 4.0)], "")
    assert line.pieces == ((10, 1.0), (20, 3.0), (40, 4.0))
    for work_done, ms in ((5, 0.5), (10, 1.0), (15, 2.0), (20, 3.0), (30, 3.5), (40, 4.0), (50, 4.5)):
        assert line.at(work_done) == pytest.approx(ms)
    assert fit_line([(10, 2.0), (20, 2.5), (40, 4.0)], "").at(4) == pytest.approx(1.7)


def test_noise_that_turns_the_order_round_leaves_the_line() -> None:
    line = fit_line([(10, 1.0), (20, 0.9), (40, 4.0)], "")
    assert line.pieces == ()
    assert line.at(30) == line.fixed_ms + 30 * line.unit_ms


@given(st.lists(st.tuples(st.integers(1, 10**6), st.floats(1e-3, 1e4)), min_size=3, max_size=6))
def test_times_never_fall_with_more_work(points: list[tuple[int, float]]) -> None:
    assume(len({amount for amount, _ in points}) > 1)
    try:
        line = fit_line(points, "")
    except BudgetError:
        return
    amounts = sorted({0, 1, 10**6 + 1, *(amount for amount, _ in points)})
    times = [line.at(amount) for amount in amounts]
    assert times[0] >= -1e-9
    assert all(a <= b * (1 + 1e-9) + 1e-9 for a, b in pairwise(times))
    if line.pieces:
        assert all(line.at(amount) == pytest.approx(ms) for amount, ms in points)


@pytest.mark.parametrize("times", [(5.0, 4.0, 3.0), (4.0, 4.0, 4.0)])
def test_a_time_that_does_not_grow_is_refused(times: tuple[float, ...]) -> None:
    with pytest.raises(BudgetError, match=r"to write a token must grow with the blocks.*quiet"):
        fit_line(list(zip((1, 2, 3), times, strict=True)), "to write a token")


def test_the_median_and_the_spread_of_the_middle_half() -> None:
    found = timed(7, [10.0, 11.0, 10.0, 99.0], [2.0, 2.0, 2.0, 2.0])
    assert found == Timed(7, 10.5, 2.0, pytest.approx(1 / 10.5))
    unsteady = replace(LATENCY, timed=(found, Timed(3, 1.0, 1.0, 0.25)))
    assert "25% from round to round" in unsteady.unsteady
    assert "cache --clear latencies" in unsteady.unsteady
    assert replace(LATENCY, timed=(found,)).unsteady == ""


# ---- prices


def test_times_by_hand() -> None:
    """Prompts of 10 tokens, bfloat16: a block 400 MACs a token and 3 a token that it sees; 2 bytes a number."""
    done = work(FoldPlan.identity(3), TABLE, TARGET, 10)
    assert done.prompt_macs == 10 * (400 + 410 + 400 + 9 * 10)
    assert done.decode_bytes == 2 * (405 + 414 + 405) + 2 * 5 * (10 + 8 + 10)
    found = price(FoldPlan.identity(3), TABLE, TARGET)
    assert found.prompt_ms == pytest.approx(2 + 0.001 * done.prompt_macs)
    assert found.decode_ms == pytest.approx(1 + 0.01 * done.decode_bytes)
    # half a block: 100 MACs, 30 of attention's products; 102 numbers and 50 that are cached
    half = work(FoldPlan.parse("0-1 2m", 3), TABLE, TARGET, 10)
    assert done.prompt_macs - half.prompt_macs == 10 * (100 + 3 * 10)
    assert done.decode_bytes - half.decode_bytes == 2 * (102 + 50)
    # a child reads its owner's weights again, whoever stores them, and its adapter and output norms beside
    child = work(FoldPlan.parse("0 1=0+r3+n 2", 3), TABLE, TARGET, 10)
    assert child.decode_bytes - done.decode_bytes == 2 * (100 - 110 + 3 * (22 + 30) + 8)
    assert child.prompt_macs - done.prompt_macs == 10 * 3 * (22 + 30)
    # one matrix of 4 x 4 with its biases, and no cache, in place of a block
    network = work(FoldPlan.parse("0-1 2~linear", 3), TABLE, TARGET, 10)
    assert done.decode_bytes - network.decode_bytes == 2 * (405 - 20 + 50)


def test_times_are_of_one_runtime_and_type() -> None:
    plan = FoldPlan.identity(3)
    for other in (replace(TARGET, runtime="stock"), replace(TARGET, weights="bf16")):
        assert TABLE.latency_on(other) is None
        assert price(plan, replace(TABLE, blocks=(BLOCK,) * 3), other).prompt_ms is None
    assert replace(price(plan, TABLE, TARGET), prompt_ms=None, decode_ms=None) == price(
        plan, replace(TABLE, latencies=()), TARGET
    )


def test_a_bound_by_counts_is_exact_where_blocks_are_alike() -> None:
    table = replace(TABLE, blocks=(BLOCK,) * 3)
    bound = lower_bound(Proposal(Fold(Removed("uniform", 1, Drop()))), table, TARGET)
    assert bound == price(FoldPlan.dropping([1], 3), table, TARGET)


def test_budgets_of_milliseconds() -> None:
    cost = price(FoldPlan.identity(3), TABLE, TARGET)
    assert cost.prompt_ms is not None
    tight = Budget(prompt_ms=cost.prompt_ms / 2, decode_ms=1e9)
    assert tight.violations(cost) == {
        "prompt_ms": pytest.approx(1.0),
        "decode_ms": pytest.approx(-1, abs=0.1),
    }
    assert not tight.admits(cost)
    assert "prompt_ms +100.0%" in tight.excess(cost)
    assert Budget(prompt_ms=cost.prompt_ms, decode_ms=cost.decode_ms).admits(cost)
    assert Budget().is_open
    assert not tight.is_open
    assert tight.admits(replace(cost, prompt_ms=None, decode_ms=None))  # what is not known breaks no bound
    with pytest.raises(BudgetError, match="milliseconds for a token must be above 0, got 0"):
        Budget(decode_ms=0.0)


def test_a_space_is_cut_to_what_is_fast_enough_or_refused() -> None:
    table = replace(TABLE, blocks=(BLOCK,) * 8)
    space = Space(removal=(0.0, 0.5), fates=("drop",), attention=(0.0, 0.0), criteria=("uniform",))
    three_gone = price(FoldPlan.dropping(range(3), 8), table, TARGET)
    found = narrow(space, table, TARGET, Budget(decode_ms=three_gone.decode_ms))
    assert found.counts(8) == (3, 4)
    four_gone = price(FoldPlan.dropping(range(4), 8), table, TARGET)
    with pytest.raises(BudgetError) as caught:
        narrow(space, table, TARGET, Budget(prompt_ms=2.5))
    assert "keeps the budget of 2.5 ms for a prompt of 10 tokens" in str(caught.value)
    assert f"fastest takes {four_gone.prompt_ms:.4g} ms for a prompt of 10 tokens, with a plan" in str(
        caught.value
    )
    assert "Raise the budget, or let the space remove more" in str(caught.value)


# ---- calibration


class Machine:
    """Reads at 1,000 MACs and writes at 500 bytes a millisecond, after 1 ms; the second of three rounds is slow."""

    def __init__(self, subject: Subject) -> None:
        self.subject, self.asked = subject, list[list[int]]()

    def __call__(self, subject: Subject, plans: Any, progress: Any) -> Rounds:
        self.asked.append([plan.depth for plan in plans])
        rounds = []
        for slow in (1.0, 3.0, 1.0):
            done = [work(plan, subject.table, subject.target, subject.tokens) for plan in plans]
            rounds.append(
                [
                    {
                        "prompt": 1000 * subject.tokens / (slow * (1 + one.prompt_macs / 1000)),
                        "decode": 1000 / (slow * (1 + one.decode_bytes / 500)),
                    }
                    for one in done
                ]
            )
        return rounds


def subject(name: str = "llama", runtime: str = "folded", **changes: Any) -> Subject:
    config = CONFIGS[name](**changes)
    target = Target("float32", context=64, runtime=runtime)
    return Subject(config, measure(config), target, 40, tokenizer)


def test_lines_come_of_three_counts_and_are_kept(tmp_path: Path) -> None:
    asked = subject(num_hidden_layers=6)
    machine = Machine(asked)
    found = calibrated(asked, tmp_path, run=machine)
    assert machine.asked == [[6, 4, 3, 2]]
    assert [one.blocks for one in found.timed] == [6, 4, 3, 2]
    table = replace(asked.table, latencies=(found,))
    for text in ("0-5", "0 2-4", "0 5", "0 1a 2m 3"):  # those between and beyond too
        plan = FoldPlan.parse(text, 6)
        cost, done = price(plan, table, asked.target), work(plan, table, asked.target, 40)
        assert cost.prompt_ms == pytest.approx(1 + done.prompt_macs / 1000)
        assert cost.decode_ms == pytest.approx(1 + done.decode_bytes / 500)
    assert found.spread == pytest.approx(2.0)
    assert from_json(CostTable, to_json(table)) == table
    # once: the same model of the same program, also where another runtime of it is asked for
    assert calibrated(asked, tmp_path, run=machine) == found
    stock = calibrated(replace(asked, target=replace(asked.target, runtime="stock")), tmp_path, run=machine)
    assert stock == replace(found, runtime="stock")
    assert len(machine.asked) == 1
    # another dtype, prompt, model or number of threads is another time
    threads = torch.get_num_threads()
    calibrated(replace(asked, target=replace(asked.target, dtype="bfloat16")), tmp_path, run=machine)
    calibrated(replace(asked, tokens=41), tmp_path, run=machine)
    calibrated(subject(num_hidden_layers=5), tmp_path, run=machine)
    torch.set_num_threads(threads + 1)
    try:
        calibrated(asked, tmp_path, run=machine)
    finally:
        torch.set_num_threads(threads)
    assert len(machine.asked) == 5


def test_a_prompt_fits_the_context_and_the_positions(tmp_path: Path) -> None:
    asked = subject()
    run = Machine(asked)
    assert calibrated(replace(asked, tokens=9999), tmp_path, run=run).tokens == 64  # the target's context
    short = subject("gpt2", max_position_embeddings=60)  # of which 24 are written
    assert calibrated(replace(short, tokens=9999), tmp_path, run=run).tokens == 36


def test_fewer_blocks_where_memory_is_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = subject(num_hidden_layers=12)
    machine = Machine(asked)
    whole = price(FoldPlan.identity(12), asked.table, asked.target).stored_bytes
    monkeypatch.setattr(calibrate, "free_memory", lambda: 2.7 * whole)
    found = calibrated(asked, tmp_path, run=machine)
    assert machine.asked == [[6, 4, 3, 2]]
    exact = work(FoldPlan.identity(12), asked.table, asked.target, 40)
    assert found.times(exact)[1] == pytest.approx(1 + exact.decode_bytes / 500)
    monkeypatch.setattr(calibrate, "free_memory", lambda: 10)
    with pytest.raises(InputError, match=r"at least a quarter of the model in memory.*are free"):
        calibrated(subject(num_hidden_layers=11), tmp_path, run=machine)
    with pytest.raises(InputError, match="got a model of 1 block"):
        calibrated(subject(num_hidden_layers=1), tmp_path, run=machine)


def test_a_program_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foldsearch.runtimes.find_spec", lambda package: None)
    asked = subject(runtime="gguf")
    with pytest.raises(InputError, match=r"llama\.cpp, which is not installed.*foldsearch\[gguf\]"):
        calibrated(asked, tmp_path, run=Machine(asked))
    assert runtime_named("gguf").engine is not None


def test_two_blocks_are_measured_as_two_and_one(tmp_path: Path) -> None:
    asked = subject(num_hidden_layers=2)
    machine = Machine(asked)
    calibrated(asked, tmp_path, run=machine)
    assert machine.asked == [[2, 1]]


# ---- what became of it


def test_predicted_beside_measured() -> None:
    predicted = Predicted(200, 100.0, 10.0)
    near = predicted.words(Speed((1900.0, 2000.0, 2100.0), ()), Speed((95.0, 95.0, 95.0), ()))
    assert near == (
        "Predicted 100 ms for a prompt of 200 tokens and 10 ms for a token after it; measured 100 ms (+0%) and 10.5 ms "
        "(+5%)."
    )
    far = predicted.words(Speed((1000.0,) * 3, ()), Speed((100.0,) * 3, ()))
    assert "measured 200 ms (+100%) and 10 ms (+0%). That is more than 10%: the machine" in far
    assert "was not measured" in predicted.words(Speed((), ()), Speed((), ()))
    paced = replace(predicted, dense_prompt_ms=200.0, dense_decode_ms=20.0)
    # everything takes half as long again, and the plan the half of dense, as was predicted; then reading is 20 % off
    slower = paced.words(Speed((1333.3,) * 3, (666.7,) * 3), Speed((66.67,) * 3, (33.33,) * 3))
    assert "the dense model takes +50% and +50%. As shares of its times, measured and predicted are" in slower
    assert slower.replace("-0%", "+0%").endswith(" are +0% and +0% apart.")
    off = paced.words(Speed((1111.1,) * 3, (666.7,) * 3), Speed((66.67,) * 3, (33.33,) * 3))
    assert "are +20% and" in off
    assert "That is more than 10%: the machine was busy" in off
    assert "was not measured" in predicted.words(Speed((1.0, 9.0, 5.0), ()), Speed((100.0,) * 3, ()))
