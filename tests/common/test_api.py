import inspect
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from clpl_moe.common.api import takes_options
from clpl_moe.common.errors import OptionError, UserError, command


@dataclass
class Fruit:
    name: str
    weight: float = 1.5

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
    assert list(parameters) == ["name", "weight", "folder", "lids"]
    assert parameters["name"].default is inspect.Parameter.empty
    assert parameters["lids"].default == [1]
    assert parameters["weight"].default == 1.5
    assert weigh.__doc__ == "Weigh it."


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
        ({"name": "fig", "weight": "much"}, "weigh(): field 'weight': found 'much', expected float"),
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
