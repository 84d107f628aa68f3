"""CONTRIBUTING's recipes for a kind of network and for a family, followed in a copy of the tree.

Oracle: the contract suites, which ask the new entry whatever they ask the others. Nothing but the files that the recipe
names is changed.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what a contributor edits."""
    for name in ("foldsearch", "tests", "spaces", "studies"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def add(file: Path, before: str, text: str) -> None:
    """Put the text in front of `before`."""
    old = file.read_text()
    assert old.count(before) == 1
    file.write_text(old.replace(before, text + before))


def run_contract(tree: Path, *arguments: str) -> str:
    """What pytest says of the copy's own tests."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", *arguments],
        cwd=tree,
        env={
            "PYTHONPATH": str(tree),
            "PATH": "",
            "HF_HOME": str(tree / "hub"),
            "FOLDSEARCH_CACHE": str(tree / "cache"),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_kind_of_network_is_an_entry_and_a_class(tree: Path) -> None:
    add(
        tree / "foldsearch/plan/kinds.py",
        '    Kind("layer", ',
        '    Kind("bilinear", "of this test", lambda width, hidden: (3 * width * hidden,) * 2, takes_size=True),\n',
    )
    networks = tree / "foldsearch/model/networks.py"
    add(
        networks,
        "def _normal(",
        '''class Bilinear(Replaced):
    """down · ((gate · n) * up · n)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__(down=(width, hidden), up=(hidden, width), gate=(hidden, width))

    def features(self, x: Tensor) -> Tensor:
        n = _normal(x)
        return functional.linear(n, self.gate.to(x.dtype)) * functional.linear(n, self.up.to(x.dtype))


''',
    )
    add(networks, '    "swiglu": SwiGLU,\n', '    "bilinear": Bilinear,\n')
    said = run_contract(
        tree, "tests/integration/test_replacement_kinds.py", "-k", "bilinear or every_kind or the_list"
    )
    assert "test_its_price_is_what_the_folded_model_has[bilinear] PASSED" in said


@pytest.mark.slow
def test_a_family_is_an_entry(tree: Path) -> None:
    """StarCoder 2: layer norms with biases, an MLP of two linears, and a sliding window."""
    add(
        tree / "foldsearch/model/blocks.py",
        '    "gpt2": Family(\n',
        """    "starcoder2": Family(
        "Starcoder2ForCausalLM",
        "model.layers",
        "model.norm",
        Unit(("self_attn",), ("input_layernorm",), "self_attn.o_proj"),
        Unit(("mlp",), ("post_attention_layernorm",), "mlp.c_proj"),
    ),
""",
    )
    add(
        tree / "tests/tiny.py",
        '    "gpt2": partial(',
        '    "starcoder2": partial(tf.Starcoder2Config, **LLAMA, sliding_window=WINDOW),\n',
    )
    said = run_contract(
        tree,
        "tests/unit/test_families.py",
        "tests/unit/test_measure.py",
        "-k",
        "starcoder2 or every_family",
        "-m",
        "",
    )
    assert "test_cached_decoding_equals_one_full_forward[0 2-3 5-starcoder2] PASSED" in said
    assert "test_prices_are_what_the_real_folded_models_have[starcoder2] PASSED" in said
