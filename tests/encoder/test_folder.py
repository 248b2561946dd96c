import contextlib
import json
import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clpl_moe.common.errors import UserError
from clpl_moe.encoder import Encoder
from clpl_moe.encoder.load import read_config
from clpl_moe.encoder.settings import EmbeddingSettings, read_settings
from helpers.tiny import make_moe
from helpers.tiny_training import arguments, write_triplets

DEEP = "[" * 3_000 + "]" * 3_000
DIGITS = "9" * 6_000
_FILES = (
    *("config.json", "modules.json", "config_sentence_transformers.json", "1_Pooling/config.json"),
    *("sentence_bert_config.json", "tokenizer_config.json", "tokenizer.json"),
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny_encoder, tiny_tokenizer):
    """A dense folder and one with experts, both with all files of settings."""
    dense, moe = (tmp_path_factory.mktemp("models") / name for name in ("dense", "moe"))
    Encoder.load(tiny_encoder, device="cpu").save(dense)
    encoder = make_moe()
    encoder.resize_token_embeddings(len(tiny_tokenizer))
    Encoder(encoder, tiny_tokenizer, EmbeddingSettings()).save(moe)
    return [dense, moe]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_triplets(tmp_path_factory.mktemp("data") / "train.jsonl", 4)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", {"model_type": []}, r"config.json: field 'model_type': found \[\], expected a string"),
        ("config.json", {"hidden_size": "32"}, "field 'hidden_size': found '32', expected a whole number from 1 to"),
        ("config.json", {"num_attention_heads": 0}, "field 'num_attention_heads': found 0"),
        ("config.json", {"num_hidden_layers": 10**9}, "field 'num_hidden_layers': found 1000000000"),
        ("config.json", {"vocab_size": True}, "field 'vocab_size': found True"),
        ("config.json", {"moe": 3}, "field 'moe': found 3, expected an object or a string"),
        ("config.json", f'{{"a": {DEEP}}}', "not JSON .nested too deeply"),
        ("config.json", f'{{"a": {DIGITS}}}', "not JSON .a number of thousands of digits"),
        ("modules.json", "[1]", "modules.json: found a int among the modules, expected objects"),
        ("modules.json", [{"type": 3, "path": ""}], "field 'type': found 3, expected a string"),
        ("config_sentence_transformers.json", {"prompts": ["query: "]}, "field 'prompts': found"),
        ("config_sentence_transformers.json", {"prompts": "query: "}, "field 'prompts': found 'query: '"),
        ("config_sentence_transformers.json", {"prompts": {"query": 3}}, "expected an object of strings"),
        ("config_sentence_transformers.json", '{"prompts": {"query": "\\ud800"}}', "half of a surrogate pair"),
        ("tokenizer_config.json", {"model_max_length": [[]]}, "the tokenizer cannot be loaded: TypeError"),
        ("1_Pooling/config.json", {"pooling_mode": 3}, "field 'pooling_mode': found 3"),
        ("1_Pooling/config.json", {"include_prompt": "no"}, "field 'include_prompt': found 'no'"),
    ],
)
def test_a_field_of_a_wrong_type_gets_one_message(folders, data, tmp_path, name, content, message):
    """Also from a dry run, which loads no weights."""
    folder = shutil.copytree(folders[0], tmp_path / "model")
    before = json.loads((folder / name).read_text())
    if isinstance(content, dict):
        content = before | content
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    if name != "tokenizer_config.json":
        with pytest.raises(UserError, match=message):
            (read_config if name == "config.json" else read_settings)(folder)
    with pytest.raises(UserError, match=message) as error:
        Encoder.load(folder, device="cpu")
    assert "\n" not in str(error.value)
    if name == "config.json":
        with pytest.raises(UserError, match=message):
            _dry_run(folder, data, tmp_path)


def _dry_run(folder, data, tmp_path):
    from clpl_moe.common.cli import parse
    from clpl_moe.train import all_options, train

    train(*parse(all_options(), "", "", arguments(folder, data, tmp_path / "run", dry_run=True)))


_SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.sampled_from([10**6, 10**20, 0.5, -1e308, float("inf"), float("nan")]),
    st.text(max_size=3),
    st.sampled_from(["\ud800", "{}", "../..", "eager", "float99", "own.Own"]),
)
_VALUES = st.recursive(
    _SCALARS,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=4,
)
_WHOLE = st.sampled_from(["", "null", "[1]", "{}", "[]", "3", '"a"', "{", DEEP, DIGITS, f'{{"hidden_size": {DIGITS}}}'])


@pytest.mark.slow
@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_a_damaged_folder_loads_or_gets_one_message(folders, data, tmp_path_factory, draw):
    """Whatever stands in its JSON files: no other error than :class:`UserError`, from loading and from a dry run."""
    tmp_path = tmp_path_factory.mktemp("damaged")
    folder = shutil.copytree(draw.draw(st.sampled_from(folders)), tmp_path / "model")
    path = folder / draw.draw(st.sampled_from(_FILES))
    if draw.draw(st.booleans()):
        path.write_text(draw.draw(_WHOLE))
    else:
        content = json.loads(path.read_text())
        record = draw.draw(st.sampled_from(content)) if isinstance(content, list) else content
        record[draw.draw(st.sampled_from(sorted(record)))] = draw.draw(_VALUES)
        path.write_text(json.dumps(content))
    for use in (lambda: Encoder.load(folder, device="cpu"), lambda: _dry_run(folder, data, tmp_path)):
        with contextlib.suppress(UserError):
            use()
    shutil.rmtree(tmp_path)
