"""All experts computed, and masked: the same states of real tokens, without a size that the data decide."""

import pytest
import torch
from transformers import BertModel, XLMRobertaModel

from clpl_moe import Encoder, MoEConfig, inject_moe
from clpl_moe.export.experts import compute_all_experts
from clpl_moe.moe.inject import choose_expert
from helpers.tiny import make_batch, make_encoder, make_moe, perturb_experts

ROUTERS = ["straight_through", "softmax_topk", "topk_softmax"]


@pytest.mark.parametrize("kind", ["xlm-roberta", "bert"])
@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("target", ["intermediate", "output", "ffn"])
def test_states_stay(target, top_k, router, kind):
    encoder = make_moe(target, 3, top_k, kind=kind, router=router, layers=[1])
    batch = make_batch([9, 4, 1])
    expected = encoder(**batch).last_hidden_state
    compute_all_experts(encoder)
    assert type(encoder) is {"bert": BertModel, "xlm-roberta": XLMRobertaModel}[kind]
    found, real = encoder(**batch).last_hidden_state, batch["attention_mask"].bool()
    torch.testing.assert_close(found[real], expected[real], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("router", ["given", "random"])
@pytest.mark.parametrize("target", ["intermediate", "output", "ffn"])
def test_routers_without_scores_leave_one_dense_layer(target, router):
    encoder = make_moe(target, 3, router=router)
    if router == "given":
        choose_expert(encoder, 2)
    batch = make_batch([9, 4])
    expected = encoder(**batch).last_hidden_state
    compute_all_experts(encoder)
    found, real = encoder(**batch).last_hidden_state, batch["attention_mask"].bool()
    torch.testing.assert_close(found[real], expected[real])
    dense = make_encoder()
    assert {n: p.shape for n, p in encoder.named_parameters()} == {n: p.shape for n, p in dense.named_parameters()}


@pytest.mark.parametrize("layers", [[1], "all"])
@pytest.mark.parametrize("target", ["intermediate", "output", "ffn"])
def test_embeddings_stay(tiny_tokenizer, target, layers):
    model = make_encoder(vocab_size=len(tiny_tokenizer), max_position_embeddings=130)
    perturb_experts(inject_moe(model, MoEConfig(3, target=target, layers=layers)))
    encoder = Encoder(model, tiny_tokenizer, compute_dtype=torch.float32)
    texts = ["red house", "blue river and a stone"]
    expected = encoder.encode_passages(texts, progress=False)
    compute_all_experts(model)
    torch.testing.assert_close(encoder.encode_passages(texts, progress=False), expected, rtol=1e-4, atol=1e-5)


def test_a_dense_encoder_stays():
    encoder = make_encoder()
    names = list(encoder.state_dict())
    compute_all_experts(encoder)
    assert list(encoder.state_dict()) == names
