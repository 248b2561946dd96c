import math

import pytest

from clpl_moe import MoEConfig


def test_defaults_are_the_published_setting_with_a_router_that_learns():
    assert MoEConfig().to_dict() == {
        "num_experts": 2,
        "top_k": 1,
        "target": "intermediate",
        "layers": "all",
        "router": "straight_through",
        "router_init_std": 0.02,
    }


def test_every_field_has_help():
    assert all(f.metadata["help"] for f in MoEConfig.__dataclass_fields__.values())


def test_comes_back_from_its_dictionary():
    config = MoEConfig(num_experts=8, top_k=2, target="ffn", layers=[1, 3], router="softmax_topk")
    assert MoEConfig(**config.to_dict()) == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_experts": 0}, "num_experts is 0: choose a whole number of at least 1"),
        ({"num_experts": 2.0}, "num_experts is 2.0"),
        ({"num_experts": True}, "num_experts is True"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_k": 3}, "top_k is 3 but there are 2 experts"),
        ({"target": "attention"}, "choose one of intermediate, output, ffn"),
        ({"router": "softmax"}, "choose one of straight_through, softmax_topk, topk_softmax"),
        ({"router_init_std": -1}, "router_init_std is -1"),
        ({"router_init_std": math.nan}, "router_init_std is nan"),
        ({"router_init_std": "0.02"}, "router_init_std is '0.02'"),
        ({"layers": "some"}, "choose 'all', 'every:2' or layer numbers"),
        ({"layers": "every:0"}, "layers is 'every:0'"),
        ({"layers": "every:"}, "layers is 'every:'"),
        ({"layers": "1,-2"}, "layers is '1,-2'"),
        ({"layers": []}, r"layers is \[\]"),
        ({"layers": [-1]}, r"layers is \[-1\]: choose"),
        ({"layers": ["1"]}, "layers is"),
        ({"layers": [True]}, "layers is"),
        ({"layers": None}, "layers is None"),
        ({"layers": 3}, "layers is 3"),
    ],
)
def test_refuses(values, message):
    with pytest.raises(ValueError, match=message):
        MoEConfig(**values)


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("all", [0, 1, 2, 3, 4]),
        ("every:1", [0, 1, 2, 3, 4]),
        ("every:2", [0, 2, 4]),
        ("every:3", [1, 4]),
        ("every:9", [4]),
        ("3, 1", [1, 3]),
        ([4, 0, 4], [0, 4]),
        ((2,), [2]),
    ],
)
def test_layers(layers, expected):
    assert MoEConfig(layers=layers).resolve_layers(5) == expected


def test_a_layer_that_the_encoder_lacks():
    config = MoEConfig(layers=[1, 5])
    with pytest.raises(ValueError, match="layer 5, but the encoder's layers are 0 to 4"):
        config.resolve_layers(5)
