"""XLM-R, RoBERTa and BERT encoders with experts, as transformers loads and saves them.

This file and its siblings ``install.py``, ``layer.py``, ``dispatch.py`` and ``config.py`` travel with every saved model
folder, so that ``AutoModel.from_pretrained(folder, trust_remote_code=True)`` works where ``clpl_moe`` is not installed.
They import nothing but torch and transformers. Each class has a ``model_type`` of its own: a loader that does not know the experts
stops, instead of replacing them by random weights.
"""

from __future__ import annotations

import copy

from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    BertConfig,
    BertModel,
    PretrainedConfig,
    PreTrainedModel,
    RobertaConfig,
    RobertaModel,
    XLMRobertaConfig,
    XLMRobertaModel,
)
from transformers import initialization as init

from .config import MoEConfig
from .install import install_experts
from .layer import Experts, Router


class MoEXLMRobertaConfig(XLMRobertaConfig):
    """XLM-R configuration; ``moe`` holds the fields of :class:`MoEConfig`."""

    model_type = "clpl_moe_xlm_roberta"
    _auto_class = "AutoConfig"
    moe: dict | None = None


class MoERobertaConfig(RobertaConfig):
    """RoBERTa configuration; ``moe`` holds the fields of :class:`MoEConfig`."""

    model_type = "clpl_moe_roberta"
    _auto_class = "AutoConfig"
    moe: dict | None = None


class MoEBertConfig(BertConfig):
    """BERT configuration; ``moe`` holds the fields of :class:`MoEConfig`."""

    model_type = "clpl_moe_bert"
    _auto_class = "AutoConfig"
    moe: dict | None = None


class _MoEMixin:
    """Installs the experts that the configuration names, after the dense layers were built."""

    _auto_class = "AutoModel"

    def __init__(self, config: PretrainedConfig, *args, **kwargs) -> None:
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


class MoEXLMRobertaModel(_MoEMixin, XLMRobertaModel):
    """XLM-R encoder with experts."""

    config_class = MoEXLMRobertaConfig


class MoERobertaModel(_MoEMixin, RobertaModel):
    """RoBERTa encoder with experts."""

    config_class = MoERobertaConfig


class MoEBertModel(_MoEMixin, BertModel):
    """BERT encoder with experts."""

    config_class = MoEBertConfig


# Dense model class -> the class of the same encoder with experts.
MOE_CLASSES: dict[type[PreTrainedModel], type[PreTrainedModel]] = {
    XLMRobertaModel: MoEXLMRobertaModel,
    RobertaModel: MoERobertaModel,
    BertModel: MoEBertModel,
}


def register_classes() -> None:
    """Let ``AutoConfig`` and ``AutoModel`` find the classes with experts by their ``model_type``."""
    for model_class in MOE_CLASSES.values():
        AutoConfig.register(model_class.config_class.model_type, model_class.config_class, exist_ok=True)
        AutoModel.register(model_class.config_class, model_class, exist_ok=True)


def become_moe(encoder: nn.Module, config: MoEConfig) -> None:
    """Give a stock encoder that now has experts the class and configuration that save and load them.

    An encoder of another class keeps its own: it can be trained, but not saved as a model folder.
    """
    moe_class = MOE_CLASSES.get(type(encoder))
    if moe_class is not None:
        _change_class(encoder, moe_class)
        encoder.config.moe = config.to_dict()


def become_dense(encoder: nn.Module) -> None:
    """The inverse of :func:`become_moe`."""
    for dense_class, moe_class in MOE_CLASSES.items():
        if isinstance(encoder, moe_class):
            _change_class(encoder, dense_class)
            del encoder.config.moe
            if hasattr(encoder.config, "auto_map"):
                del encoder.config.auto_map


def _change_class(encoder: nn.Module, new: type[PreTrainedModel]) -> None:
    # A copy, since other models may share the configuration object; submodules read theirs, and need the same one.
    old, config = encoder.config, copy.deepcopy(encoder.config)
    config.__class__ = new.config_class
    config.architectures = [new.__name__]
    for module in encoder.modules():
        if getattr(module, "config", None) is old:
            module.config = config
    encoder.__class__ = new
    # transformers learns how to return a class's hidden states and attentions when one is made; this makes no layers.
    PreTrainedModel.__init__(new.__new__(new), copy.deepcopy(config))
