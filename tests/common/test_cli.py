import dataclasses
import importlib.metadata
import json
import re
import subprocess
import sys
import time
from dataclasses import dataclass, field

import pytest

from clpl_moe import train
from clpl_moe.common import cli
from clpl_moe.common.errors import UserError
from clpl_moe.train.__main__ import main
from helpers.tiny_training import arguments


@dataclass
class Options:
    """What the tests parse."""

    name: str = field(metadata={"help": "A name, 100% required."})
    learning_rate: float = field(default=1e-5, metadata={"help": "Step size."})
    num_experts: int = field(default=2, metadata={"help": "How many."})
    bf16: bool = field(default=False, metadata={"help": "Half precision."})
    shuffle: bool = field(default=True, metadata={"help": "Order."})
    router: str = field(default="a", metadata={"help": "Which.", "choices": ["a", "b"]})
    files: list[str] = field(default_factory=list, metadata={"help": "Several."})
    margin: float | None = field(default=None, metadata={"help": "Maybe."})

    def __post_init__(self):
        if self.num_experts < 0:
            raise ValueError("num_experts is below 0")


def parse(*argv):
    return cli.parse([Options], "test", "", argv)[0]


@pytest.fixture
def config(tmp_path):
    def write(text):
        path = tmp_path / "c.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return write


def test_yaml_values_and_the_command_line_over_them(config):
    path = config(
        "# a comment\nname: 한국어\nlearning_rate: 1e-5\nnum_experts: 3\nbf16: yes\nfiles: [a, b]\nmargin: null\n"
    )
    options = parse("--config", path)
    assert options == Options("한국어", 1e-5, 3, True, files=["a", "b"])
    assert isinstance(options.learning_rate, float)
    over = parse("--num_experts", "5", "--config", path, "--bf16", "false", "--files", "c", "--margin=-0.5")
    assert over == Options("한국어", 1e-5, 5, False, files=["c"], margin=-0.5)


def test_null_is_no_value_of_an_option_that_has_a_default(config):
    path = config("name: a\nrouter: null")
    with pytest.raises(UserError, match=r"field 'router': found null, expected a value; without the line it is a"):
        parse("--config", path)


def test_values_that_begin_with_a_dash_or_hold_spaces(config):
    path = config("name: '--odd name'\nmargin: -1\nfiles: one file.jsonl")
    options = parse(f"--config={path}")
    assert (options.name, options.margin, options.files) == ("--odd name", -1.0, ["one file.jsonl"])


def test_mappings_with_dates(config):
    assert parse("--config", config("name: {since: 2024-12-01}")).name == '{"since": "2024-12-01"}'


def test_merged_mappings(config):
    """YAML's ``<<``: entries of another mapping, of which some may be set anew."""
    text = "name: {first: &first {a: 1, b: 2}, second: {<<: *first, b: 3}}"
    merged = json.loads(parse("--config", config(text)).name)
    assert merged == {"first": {"a": 1, "b": 2}, "second": {"a": 1, "b": 3}}


def test_empty_values(config):
    assert parse("--config", config("name: ''\nfiles:\n")) == Options("")
    with pytest.raises(UserError, match="name"):
        parse("--config", config(""))


def test_flags():
    assert parse("--name", "x", "--bf16", "--no_shuffle") == Options("x", bf16=True, shuffle=False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nam: x", "c.yaml: unknown option 'nam'; did you mean 'name'?"),
        ("xyzzy: x", "c.yaml: unknown option 'xyzzy'; --help lists the options"),
        ("learning_rate: fast", "c.yaml: field 'learning_rate': found 'fast', expected float"),
        ("num_experts: 2.5", "c.yaml: field 'num_experts': found 2.5, expected int"),
        ("bf16: maybe", "c.yaml: field 'bf16': found 'maybe', expected true or false"),
        ("router: c", "c.yaml: field 'router': found 'c', expected one of a, b"),
        ("num_experts: [1, 2]", "c.yaml: field 'num_experts': a list was found, one value is expected"),
        ("name: x\nfiles: []", "c.yaml: field 'files': an empty list was found, at least one value is expected"),
        ("num_experts: {a: 1}", "c.yaml: field 'num_experts': found {'a': 1}, expected int"),
        ("name: x\nbf16: true\nname: y", "c.yaml:3: not valid YAML: 'name' stands twice"),
        ("name: {a: {b: 1, b: 2}}", "c.yaml:1: not valid YAML: 'b' stands twice"),
        ("name: x\nfiles: [a", "c.yaml:"),
        ("name: x\n\tbf16: true", "c.yaml:2: not valid YAML"),
        ("- name\n- x", "c.yaml: found a list, expected 'option: value' lines"),
        ("just words", "c.yaml: found a str, expected 'option: value' lines"),
        (b"name: \xff", "c.yaml: not UTF-8 text"),
        ("name: x\nnum_experts: -1", "num_experts is below 0"),
        ("? [a]\n: x", "c.yaml"),
        ("1: x", "c.yaml: unknown option '1'"),
    ],
)
def test_faults_of_the_file(config, text, message):
    with pytest.raises(UserError, match=re.escape(message)) as error:
        parse("--config", config(text))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--nam", "x"], "unknown option '--nam'; did you mean 'name'?"),
        (
            ["--learning-rat=3", "--name", "x"],
            "unknown option '--learning-rat'; did you mean 'learning_rate'?",
        ),
        (["--name", "x", "--num_experts", "two"], "invalid int value: 'two'"),
        (["--name", "x", "--num_experts"], "expected one argument"),
        (["--name", "x", "--bf16", "perhaps"], "perhaps"),
        (["--name", "x", "--router", "c"], "invalid choice: 'c'"),
        (["--name", "x", "stray"], "stray"),
        ([], "required: --name"),
        (["--config"], "expected one argument"),
        (["--config", "/nowhere/c.yaml"], "/nowhere/c.yaml: no such config file"),
    ],
)
def test_faults_of_the_command_line(argv, message):
    with pytest.raises(UserError, match=re.escape(message)):
        parse(*argv)


def listed(text):
    """The options of a help text, with what is said of each."""
    parts = re.split(r"\n  (?=-)", text)[1:]
    return [(re.search(r"--(\w+)", part).group(1), " ".join(part.split())) for part in parts]


def test_help_lists_every_option_once_with_its_default(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    assert stop.value.code == 0
    found = listed(capsys.readouterr().out)
    names = [f.name for f in dataclasses.fields(Options)]
    assert [name for name, _ in found] == ["help", *names, "config"]
    texts = dict(found)
    assert "A name, 100% required. (required)" in texts["name"]
    assert "(default: 1e-05)" in texts["learning_rate"]
    assert "(default: True)" in texts["shuffle"]
    assert "{a,b}" in texts["router"]


def test_words_are_not_mixed_with_the_option_of_their_name(tmp_path):
    def read(*argv):
        return cli.parse([Options], "test", "", argv, positional="files")[0].files

    config = tmp_path / "c.yaml"
    config.write_text("files: [c]\n")
    required = ("--name", "x")
    assert read("a", "b", *required) == read(*required, "--files", "a", "b") == ["a", "b"]
    assert read("a", *required, "--config", str(config)) == ["a"]  # as any option overrides the file
    with pytest.raises(UserError, match="--files: given as an option and as words"):
        read("a", *required, "--files", "b")


def test_words_are_not_mixed_with_either_spelling_of_an_option():
    from clpl_moe.validate.__main__ import main

    for option in ("--train_data", "--train-data"):
        with pytest.raises(SystemExit) as stop:
            main(["a.jsonl", option, "b.jsonl"])
        assert stop.value.code == 2, option


def test_words_stand_in_the_help_without_being_required():
    text = cli.make_parser([Options], "test", "", positional="files").format_help()
    assert "usage: python -m test [FILES ...] [--config" in text
    assert re.search(r"\n  FILES +the same as --files\n", text)


@pytest.fixture(scope="module")
def parser():
    from clpl_moe.train.arguments import CLPLDataArguments, CLPLModelArguments, CLPLTrainingArguments

    classes = [CLPLModelArguments, CLPLDataArguments, CLPLTrainingArguments]
    return cli.make_parser(classes, train.PROG, train.DESCRIPTION)


class TestTraining:
    """The command with the most options."""

    def test_help_is_that_of_the_parser(self, parser):
        """The stored text: equal where the versions are those it was made with, else the same names of ours."""
        stored = train.HELP_FILE.read_text(encoding="utf-8")
        live = listed(parser.format_help())
        shown = listed(stored)
        names = [name for name, _ in shown]
        assert len(names) == len(set(names))
        from clpl_moe.train import options

        for cls in (options.ModelOptions, options.DataOptions, options.LossOptions, options.RunOptions):
            for name in cls.__dataclass_fields__:
                assert dict(shown)[name] == dict(live)[name], "run scripts/update_help.py"
        for name, text in shown[1:]:
            assert "(default: " in text or "(required)" in text or name == "config", name
        if installed_versions() == LOCKED:
            assert shown == live, "run scripts/update_help.py"

    def test_every_option_that_works_is_listed(self, parser):
        """But for what argparse adds: the dashed spelling, and --no_x for switches that are on."""
        names = {name for name, _ in listed(parser.format_help())}
        fields = {a.dest for a in parser._actions}
        assert fields == names

    def test_no_token_reaches_help_or_run_folder(self, parser, monkeypatch, tiny_encoder, tmp_path):
        """FlagEmbedding's default of --token is HF_TOKEN's value, which --help then shows."""
        from clpl_moe.train.arguments import CLPLDataArguments, CLPLModelArguments, CLPLTrainingArguments
        from clpl_moe.train.stored_config import resolved_config

        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        assert "secret" not in train.help_text()
        assert CLPLModelArguments(model_name_or_path="m").token is None
        argv = [
            *arguments(tiny_encoder, tmp_path, tmp_path / "out"),
            "--token",
            "hf_secret",
            "--hub_token",
            "hf_secret",
            "--dev_batch_tokens",
            "4096",
        ]
        groups = cli.parse([CLPLModelArguments, CLPLDataArguments, CLPLTrainingArguments], "", "", argv)
        config = resolved_config(*groups)
        assert "secret" not in str(config)
        # Of all others none is left out, whatever their names hold.
        names = {f.name for group in groups for f in dataclasses.fields(group) if f.init}
        empty = {name for name in names if any(getattr(g, name, None) == [] for g in groups)}
        assert names - config.keys() - empty == {"token", "hub_token", "resume_from_checkpoint"}
        assert config["dev_batch_tokens"] == 4096

    def test_mistakes_end_with_code_2(self, tiny_encoder, tmp_path, capsys, config):
        argv = arguments(tiny_encoder, tmp_path / "t.jsonl", tmp_path / "out")
        for more, message in [
            (
                ["--learning_rte", "1"],
                "error: unknown option '--learning_rte'; did you mean 'learning_rate'?",
            ),
            (
                ["--config", config("penalty_wieght: 1")],
                "unknown option 'penalty_wieght'; did you mean 'penalty_weight'?",
            ),
            (["--temperature", "0"], "temperature is 0.0"),
            (["--penalty_weight", "1.5"], "penalty_weight is 1.5"),
            (["--top_k", "3"], "top_k"),
            (["--train_group_size", "0"], "train_group_size is 0"),
            (["--query_max_len", "2"], "query_max_len is 2"),
            (["--trainable", "some"], "invalid choice: 'some'"),
            (["--use_mrl", "true"], "use_mrl"),
            (["--dev_language", "ko"], "dev_language needs"),
        ]:
            with pytest.raises(SystemExit) as stop:
                main(argv + more)
            assert stop.value.code == 2
            err = capsys.readouterr().err
            assert message in err
            assert "Traceback" not in err
        assert [path.name for path in tmp_path.iterdir()] == ["c.yaml"]


# What train/help.txt was made with.
LOCKED = {"transformers": "5.23.0", "FlagEmbedding": "1.4.2"}


def installed_versions():
    return {name: importlib.metadata.version(name) for name in LOCKED}


def test_start_times():
    """Limits for an idle machine, the best of several tries on a busy one."""

    def seconds(*command):
        best = float("inf")
        for _ in range(4):
            start = time.perf_counter()
            done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=True)
            best = min(best, time.perf_counter() - start)
        return best, done.stdout

    nothing, _ = seconds("-c", "pass")
    imported, _ = seconds("-c", "import clpl_moe")
    assert imported - nothing < 0.3
    helped, output = seconds("-m", "clpl_moe.train", "--help")
    assert helped < 5
    assert output == train.HELP_FILE.read_text(encoding="utf-8")
