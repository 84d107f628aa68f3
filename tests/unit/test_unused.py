"""Settings that change nothing are told; what a person did not set is not.

Oracles: sentences worked out by hand for each setting, and the studies and spaces that ship, whose settings all apply.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest

from foldsearch.spec.load import load_space, load_study, shipped
from foldsearch.spec.unused import unused_settings

DROPPING = {"criteria": ["window"], "neighbour_share": 0.0}
WHY = {
    "gate": "the space's criteria do not name 'gate'.",
    "groups": "groups.max_groups is 0, so no weights are shared in groups.",
    "share": "the space's fates do not name 'share', so no removed block comes back.",
    "replace": "the space's fates do not name 'replace', so no network takes the place of blocks.",
    "fit": "nothing in the space is fitted to text.",
    "train": "the only rung is 0, so nothing is trained.",
    "rungs": "there is one rung only, after which every trial ends.",
    "nsga2": "the sampler nsga2 takes no neighbours, as it crosses only what all trials have in common.",
    "drop": "the space's blocks are neither dropped nor replaced by 'linear', and nothing else is screened.",
    "unhealed": "healing.tokens is 0, so nothing is healed.",
    "method": "healing.method is not 'ridge', and plans are screened healed by it.",
    "patch": "the space has no network of the kind 'linear'.",
    "heal": "healing.tokens is 0, and plans are screened as they are healed.",
    "screen": "screen.plans is 0, so nothing is screened.",
    "stock": "the stock runtime runs stock blocks.",
}


@pytest.mark.parametrize(
    ("space", "settings", "said"),
    [
        ({}, {"gates.steps": 4}, f"gates.steps does not apply: {WHY['gate']}"),
        (
            {"gate_eps": [0.1]},
            {"gates.steps": 4},
            f"gates.steps and space.gate_eps do not apply: {WHY['gate']}",
        ),
        (
            {"groups": {"max_groups": 0, "group_sizes": [3], "adapter_ranks": [8]}},
            {},
            f"space.groups.group_sizes and space.groups.adapter_ranks do not apply: {WHY['groups']}",
        ),
        (
            {"children": {"ranks": [4], "starts": ["zero"]}},
            {},
            f"space.children.ranks and space.children.starts do not apply: {WHY['share']}",
        ),
        ({"replace": {"kinds": ["ffn"]}}, {}, f"space.replace.kinds does not apply: {WHY['replace']}"),
        ({}, {"starts.tokens": 64}, f"starts.tokens does not apply: {WHY['fit']}"),
        (
            {"recover": {"delta_ranks": [4]}},
            {"rungs": [0], "recovery.batch": 4},
            f"recovery.batch and space.recover.delta_ranks do not apply: {WHY['train']}",
        ),
        (
            {"recover": {"delta_ranks": [4], "trains": ["last", "healed"]}},
            {},
            "space.recover.delta_ranks does not apply: space.recover.trains does not name 'deltas', so no delta is "
            "trained.",
        ),
        ({}, {"rungs": [0], "halving.keep": 0.3}, f"halving.keep does not apply: {WHY['rungs']}"),
        (
            {"fates": ["share"], "removal": [0.2, 0.5], "groups": {"max_groups": 2}},
            {},
            "space.groups.max_groups does not apply: every plan removes blocks, and what the space's fates leave "
            "cannot be shared in groups.",
        ),
        (
            {"criteria": ["window"], "removal": [0, 0], "groups": {"max_groups": 2}},
            {},
            "space.criteria does not apply: space.removal ends at 0, so no block is removed.",
        ),
        ({"fates": ["share"]}, {"screen.plans": 10}, f"screen.plans does not apply: {WHY['drop']}"),
        (
            {},
            {"healing.tokens": 0, "screen.promoted": 3},
            f"screen.promoted does not apply: {WHY['heal']}",
        ),
        (
            {},
            {"healing.tokens": 0, "healing.method": "fused"},
            f"healing.method does not apply: {WHY['unhealed']}",
        ),
        (
            {},
            {"healing.method": "rescale", "screen.promoted": 3},
            f"screen.promoted does not apply: {WHY['method']}",
        ),
        (
            {"criteria": ["linear_window"]},
            {"starts.linear": "patch"},
            f"starts.linear does not apply: {WHY['patch']}",
        ),
        ({}, {"screen.plans": 0, "screen.promoted": 3}, f"screen.promoted does not apply: {WHY['screen']}"),
        (
            {"neighbour_share": 0.25},
            {"sampler": "nsga2"},
            f"space.neighbour_share does not apply: {WHY['nsga2']}",
        ),
        (
            {"fates": ["drop", "share", "replace"], "attention": [0.0, 0.2], "groups": {"max_groups": 1}},
            {"target.runtime": "stock"},
            "space.fates 'share', space.replace.kinds 'linear', space.attention and space.groups.max_groups do not "
            f"apply: {WHY['stock']}",
        ),
    ],
)
def test_what_does_not_apply_is_told_with_its_reason(
    space: dict[str, Any], settings: dict[str, Any], said: str
) -> None:
    study = load_study("default", {"space": {**DROPPING, **space}, **settings})
    assert unused_settings(study) == (said,)


@pytest.mark.parametrize(
    ("space", "settings"),
    [
        ({"criteria": ["window", "gate"], "gate_eps": [0.1]}, {"gates.steps": 4}),
        ({"fates": ["share"], "removal": [0, 0.5], "groups": {"max_groups": 2}}, {}),
        ({"criteria": ["window"], "removal": [0, 0]}, {}),  # one block is removed all the same
        ({"groups": {"max_groups": 1, "group_sizes": [3], "adapter_ranks": [8]}}, {}),
        ({"fates": ["share"], "children": {"ranks": [4], "starts": ["data"]}}, {"starts.tokens": 64}),
        ({"fates": ["replace"], "replace": {"kinds": ["ffn"]}}, {"starts.tokens": 64}),
        ({"criteria": ["linear_window"]}, {"starts.tokens": 64}),
        ({"recover": {"delta_ranks": [4]}}, {"rungs": [0, 64], "recovery.batch": 4, "halving.keep": 0.3}),
        ({"recover": {"delta_ranks": [4], "trains": ["last", "deltas"]}}, {}),
        ({"neighbour_share": 0.25}, {"sampler": "tpe"}),
        ({"fates": ["drop", "replace"], "replace": {"kinds": ["layer"]}}, {"target.runtime": "stock"}),
    ],
)
def test_what_applies_is_not_told(space: dict[str, Any], settings: dict[str, Any]) -> None:
    assert unused_settings(load_study("default", {"space": {**DROPPING, **space}, **settings})) == ()


def test_what_ships_has_no_setting_that_does_not_apply() -> None:
    spaces = [None, *shipped("spaces")]
    for name, space in product(shipped("studies"), spaces):
        if name == "baselines/linearpatch" and space is not None:
            continue  # how a network starts is nothing to a space that only drops blocks
        study = load_study(name, {"space": space})
        if name == "smollm2-demo" and "drop" not in study.space.fates:
            continue  # how many plans are screened is nothing to a space that drops no block
        assert unused_settings(study) == (), (name, space)
        if space is not None:
            assert unused_settings(load_study(name, {"space": space, "rungs": [0], "halving": {}})) == ()


def test_one_plan_alone_has_settings_of_recovery_only() -> None:
    study = load_study("default", {"space": DROPPING, "rungs": [0], "gates.steps": 4, "recovery.kl": 0.5})
    assert unused_settings(study, only=("recovery",)) == (f"recovery.kl does not apply: {WHY['train']}",)


def test_a_study_without_a_space_searches_everything(tmp_path: Path) -> None:
    path = tmp_path / "study.toml"
    path.write_text('model = "m"\ndata = "d"\n')
    assert load_study(path).space == load_space("everything")
    assert load_study(path, {"space": "foldgpt"}).space == load_space("foldgpt")
