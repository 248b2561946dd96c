import importlib.metadata
import json
import re
from importlib.util import find_spec

import pytest
import torch

import clpl_moe.check
from clpl_moe import Encoder, MoEConfig, inject_moe
from clpl_moe.check import check
from clpl_moe.check.__main__ import main
from clpl_moe.check.calls import TOOLS, Tool
from clpl_moe.common.errors import UserError
from clpl_moe.encoder.settings import EmbeddingSettings
from clpl_moe.export import export
from helpers.tiny import make_moe, make_tokenizer, perturb_experts
from helpers.tools import all_installed


@pytest.fixture(scope="module")
def folder(tiny_encoder, tmp_path_factory):
    """A folder with experts, heads, mean pooling, prompts and a length."""
    encoder = inject_moe(Encoder.load(tiny_encoder), MoEConfig(num_experts=2))
    perturb_experts(encoder.model)
    encoder.settings = EmbeddingSettings("mean", True, "query: ", "passage: ")
    encoder.max_length = 100
    place = tmp_path_factory.mktemp("check") / "model"
    encoder.save(place)
    return place


@pytest.fixture
def stand_ins(folder, tmp_path, monkeypatch):
    """Tools whose calls are Python only: they read our embeddings from a file, or others, or fail."""
    encoder = Encoder.load(folder, device="cpu", compute_dtype=torch.float32)
    texts = [*clpl_moe.check._PASSAGES, clpl_moe.check._long_text(encoder)]
    found = {
        "queries": encoder.encode_queries(clpl_moe.check._QUERIES).tolist(),
        "passages": encoder.encode_passages(texts).tolist(),
    }
    (tmp_path / "ours.json").write_text(json.dumps(found))
    read = f"import json\nfound = json.load(open({str(tmp_path / 'ours.json')!r}))\npassages = found['passages']\n"
    right, wrong = read + "queries = found['queries']\n", read + "queries = found['queries'][::-1]\n"

    def use(call, usual=right):
        tool = Tool("Stand-in", "pytest", lambda m: f"# {m.folder}\n{call}", lambda m: usual)
        monkeypatch.setattr("clpl_moe.check.calls.TOOLS", [tool, Tool("Other", "no-such-package", str, str)])

    return use, right, wrong


def test_the_right_call_is_shown_with_what_the_usual_one_gives(stand_ins, folder, capsys):
    use, right, wrong = stand_ins
    use(right, usual=wrong)
    main([str(folder)])
    output = capsys.readouterr().out
    usual, best = re.search(rf"Stand-in {importlib.metadata.version('pytest')} +([\d.]+) +([\d.]+)", output).groups()
    assert float(usual) > 0.001
    assert float(best) < 1e-4
    assert re.search("Other +not installed: pip install no-such-package", output)
    assert f"# Stand-in\n# {folder}\n{right}" in output


@pytest.mark.parametrize(
    ("call", "fault"),
    [
        ("raise OSError('no\\nsuch file')", "OSError: no such file"),
        ("queries = passages = [[1.0]]", None),
        ("import os; os._exit(3)", "its process ended with exit code 3"),
    ],
)
def test_a_tool_that_fails_is_told_of(stand_ins, folder, capsys, call, fault):
    use, _, _ = stand_ins
    use(call)
    with pytest.raises(SystemExit) as ended:
        main([str(folder), "--tools", "stand-in"])
    assert ended.value.code == 2
    captured = capsys.readouterr()
    assert "other embeddings than ours, or none: Stand-in" in captured.err
    assert "fails" in captured.out
    assert fault is None or fault in captured.out
    assert f"# {folder}" not in captured.out  # no call that is wrong


def test_a_checkpoint_of_2024_is_told_of_before_tools_fail_at_it(tmp_path):
    """They would load it as a dense model, without its experts."""
    Encoder(make_moe("intermediate", num_experts=2), make_tokenizer()).save(tmp_path / "model")
    export(input=tmp_path / "model", output=tmp_path / "2024", to="2024")
    with pytest.raises(UserError, match=r"2024: a checkpoint of 2024, whose experts no tool here reads; .*export"):
        check(folder=tmp_path / "2024", tools=["transformers"])


def test_wrong_embeddings_are_told_of(stand_ins, folder):
    use, _, wrong = stand_ins
    use(wrong)
    checked = check(folder=folder, tools=["Stand-in", "stand-in"])  # once
    (tool,) = checked.wrong
    assert tool.right > 0.001
    assert tool.fault is None


def test_code_that_is_not_ours_is_not_run(folder, tmp_path):
    with pytest.raises(UserError, match=r"nothing: no such folder"):
        check(folder=tmp_path / "nothing")
    for file in folder.glob("*"):
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with (tmp_path / "layer.py").open("a") as file:
        file.write("import os\n")
    with pytest.raises(UserError, match=r"layer\.py: is not the code of this version of clpl_moe.*trust_remote_code"):
        check(folder=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", [tool.name for tool in TOOLS])
def test_every_tool_gives_our_embeddings(folder, name):
    """Those that are installed; scripts/test_tools.sh installs all."""
    (tool,) = check(folder=folder, tools=[name]).tools
    if tool.version is None:
        assert not all_installed(), tool.fault
        pytest.skip(tool.fault)
    if name.endswith("FlagModel") and find_spec("transformers.modeling_attn_mask_utils") is None:
        assert "modeling_attn_mask_utils" in tool.fault
        pytest.skip("FlagEmbedding 1.4.2 needs a module that transformers 5.24 removed")
    assert tool.is_right, tool
    # With its defaults none has the queries' prompt; FlagEmbedding's loaders cut at 512 tokens, which this model cannot take.
    assert tool.usual is None or tool.usual > 1e-3, tool
    assert tool.usual is not None or name.endswith("FlagModel"), tool
