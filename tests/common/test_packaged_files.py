import os
from pathlib import Path

import pytest

from clpl_moe.common.cli import read_config
from clpl_moe.common.errors import UserError
from clpl_moe.common.packaged_files import ROOT, find_config, packaged_configs, packaged_samples


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_names_of_packaged_configs():
    assert {"ko", "quickstart", "paper/ko"} <= set(packaged_configs())
    for name in packaged_configs():
        assert find_config(name) == ROOT / "configs" / f"{name}.yaml"


def test_a_file_in_the_folder_goes_first(folder):
    (folder / "ko.yaml").write_text("name: mine")
    assert find_config("ko") == Path("ko.yaml")
    assert read_config("ko")[1] == {"name": "mine"}
    (folder / "ko").write_text("name: nearer")
    assert find_config("ko") == Path("ko")
    assert find_config(folder / "ko.yaml") == folder / "ko.yaml"
    (folder / "hi").mkdir()
    assert find_config("hi") == ROOT / "configs" / "hi.yaml"


@pytest.mark.parametrize("name", ["kr", "configs/ko.yaml", "", "../ko"])
def test_unknown_names_list_the_packaged_ones(name):
    with pytest.raises(UserError, match=r"no such config file; packaged ones are .*ko, .*paper/fa"):
        find_config(name)


def test_a_folder_is_no_config(folder):
    (folder / "mine").mkdir()
    with pytest.raises(UserError, match="mine: found a folder, expected a config file"):
        find_config("mine")


def test_packaged_configs_read_packaged_samples_where_the_folder_has_none(folder):
    _, options = read_config("ko")
    train, dev = Path(*options["train_data"]), Path(options["dev_collection"])
    assert train == dev / "ko" / "train.jsonl"
    assert train.is_absolute()
    assert train.is_file()
    assert options["output_dir"] == "runs/ko"

    (folder / "data" / "samples").mkdir(parents=True)
    _, options = read_config("ko")
    assert options["dev_collection"] == "data/samples"
    assert Path(*options["train_data"]) == train


def test_samples_of_the_folder_go_first(folder):
    assert packaged_samples() == ROOT / "data" / "samples"
    (folder / "data" / "samples").mkdir(parents=True)
    assert packaged_samples() == Path("data/samples")


def test_other_configs_keep_their_paths(folder):
    (folder / "own.yaml").write_text("train_data: [data/samples/ko/train.jsonl]")
    assert read_config("own")[1] == {"train_data": ["data/samples/ko/train.jsonl"]}


def test_a_clone_is_read_by_its_own_paths(monkeypatch):
    if not (ROOT / "pyproject.toml").is_file():
        pytest.skip("an installed wheel")
    monkeypatch.chdir(ROOT)
    for name in ("ko", os.path.join("configs", "ko.yaml")):  # noqa: PTH118
        assert read_config(name)[1]["train_data"] == ["data/samples/ko/train.jsonl"]
