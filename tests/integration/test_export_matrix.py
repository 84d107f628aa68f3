"""docs/exports.md says what is so: every cell is done again. Of most families `make runtimes` does it."""

import pytest

from tests.export_matrix import FILE, README, TABLES, page, readme, row
from tests.tiers import some

QUICK = ("gemma2",)  # it has norms after the blocks; a family takes a quarter of a minute


@pytest.mark.parametrize("family", some(QUICK))
def test_every_cell_of_a_family_is_what_its_exports_do(family: str) -> None:
    lines = FILE.read_text(encoding="utf-8").splitlines()
    written = [line for line in lines if line.startswith(f"| {family} |")]
    assert written == [row(family, runtime) for runtime in TABLES], (
        "write it anew: python tests/export_matrix.py"
    )


def test_the_rest_of_the_page_is_what_is_written() -> None:
    given = iter([line for line in FILE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")])

    def written(family: str, _runtime: object) -> str:
        return next(line for line in given if line.startswith(f"| {family} |"))

    assert FILE.read_text(encoding="utf-8") == page(written)


def test_the_sums_of_the_page_are_those_of_the_readme() -> None:
    text = README.read_text(encoding="utf-8")
    assert text == readme(FILE.read_text(encoding="utf-8")), "write it anew: python tests/export_matrix.py"
