import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from clpl_moe.encoder import load_encoder
from helpers.evaluating import make_collections

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "eval_miracl.sh"


def hub_of(folder, home):
    """Puts a model folder into a hub cache, as a download would; its name."""
    cache = home / "hub" / "models--someone--their-model"
    shutil.copytree(folder, cache / "snapshots" / ("0" * 40))
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0" * 40)
    for name in ("modules.json", "config_sentence_transformers.json"):  # known not to be there
        (cache / ".no_exist" / ("0" * 40)).mkdir(parents=True, exist_ok=True)
        (cache / ".no_exist" / ("0" * 40) / name).touch()
    return "someone/their-model"


def fake_environment(folder, activate):
    """A virtual environment that looks ready, so that the script does not install one."""
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python").symlink_to(sys.executable)
    (folder / "bin" / "activate").write_text(activate)
    (folder / ".installed").touch()
    return folder


@pytest.mark.parametrize(
    ("arguments", "variables", "evaluated", "prepared"),
    [
        (["BAAI/bge-m3"], {}, "BAAI/bge-m3 {root}/data/miracl ko fa hi {root}/results/miracl/bge-m3", "ko fa hi"),
        (
            ["mine", "ko", "--top_k", "9"],
            {},
            "{here}/mine {root}/data/miracl ko {root}/results/miracl/mine --top_k 9",
            "ko",
        ),
        (["mine", "b/c", "--"], {}, "{here}/mine b/c {root}/data/miracl ko fa hi {root}/results/miracl", "ko fa hi"),
        (["mine", "b/c", "--", "fa"], {"COLLECTION": "own"}, "{here}/mine b/c {here}/own fa {root}/results/own", ""),
        (["a"], {"COLLECTION": "/own", "OUTPUT": "out", "GPUS": "2"}, "torchrun a /own ko fa hi {here}/out", ""),
        (
            ["a", "hi"],
            {"MIRACL_SOURCE": "files"},
            "a {root}/data/miracl hi {root}/results/miracl/a",
            "hi from {here}/files",
        ),
        # A folder goes by its own name.
        ([".", "hi"], {"COLLECTION": "."}, "{here} {here} hi {root}/results/{here.name}/{here.name}", ""),
        (["mine/", "hi"], {"COLLECTION": "mine/."}, "{here}/mine {here}/mine hi {root}/results/mine/mine", ""),
    ],
)
def test_what_the_script_runs(tmp_path, arguments, variables, evaluated, prepared):
    (tmp_path / "mine").mkdir()
    venv = fake_environment(tmp_path / "venv", 'PATH="$VENV/fake:$PATH"\n')
    (venv / "fake").mkdir()
    for name in ("python", "torchrun"):  # exec takes no function
        (venv / "fake" / name).write_text(f'#!/bin/sh\npwd >> "{tmp_path}/from"\necho {name} "$@"\n')
        (venv / "fake" / name).chmod(0o755)
    environment = {**os.environ, "VENV": str(venv), **variables}
    done = subprocess.run(
        ["bash", str(SCRIPT), *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    *before, last = done.stdout.splitlines()
    known = ("python", "-m", "clpl_moe.evaluate", "--model", "--collection", "--languages", "--output")
    words = [word for word in last.split() if word not in (*known, "--standalone", "--nproc_per_node", "2")]
    assert " ".join(words) == evaluated.format(here=tmp_path, root=SCRIPT.parents[1])
    assert set((tmp_path / "from").read_text().split()) == {str(tmp_path)}  # where paths in options are the caller's
    sources = {line.split("--source ")[1] for line in before if "--source" in line}
    languages = [line.split()[4] for line in before]
    assert " ".join([*languages, *(f"from {source}" for source in sources)]) == prepared.format(here=tmp_path)
    assert all(line.startswith("python -m clpl_moe.prepare --miracl") for line in before)


def test_the_script_without_a_model():
    done = subprocess.run(["bash", str(SCRIPT)], capture_output=True, text=True)
    assert done.returncode == 2
    assert "usage: scripts/eval_miracl.sh MODEL" in done.stderr


@pytest.mark.slow
def test_every_kind_of_model_through_the_script(tiny_encoder, tiny_tokenizer, tmp_path):
    """A hub name, a stock folder with heads, a folder of ours and one of 2024, on a local collection without a network."""
    from clpl_moe import MoEConfig, inject_moe, save_encoder
    from encoder.test_load import config_2024, state_2024, stock_config, write_folder
    from helpers.tiny import perturb_experts

    make_collections(tmp_path / "data")
    encoder, _ = load_encoder(tiny_encoder)
    encoder = inject_moe(encoder, MoEConfig(num_experts=2, router="topk_softmax"))
    perturb_experts(encoder)
    save_encoder(encoder, tiny_tokenizer, tmp_path / "ours")
    config = config_2024("intermediate", 2, 1, **stock_config(encoder))
    write_folder(tmp_path / "of-2024", config, state_2024(encoder, "intermediate"), tiny_tokenizer)
    for folder in ("ours", "of-2024"):
        for file in ("sparse_linear.pt", "colbert_linear.pt"):
            shutil.copy(tiny_encoder / file, tmp_path / folder / file)
    name = hub_of(tiny_encoder, tmp_path / "home")
    environment = {
        **os.environ,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "1",
        "VENV": str(fake_environment(tmp_path / "venv", f'PATH="{Path(sys.executable).parent}:$PATH"\n')),
        "COLLECTION": "data",
        "OUTPUT": "results",
        "PYTHONPATH": str(SCRIPT.parents[1] / "src"),
    }

    def script(*arguments, **variables):
        command = ["bash", str(SCRIPT), *map(str, arguments)]
        return subprocess.run(command, cwd=tmp_path, env=environment | variables, capture_output=True, text=True)

    options = ["--passage_max_len", "100", "--dtype", "float32", "--m3_scores", "true"]
    done = script(name, tiny_encoder, "ours", "of-2024", "--", "ko", "fa", *options)
    assert done.returncode == 0, done.stderr
    metrics = {
        (label, kind): json.loads((tmp_path / "results" / label / "fa" / f"metrics{kind}.json").read_text())["metrics"]
        for label in ("their-model", "tiny", "ours", "of-2024")
        for kind in ("", ".m3")
    }
    for kind in ("", ".m3"):
        assert metrics["their-model", kind] == metrics["tiny", kind]
        assert metrics["ours", kind] == metrics["of-2024", kind] != metrics["tiny", kind]
    assert "their-model" in done.stdout
    # In two processes: the same, said once.
    done = script(tiny_encoder, "fa", *options, GPUS="2", OUTPUT="two")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("values of each query") == 1
    for kind in ("", ".m3"):
        assert (
            json.loads((tmp_path / "two" / "fa" / f"metrics{kind}.json").read_text())["metrics"]
            == metrics["tiny", kind]
        )
