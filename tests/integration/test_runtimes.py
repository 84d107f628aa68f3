"""What every runtime of the list must do, and what a new one costs: a file and an entry in the list.

Oracles: the folded model in this process; the price of its plan, made without looking at a file; the bytes on disk.
"""

import subprocess
import sys
from dataclasses import replace

import gguf
import onnx_ir
import pytest
import torch

from foldsearch import cli, runtimes
from foldsearch.errors import PlanError, SpecError
from foldsearch.export import Shipment, check_export, export, load_exported
from foldsearch.export.card import read_card
from foldsearch.model.fold import fold
from foldsearch.model.parts import Borrowed
from foldsearch.plan.cost import price
from foldsearch.plan.plan import FoldPlan
from foldsearch.runtimes import Beside
from foldsearch.runtimes.needs import WORDS, needs
from foldsearch.spec.fit import can_run, for_runtime
from foldsearch.spec.load import load_space, load_study
from foldsearch.spec.unused import unused_settings
from tests.split_runtime import ENTRY as SPLIT
from tests.tiny import NUM_BLOCKS, dense_model, price_table
from tests.tolerances import OTHER_WAY

IDS = torch.randint(3, 96, (3, 12), generator=torch.Generator().manual_seed(1))
# A plan for each thing that a runtime may be unable to do, of a model that scales attention by position in the last
NEEDY = {
    "network": "0 1-2~linear 3-4",
    "copied block": "0 1-2~layer 3-4",
    "norm": "0-2 3=1+r2+n 4",
    "half block": "0 1a 2-4",
    "moved block": "1-4",
}
HELD = ["0-4", "0 2-4", "0 1=3+r4 2-4 2=2"]  # by every runtime


# Half a minute a graph: test_onnx.py has some in `make test`.
LATER = {"onnx": [pytest.mark.runtimes]}


@pytest.fixture(
    params=[pytest.param(one, marks=LATER.get(one.name, [])) for one in (*runtimes.RUNTIMES, SPLIT)],
    ids=lambda runtime: runtime.name,
)
def runtime(request, monkeypatch):
    """Each of the list, and one that the list does not have yet."""
    if request.param not in runtimes.RUNTIMES:
        monkeypatch.setattr(runtimes, "RUNTIMES", (*runtimes.RUNTIMES, request.param))
    return request.param


@pytest.fixture
def quick(runtime):
    """Those that write a model in seconds, and are installed for every test."""
    if runtime.name == "executorch":
        pytest.skip("a minute a model, in an environment of its own: test_executorch.py, by make runtimes")
    return runtime


def folded(text):
    plan = FoldPlan.parse(text, NUM_BLOCKS)
    model = fold(dense_model(), plan)
    torch.manual_seed(2)
    for part in model.modules():
        if isinstance(part, Borrowed) and part.rank:
            part.up.data.normal_(0, 0.1)
    return model, plan


@pytest.fixture(scope="module")
def table():
    return price_table()


def target_of(runtime):
    return load_study("default", {"target.runtime": runtime.name, "target.dtype": "float32"}).target.value()


def weights_in(folder, runtime):
    """Bytes of the tensors in the files of a folder, by what their headers say of where these begin."""
    if runtime.weights == "*.gguf":
        (file,) = folder.glob(runtime.weights)
        return sum(int(tensor.n_bytes) for tensor in gguf.GGUFReader(file).tensors)
    if runtime.weights == "*.onnx.data":
        held = onnx_ir.load(folder / "model.onnx").graph.initializers.values()
        # beside weights there are constants: the frequencies of positions, and single numbers
        return sum(
            value.const_value.nbytes
            for value in held
            if len(value.shape) > 1 or value.name.endswith((".weight", ".bias", ".gamma"))
        )
    files = [file.read_bytes() for file in folder.glob(runtime.weights)]
    # the first eight bytes of a safetensors file are the length of its header, and all else is weights
    return sum(len(data) - 8 - int.from_bytes(data[:8], "little") for data in files)


def equal_norms(model, runtime):
    """Bytes of vectors that are equal to others: a graph holds these once, as it holds what is shared."""
    if runtime.weights != "*.onnx.data":
        return 0
    vectors = [tuple(value.tolist()) for value in model.parameters() if value.dim() == 1]
    return sum(4 * len(vector) for vector in vectors) - sum(4 * len(vector) for vector in set(vectors))


@pytest.mark.parametrize("text", HELD)
def test_the_price_is_the_bytes_that_are_written(quick, table, text, tmp_path):
    runtime = quick
    model, plan = folded(text)
    written, _ = runtime.writer.before_rounding(model)
    runtime.writer.write(written, tmp_path, Beside(weights=runtime.stored_as("float32")))
    found = weights_in(tmp_path, runtime) + equal_norms(model, runtime)
    assert found == price(plan, table, target_of(runtime)).stored_bytes


@torch.no_grad()
def test_a_plan_it_holds_is_shipped_and_loaded_as_the_same_model(quick, table, tmp_path):
    runtime = quick
    model, plan = folded(HELD[-1])
    assert can_run(plan, table, target_of(runtime))
    out = tmp_path / "out"
    check_export(out, plan, runtime.name)
    report = export(model, None, out, Shipment(plan, runtime.name, "float32", IDS))
    assert report.runtime == runtime.name
    found = weights_in(out, runtime) + equal_norms(model, runtime)
    assert found == price(plan, table, target_of(runtime)).stored_bytes
    assert runtime.types or report.exported.weight_bytes == weights_in(out, runtime)
    assert report.loads_without_foldsearch == (not runtime.loader)
    assert bool(report.refused_without_code) == runtime.carries_code
    again, _ = load_exported(out)
    torch.testing.assert_close(again(IDS).logits, model(IDS).logits, **OTHER_WAY)
    card = (out / "README.md").read_text()
    assert runtime.card in card
    assert read_card(out).report.runtime == runtime.name


@pytest.mark.parametrize("need", WORDS)
def test_a_plan_it_does_not_hold_is_refused_in_words(runtime, table, need, tmp_path):
    plan = FoldPlan.parse(NEEDY[need], NUM_BLOCKS)
    by_position = need == "moved block"
    scaled = replace(table, by_position=True)
    assert list(needs(plan, by_position=by_position)) == [need]
    if need not in runtime.cannot:
        check_export(tmp_path / "out", plan, runtime.name, table=scaled if by_position else table)
        return
    with pytest.raises(PlanError, match=runtime.name) as caught:
        check_export(tmp_path / "out", plan, runtime.name, table=scaled if by_position else table)
    what, remedy = WORDS[need]
    assert f"has {what}, " in str(caught.value)
    assert str(caught.value).endswith(f"Export it to {runtimes.ALL_CAN}, or {remedy}.")
    if not by_position:
        assert not can_run(plan, table, target_of(runtime))
        model = fold(dense_model(), plan)
        with pytest.raises(PlanError, match="cannot do"):
            export(model, None, tmp_path / "out", Shipment(plan, runtime.name, "float32", IDS))
    assert list(tmp_path.iterdir()) == []


def test_the_command_line_and_studies_know_it(runtime, table, capsys):
    with pytest.raises(SystemExit):
        cli.main(["export", "--help"])
    assert f"{runtime.name}: {runtime.title}" in " ".join(capsys.readouterr().out.split())
    study = load_study("default", {"target.runtime": runtime.name, "space": "everything"})
    held = for_runtime(study.space, table, study.target.value())
    assert (held.attention == (0.0, 0.0)) == ("half block" in runtime.cannot)
    assert ("share" in held.fates) == ("norm" not in runtime.cannot)
    assert held.fates
    assert for_runtime(load_space("everything"), table, study.target.value()) == held
    told = [f"the {runtime.name} runtime runs {runtime.blocks}." in words for words in unused_settings(study)]
    assert told == ([True] if runtime.cannot else [])


@pytest.mark.parametrize("name", ["lfm2", "qwen3_moe"])
def test_a_search_shares_nothing_among_blocks_of_several_kinds(name):
    table, target = price_table(name), load_study("default").target.value()
    held = for_runtime(load_space("everything"), table, target)
    assert set(held.fates) == {"drop", "replace"}
    assert held.groups.max_groups == 0
    assert held.attention == load_space("everything").attention
    with pytest.raises(SpecError, match=r"several kinds, or have experts, so a search shares no weights"):
        for_runtime(load_space("flexigpt"), table, target)
    for text, may in [
        ("0 2-4", True),
        ("0 1=2a 2-4", True),
        ("0 1=0a 2-4", name == "qwen3_moe"),
        ("0 4", name == "qwen3_moe"),
    ]:
        assert can_run(FoldPlan.parse(text, NUM_BLOCKS), table, target) == may
    assert can_run(FoldPlan.parse("0 1=2m 2-4", NUM_BLOCKS), table, target) == (name == "lfm2")


def test_what_is_not_in_the_list_is_refused_by_the_names_that_are():
    with pytest.raises(
        SpecError, match=r"must be one of 'folded', 'stock', 'gguf', 'onnx' or 'executorch'; got \"split\""
    ):
        load_study("default", {"target.runtime": "split"})


def test_the_list_needs_no_torch():
    code = "import sys, foldsearch.runtimes, foldsearch.spec.study; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
