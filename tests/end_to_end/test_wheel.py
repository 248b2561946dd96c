"""What is in the wheel and in the source distribution."""

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

from clpl_moe import __version__

CLONE = Path(__file__).parents[2]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    pytest.importorskip("hatchling")
    pytest.importorskip("hatch_fancy_pypi_readme")
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-d", folder], check=True, cwd=CLONE)
    return folder


def test_the_wheel_has_configs_samples_and_a_command(dist):
    (path,) = dist.glob("*.whl")
    assert path.stat().st_size < 3e6
    with zipfile.ZipFile(path) as wheel:
        names = set(wheel.namelist())
        (metadata,) = (name for name in names if name.endswith("dist-info/METADATA"))
        described = message_from_bytes(wheel.read(metadata))
        assert (
            "clpl-moe = clpl_moe.__main__:main" in wheel.read(metadata.replace("METADATA", "entry_points.txt")).decode()
        )
    tracked = {
        path.relative_to(CLONE) for pattern in ("configs/**/*.yaml", "data/samples/*/*") for path in CLONE.glob(pattern)
    }
    assert tracked
    assert {f"clpl_moe/resources/{path.as_posix()}" for path in tracked} <= names
    assert {"clpl_moe/py.typed", "clpl_moe/report/templates/report.html"} <= names
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/")) or name.endswith(".pyc")]
    assert described["Version"] == __version__
    assert described.get_all("Project-URL")
    # An index page has no folders beside the README.
    targets = re.findall(r"\]\(([^)\s]+)\)", described.get_payload())
    assert targets
    assert not [target for target in targets if not target.startswith(("https://", "#"))]


def test_a_wheel_that_is_unpacked_finds_what_it_brings(dist, tmp_path):
    (path,) = dist.glob("*.whl")
    with zipfile.ZipFile(path) as wheel:
        wheel.extractall(tmp_path / "site")
    (tmp_path / "empty").mkdir()
    script = "from clpl_moe.common.cli import read_config; print(*read_config('ko')[1]['train_data'])"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": str(tmp_path / "site")},
        cwd=tmp_path / "empty",
        capture_output=True,
        text=True,
        check=True,
    )
    train = Path(done.stdout.strip())
    assert train == tmp_path / "site/clpl_moe/resources/data/samples/ko/train.jsonl"
    assert train.is_file()


def test_the_source_distribution_has_documents_and_pictures(dist):
    (path,) = dist.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"README.md", "CHANGELOG.md", "ARCHITECTURE.md", "LICENSE", "pyproject.toml"} <= names
    for folder in ("configs", "data/samples", "docs", "examples", "imgs", "scripts", "src", "tests"):
        assert any(name.startswith(f"{folder}/") for name in names), folder
    assert not [name for name in names if name.startswith(("models/", "runs/", "results/", ".venv/"))]
