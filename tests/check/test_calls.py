import ast
from dataclasses import replace
from pathlib import Path

import pytest

from clpl_moe.check.calls import TOOLS, Model, find_tools, flag_embedding_arguments
from clpl_moe.common.errors import OptionError
from clpl_moe.encoder.settings import EmbeddingSettings, write_settings

_HOSTILE = 'a"]);__import__("os").system("id")#\n{x} \\'
_MODEL = Model("runs/ko", EmbeddingSettings("mean", True, "query: ", "passage: "), 512)


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.name)
@pytest.mark.parametrize("pooling", ["cls", "mean", "last_token"])
@pytest.mark.parametrize("own_code", [False, True])
def test_calls_are_code_and_strings_of_a_model_stay_strings(tool, pooling, own_code):
    settings = EmbeddingSettings(pooling, pooling != "cls", _HOSTILE, _HOSTILE)
    model = Model(_HOSTILE, settings, 512, own_code, heads=True)
    for code in (tool.call(model), tool.usual(model)):
        tree = ast.parse(code)
        strings = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
        assert _HOSTILE in strings
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        assert {"queries", "passages"} <= names
        assert "__import__" not in names
        assert ("trust_remote_code" in code) == own_code


def test_truncated_embeddings_are_scaled_again():
    short = replace(_MODEL, heads=True, settings=replace(_MODEL.settings, truncate_dim=256))
    for tool in TOOLS:
        code = tool.call(short)
        ast.parse(code)
        assert "normalize" in code, tool.name
        assert ("256" in code) == (tool.package in ("transformers", "FlagEmbedding"))  # the others read it


def test_a_call_states_what_flag_embedding_does_not_read():
    code = next(tool for tool in TOOLS if tool.name == "FlagModel").call(_MODEL)
    for piece in (
        'pooling_method="mean"',
        'query_instruction_for_retrieval="query: "',
        'query_instruction_format="{}{}"',
        'passage_instruction_for_retrieval="passage: "',
        "passage_max_length=512",
        "use_fp16=False",
    ):
        assert f"    {piece},\n" in code


def test_arguments_for_flag_embedding_are_the_folders_own(tmp_path):
    write_settings(tmp_path, _MODEL.settings, max_length=512, hidden_size=32)
    given = flag_embedding_arguments(tmp_path)
    code = next(tool for tool in TOOLS if tool.name == "FlagModel").call(_MODEL)
    (call,) = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call) and node.keywords]
    stated = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    assert given | {"use_fp16": False} == stated
    (tmp_path / "sentence_bert_config.json").unlink()
    assert flag_embedding_arguments(tmp_path) == {k: v for k, v in given.items() if not k.endswith("_max_length")}


def test_tools_that_cannot_have_a_models_embeddings_say_so():
    fits = {tool.name: tool.fits for tool in TOOLS}
    assert "BGE-M3's heads" in fits["BGEM3FlagModel"](_MODEL)
    assert fits["BGEM3FlagModel"](replace(_MODEL, heads=True)) is None
    last = replace(_MODEL, settings=EmbeddingSettings("last_token"))
    assert "last_token" in fits["FlagModel"](last)
    assert fits["sentence-transformers"](last) is None


def test_the_page_has_the_calls_of_all_tools():
    text = (Path(__file__).parents[2] / "docs/loading.md").read_text(encoding="utf-8")
    texts = {"queries": '["탑은 언제 세워졌나요?"]', "passages": '["그 탑은 1889년에 완성되었다."]'}
    model = replace(_MODEL, max_length=128, own_code=True, heads=True, **texts)
    for tool in TOOLS:
        assert f"\n{tool.call(model)}```\n" in text, tool.name


def test_tools_are_found_by_name():
    assert find_tools(None) is TOOLS
    assert [tool.name for tool in find_tools(["langchain", "FlagModel"])] == ["LangChain", "FlagModel"]
    with pytest.raises(OptionError, match="tools: found 'FlagModle'; did you mean 'FlagModel'"):
        find_tools(["FlagModle"])
