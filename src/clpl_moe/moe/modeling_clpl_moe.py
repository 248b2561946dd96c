"""XLM-R, RoBERTa and BERT encoders with experts, as transformers loads and saves them.

This file and the siblings that it needs travel with every saved model folder, so that
``AutoModel.from_pretrained(folder, trust_remote_code=True)`` works where ``clpl_moe`` is not installed. They import only
torch, transformers and each other. Each class has a ``model_type`` of its own: a loader that does not know the experts
stops, instead of replacing them by random weights.
"""

from __future__ import annotations

import copy

import transformers
from torch import nn

try:
    from transformers import initialization as init
except ImportError:
    raise ImportError(
        f"this model has experts, whose code needs transformers 5.0 or later, found {transformers.__version__}; the dense"
        " model that `clpl-moe merge FOLDER OUTPUT` makes of it loads with any version"
    ) from None

# Up to 5.3, transformers copies from a folder only what this file imports itself: so it imports all of them, used or not.
from .config import MoEConfig
from .dispatch import Assignment  # noqa: F401
from .experts import Experts
from .install import install_experts
from .kernel_choice import choose_kernel  # noqa: F401
from .layer import RoutedTokens  # noqa: F401
from .layer_state import LayerState  # noqa: F401
from .router import Router


class MoEXLMRobertaConfig(transformers.XLMRobertaConfig):
    model_type = "clpl_moe_xlm_roberta"
    moe: dict | None = None  # the fields of MoEConfig


class MoERobertaConfig(transformers.RobertaConfig):
    model_type = "clpl_moe_roberta"
    moe: dict | None = None


class MoEBertConfig(transformers.BertConfig):
    model_type = "clpl_moe_bert"
    moe: dict | None = None


class MoEModel(transformers.PreTrainedModel):
    """Installs the experts that the configuration names, after the dense layers were built."""

    config_class: type[transformers.PretrainedConfig]

    def __init__(self, config: transformers.PretrainedConfig, *args, **kwargs) -> None:
        super().__init__(config, *args, **kwargs)
        install_experts(self, MoEConfig(**(config.moe or {})))

    def _init_weights(self, module: nn.Module) -> None:
        # Only reached for weights that a checkpoint lacks.
        if isinstance(module, (Experts, Router)):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
            if isinstance(module, Experts):
                init.zeros_(module.bias)
        else:
            super()._init_weights(module)


class MoEXLMRobertaModel(MoEModel, transformers.XLMRobertaModel):
    config_class = MoEXLMRobertaConfig


class MoERobertaModel(MoEModel, transformers.RobertaModel):
    config_class = MoERobertaConfig


class MoEBertModel(MoEModel, transformers.BertModel):
    config_class = MoEBertConfig


# Dense model class -> the class of the same encoder with experts.
MOE_CLASSES: dict[type[transformers.PreTrainedModel], type[MoEModel]] = {
    transformers.XLMRobertaModel: MoEXLMRobertaModel,
    transformers.RobertaModel: MoERobertaModel,
    transformers.BertModel: MoEBertModel,
}

# Their code is saved with them, and the folder's config.json names it.
for _moe_class in MOE_CLASSES.values():
    _moe_class.register_for_auto_class("AutoModel")
    _moe_class.config_class.register_for_auto_class("AutoConfig")


def register_classes() -> None:
    """Let ``AutoConfig`` and ``AutoModel`` find the classes with experts by their ``model_type``."""
    for model_class in MOE_CLASSES.values():
        transformers.AutoConfig.register(model_class.config_class.model_type, model_class.config_class, exist_ok=True)
        transformers.AutoModel.register(model_class.config_class, model_class, exist_ok=True)


def become_moe(encoder: nn.Module, config: MoEConfig) -> None:
    """Give a stock encoder that now has experts the class that saves and loads them; others keep theirs, to be trained only."""
    if isinstance(encoder, transformers.PreTrainedModel) and (moe_class := MOE_CLASSES.get(type(encoder))) is not None:
        _change_class(encoder, moe_class)
        encoder.config.update({"moe": config.to_dict()})


def become_dense(encoder: nn.Module) -> None:
    """The inverse of :func:`become_moe`."""
    for dense_class, moe_class in MOE_CLASSES.items():
        if isinstance(encoder, moe_class):
            _change_class(encoder, dense_class)
            del encoder.config.moe
            if hasattr(encoder.config, "auto_map"):
                del encoder.config.auto_map


def _change_class(encoder: transformers.PreTrainedModel, new: type[transformers.PreTrainedModel]) -> None:
    # A copy, since other models may share the configuration object; submodules read theirs, and need the same one.
    old, config = encoder.config, copy.deepcopy(encoder.config)
    assert new.config_class is not None
    config.__class__ = new.config_class
    config.architectures = [new.__name__]
    for module in encoder.modules():
        if getattr(module, "config", None) is old:
            module.config = config  # type: ignore[assignment]
    encoder.__class__ = new
    # transformers learns how to return a class's hidden states and attentions when one is made; this makes no layers.
    transformers.PreTrainedModel.__init__(new.__new__(new), copy.deepcopy(config))
