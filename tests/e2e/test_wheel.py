"""What `pip install .` brings. Oracle: the files of the checkout, and a look into the wheel."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_wheel_holds_the_package_and_the_shipped_studies_and_spaces(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
        archive.extractall(tmp_path / "installed")
    tracked = {str(path.relative_to(ROOT)) for path in (ROOT / "foldsearch").rglob("*.py")}
    shipped = {
        f"foldsearch/{path.relative_to(ROOT)}"
        for kind in ("spaces", "studies")
        for path in (ROOT / kind).glob("*.toml")
    }
    assert len(shipped) >= 3
    assert tracked | shipped | {"foldsearch/py.typed"} <= held
    assert not [name for name in held if name.startswith("tests")]

    # found by name, away from the checkout
    code = "from foldsearch import load_study; s = load_study('smollm2-demo'); print(s.space.name)"
    found = subprocess.run(
        [sys.executable, "-P", "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "installed")},
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    assert found.stdout.strip() == "foldgpt"
