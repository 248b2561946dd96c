import ast
import importlib.util
import json
import re
import shlex
import shutil

import pytest
import torch
import yaml
from huggingface_hub import ModelCard

from clpl_moe.card import main as card
from clpl_moe.check.calls import TOOLS
from clpl_moe.common.errors import UserError
from clpl_moe.common.files import write_json
from clpl_moe.common.machine import versions
from clpl_moe.encoder.settings import EmbeddingSettings, write_settings
from clpl_moe.train.__main__ import main
from clpl_moe.train.card import _BEGIN, _END, Evaluated, add_results
from helpers.tiny_training import arguments, make_collection, read_metrics, write_dev_lines, write_triplets


def split_card(folder):
    _, front, text = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(front), text


def results_of(header):
    """The results in the front matter, by metric."""
    (model,) = header["model-index"]
    return {m["name"]: (m["value"], r["dataset"]) for r in model["results"] for m in r["metrics"]}


@pytest.mark.parametrize("helps", [True, False])
def test_card_tells_what_was_trained_on_what_and_how_it_went(tiny_encoder, tmp_path, helps):
    data = (write_dev_lines if helps else write_triplets)(tmp_path / "my data.jsonl", 6)
    options = {
        "max_steps": 2,
        "save_strategy": "steps",
        "save_steps": 1,
        "dev_collection": make_collection(tmp_path / "dev"),
        "dev_language": "ko",
        "query_instruction_for_retrieval": "query: ",
        **({"learning_rate": 1e-2, "per_device_train_batch_size": 6} if helps else {}),
    }
    main(arguments(tiny_encoder, data, tmp_path / "run", **options))
    header, text = split_card(tmp_path / "run")
    assert header["language"] == ["ko"]
    assert "base_model" not in header  # the hub takes no folders
    assert header["library_name"] == "sentence-transformers"
    assert "moe" in header["tags"]
    evaluations = [record for record in read_metrics(tmp_path / "run") if "eval_ndcg@10" in record]
    assert [record["step"] for record in evaluations] == [0, 1, 2]
    best = max(evaluations, key=lambda record: record["eval_ndcg@10"])
    assert (best["step"] > 0) == helps
    dataset = {"type": "dev", "name": "dev (ko)", "config": "ko", "split": "dev"}
    assert results_of(header) == {
        "nDCG@5": (round(best["eval_ndcg@5"], 6), dataset),
        "nDCG@10": (round(best["eval_ndcg@10"], 6), dataset),
        "R@100": (round(best["eval_recall@100"], 6), dataset),
    }
    assert header["model-index"][0]["name"] == "run"
    for piece in (
        "# run\n",
        "6 from `my data.jsonl`",
        "temperature 0.1, penalty weight 0.1 (cosine), in-batch negatives on",
        f"| {'before training' if helps else 'the base model, kept'} | {evaluations[0]['eval_ndcg@5']:.4f} |",
        f"| after training | {best['eval_ndcg@5']:.4f} |" if helps else "as it was: fine-tuning with",
        "`'query: '`",
        "trust_remote_code=True",
        "2412.17364",
        f"torch {versions()['torch']}",
    ):
        assert piece in text
    assert str(tmp_path) not in text
    assert ModelCard.load(tmp_path / "run" / "README.md").data.eval_results[0].metric_value == round(
        best["eval_ndcg@5"], 6
    )


def test_without_best_checkpoint_the_card_is_of_the_last_weights(tiny_encoder, tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 1, "dev_collection": make_collection(tmp_path / "dev")}
    options |= {"max_steps": 3, "dev_language": "ko", "learning_rate": 0.3, "trainable": "full"}
    main(arguments(tiny_encoder, write_triplets(tmp_path / "t.jsonl", 6), tmp_path / "run", **options))
    found = [record["eval_ndcg@10"] for record in read_metrics(tmp_path / "run") if "eval_ndcg@10" in record]
    assert found[-1] < max(found)
    header, _ = split_card(tmp_path / "run")
    assert results_of(header)["nDCG@10"][0] == round(found[-1], 6)


def test_the_code_in_the_card_runs_and_its_ways_agree(tiny_encoder, tmp_path, monkeypatch):
    data = write_triplets(tmp_path / "t.jsonl", 6)
    main(arguments(tiny_encoder, data, tmp_path / "run", max_steps=1, sentence_pooling_method="mean"))
    _, text = split_card(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    values = {}
    for name, code in re.findall(r"^With ([\w-]+).*?:\n+```python\n(.*?)```", text, flags=re.DOTALL | re.MULTILINE):
        space = values[name] = {}
        if all(importlib.util.find_spec(module) for module in re.findall(r"^from (\w+)", code, re.MULTILINE)):
            exec(code.replace("…", "abc def"), space)
    assert {*values} == {tool.name for tool in TOOLS} | {"clpl_moe"}
    found = {
        name: torch.tensor([list(map(float, row)) for row in space["queries"]])
        for name, space in values.items()
        if space
    }
    assert {"sentence-transformers", "transformers", "FlagModel", "BGEM3FlagModel"} <= found.keys()
    expected = found["transformers"].double()
    for name, queries in found.items():
        least = 0.999 if name == "clpl_moe" else 0.99999  # in bfloat16 where that is fast
        assert torch.cosine_similarity(queries.double(), expected).min() > least, name
    assert values["clpl_moe"]["encoder"].model.config.moe


_HOSTILE_PROMPT = 'a"]);__import__("os").system("id")#\n```\n| query: \\'


def test_strings_of_models_data_and_options_are_no_code_and_no_markup_in_the_card(tiny_encoder, tmp_path):
    base = shutil.copytree(tiny_encoder, tmp_path / "ba`se|")
    write_settings(base, EmbeddingSettings(query_prompt=_HOSTILE_PROMPT), max_length=100, hidden_size=32)
    data = write_triplets(tmp_path / "t`|<i>.jsonl", 6)
    folder = tmp_path / 'r"un <b>`$(id)`|[x](y)'
    main(arguments(base, data, folder, max_steps=1, num_experts=0, trainable="full"))
    header, text = split_card(folder)
    assert header["tags"][0] == "sentence-transformers"
    blocks = re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    assert len(blocks) == len(TOOLS) + 1
    strings = [node.value for code in blocks for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)]
    assert strings.count(folder.name) >= len(blocks)
    assert strings.count(_HOSTILE_PROMPT) == 6  # of the tools that do not read it from the folder
    (shell,) = re.findall(r"^```bash\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    assert shlex.split(shell)[4] == folder.name
    assert '# r"un \\<b\\>\\`\\$(id)\\`\\|\\[x\\](y)\n' in text
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert all(len(re.findall(r"(?<!\\)\|", line)) == 3 for line in table)


def test_card_of_a_dense_run_without_evaluation(tiny_encoder, tmp_path):
    data = write_triplets(tmp_path / "t.jsonl", 6)
    main(arguments(tiny_encoder, data, tmp_path / "run", max_steps=1, num_experts=0, trainable="full"))
    header, text = split_card(tmp_path / "run")
    assert "moe" not in header["tags"]
    assert "language" not in header
    assert "model-index" not in header
    assert "## Results" not in text
    assert "trust_remote_code" not in text


def write_results(folder, language, value, collection_hash="same"):
    about = {"collection": "data/miracl", "collection_hash": collection_hash, "language": language, "split": "dev"}
    write_json(folder / language / "metrics.json", {"metrics": {"nDCG@5": value, "RR@10": 0.5}, **about})


CARD = """---
tags:
- clpl
---
# run

<!-- results -->
<!-- end of results -->

## Training
"""


def test_results_of_an_evaluation_go_into_the_card_and_are_replaced_by_later_ones(tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    (run / "README.md").write_text(CARD, encoding="utf-8")
    for language, value in (("ko", 0.6), ("fa", 0.7)):
        write_results(tmp_path / "after", language, value)
    write_results(tmp_path / "before", "ko", 0.25)
    argv = ["--run", str(run), "--after", str(tmp_path / "after"), "--before", str(tmp_path / "before")]
    card(argv)
    card(argv)
    header, text = split_card(run)
    assert header["tags"] == ["clpl"]
    found = {
        (r["dataset"]["config"], m["name"]): m["value"] for r in header["model-index"][0]["results"] for m in r["metrics"]
    }  # fmt: skip
    assert found == {("fa", "nDCG@5"): 0.7, ("fa", "RR@10"): 0.5, ("ko", "nDCG@5"): 0.6, ("ko", "RR@10"): 0.5}
    assert text.count("## Results") == 1
    assert (
        "Dev queries of `miracl/ko`:\n\n| | nDCG@5 | RR@10 |\n|---|--:|--:|\n| before training | 0.2500 | 0.5000 |"
        in text
    )
    assert text.count("before training") == 1  # there are none of Persian
    assert text.endswith("## Training\n")
    write_results(tmp_path / "later", "hi", 0.9)
    card(["--run", str(run), "--after", str(tmp_path / "later")])
    assert list(results_of(split_card(run)[0])) == ["nDCG@5", "RR@10"]
    assert "ko" not in split_card(run)[1]


def test_results_without_their_place_are_refused(tmp_path, capsys):
    result = Evaluated("c", "ko", "dev", {"nDCG@5": 0.5})
    with pytest.raises(UserError, match=r"README\.md: no such file; expected the card of a run"):
        add_results(tmp_path, [result])
    (tmp_path / "README.md").write_text("---\ntags: [\n---\nmine\n", encoding="utf-8")
    with pytest.raises(UserError, match="no model card"):
        add_results(tmp_path, [result])
    for text in (f"{_END}\n{_BEGIN}\nmine\n", "mine\n"):
        (tmp_path / "README.md").write_text(f"---\ntags: []\n---\n{text}", encoding="utf-8")
        with pytest.raises(UserError, match="has no place for results"):
            add_results(tmp_path, [result])
    assert (tmp_path / "README.md").read_text(encoding="utf-8").endswith("mine\n")
    with pytest.raises(SystemExit):
        card(["--run", "", "--after", str(tmp_path)])
    assert capsys.readouterr().err == "error: --run: found nothing, expected the name of an output\n"
    with pytest.raises(SystemExit):
        card(["--run", str(tmp_path), "--after", str(tmp_path)])
    assert "holds no results of clpl_moe.evaluate" in capsys.readouterr().err
    write_results(tmp_path / "a", "ko", 0.5)
    write_results(tmp_path / "b", "ko", 0.5, "other")
    with pytest.raises(SystemExit):
        card(["--run", str(tmp_path), "--after", str(tmp_path / "a"), "--before", str(tmp_path / "b")])
    assert "results of another collection" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        card(["--run", str(tmp_path), "--after", str(tmp_path / "a"), "--before", str(tmp_path / "c")])
    assert f"{tmp_path / 'c'}: holds no results of a language that" in capsys.readouterr().err
    assert json.loads((tmp_path / "a" / "ko" / "metrics.json").read_text())["metrics"]["nDCG@5"] == 0.5
