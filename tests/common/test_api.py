import inspect
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from clpl_moe.common.api import takes_options
from clpl_moe.common.errors import OptionError, UserError, command


@dataclass
class Fruit:
    name: str
    weight: float = field(default=1.5, metadata={"help": "in kg"})

    def __post_init__(self):
        if self.weight <= 0:
            raise OptionError("weight", f"found {self.weight}, expected more than 0")


@dataclass
class Basket:
    folder: str = "here"
    lids: list[int] = field(default_factory=lambda: [1])


@takes_options(Fruit, Basket)
def weigh(fruit: Fruit, basket: Basket) -> str:
    """Weigh it."""
    return f"{fruit.name} {fruit.weight} {basket.folder} {basket.lids}"


def test_keyword_arguments_are_the_options():
    assert weigh(name="fig", folder=Path("there"), lids=(2, 3)) == "fig 1.5 there [2, 3]"
    assert weigh(name="fig", weight=None) == "fig 1.5 here [1]"


def test_instances_go_through():
    assert weigh(Fruit("fig", 2), Basket()) == "fig 2 here [1]"


def test_the_signature_shows_each_option_with_its_default():
    parameters = inspect.signature(weigh).parameters
    assert list(parameters) == ["name", "weight", "folder", "lids", "config"]
    assert parameters["name"].default is inspect.Parameter.empty
    assert str(inspect.signature(weigh)).startswith(
        "(*, name: str, weight: float = 1.5, folder: str = 'here', lids: list[int] = [1]"
    )
    assert parameters["lids"].default == [1]
    assert parameters["weight"].default == 1.5
    assert (
        weigh.__doc__
        == "Weigh it.\n\nOptions:\n    weight: in kg\n    config: " + weigh.__doc__.partition("config: ")[2]
    )


def test_arguments_override_a_config_and_none_is_the_default(tmp_path):
    config = tmp_path / "fruit.yaml"
    config.write_text("name: fig\nweight: 3\nfolder: box\n")
    assert weigh(config=str(config), weight=2, folder=None) == "fig 2.0 here [1]"
    config.write_text("name: fig\nweight: much\n")
    with pytest.raises(UserError, match=r"fruit.yaml: field 'weight': found 'much', expected a number"):
        weigh(config=config)
    config.write_text("name: fig\nwight: 3\n")
    with pytest.raises(UserError, match=r"fruit.yaml: unknown option 'wight'; did you mean 'weight'\?"):
        weigh(config=config)


def test_a_config_is_found_by_its_name_as_on_the_command_line(tmp_path, monkeypatch):
    (tmp_path / "fruit.yaml").write_text("name: fig")
    monkeypatch.chdir(tmp_path)
    assert weigh(config="fruit") == "fig 1.5 here [1]"
    with pytest.raises(UserError, match="frut: no such config file; packaged ones are .*ko"):
        weigh(config="frut")


def test_a_config_file_gives_options_that_arguments_override(tmp_path):
    config = tmp_path / "fruit.yaml"
    config.write_text("name: fig\nweight: 2e0\nfolder: box\n")
    assert weigh(config=config, folder="there") == "fig 2.0 there [1]"


def test_a_dataclass_may_read_the_config_itself():
    @dataclass
    class Reader:
        config: str

    @takes_options(Reader)
    def read(reader: Reader) -> str:
        return reader.config

    assert read(config="nowhere.yaml") == "nowhere.yaml"


def test_a_function_may_give_the_dataclass_at_each_call():
    known = [Basket]

    @takes_options(lambda: known[-1])
    def show(instance):
        return instance

    known.append(Fruit)
    assert show(name="fig") == Fruit("fig")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "fig", "wieght": 1}, "weigh(): unknown argument 'wieght'; did you mean 'weight'?"),
        ({"name": "fig", "xyzzy": None}, "weigh(): unknown argument 'xyzzy'"),
        ({"weight": 2}, "weigh(): missing argument name"),
        ({"name": None}, "weigh(): missing argument name"),
        ({"name": "fig", "lids": [1, "two"]}, "weigh(): field 'lids': found 'two', expected a whole number"),
        ({"name": "fig", "folder": ["a"]}, "weigh(): field 'folder': a list was found, one value is expected"),
        ({"name": ValueError("x")}, "weigh(): field 'name': found a ValueError, expected text"),
        ({"name": "fig", "weight": "much"}, "weigh(): field 'weight': found 'much', expected a number"),
        ({"name": "fig", "weight": -1}, "weigh(): weight: found -1.0, expected more than 0"),
    ],
)
def test_faults_speak_of_arguments(options, message):
    with pytest.raises(UserError) as error:
        weigh(**options)
    assert str(error.value) == message


def test_a_command_speaks_of_the_option(capsys):
    @command
    def main():
        Fruit("fig", 0)

    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert capsys.readouterr().err == "error: --weight: found 0, expected more than 0\n"


def test_an_argument_without_a_name_is_refused():
    with pytest.raises(UserError, match=r"weigh\(\): found 'fig' without a name"):
        weigh("fig")
