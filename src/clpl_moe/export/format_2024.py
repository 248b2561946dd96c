"""A model folder under the names of the checkpoints that were published in 2024; the inverse of reading one.

Experts stand one by one, as ``….dense.experts.{j}.weight|bias``, and routers as ``….dense.gate.weight``. ``config.json`` has a
stock model type, ``moe`` and ``only_train`` (the Linear that became experts), ``num_experts`` and ``num_experts_per_tok``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from clpl_moe.common.errors import OptionError
from clpl_moe.common.files import read_json, share, write_json
from clpl_moe.encoder import Encoder
from clpl_moe.moe.modeling_clpl_moe import MOE_CLASSES

# Their weights are the softmax of the chosen logits, as the code of 2024 computes it.
_ROUTERS = ("topk_softmax", "straight_through")


def check_2024(encoder: Encoder) -> None:
    """Raise :class:`OptionError` for a model that this format cannot hold."""
    moe = getattr(encoder.model.config, "moe", None)
    if moe is None or not isinstance(encoder.model, tuple(MOE_CLASSES.values())):
        raise OptionError("to", "2024 is a format of models with experts, found a dense one")
    if moe["router"] not in _ROUTERS:
        raise OptionError("to", f"found the router {moe['router']}, expected {' or '.join(_ROUTERS)} for 2024")
    if moe["target"] not in ("intermediate", "output"):
        raise OptionError("to", f"found experts of {moe['target']}, expected intermediate or output for 2024")


def write_2024(encoder: Encoder, folder: Path) -> None:
    """Write a model that :func:`check_2024` let pass into a folder."""
    from safetensors.torch import save_file

    encoder.save(folder)
    for file in (*folder.glob("*.py"), *folder.glob("model*.safetensors*")):
        file.unlink()
    moe: dict[str, Any] = encoder.model.config.moe  # type: ignore[assignment]
    save_file(state_2024(encoder.model.state_dict(), moe["target"]), folder / "model.safetensors", {"format": "pt"})
    share(folder / "model.safetensors")
    config = read_json(folder / "config.json", dict)
    dense = next(dense for dense, moe_class in MOE_CLASSES.items() if isinstance(encoder.model, moe_class))
    assert dense.config_class is not None
    config.pop("auto_map", None)
    config |= {"model_type": dense.config_class.model_type, "architectures": [dense.__name__]}
    config |= {"moe": moe["target"], "only_train": moe["target"]}
    config |= {"num_experts": moe["num_experts"], "num_experts_per_tok": moe["top_k"]}
    write_json(folder / "config.json", config)


def state_2024(state: dict[str, Tensor], target: str) -> dict[str, Tensor]:
    """The names of 2024 for a state dict with experts in the layers' ``target``; tensors that share no memory."""
    renamed: dict[str, Tensor] = {}
    for name, value in state.items():
        owner, _, rest = name.rpartition(f".{target}.")
        if rest == "router.weight":
            renamed[f"{owner}.{target}.dense.gate.weight"] = value.contiguous()
        elif rest in ("dense.weight", "dense.bias") and f"{owner}.{target}.router.weight" in state:
            for number, part in enumerate(value):
                renamed[f"{owner}.{target}.dense.experts.{number}.{rest.removeprefix('dense.')}"] = part.clone()
        else:
            renamed[name] = value.contiguous()
    return renamed
