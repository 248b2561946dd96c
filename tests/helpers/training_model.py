from types import SimpleNamespace

import torch

from clpl_moe.data.collator import CLPLCollator
from clpl_moe.data.dataset import Example
from clpl_moe.train.base_model import choose_trainable


def make_batch(tokenizer, *, sub_batch_size=-1, examples=None, packing=False, **changes):
    examples = examples or [
        Example("what is a", ["aa bb cc", "bb dd", "cc ee ff"], [["which b", "bb"], []], None, True),
        Example("and c", ["cc cc", "aa bb cc", "x y z z y"], [[], ["xyz"]], None, True),
    ]
    collator = CLPLCollator(
        tokenizer=tokenizer,
        query_max_len=16,
        passage_max_len=24,
        sub_batch_size=sub_batch_size,
        padding=True,
        return_tensors="pt",
        packing=packing,
    )
    return collator(examples) | changes


def gradients(model, batch):
    output = model(**batch)
    output.loss.backward()
    return output, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found, expected, **tolerances):
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], **tolerances, msg=lambda m, n=name: f"{n}: {m}")


def train_only(encoder, trainable, **options):
    """Choose trained parameters by options, which otherwise have their defaults."""
    stock = {"frozen_layers": 0, "fix_encoder": False, "fix_position_embedding": False, "unified_finetuning": False}
    stock |= {"lora_rank": 4, "lora_alpha": 8, "lora_dropout": 0.0, "lora_targets": ["attention", "ffn"]}
    choose_trainable(encoder, SimpleNamespace(**stock | {"trainable": trainable} | options))
