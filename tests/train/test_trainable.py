import pytest

from clpl_moe.common.errors import UserError
from clpl_moe.moe.inject import expert_parameters
from helpers.training_model import assert_same, gradients, make_batch, train_only


def trained(model, trainable, **options):
    train_only(model.model, trainable, **options)
    return {name.removeprefix("model.") for name, p in model.named_parameters() if p.requires_grad}


def test_moe_is_experts_and_routers(make_model):
    model = make_model()
    found = trained(model, "moe")
    assert found == {name for name, _ in expert_parameters(model.model)}
    assert all(".intermediate." in name for name in found)
    assert len([name for name in found if "router" in name]) == 2


def test_ffn_is_all_linear_layers_of_the_ffn(make_model):
    found = trained(make_model(num_experts=0), "ffn")
    layers = [f"encoder.layer.{i}.{part}.dense" for i in (0, 1) for part in ("intermediate", "output")]
    assert found == {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    assert trained(make_model(), "moe") < trained(make_model(), "ffn")


def test_full_is_all_but_the_pooler(make_model):
    model = make_model()
    every = {name.removeprefix("model.") for name, _ in model.named_parameters()}
    assert trained(model, "full") == {name for name in every if not name.startswith("pooler.")}
    left = every - trained(make_model(), "full", fix_position_embedding=True)
    assert {name for name in left if not name.startswith("pooler.")} == {"embeddings.position_embeddings.weight"}


@pytest.mark.parametrize("trainable", ["moe", "ffn", "full"])
def test_frozen_layers_and_what_is_below_are_left_out(make_model, trainable):
    model = make_model()
    without = trained(make_model(), trainable)
    found = trained(model, trainable, frozen_layers=1)
    assert found == {name for name in without if name.startswith("encoder.layer.1.")}
    assert found


def test_frozen_layers_leave_the_gradients_of_the_others_as_they_are(make_model, tiny_tokenizer):
    batch = make_batch(tiny_tokenizer, packing=True)
    whole, upper = make_model(), make_model()
    trained(whole, "full")
    names = trained(upper, "full", frozen_layers=1)
    expected, found = gradients(whole, batch)[1], gradients(upper, batch)[1]
    assert {name.removeprefix("model.") for name in found} == names
    assert_same(found, {name: expected[name] for name in found}, rtol=1e-5, atol=1e-7)


def test_fixed_encoder_leaves_the_heads(make_model):
    found = trained(make_model(unified_finetuning=True), "moe", fix_encoder=True, unified_finetuning=True)
    assert found == {f"{head}.{kind}" for head in ("colbert_linear", "sparse_linear") for kind in ("weight", "bias")}


def test_mistakes(make_model):
    with pytest.raises(UserError, match="trainable is moe but the model has no experts"):
        trained(make_model(num_experts=0), "moe")
    with pytest.raises(UserError, match="nothing would be trained"):
        trained(make_model(), "full", fix_encoder=True)
    with pytest.raises(UserError, match="nothing would be trained"):
        trained(make_model(), "full", frozen_layers=2)
    with pytest.raises(UserError, match="frozen_layers is 3: found 2 layers"):
        trained(make_model(), "full", frozen_layers=3)
