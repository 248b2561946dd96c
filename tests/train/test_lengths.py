"""The lengths of a run, given or taken from its data."""

import json

import pytest
import yaml

from clpl_moe.common.files import write_jsonl
from clpl_moe.train.__main__ import main
from helpers.tiny_training import arguments, make_collection, make_runner, refused

FROM_DATA = {"query_max_len": None, "passage_max_len": None}


@pytest.fixture
def data(tmp_path):
    """20 lines whose passages have 12, 22, ..., 402 tokens, and whose queries have 42 at most."""

    def write(name="data.jsonl", scale=1):
        lines = [
            {"query": "a" * (40 if number else 20), "pos": ["b" * (20 * number + 10) * scale],
             "neg": ["c" * (20 * number + 20) * scale]}
            for number in range(20)
        ]  # fmt: skip
        write_jsonl(tmp_path / name, lines)
        return tmp_path / name

    return write


def options(narrow_encoder, data, output, **more):
    return arguments(narrow_encoder, data, output, train_group_size=2, trainable="moe", moe_layers="11", **more)


def chosen(runner):
    return runner.data_args.query_max_len, runner.data_args.passage_max_len


def test_they_fit_the_data(narrow_encoder, data, tmp_path, caplog):
    runner = make_runner(options(narrow_encoder, data(), tmp_path / "out", **FROM_DATA))
    assert chosen(runner) == (48, 392)  # 38 of the 40 passages have at most 382 tokens
    collator, encoding = runner.trainer.data_collator, runner.lengths.limits
    assert (collator.query_max_len, collator.passage_max_len) == (48, 392)
    assert (encoding["query_max_len"], encoding["passage_max_len"]) == (48, 392)
    said = "lengths         queries 48 (from the data, 0% are cut), passages 392 (from the data, 2.5% are cut) tokens\n"
    assert said in str(runner.plan)
    assert "cuts" not in caplog.text


def test_zero_takes_back_a_config_s(narrow_encoder, data, tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("query_max_len: 16\npassage_max_len: 24\n")
    zeros = {"query_max_len": 0, "passage_max_len": 0}
    runner = make_runner(["--config", str(config), *options(narrow_encoder, data(), tmp_path / "out", **zeros)])
    assert chosen(runner) == (48, 392)


@pytest.mark.parametrize(
    ("encoder", "scale", "limit", "advice"),
    [
        ("narrow_encoder", 0.1, 128, None),  # not below
        ("narrow_encoder", 3, 512, "the model takes no longer ones: split the texts"),
        ("tiny_encoder", 3, 128, "the model takes no longer ones: split the texts"),
    ],
)
def test_their_bounds(request, data, tmp_path, caplog, encoder, scale, limit, advice):
    path = data() if scale == 3 else tmp_path / "short.jsonl"
    lines = [{"query": "a", "pos": ["b" * int(100 * scale)], "neg": ["c" * int(300 * scale)]}] * 4
    write_jsonl(path, lines)
    argv = arguments(request.getfixturevalue(encoder), path, tmp_path / "out", train_group_size=2, **FROM_DATA)
    assert chosen(make_runner(argv)) == (32, limit)
    assert (advice in caplog.text) if advice else ("cuts" not in caplog.text)


def test_given_ones_are_taken_and_warned_of(narrow_encoder, data, tmp_path, caplog):
    runner = make_runner(options(narrow_encoder, data(), tmp_path / "out", query_max_len=24, passage_max_len=160))
    assert chosen(runner) == (24, 160)
    assert "queries 24 (95.0% are cut), passages 160 (62.5% are cut) tokens" in str(runner.plan)
    assert "passage_max_len 160 cuts 62.5% of the passages, which lose 36.8% of their tokens: set" in caplog.text
    assert "set passage_max_len 392, or 0 to take it from the data" in caplog.text
    assert "query_max_len 24 cuts 95.0% of the queries" in caplog.text
    caplog.clear()
    make_runner(options(narrow_encoder, data(), tmp_path / "out", query_max_len=48, passage_max_len=368))
    assert "cuts" not in caplog.text  # a tenth or less


def test_the_plan_of_a_dry_run_has_the_same(narrow_encoder, data, tmp_path, capsys):
    main([*options(narrow_encoder, data(), tmp_path / "out", **FROM_DATA), "--dry_run", "true"])
    assert (
        "queries 48 (from the data, 0% are cut), passages 392 (from the data, 2.5% are cut)" in capsys.readouterr().out
    )


def test_one_that_the_model_has_no_positions_for(narrow_encoder, data, tmp_path, capsys):
    argv = options(narrow_encoder, data(), tmp_path / "out", query_max_len=None, passage_max_len=513)
    assert "--passage_max_len: found 513 tokens" in refused(argv, capsys)


def test_a_resumed_run_keeps_its_lengths(tiny_encoder, tmp_path, monkeypatch):
    lines = [{"query": "ab", "pos": ["b" * 90], "neg": ["c" * 100]}] * 8
    write_jsonl(tmp_path / "t.jsonl", lines)
    more = {"train_group_size": 2, "save_strategy": "steps", "save_steps": 2, "max_steps": 4, **FROM_DATA}
    argv = arguments(tiny_encoder, tmp_path / "t.jsonl", tmp_path / "out", **more)
    main(argv)
    config = tmp_path / "out" / "train_config.yaml"
    values = yaml.safe_load(config.read_text())
    assert (values["query_max_len"], values["passage_max_len"]) == (32, 128)
    # The stored ones count, also where another version would choose others.
    config.write_text(yaml.safe_dump(values | {"passage_max_len": 104}))
    runner = make_runner([*argv, "--resume_from_checkpoint", "true"])
    assert chosen(runner) == (32, 104)
    assert runner.lengths.from_data == []


def test_nothing_else_changes(tiny_encoder, tmp_path):
    """Counting leaves no traces: tokenizer.json is the one of a run with given lengths."""
    lines = [{"query": "ab", "pos": ["b" * 90], "neg": ["c" * 100]}] * 8
    write_jsonl(tmp_path / "t.jsonl", lines)
    files = []
    for name, lengths in (("given", {"query_max_len": 32, "passage_max_len": 128}), ("found", FROM_DATA)):
        collection = make_collection(tmp_path / "dev")
        more = {"train_group_size": 2, "dev_collection": collection, "dev_language": "ko", **lengths}
        main(arguments(tiny_encoder, tmp_path / "t.jsonl", tmp_path / name, **more))
        files.append([(tmp_path / name / file).read_bytes() for file in ("tokenizer.json", "model.safetensors")])
    assert files[0] == files[1]
    assert json.loads((tmp_path / "found" / "tokenizer.json").read_text())
