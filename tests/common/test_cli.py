import dataclasses
import json
import re
import subprocess
import sys
from dataclasses import dataclass, field

import pytest

from clpl_moe.common import cli
from clpl_moe.common.errors import UserError
from helpers.timing import processor_time


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


def test_paths_that_begin_at_the_users_home(tmp_path, monkeypatch, config):
    """A shell leaves --name=~/x as it is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert parse("--name=~/x", "--files", "a", "~/b") == Options(f"{tmp_path}/x", files=["a", f"{tmp_path}/b"])
    assert parse("--config", config("name: ~/y\n")).name == f"{tmp_path}/y"
    assert parse("--name=~").name == str(tmp_path)  # no folder of this name, which a careless rm takes for the home
    assert parse("--name=~ about x").name == "~ about x"


def test_yaml_values_and_the_command_line_over_them(config):
    path = config(
        "# a comment\nname: 한국어\nlearning_rate: 1e-5\nnum_experts: 3\nbf16: yes\nfiles: [a, b]\nmargin: null\n"
    )
    options = parse("--config", path)
    assert options == Options("한국어", 1e-5, 3, True, files=["a", "b"])
    assert isinstance(options.learning_rate, float)
    over = parse("--num_experts", "5", "--config", path, "--bf16", "false", "--files", "c", "--margin=-0.5")
    assert over == Options("한국어", 1e-5, 5, False, files=["c"], margin=-0.5)


@pytest.mark.parametrize("text", ["0123456", "12345e6", "1.10", "1e5", "1:30", "-0.50", "7654321"])
def test_text_that_looks_like_a_number_stays_as_it_is(config, text):
    """Such as a commit or a version."""
    options = parse("--config", config(f"name: {text}\nfiles: [{text}, a]\nlearning_rate: 1.50e-05\nnum_experts: 010"))
    assert options == Options(text, 1.5e-5, 10, files=[text, "a"])
    assert cli.look_up("name", ["--config", config(f"name: {text}")]) == text


def test_null_is_no_value_of_an_option_that_has_a_default(config):
    path = config("name: a\nrouter: null")
    with pytest.raises(UserError, match=r"field 'router': found null, expected a value; without the line it is a"):
        parse("--config", path)


def test_values_that_begin_with_a_dash_or_hold_spaces(config):
    path = config("name: '--odd name'\nmargin: -1\nfiles: one file.jsonl")
    options = parse(f"--config={path}")
    assert (options.name, options.margin, options.files) == ("--odd name", -1.0, ["one file.jsonl"])


def test_numbers_in_mappings_stay_as_they_are(config):
    written = parse(
        "--config", config("name: {a: 1.10, b: [12345e6, -0.50, .5, 3], c: {d: 0123456, 7: null, e: true}}")
    ).name
    assert written == '{"a": 1.10, "b": [12345e6, -0.50, 0.5, 3], "c": {"d": "0123456", "7": null, "e": true}}'


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
        ("learning_rate: fast", "c.yaml: field 'learning_rate': found 'fast', expected a number"),
        ("num_experts: 2.5", "c.yaml: field 'num_experts': found 2.5, expected a whole number"),
        ("bf16: maybe", "c.yaml: field 'bf16': found 'maybe', expected true or false"),
        ("router: c", "c.yaml: field 'router': found 'c', expected one of a, b"),
        ("num_experts: [1, 2]", "c.yaml: field 'num_experts': a list was found, one value is expected"),
        ("name: x\nfiles: []", "c.yaml: field 'files': an empty list was found, at least one value is expected"),
        ("name: x\nfiles: [a, null]", "c.yaml: field 'files': found a null, expected text"),
        ("name: x\nfiles: [[a]]", "c.yaml: field 'files': found a list, expected text"),
        ("num_experts: {a: 1}", "c.yaml: field 'num_experts': found {'a': 1}, expected a whole number"),
        ("name: x\nbf16: true\nname: y", "c.yaml:3: not valid YAML: 'name' stands twice"),
        ("name: {a: {b: 1, b: 2}}", "c.yaml:1: not valid YAML: 'b' stands twice"),
        ("name: x\nfiles: [a", "c.yaml:"),
        ("name: x\n\tbf16: true", "c.yaml:2: not valid YAML"),
        ("- name\n- x", "c.yaml: found a list, expected 'option: value' lines"),
        ("just words", "c.yaml: found text, expected 'option: value' lines"),
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


@pytest.mark.parametrize("value", ["a\udcff", "\ud800", "a\0b"])
def test_words_that_no_file_can_hold(value):
    for argv in (["--name", value], ["--name", "x", "--files", "a", value]):
        with pytest.raises(UserError, match=r"(name|files): found .*, expected text in UTF-8, without NUL"):
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


def test_several_words_go_to_an_option_each():
    @dataclasses.dataclass
    class Folders:
        source: str | None = None
        target: str | None = None

    def read(*argv):
        return dataclasses.astuple(cli.parse([Folders], "test", "", argv, positional=("source", "target"))[0])

    assert read("a", "b") == read("--target", "b", "--source", "a") == ("a", "b")
    assert read("--source", "a") == ("a", None)
    with pytest.raises(UserError, match="found 3 words without an option, expected SOURCE TARGET"):
        read("a", "b", "c")
    with pytest.raises(UserError, match="--target: given as an option and as words"):
        read("a", "b", "--target", "c")
    text = cli.make_parser([Folders], "test", "", positional=("source", "target")).format_help()
    assert "usage: python -m test SOURCE TARGET [--config" in text
    assert re.search(r"\n  SOURCE TARGET +the same as --source, --target\n", text)


_PARSE = """
import sys
from clpl_moe.common import cli
from clpl_moe.mine.options import SelectionArguments
(options,) = cli.parse([SelectionArguments], "test", "", ["--negatives=3", "--sampling", "score"])
print(options.negatives, options.sampling, "transformers" in sys.modules)
"""
# transformers' parser in a version where it needs more of the package.
_OTHER_VERSION = """
import importlib.util, sys
find = importlib.util.find_spec

def find_other(name):
    importlib.util.find_spec = find  # for transformers itself
    found = find(name)
    found.submodule_search_locations = [sys.argv[1]]
    return found

importlib.util.find_spec = find_other
"""


@pytest.mark.parametrize(("before", "loaded"), [("", False), (_OTHER_VERSION, True)])
def test_options_are_read_without_the_rest_of_transformers(tmp_path, before, loaded):
    """Which takes most of a second to import."""
    (tmp_path / "hf_argparser.py").write_text("from .utils import logging")
    command = [sys.executable, "-c", before + _PARSE, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"3 score {loaded}\n"


def test_start_times():
    nothing, _ = processor_time(sys.executable, "-c", "pass")
    imported, _ = processor_time(sys.executable, "-c", "import clpl_moe")
    assert imported - nothing < 0.3
    helped, _ = processor_time(sys.executable, "-m", "clpl_moe.train", "--help")
    assert helped < 5


@pytest.mark.parametrize(
    ("argv", "found"),
    [
        (["--files", "a", "--name", "x", "--bf16"], "x"),
        (["--name=x", "--name", "y"], "y"),
        (["--name=~/x"], "/home/x"),
        (["--config", "CONFIG"], "of the file"),
        (["--config", "CONFIG", "--name", "x"], "x"),
        (["--config", "missing"], None),
        (["--config"], None),
        (["--names", "x"], None),
        ([], None),
    ],
)
def test_one_option_before_the_others_are_known(config, monkeypatch, argv, found):
    monkeypatch.setenv("HOME", "/home")
    path = config("name: of the file\nnum_experts: 3\nfiles: [a]\n")
    assert cli.look_up("name", [path if word == "CONFIG" else word for word in argv]) == found


def test_one_option_that_is_written_in_another_way(config):
    assert cli.look_up("num_experts", ["--num-experts", "4"]) == "4"
    assert cli.look_up("num_experts", ["--config", config("num_experts: 3\n")]) == "3"
    assert cli.look_up("bf16", ["--bf16", "--name", "x"]) == "true"
    assert cli.look_up("files", ["--config", config("files: [a]\n")]) is None
    assert cli.look_up("name", ["--config", config("name: [\n")]) is None
