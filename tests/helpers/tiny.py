"""Tiny encoders with random weights, and a tokenizer of characters, that tests build in milliseconds."""

from __future__ import annotations

import torch
from transformers import (
    BertConfig,
    BertModel,
    ElectraConfig,
    ElectraModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
    XLMRobertaConfig,
    XLMRobertaModel,
)

DENSE_CLASSES = {
    "xlm-roberta": (XLMRobertaConfig, XLMRobertaModel),
    "roberta": (RobertaConfig, RobertaModel),
    "bert": (BertConfig, BertModel),
}
# Another encoder, with layers as these have.
OTHER_CLASSES = {"electra": (ElectraConfig, ElectraModel)}


def checkpoint_gradients(encoder: PreTrainedModel, reentrant: bool = False) -> None:
    """Turn gradient checkpointing on, which transformers 5.20 renamed."""
    name = "activation" if hasattr(encoder, "activation_checkpointing_enable") else "gradient"
    options = {f"{name}_checkpointing_kwargs": {"use_reentrant": reentrant}}
    getattr(encoder, f"{name}_checkpointing_enable")(**options)


def make_encoder(kind: str = "xlm-roberta", seed: int = 0, **overrides) -> PreTrainedModel:
    """A dense encoder of two layers in evaluation mode, without dropout; tokens differ in their outputs."""
    config_class, model_class = (DENSE_CLASSES | OTHER_CLASSES)[kind]
    values = {
        "vocab_size": 50,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 40,
        "type_vocab_size": 1,
        "pad_token_id": 1,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "initializer_range": 0.2,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    torch.manual_seed(seed)
    return model_class(config_class(**(values | overrides))).eval()


def make_moe(
    target: str = "intermediate",
    num_experts: int = 3,
    top_k: int = 1,
    *,
    perturb: bool = True,
    kind: str = "xlm-roberta",
    **options,
) -> PreTrainedModel:
    """A tiny encoder whose experts and routers differ, so that routing shows."""
    from clpl_moe.moe.inject import MoEConfig, inject_moe

    encoder = inject_moe(make_encoder(kind), MoEConfig(num_experts, top_k, target, **options))
    if perturb:
        perturb_experts(encoder)
    return encoder


def perturb_experts(encoder: PreTrainedModel) -> None:
    """Make the experts and routers of an encoder differ much; in place."""
    from clpl_moe.moe.inject import expert_parameters

    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in expert_parameters(encoder):
            std = 1.0 if "router" in name else 0.2
            parameter.add_(torch.randn(parameter.shape, generator=generator) * std)


def make_batch(lengths: list[int], seed: int = 0, vocab_size: int = 50) -> dict[str, torch.Tensor]:
    """Random token ids of these lengths, padded on the right, with their mask."""
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)).long()
    ids = torch.randint(4, vocab_size, mask.shape, generator=generator)
    return {"input_ids": torch.where(mask.bool(), ids, 1), "attention_mask": mask}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Characters of Latin, Persian, Devanagari and letters of Hangul, with XLM-R's special tokens."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

    special = ["<s>", "<pad>", "</s>", "<unk>"]
    blocks = [(0x21, 0x7F), (0xA1, 0x100), (0x600, 0x700), (0x900, 0x980), (0x200C, 0x200E), (0x2010, 0x2027)]
    jamo = [(0x1100, 0x1113), (0x1161, 0x1176), (0x11A8, 0x11C3)]
    characters = [chr(code) for start, end in blocks + jamo for code in range(start, end)]
    vocabulary = {token: index for index, token in enumerate([*special, *characters, "<mask>"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKD(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex("."), "isolated")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        cls_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        sep_token="</s>",
        unk_token="<unk>",
        mask_token="<mask>",
        model_max_length=128,
    )
