"""The text of ``--help``, which is not made by the parser that reads the options."""

import dataclasses
import re

import pytest

from clpl_moe.common import cli
from clpl_moe.train import all_options
from clpl_moe.train.__main__ import PROG, main
from clpl_moe.train.arguments import CLPLModelArguments
from clpl_moe.train.help import help_text
from clpl_moe.train.options import OPTIONS, WITHOUT_EFFECT
from clpl_moe.train.resume import resolved_config
from helpers.tiny_training import arguments

REFUSED = {"config_name", "use_mrl", "auto_find_batch_size", "label_smoothing_factor", "neftune_noise_alpha"}


@pytest.fixture(scope="module")
def groups():
    """The options of each group of the text, with what is said of each."""
    found = {}
    for part in help_text(PROG, "").split("\n\n")[1:]:
        title, _, rest = part.partition(":\n")
        options = re.split(r"\n  (?=-)", f"\n{rest}")[1:]
        found[title] = {re.search(r"--(\w+)", text).group(1): " ".join(text.split()) for text in options}
    return found


@pytest.fixture(scope="module")
def parser():
    return cli.make_parser(all_options(), PROG, "")


def test_own_options_come_first(groups):
    assert list(groups) == [
        "general",
        *OPTIONS,
        "FlagEmbedding's options",
        "transformers' options",
    ]
    for title, cls in OPTIONS.items():
        assert list(groups[title]) == [f.name for f in dataclasses.fields(cls) if f.name not in WITHOUT_EFFECT]
    assert 50 < sum(len(groups[title]) for title in OPTIONS) < 85
    assert "temperature" in {**groups["FlagEmbedding's options"], **groups["loss"]}
    assert "max_grad_norm" in groups["transformers' options"]


def test_every_option_of_the_installed_versions_is_listed_once(groups, parser):
    """But for those without effect, those whose other values are refused, and launchers' own."""
    listed = [name for group in groups.values() for name in group]
    assert len(listed) == len(set(listed))
    known = {action.dest for action in parser._actions}
    assert known - set(listed) == ({*WITHOUT_EFFECT, *REFUSED, "local_rank"} & known)
    assert set(listed) <= known


def test_defaults_are_those_of_the_parser(groups, parser):
    switched_off = [a for a in parser._actions if a.option_strings[0].startswith("--no_")]
    actions = {action.dest: action for action in parser._actions if action not in switched_off}
    own = {name for title in OPTIONS for name in groups[title]}
    for name, text in (item for group in list(groups.values())[1:] for item in group.items()):
        action, shown = actions[name], re.search(r"\((required|default: .*)\)$", text).group(1)
        if action.required:
            assert shown == "required", name
        elif isinstance(action.default, (int, float, str)) and (name in own or action.default != ""):
            assert shown.removeprefix("default: ").lower() in (str(action.default).lower(), "no"), name
    assert "{cosine,contrastive}" in groups["loss"]["penalty"]


def test_texts_of_dependencies_are_whole(groups):
    text = groups["transformers' options"]["max_grad_norm"]
    assert "gradient" in text.removeprefix("--max_grad_norm FLOAT")
    assert "%%" not in str(groups)


def test_no_token_reaches_help_or_run_folder(monkeypatch, tiny_encoder, tmp_path):
    """FlagEmbedding's default of --token is HF_TOKEN's value, which --help then shows."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert "secret" not in help_text(PROG, "")
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
    groups = cli.parse(all_options(), "", "", argv)
    config = resolved_config(*groups)
    assert "secret" not in str(config)
    # Of all others none is left out, whatever their names hold.
    names = {f.name for group in groups for f in dataclasses.fields(group) if f.init}
    empty = {name for name in names if any(getattr(g, name, None) == [] for g in groups)}
    assert names - config.keys() - empty == {"token", "hub_token", "resume_from_checkpoint"}
    assert config["dev_batch_tokens"] == 4096


def test_mistakes_end_with_code_2(tiny_encoder, tmp_path, capsys):
    argv = arguments(tiny_encoder, tmp_path / "t.jsonl", tmp_path / "out")
    config = tmp_path / "c.yaml"
    config.write_text("penalty_wieght: 1")
    for more, message in [
        (
            ["--learning_rte", "1"],
            "error: unknown option '--learning_rte'; did you mean 'learning_rate'?",
        ),
        (
            ["--config", str(config)],
            "unknown option 'penalty_wieght'; did you mean 'penalty_weight'?",
        ),
        (["--temperature", "0"], "temperature is 0.0"),
        (["--penalty_weight", "1.5"], "penalty_weight is 1.5"),
        (["--top_k", "3"], "top_k"),
        (["--train_group_size", "0"], "train_group_size: found 0, expected"),
        (["--query_max_len", "2"], "query_max_len: found 2, expected"),
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
