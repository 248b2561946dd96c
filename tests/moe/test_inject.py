import copy
import io
import pickle
import threading

import pytest
import torch
import transformers
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from clpl_moe import MoEConfig, inject_moe, merge_experts
from clpl_moe.moe.balance import pop_router_terms, track_routers
from clpl_moe.moe.inject import expert_parameters, ffn_parameters, stack_2024_experts
from clpl_moe.moe.install import dense_half, has_experts, layer_states
from clpl_moe.moe.layer import RoutedOutput
from clpl_moe.moe.modeling_clpl_moe import MOE_CLASSES
from helpers.tiny import DENSE_CLASSES, make_batch, make_encoder, make_moe

TARGETS = ["intermediate", "output", "ffn"]
ROUTERS = ["straight_through", "softmax_topk", "topk_softmax"]
SIZES = [(1, 1), (2, 1), (2, 2), (4, 3), (8, 2)]


def real(encoder, batch):
    """The encoder's outputs at real tokens."""
    return encoder(**batch).last_hidden_state[batch["attention_mask"].bool()]


def gradients(encoder):
    return {name: p.grad for name, p in encoder.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("target", TARGETS)
def test_keeps_the_function(target, router, size):
    batch = make_batch([9, 4, 7])
    dense = make_encoder()
    moe = inject_moe(copy.deepcopy(dense), MoEConfig(*size, target, router=router))
    with torch.no_grad():
        torch.testing.assert_close(real(moe, batch), real(dense, batch), rtol=0, atol=1e-5)
        alone = {"input_ids": batch["input_ids"][:1]}
        torch.testing.assert_close(moe(**alone)[0], dense(**alone)[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", ["roberta", "bert"])
def test_other_encoders(kind, target):
    batch = make_batch([9, 4, 7])
    dense = make_encoder(kind)
    moe = inject_moe(copy.deepcopy(dense), MoEConfig(3, 2, target))
    assert type(moe) is MOE_CLASSES[DENSE_CLASSES[kind][1]]
    with torch.no_grad():
        torch.testing.assert_close(real(moe, batch), real(dense, batch), rtol=0, atol=1e-5)
        assert not torch.allclose(real(make_moe(target, kind=kind), batch), real(dense, batch), atol=1e-2)


def test_a_model_around_an_encoder():
    config = transformers.XLMRobertaConfig(**make_encoder().config.to_dict())
    model = transformers.XLMRobertaForMaskedLM(config).eval()
    batch = make_batch([5, 3])
    before = model(**batch).logits[batch["attention_mask"].bool()]
    assert inject_moe(model, MoEConfig()) is model
    assert has_experts(model.roberta)
    after = model(**batch).logits[batch["attention_mask"].bool()]
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5)
    assert not has_experts(merge_experts(model))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("top_k", [1, 2])
def test_padding_is_neither_routed_nor_counted(target, top_k):
    encoder = make_moe(target, top_k=top_k).train()
    track_routers(encoder)
    short = make_batch([9, 4, 6])
    padding = short["attention_mask"] == 0
    other = {**short, "input_ids": torch.where(padding, 33, short["input_ids"])}
    wide = {name: nn.functional.pad(value, (0, 5), value=0) for name, value in short.items()}
    # XLM-R counts positions over what is no padding token, so that they have to stay as they are.
    positions = encoder.embeddings.create_position_ids_from_input_ids(short["input_ids"], 1)
    results = []
    for batch in (short, other, wide):
        width = batch["input_ids"].shape[1]
        outputs = real(encoder, {**batch, "position_ids": nn.functional.pad(positions, (0, width - 9), value=1)})
        results.append((outputs, pop_router_terms(encoder)))
    for outputs, terms in results[1:]:
        torch.testing.assert_close(outputs, results[0][0], rtol=0, atol=1e-5)
        assert torch.equal(terms.load, results[0][1].load)
        torch.testing.assert_close(terms.balance, results[0][1].balance)
        torch.testing.assert_close(terms.z, results[0][1].z)
    routed = []
    for _, _, router in layer_states(encoder):
        router.register_forward_hook(lambda module, args, output: routed.append(sum(output.sizes)))
    encoder(**short)
    assert routed == [19 * top_k, 19 * top_k]


@pytest.mark.parametrize("as_type", [torch.bool, torch.float32])
def test_masks_of_other_types_and_as_a_second_argument(as_type):
    encoder, batch = make_moe(), make_batch([9, 4])
    expected = encoder(**batch)[0]
    mask = batch["attention_mask"].to(as_type)
    assert torch.equal(encoder(input_ids=batch["input_ids"], attention_mask=mask)[0], expected)
    assert torch.equal(encoder(batch["input_ids"], batch["attention_mask"])[0], expected)


@pytest.mark.parametrize("target", TARGETS)
def test_router_learns_at_one_expert_a_token(target):
    batch = make_batch([9, 4])
    learning = make_moe(target, top_k=1)
    fixed = make_moe(target, top_k=1, router="topk_softmax")
    torch.testing.assert_close(real(learning, batch), real(fixed, batch))
    for encoder in (learning, fixed):
        real(encoder, batch).pow(3).sum().backward()
    for (_, _, router), (_, _, other) in zip(layer_states(learning), layer_states(fixed), strict=True):
        assert router.weight.grad.norm() > 1e-3
        assert not other.weight.grad.any()


@pytest.mark.parametrize("target", TARGETS)
def test_router_learns_at_one_expert_a_token_right_after_injection(target):
    """Experts are equal then: the gradient of the router comes from its weight on their common output."""
    encoder = make_moe(target, num_experts=2, perturb=False)
    real(encoder, make_batch([9, 4])).pow(3).sum().backward()
    assert all(router.weight.grad.norm() > 1e-3 for _, _, router in layer_states(encoder))


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("target", TARGETS)
def test_bf16_autocast(target, top_k):
    encoder, batch = make_moe(target, top_k=top_k), make_batch([9, 4])
    exact = real(encoder, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = real(encoder, batch)
        stock = real(make_encoder(), batch)
    assert rounded.dtype == stock.dtype
    # Rounding may send a token to another expert; most tokens stay near.
    near = (rounded.float() - exact).abs().amax(1) < 0.15
    assert near.float().mean() > 0.8
    rounded.float().square().sum().backward()
    assert all(g.isfinite().all() and g.dtype == torch.float32 for g in gradients(encoder).values())


def test_bf16_weights():
    encoder = make_moe().to(torch.bfloat16)
    outputs = real(encoder, make_batch([9, 4]))
    assert outputs.dtype == torch.bfloat16
    outputs.float().sum().backward()
    assert inject_moe(make_encoder().to(torch.bfloat16), MoEConfig()).dtype == torch.bfloat16


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("target", TARGETS)
def test_gradient_checkpointing_changes_nothing(target, top_k):
    """Other batches go through before the backward pass repeats layers, in a thread of its own as on CUDA."""
    batches = [make_batch([9, 4, 6], 1), make_batch([2, 8], 2), make_batch([5, 5], 3)]
    results = []
    for checkpointing in (False, True):
        encoder = make_moe(target, top_k=top_k).train()
        if checkpointing:
            encoder.gradient_checkpointing_enable()
        track_routers(encoder)
        loss = sum(real(encoder, batch).square().mean() for batch in batches)
        terms = pop_router_terms(encoder)
        backward = threading.Thread(target=(loss + terms.balance + 0.1 * terms.z).backward)
        backward.start()
        backward.join()
        assert pop_router_terms(encoder) is None  # nothing was counted again in the backward pass
        results.append((loss, terms, gradients(encoder)))
    (loss, terms, grads), (again, terms_again, grads_again) = results
    torch.testing.assert_close(again, loss)
    assert torch.equal(terms_again.load, terms.load)
    torch.testing.assert_close(terms_again.balance, terms.balance)
    assert grads.keys() == grads_again.keys()
    for name in grads:
        torch.testing.assert_close(grads_again[name], grads[name])


@pytest.mark.parametrize("target", TARGETS)
def test_merging_is_the_inverse_of_injection(target):
    dense = make_encoder()
    merged = merge_experts(inject_moe(copy.deepcopy(dense), MoEConfig(3, 2, target)))
    assert type(merged) is type(dense)
    assert merged.config.to_dict() == {**dense.config.to_dict(), "architectures": ["XLMRobertaModel"]}
    state, expected = merged.state_dict(), dense.state_dict()
    assert state.keys() == expected.keys()
    for name in state:
        torch.testing.assert_close(state[name], expected[name])
    assert list(map(type, merged.modules())) == list(map(type, dense.modules()))
    batch = make_batch([9, 4])
    torch.testing.assert_close(merged(**batch)[0], dense(**batch)[0])
    assert not has_experts(merged)
    again = inject_moe(merged, MoEConfig(2, 1, target))
    torch.testing.assert_close(real(again, batch), real(dense, batch), rtol=0, atol=1e-5)


def test_merging_takes_the_mean_of_the_experts():
    encoder = make_moe("ffn")
    layer = encoder.encoder.layer[1]
    first, second = layer.intermediate.dense.weight.mean(0), layer.output.dense.bias.mean(0)
    merge_experts(encoder)
    torch.testing.assert_close(encoder.encoder.layer[1].intermediate.dense.weight, first)
    torch.testing.assert_close(encoder.encoder.layer[1].output.dense.bias, second)


def test_a_merged_encoder_saves_as_a_stock_one(tmp_path):
    encoder = make_moe()
    encoder.save_pretrained(tmp_path / "moe")  # leaves traces in the configuration
    merge_experts(encoder).save_pretrained(tmp_path / "dense")
    loaded = transformers.AutoModel.from_pretrained(tmp_path / "dense").eval()
    assert type(loaded) is transformers.XLMRobertaModel
    batch = make_batch([9, 4])
    torch.testing.assert_close(loaded(**batch)[0], encoder(**batch)[0])


def test_training_and_evaluation_mode_are_kept():
    for training in (True, False):
        encoder = inject_moe(make_encoder().train(training), MoEConfig(target="ffn"))
        assert all(module.training is training for module in encoder.encoder.layer.modules())


def copy_by_pickle(model):
    return pickle.loads(pickle.dumps(model))


def copy_by_torch_save(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, copy_by_pickle, copy_by_torch_save])
@pytest.mark.parametrize("target", TARGETS)
def test_copies_are_independent(duplicate, target):
    encoder, batch = make_moe(target).train(), make_batch([9, 4])
    track_routers(encoder)
    encoder(**batch)  # leaves records, which hold on to a graph
    twin = duplicate(encoder)
    assert pop_router_terms(twin) is None
    torch.testing.assert_close(real(twin, batch), real(encoder, batch))
    terms = pop_router_terms(twin)
    assert terms is not None  # still tracking, in its own records
    counted = torch.stack([r.counts for _, state, _ in layer_states(encoder) for r in state.records]).sum()
    assert counted.item() == 2 * 2 * 13  # two passes, two layers
    with torch.no_grad():
        for _, parameter in expert_parameters(twin):
            parameter.zero_()
    assert not torch.allclose(real(twin, batch), real(encoder, batch))


def test_threads_can_share_a_model():
    """Both threads are between attention and experts at the same time, with different padding."""
    encoder = make_moe("ffn")
    batches = [make_batch([9, 4, 6], 1), make_batch([2, 9, 8], 2)]
    with torch.no_grad():
        expected = [real(encoder, batch) for batch in batches]
        together, results = threading.Barrier(2, timeout=300), [None, None]
        for layer in encoder.encoder.layer:
            layer.attention.register_forward_hook(lambda *_: [together.wait(), None][1])

        def work(index):
            with torch.no_grad():
                results[index] = real(encoder, batches[index])

        threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for result, value in zip(results, expected):
        assert torch.equal(result, value)


@pytest.mark.slow
@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("target", TARGETS)
def test_compiled(target, top_k):
    """By torch's frontend: what its backends generate is not in question."""
    torch._dynamo.reset()
    encoder = make_moe(target, top_k=top_k)
    twin = copy.deepcopy(encoder)
    compiled = torch.compile(encoder, backend="eager")
    for batch in (make_batch([9, 4]), make_batch([3, 7, 5]), make_batch([6])):
        outputs, expected = real(compiled, batch), real(twin, batch)
        torch.testing.assert_close(outputs, expected)
        outputs.pow(3).sum().backward()
        expected.pow(3).sum().backward()
    wanted = gradients(twin)
    for name, gradient in gradients(encoder).items():
        torch.testing.assert_close(gradient, wanted.pop(name), rtol=1e-4, atol=1e-4)
    assert not wanted


def test_the_sorted_order_is_kept_through_the_output_linear():
    """It sees the real tokens only, those of one expert together; a module of another build sees what it always saw."""
    encoder, batch = make_moe(num_experts=4), make_batch([9, 4])
    layer, seen = encoder.encoder.layer[0], {}
    assert isinstance(layer.output, RoutedOutput)
    layer.intermediate.router.register_forward_hook(lambda module, args, output: seen.update(assignment=output))
    layer.intermediate.dense.register_forward_hook(lambda module, args, output: seen.update(first=output))
    layer.output.dense.register_forward_pre_hook(lambda module, args: seen.update(second=args[0]))
    expected = real(encoder, batch)
    assert len(seen["second"]) == 13
    assert torch.equal(seen["second"], layer.intermediate.intermediate_act_fn(seen["first"]))
    expected.pow(3).sum().backward()
    other = make_moe(num_experts=4)
    for layer in other.encoder.layer:
        layer.intermediate.hands_over = False
        layer.output = dense_half(layer.output)
    found = real(other, batch)
    torch.testing.assert_close(found, expected)
    found.pow(3).sum().backward()
    wanted = gradients(encoder)
    for name, gradient in gradients(other).items():
        torch.testing.assert_close(gradient, wanted.pop(name), rtol=1e-4, atol=1e-4)
    assert not wanted


def test_an_output_module_of_another_build_is_left_in_place():
    dense = make_stock("XLMRobertaXL")
    moe, batch = inject_moe(copy.deepcopy(dense), MoEConfig()), make_batch([9, 4])
    assert type(moe.encoder.layer[0].output) is type(dense.encoder.layer[0].output)
    torch.testing.assert_close(real(moe, batch), real(dense, batch), rtol=0, atol=1e-5)


def test_a_failed_pass_leaves_nothing_behind():
    encoder, batch = make_moe(), make_batch([9, 4])
    expected = encoder(**batch)[0]
    with pytest.raises(IndexError):
        encoder(input_ids=torch.full((1, 3), 999), attention_mask=torch.tensor([[1, 1, 0]]))
    assert not any(state.is_running() for _, state, _ in layer_states(encoder))
    assert torch.equal(encoder(**batch)[0], expected)
    hidden = torch.randn(1, 4, 32)
    assert encoder.encoder.layer[0](hidden).shape == hidden.shape  # a layer by itself: all tokens are real


def test_only_the_chosen_layers():
    encoder = inject_moe(make_encoder(num_hidden_layers=4), MoEConfig(layers="every:2"))
    assert [index for index, _, _ in layer_states(encoder)] == [1, 3]
    assert isinstance(encoder.encoder.layer[0].intermediate.dense, nn.Linear)
    batch = make_batch([9, 4])
    with torch.no_grad():
        dense = make_encoder(num_hidden_layers=4)
        torch.testing.assert_close(real(encoder, batch), real(dense, batch), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="layer 7, but"):
        inject_moe(make_encoder(), MoEConfig(layers=[7]))


def test_parameters_of_experts_and_of_the_ffn():
    encoder = make_moe(layers=[1])
    names = [name for name, _ in expert_parameters(encoder)]
    prefix = "encoder.layer.1.intermediate."
    assert names == [prefix + "router.weight", prefix + "dense.weight", prefix + "dense.bias"]
    kinds = {".".join(name.split(".")[3:]) for name, _ in ffn_parameters(encoder)}
    assert kinds == {
        "intermediate.dense.weight",
        "intermediate.dense.bias",
        "intermediate.router.weight",
        "output.dense.weight",
        "output.dense.bias",
    }
    assert expert_parameters(make_encoder()) == []
    assert len(ffn_parameters(make_encoder())) == 8


def test_another_models_configuration_is_left_alone():
    dense = make_encoder()
    twin = transformers.XLMRobertaModel(dense.config)
    inject_moe(dense, MoEConfig())
    assert type(twin.config) is transformers.XLMRobertaConfig
    assert not hasattr(twin.config, "moe")
    assert dense.encoder.layer[0].attention.self.config is dense.config


def test_refuses_an_encoder_of_another_build():
    shape = {"vocab_size": 20, "dim": 8, "n_layers": 1, "n_heads": 2, "hidden_dim": 16}
    other = transformers.DistilBertModel(transformers.DistilBertConfig(**shape))
    with pytest.raises(ValueError, match=r"DistilBertModel has no layers with attention, intermediate.dense"):
        inject_moe(other, MoEConfig())


def make_stock(name, **overrides):
    """A tiny stock encoder of a family of transformers."""
    values = make_encoder().config.to_dict() | overrides
    config_class = getattr(transformers, f"{name}Config")
    values = {k: v for k, v in values.items() if k not in ("model_type", "architectures", "dtype")}
    return getattr(transformers, f"{name}Model")(config_class(**values)).eval()


def test_refuses_a_feed_forward_layer_with_parts_of_its_own():
    with pytest.raises(ValueError, match="RobertaPreLayerNormIntermediate consists of LayerNorm, dense"):
        inject_moe(make_stock("RobertaPreLayerNorm"), MoEConfig())
    for target in ("output", "ffn"):
        with pytest.raises(ValueError, match="XLMRobertaXLOutput consists of dense, expected LayerNorm"):
            inject_moe(make_stock("XLMRobertaXL"), MoEConfig(target=target))


def test_an_encoder_that_hides_padding_from_its_layers_fails_instead_of_routing_it():
    encoder = inject_moe(make_stock("MPNet"), MoEConfig())
    with pytest.raises(RuntimeError, match="does not hand keyword arguments down"):
        encoder(**make_batch([9, 4]))


def test_refuses_a_model_that_takes_no_mask():
    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = make_encoder()

        def forward(self, features, **kwargs):
            return self.model(**features)

    with pytest.raises(ValueError, match=r"Wrapper\.forward does not take attention_mask"):
        inject_moe(Wrapper(), MoEConfig())


def test_refuses_what_cannot_be_replaced():
    with pytest.raises(ValueError, match="has experts already"):
        inject_moe(make_moe(), MoEConfig())
    adapted = make_moe()
    names = ["encoder.layer.0.intermediate.dense.weight"]
    inject_adapter_in_model(LoraConfig(target_modules=["query"], target_parameters=names), adapted)
    with pytest.raises(ValueError, match="the experts have adapters: merge these first"):
        merge_experts(adapted)
    with pytest.raises(ValueError, match="no experts to merge"):
        merge_experts(make_encoder())
    with pytest.raises(ValueError, match="set the encoder's chunk_size_feed_forward to 0"):
        inject_moe(make_encoder(chunk_size_feed_forward=2), MoEConfig())
    encoder = make_encoder()
    encoder.encoder.layer[1].intermediate.dense = nn.Identity()
    with pytest.raises(ValueError, match=r"dense is Identity\(\), expected a Linear with bias"):
        inject_moe(encoder, MoEConfig())
    assert isinstance(encoder.encoder.layer[0].intermediate.dense, nn.Linear)  # nothing was begun


def test_stacking_the_2024_format():
    state = {
        "model.encoder.layer.0.output.dense.experts.1.weight": torch.full((2, 3), 1.0),
        "model.encoder.layer.0.output.dense.experts.0.weight": torch.zeros(2, 3),
        "model.encoder.layer.0.output.dense.gate.weight": torch.ones(2, 3),
        "embeddings.LayerNorm.weight": torch.ones(3),
    }
    stacked = stack_2024_experts(state)
    assert set(stacked) == {
        "encoder.layer.0.output.dense.weight",
        "encoder.layer.0.output.router.weight",
        "embeddings.LayerNorm.weight",
    }
    assert stacked["encoder.layer.0.output.dense.weight"].tolist() == [[[0.0] * 3] * 2, [[1.0] * 3] * 2]


@pytest.mark.parametrize("target", TARGETS)
def test_merges_weighted_by_shares_of_each_layer(target):
    encoder = make_moe(target, layers=[1])
    before, shares = dict(encoder.named_parameters()), torch.tensor([[0.5, 0.3, 0.2]])
    merged = dict(merge_experts(encoder, shares).named_parameters())
    halves = ["intermediate", "output"] if target == "ffn" else [target]
    for name in [f"encoder.layer.1.{half}.dense.{kind}" for half in halves for kind in ("weight", "bias")]:
        expected = 0.5 * before[name][0] + 0.3 * before[name][1] + 0.2 * before[name][2]
        torch.testing.assert_close(merged[name], expected)


def test_shares_of_another_shape_are_refused():
    encoder = make_moe()
    with pytest.raises(ValueError, match=r"shares have shape \(1, 3\), expected \(2, 3\)"):
        merge_experts(encoder, torch.ones(1, 3))
    assert has_experts(encoder)
