"""Whatever stands in a config: a command does its work, or ends in one message; nothing that was there changes."""

import dataclasses
import importlib
import json

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers import mining
from helpers.evaluating import make_collection
from helpers.tiny_training import write_triplets

# As they stand in a file.
_HOSTILE = (
    *(
        "2020-13-45",
        "2020-01-01",
        "!!int abc",
        "!!int ''",
        "!!float abc",
        "!!bool abc",
        "!!timestamp abc",
        "!!binary abc",
    ),
    *("0x_", "9" * 5_000, "0x" + "F" * 5_000, "[" * 3_000 + "]" * 3_000, "&x [*x]", "&x {a: *x}", "{2020-01-01: 3}"),
    *(
        "{1: 2}",
        "{true: 2}",
        "[1, 2]",
        "[[1]]",
        "[null]",
        "{a: {b: 1}}",
        "null",
        "''",
        "'{}{}{x}'",
        "'[1]'",
        "'{\"a\": 1}'",
    ),
    *(
        '"a\\0b"',
        '"\\ud800"',
        "1e308",
        "-1",
        "0",
        ".inf",
        ".nan",
        "2147483648",
        "1e10",
        "true",
        "!!set {a}",
        "!!omap [a: 1]",
    ),
    *("no_such", "~/x", "../..", "/dev/null", "/proc/1", "[a", "'a", "*x", "@", "?", "%"),
)
_VALUES = st.one_of(
    st.sampled_from(_HOSTILE),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
        lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
        max_leaves=4,
    ).map(lambda value: json.dumps(value, ensure_ascii=True)),
)
# What could write to other places, fetch something, or start processes.
_LEFT_OUT = {
    "cache_dir",
    "cache_path",
    "push_to_hub",
    "base_url",
    "output",
    "output_dir",
    "logging_dir",
    "trust_remote_code",
}


@pytest.fixture(scope="module")
def commands(tiny_encoder, tmp_path_factory):
    """A folder, and by command options with which it ends well."""
    folder = tmp_path_factory.mktemp("data")
    data = str(write_triplets(folder / "t.jsonl", 4))
    model, mined = str(tiny_encoder), str(mining.make_collection(folder / "mined"))
    evaluated, lengths = str(make_collection(folder / "evaluated", "ko")), {"query_max_len": 20, "passage_max_len": 30}
    training = {"model_name_or_path": model, "train_data": [data], "output_dir": "run", "dry_run": True}
    training |= {"per_device_train_batch_size": 2, "max_steps": 1, "train_group_size": 2, "report_to": "none"}
    shared = {"model": model, "output": "out", "overwrite": True}
    asked = {"train_data": [data], "output": "out.jsonl", "language": "ko", "model": "m", "dry_run": True}
    return folder, {
        "train": training | lengths,
        "evaluate": {**shared, **lengths, "collection": evaluated, "languages": ["ko"]},
        "mine": {**shared, **lengths, "collection": mined, "language": "ko", "rank_to": 5, "negatives": 2},
        "synthesize": asked,
        "judge": asked | {"ask": "all"},
        "validate": {"train_data": [data], "tokenizer": model},
    }


@pytest.mark.slow
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(draw=st.data())
def test_a_config_is_used_or_refused_in_one_message(commands, draw, tmp_path_factory, capfd, monkeypatch):
    folder, known = commands
    command = draw.draw(st.sampled_from(sorted(known)))
    options, main = known[command], importlib.import_module(f"clpl_moe.{command}.__main__").main
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    names = sorted(set(_names(command)) - _LEFT_OUT)
    name, value = draw.draw(st.sampled_from([*names, *names, "no_such", "2020-01-01", "? [1]"])), draw.draw(_VALUES)
    place = tmp_path_factory.mktemp("cwd")
    monkeypatch.chdir(place)
    text = yaml.safe_dump({key: given for key, given in options.items() if key != name})
    (place / "c.yaml").write_text(f"{text}{name}: {value}\n")
    capfd.readouterr()
    code = 0
    try:
        main(["--config", "c.yaml"])
    except SystemExit as end:
        code = end.code or 0
    assert code in ((0, 1, 2) if command == "validate" else (0, 2))  # validate has found faults
    if code == 2:
        assert capfd.readouterr().err.strip().splitlines()[-1].startswith("error: ")
        assert not (place / "out").exists()
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def _names(command):
    """The options of a command."""
    types = getattr(importlib.import_module(f"clpl_moe.{command}"), command).option_types()
    return [field.name for cls in types for field in dataclasses.fields(cls) if field.init]
