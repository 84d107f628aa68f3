"""docs/exports.md says what is so: every cell is done again."""

from tests.export_matrix import FILE, matrix


def test_the_table_of_exports_is_what_exports_do() -> None:
    made = matrix()
    assert FILE.read_text(encoding="utf-8") == made, "write it anew: python tests/export_matrix.py"
