import os
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from clpl_moe import MoEConfig, inject_moe
from clpl_moe.common.errors import UserError
from clpl_moe.encoder.packing import PackedTexts, can_pack, embed_packed
from clpl_moe.train.arguments import CLPLTrainingArguments
from clpl_moe.train.sharding import (
    WholeCopy,
    check_sharding,
    load_models_whole,
    load_optimizer_state,
    optimizer_state,
    put_weights,
    sharding_of,
    whole_weights,
)
from helpers.tiny import make_encoder


def fake_trainer(version=None, deepspeed=None):
    """A trainer whose launcher set an environment variable, and no option."""
    plugins = SimpleNamespace(
        fsdp_plugin=SimpleNamespace(fsdp_version=version),
        deepspeed_plugin=SimpleNamespace(hf_ds_config=SimpleNamespace(config=deepspeed)),
    )
    return SimpleNamespace(
        is_fsdp_enabled=version is not None,
        is_deepspeed_enabled=deepspeed is not None,
        accelerator=SimpleNamespace(state=plugins),
    )


def test_the_trainer_says_who_divides_the_model():
    assert sharding_of(fake_trainer()) is None
    assert sharding_of(fake_trainer(version=2)) == "FSDP2"
    assert sharding_of(fake_trainer(deepspeed={"zero_optimization": {"stage": 2}})) == "ZeRO-2"
    assert sharding_of(fake_trainer(deepspeed={"zero_optimization": {"stage": 0}})) is None
    with pytest.raises(UserError, match="FSDP of version 1 .* set fsdp_version to 2"):
        sharding_of(fake_trainer(version=1))
    with pytest.raises(UserError, match="the DeepSpeed config has scheduler: leave it out"):
        sharding_of(fake_trainer(deepspeed={"zero_optimization": {"stage": 2}, "scheduler": {}}))


@pytest.mark.parametrize(
    ("by", "options", "message"),
    [
        ("FSDP2", {"grad_cache_tokens": 64}, "grad_cache_tokens does not work with FSDP2: in the backward pass"),
        ("ZeRO-3", {"grad_cache_tokens": 64}, "grad_cache_tokens does not work with ZeRO-3"),
        ("ZeRO-2", {"grad_cache_tokens": 64}, None),
        ("ZeRO-2", {"trainable": "lora"}, "trainable lora does not work with ZeRO-2: .* take DDP"),
        ("FSDP2", {"torch_compile": True}, "torch_compile does not work with FSDP2"),
        ("FSDP2", {"optim": "adafactor"}, "optim adafactor does not work with FSDP2: take one of adamw_torch"),
        ("FSDP2", {"optim": "adamw_torch"}, None),
    ],
)
def test_what_does_not_work_divided_is_refused(by, options, message):
    args = CLPLTrainingArguments(output_dir="out", use_cpu=True, **options)
    if message is None:
        check_sharding(args, by, experts=False)
        return
    with pytest.raises(UserError, match=message):
        check_sharding(args, by, experts=False)


def test_experts_do_not_work_with_zero_3():
    args = CLPLTrainingArguments(output_dir="out", use_cpu=True)
    check_sharding(args, "FSDP2", experts=True)
    check_sharding(args, "ZeRO-3", experts=False)
    with pytest.raises(UserError, match="a model with experts does not work with ZeRO-3: take FSDP2"):
        check_sharding(args, "ZeRO-3", experts=True)


def test_all_processes_load_whole_models(monkeypatch):
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")  # as accelerate launch does by itself
    load_models_whole()
    assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false"


@pytest.fixture
def mesh(tmp_path):
    """Of this process, which makes a group of its own."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def divide(model, mesh):
    for module in (model.embeddings, *model.encoder.layer, model):
        fully_shard(module, mesh=mesh)
    return model


TEXTS = PackedTexts.from_sequences([[0, 5, 6, 2], [0, 7, 2], [0, 8, 9, 10, 11, 2]])


def step(model, optimizer):
    embed_packed(model, TEXTS, pooling="cls").square().mul(torch.arange(32.0)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("experts", [False, True])
def test_divided_weights_and_optimizer_are_those_of_the_whole_model(mesh, experts):
    def make():
        torch.manual_seed(0)
        model = make_encoder(vocab_size=50).train()
        model.pooler.requires_grad_(False)
        return inject_moe(model, MoEConfig(3, 1)) if experts else model

    models = [make(), divide(make(), mesh)]
    assert can_pack(models[1])
    empty = WholeCopy(make())
    optimizers = [
        torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.01, momentum=0.9) for m in models
    ]
    for _ in range(2):
        for model, optimizer in zip(models, optimizers):
            step(model, optimizer)
    weights = whole_weights(models[1], lambda weight: weight.clone())
    torch.testing.assert_close(weights, dict(models[0].state_dict()), rtol=1e-5, atol=1e-6)
    state = optimizer_state(optimizers[1], [], keep=True)
    torch.testing.assert_close(state, optimizers[0].state_dict(), rtol=1e-5, atol=1e-6)
    assert optimizer_state(optimizers[1], [], keep=False) is None
    with torch.no_grad(), empty.filled(weights, "cpu") as whole:
        expected = embed_packed(models[0].eval(), TEXTS, pooling="cls")
        torch.testing.assert_close(embed_packed(whole, TEXTS, pooling="cls"), expected, rtol=1e-5, atol=1e-6)
    assert all(parameter.is_meta for parameter in empty.model.parameters())

    # A run of one process goes on divided.
    other = divide(make(), mesh)
    optimizer = torch.optim.SGD([p for p in other.parameters() if p.requires_grad], lr=0.5, momentum=0.1)
    step(other, optimizer)
    put_weights(other, {name: value.clone() for name, value in models[0].state_dict().items()})
    load_optimizer_state(optimizer, [], optimizers[0].state_dict())
    for model, of_model in ((models[0].train(), optimizers[0]), (other, optimizer)):
        step(model, of_model)
    found = whole_weights(other, lambda weight: weight)
    torch.testing.assert_close(found, dict(models[0].state_dict()), rtol=1e-5, atol=1e-6)
