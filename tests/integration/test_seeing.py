"""The text part of a model that also sees is found, folded, priced, and put back into the whole.

Oracles: transformers' own classes for such models, on text and on an image, loading what was exported; the same model
with blocks stepped over by hand, which never left its own class; its files, tensor by tensor; counts of its parameters.
"""

import json
from dataclasses import replace

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

from foldsearch import api, cli
from foldsearch.bound import lower_bound
from foldsearch.errors import ModelError
from foldsearch.export import Shipment, export, load_exported
from foldsearch.export.card import read_card
from foldsearch.export.passport import passport
from foldsearch.export.recheck import recheck
from foldsearch.model.blocks import FAMILIES
from foldsearch.model.fold import fold
from foldsearch.model.source import identify, locate, open_config, open_dense, open_tokenizer, prepare
from foldsearch.model.tokens import as_parts, reads_parts
from foldsearch.model.whole import put_back
from foldsearch.plan.cost import price
from foldsearch.plan.plan import FoldPlan
from foldsearch.prepare import cost_table
from foldsearch.proposal import Given, Proposal, RecoveryChoice
from foldsearch.runtimes import stock
from foldsearch.spec.load import load_study
from tests.contexts import tiny_study
from tests.seeing import SEEING, save_seeing, seeing_model, with_image
from tests.tiny import COMMON, CONFIGS, NUM_BLOCKS, WINDOW, tokenizer

IDS = torch.randint(3, 88, (2, 40), generator=torch.Generator().manual_seed(1))
PLAN = "0 2-4"
PARTS = {
    "gemma3": "gemma3_text", "llava": "llama", "smolvlm": "llama", "internvl": "qwen3", "lfm2_vl": "lfm2",
}  # fmt: skip
# `make test` puts two of them back; what they differ in from the others is where the text part is found.
NAMES = [pytest.param(name, marks=[pytest.mark.slow] * (name not in ("gemma3", "llava"))) for name in SEEING]
BY_PARTS = (
    "{% for one in messages %}{% for part in one['content'] %}{{ part['text'] }} {% endfor %}{% endfor %}"
)


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """For a name: the folder of the whole model, and its text part as foldsearch opens it; made once."""
    place, made = tmp_path_factory.mktemp("seeing"), {}

    def open_one(name):
        if name not in made:
            folder = save_seeing(place / name, name)
            files = prepare(folder, dtype="float32", cache_dir=place / "cache")
            made[name] = (place / name, files, open_dense(files))
        return made[name]

    return open_one


@torch.no_grad()
def whole_logits(model, **given):
    return model(**given, use_cache=False).logits


def exported(opened, name, text, out):
    """The folded text part, and the whole model around it, written as an export is."""
    folder, _, dense = opened(name)
    model = fold(dense, FoldPlan.parse(text, NUM_BLOCKS))
    written, is_exact = stock.before_rounding(model)
    assert is_exact
    stock.write(put_back(written, folder), out, stock.Beside(whole=folder))
    again, info = tf.AutoModelForImageTextToText.from_pretrained(
        out, attn_implementation=model.config._attn_implementation, output_loading_info=True
    )
    assert not any(info.values()), info
    return model, again.eval()


@pytest.mark.parametrize("name", SEEING)
def test_the_text_part_is_opened_as_a_model_of_its_family(opened, name):
    _, files, dense = opened(name)
    assert dense.config.model_type == PARTS[name]
    assert type(dense).__name__ == FAMILIES[PARTS[name]].stock
    assert files.note == f"text part of a {type(seeing_model(name)).__name__}"
    assert torch.equal(whole_logits(dense, input_ids=IDS), whole_logits(seeing_model(name), input_ids=IDS))
    assert open_tokenizer(files).get_vocab() == tokenizer().get_vocab()


@pytest.mark.parametrize("name", NAMES)
def test_the_whole_model_around_the_folded_part_says_what_was_measured(opened, name, tmp_path):
    assert IDS.shape[1] > 4 * WINDOW  # a list by block that was not cut shifts a window
    model, again = exported(opened, name, PLAN, tmp_path)
    assert torch.equal(whole_logits(again, input_ids=IDS), whole_logits(model, input_ids=IDS))
    assert type(again) is type(seeing_model(name))
    said = json.loads((tmp_path / "config.json").read_text())
    theirs = json.loads((opened(name)[0] / "config.json").read_text())
    said["vision_config"].pop("dtype", None)  # of the file that was read, told once more
    for key in theirs.keys() - {"text_config", "transformers_version"}:
        assert said[key] == theirs[key], key
    part, whole = said["text_config"], theirs["text_config"]
    assert part["num_hidden_layers"] == NUM_BLOCKS - 1
    kept = [0, 2, 3, 4]
    for key, value in part.items():
        if isinstance(whole.get(key), list) and len(whole[key]) == NUM_BLOCKS:
            assert value == [whole[key][home] for home in kept], key
    assert "fold" not in part
    assert list(tmp_path.glob("*.py")) == []
    assert (tmp_path / "preprocessor_config.json").is_file()


@pytest.mark.parametrize("name", [one for one in NAMES if one.values != ("lfm2_vl",)])
def test_it_sees_as_the_model_with_the_same_blocks_stepped_over(opened, name, tmp_path):
    _, again = exported(opened, name, PLAN, tmp_path)
    other = tf.AutoModelForImageTextToText.from_pretrained(opened(name)[0]).eval()
    given = with_image(name)
    dense_logits = whole_logits(other, **given)
    layers = next(module.layers for path, module in other.named_modules() if path in (
        "model.language_model", "model.text_model"
    ))  # fmt: skip
    layers[1].forward = lambda hidden_states, *args, **kwargs: hidden_states
    stepped_over = whole_logits(other, **given)
    assert torch.equal(whole_logits(again, **given), stepped_over)
    assert not torch.allclose(stepped_over, dense_logits)
    blind = {key: value for key, value in given.items() if key == "input_ids"}
    assert not torch.allclose(whole_logits(again, **blind), stepped_over)  # the image is looked at


@pytest.mark.parametrize("name", NAMES)
def test_the_plan_that_keeps_all_gives_back_the_same_files(opened, name, tmp_path):
    exported(opened, name, "0-4", tmp_path)
    ours = load_file(tmp_path / "model.safetensors")
    theirs = load_file(opened(name)[0] / "model.safetensors")
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("name", NAMES[:2])
def test_the_rest_is_priced_where_an_export_holds_it(opened, name, tmp_path):
    folder, _, dense = opened(name)
    found = locate(str(folder))
    table = cost_table(found, open_config(found))
    assert table.rest_weights == seeing_model(name).num_parameters() - dense.num_parameters()
    plan = FoldPlan.parse(PLAN, NUM_BLOCKS)
    whole = load_study("default", {"target.runtime": "stock", "target.dtype": "float32"}).target.value()
    exported(opened, name, PLAN, tmp_path)
    held = load_file(tmp_path / "model.safetensors").values()
    assert price(plan, table, whole).stored_bytes == sum(4 * tensor.numel() for tensor in held)
    text = load_study("default", {"target.dtype": "float32"}).target.value()
    apart = price(plan, table, whole).weight_bytes - price(plan, table, text).weight_bytes
    assert apart == 4 * table.rest_weights
    proposal = Proposal(Given(plan), RecoveryChoice(), "hand")
    assert lower_bound(proposal, table, whole) == price(plan, table, whole)


@pytest.mark.slow
@torch.no_grad()
def test_an_export_is_the_whole_model_and_its_card_says_so(opened, tmp_path):
    folder, files, dense = opened("llava")
    plan, out = FoldPlan.parse(PLAN, NUM_BLOCKS), tmp_path / "out"
    given = Shipment(plan, "stock", "float32", IDS, dense=dense, whole=files.whole)
    report = export(fold(dense, plan), open_tokenizer(files), out, given)
    assert report.logits_difference == report.logits_tolerance == 0
    assert report.whole == "LlavaForConditionalGeneration"
    again, _ = load_exported(out)
    assert report.exported.parameters == again.num_parameters()
    assert report.dense is not None
    assert report.dense.parameters == seeing_model("llava").num_parameters()  # like beside like
    card = read_card(out)
    assert "AutoModelForImageTextToText" in card.loading
    assert any("only the text part was folded" in note for note in card.report.notes)
    assert any("images" in words for words in card.not_checked)
    assert recheck(out).faults == []
    theirs = folder / "preprocessor_config.json"
    assert (out / theirs.name).read_text() == theirs.read_text()


@pytest.mark.slow
def test_other_runtimes_hold_the_text_part_alone_and_say_what_becomes_of_the_rest(opened, tmp_path):
    _, files, dense = opened("llava")
    plan = FoldPlan.parse(PLAN, NUM_BLOCKS)
    for runtime, words in (("folded", "an export to stock"), ("gguf", "mmproj")):
        given = Shipment(plan, runtime, "float32", IDS, whole=files.whole)
        report = export(fold(dense, plan), None, tmp_path / runtime, given)
        (note,) = [note for note in report.notes if "text part of a LlavaForConditionalGeneration" in note]
        assert words in note
        assert report.whole == ""
        again, _ = load_exported(tmp_path / runtime)
        assert again.num_parameters() < dense.num_parameters()


def test_a_plan_for_other_tools_says_whose_text_part_it_is_of(opened):
    plan = FoldPlan.parse(PLAN, NUM_BLOCKS)
    config = opened("smolvlm")[2].config
    value = passport(
        plan, config, base_model="x", dtype="float32", weights_changed="", part_of="SmolVLMForConditionalGeneration"
    )  # fmt: skip
    assert value["part_of"] == "SmolVLMForConditionalGeneration"
    assert value["mergekit"] is None
    assert "SmolVLM" in value["why_not"]["mergekit"]


def test_a_plan_is_priced_tried_and_exported(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FOLDSEARCH_CACHE", str(tmp_path / "cache"))
    model = save_seeing(tmp_path / "whole", "gemma3")
    assert cli.main(["price", PLAN, "--model", model, "--runtime", "stock"]) == 0
    said = capsys.readouterr().err
    assert (
        "is a Gemma3ForConditionalGeneration: its text part, a gemma3_text model of 5 blocks, is folded"
        in said
    )
    assert "is priced with it, as an export to stock holds both" in said
    study = tiny_study(tmp_path, model=model)
    assert len(api.inspect_model(study).block_cosine) == NUM_BLOCKS
    told = []
    *_, trial = api.try_plan(PLAN, study, folder=tmp_path / "tried", notice=told.append)
    assert trial.state == "finished"
    assert any("only exports to stock hold it" in words for words in told)
    form = api.ExportForm(compares=False)
    api.export_tried(study, tmp_path / "tried", tmp_path / "out", form=form)
    again, info = tf.AutoModelForImageTextToText.from_pretrained("out", output_loading_info=True)
    assert not any(info.values()), info
    assert again.config.text_config.num_hidden_layers == NUM_BLOCKS - 1
    assert {tensor.dtype for tensor in load_file("out/model.safetensors").values()} == {torch.bfloat16}
    assert open_config(locate("out")).num_hidden_layers == NUM_BLOCKS - 1  # it is a model like any other


def test_another_rest_is_another_model(opened, tmp_path):
    folder, _, _ = opened("llava")
    copy = tmp_path / "copy"
    save_seeing(copy, "llava")
    first = identify(locate(str(folder)))
    assert identify(locate(str(copy))) == first
    weights = load_file(copy / "model.safetensors")
    weights["vision_tower.pre_layrnorm.weight"] += 1
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    again = identify(locate(str(copy)))
    assert replace(again, weights=first.weights) == first
    assert again.weights != first.weights


REFUSED = {
    "another family": (
        lambda: tf.LlavaConfig(
            text_config=tf.BloomConfig(vocab_size=96, hidden_size=32, n_layer=2, n_head=4),
            vision_config=SEEING["llava"]().vision_config,
        ),
        "is folded by its text part. foldsearch folds the families it knows, but this model's type is 'bloom'",
    ),
    "three positions": (
        lambda: tf.Qwen2VLConfig(
            text_config={
                **COMMON,
                "num_key_value_heads": 2,
                "intermediate_size": 40,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
            }
        ),
        "'qwen2_vl_text', gives each token a position in time, height and width",
    ),
}


@pytest.mark.parametrize("why", REFUSED)
def test_a_text_part_that_cannot_be_folded_is_refused_before_a_weight_is_read(why, tmp_path):
    make, words = REFUSED[why]
    make().save_pretrained(tmp_path)
    with pytest.raises(ModelError) as caught:
        open_config(locate(str(tmp_path)))
    assert words in str(caught.value)


def test_a_model_whose_text_is_not_read_as_its_text_part_reads_it_is_refused(tmp_path):
    vision = SEEING["gemma3"]().vision_config
    config = tf.PaliGemmaConfig(text_config=CONFIGS["gemma"](), vision_config=vision, image_token_index=90)
    torch.manual_seed(0)
    tf.AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path / "model")
    with pytest.raises(
        ModelError, match="must say of text what the whole model says; that of this PaliGemma"
    ):
        prepare(str(tmp_path / "model"), dtype="float32", cache_dir=tmp_path / "cache")
    assert list((tmp_path / "cache" / "models").glob("*-float32")) == []


def test_a_template_that_drops_a_text_is_given_parts():
    words = tokenizer()
    words.chat_template = BY_PARTS
    assert reads_parts(words)
    messages = [{"role": "user", "content": "w5 w6"}]
    assert words.apply_chat_template(as_parts(messages), tokenize=False).strip() == "w5 w6"
    words.chat_template = "{% for one in messages %}{{ one['content'] }}{% endfor %}"
    assert not reads_parts(words)
