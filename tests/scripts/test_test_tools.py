"""scripts/test_tools.sh, with an interpreter that only notes what it is asked to do."""

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts/test_tools.sh"
# What other tools need beside them; no tool of the table.
NEEDED = {"datasets", "pyarrow"}

PYTHON = """#!/usr/bin/env bash
echo "$*" >> "$PLACE/calls"
case "$*" in
    "-m venv"*) mkdir -p "${@: -1}/bin"; cp "$0" "${@: -1}/bin/python" ;;
    -c*) echo "$PLACE" ;;
    *"install"*"$FAILS"*) echo "ERROR: No matching distribution found for $FAILS" >&2; exit 1 ;;
esac
"""


@pytest.fixture
def run(tmp_path):
    """The exit code of the script, what it writes to stderr, and the calls of the interpreter."""
    venv = tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin/python").write_text(PYTHON)
    (venv / "bin/python").chmod(0o755)
    (venv / "bin/activate").write_text(f'PATH="{venv}/bin:$PATH"\n')
    (venv / ".installed").touch()

    def run(fails="none fails"):
        (tmp_path / "calls").unlink(missing_ok=True)
        places = {"VENV": str(venv), "TOOLS": str(tmp_path / "tools"), "PLACE": str(tmp_path), "FAILS": fails}
        done = subprocess.run([SCRIPT, "-x"], env=os.environ | places, capture_output=True, text=True, check=False)
        return done.returncode, done.stderr, (tmp_path / "calls").read_text().splitlines()

    return run


def test_environments_are_made_once_and_again_for_other_packages(run, tmp_path):
    code, stderr, calls = run()
    assert code == 0, stderr
    made = [call for call in calls if call.startswith("-m venv")]
    assert len(made) == 5
    tests = [call for call in calls if call.startswith("-m pytest")]
    assert len(tests) == 2
    assert all(call.endswith(" -x") for call in tests)
    assert [call for call in run()[2] if call.startswith("-m")] == tests
    (tmp_path / "tools/beside/.installed").write_text("another list\n")
    assert [call for call in run()[2] if call.startswith("-m venv")] == made[:1]


def test_a_package_that_cannot_be_had_ends_it_before_any_test(run, tmp_path):
    code, stderr, calls = run(fails="txtai")
    assert code == 1
    assert "ERROR: No matching distribution found for txtai" in stderr
    assert re.search(r"tools/beside: packages could not be installed: .*txtai==", stderr)
    assert not [call for call in calls if call.startswith("-m pytest")]
    assert not (tmp_path / "tools/beside/.installed").exists()


def test_the_page_has_the_tools_in_the_versions_that_are_installed():
    installed: dict[str, set[str]] = {}
    for package, version in re.findall(r"([\w-]+)==([\w.]+)", SCRIPT.read_text(encoding="utf-8")):
        installed.setdefault(package, set()).add(version)
    page = (ROOT / "docs/loading.md").read_text(encoding="utf-8")
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| ") and line.count(" | ") == 3]
    named = [found for row in rows for found in re.findall(r"([\w-]+) (\d[\w.]*)", row[1])]
    assert installed.keys() - NEEDED == {package for package, _ in named} & installed.keys()
    for package, version in named:
        assert version in installed.get(package, {version}) or package == "sentence-transformers", package
