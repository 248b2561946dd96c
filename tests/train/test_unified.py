import pytest
import torch

from clpl_moe.train.unified import UnifiedModel
from helpers.training_model import assert_same, gradients, make_batch


@pytest.mark.parametrize("own", [False, True])
def test_unified_finetuning_computes_the_dense_loss_once(make_model, tiny_tokenizer, own, monkeypatch):
    model, calls = make_model(unified_finetuning=True), []
    stock = model.compute_loss
    monkeypatch.setattr(model, "compute_loss", lambda scores, target: calls.append(1) or stock(scores, target))
    model(**make_batch(tiny_tokenizer, no_in_batch_neg_flag=own))
    assert len(calls) == 3  # sparse, multi-vector, summed


def test_sub_batches_give_the_same_gradients(make_model, tiny_tokenizer):
    whole = gradients(make_model(unified_finetuning=True), make_batch(tiny_tokenizer))
    parts = gradients(
        make_model(unified_finetuning=True, sub_batch_size=2), make_batch(tiny_tokenizer, sub_batch_size=2)
    )
    torch.testing.assert_close(parts[0].loss, whole[0].loss)
    assert_same(parts[1], whole[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("own", [False, True])
def test_unified_finetuning_and_self_distillation(make_model, tiny_tokenizer, own):
    batch = make_batch(tiny_tokenizer, no_in_batch_neg_flag=own)
    output, found = gradients(make_model(unified_finetuning=True), batch)
    terms = output.terms
    dense = make_model()(**batch).loss.detach()
    expected = (dense + terms["summed"] + 0.1 * terms["sparse"] + terms["colbert"]) / 4
    torch.testing.assert_close(output.loss.detach(), expected)
    assert {"colbert_linear.weight", "sparse_linear.weight"} < found.keys()
    distilling = make_model(unified_finetuning=True, use_self_distill=True, self_distill_start_step=3)
    distilling.step = 3
    assert distilling(**batch).loss == output.loss
    distilling.step = 4
    assert distilling(**batch).loss != output.loss


def test_distillation_of_own_groups_is_flagembeddings_of_each_query_alone():
    """Where the latter knows only the scores of in-batch negatives, and fails on groups of several queries."""
    from FlagEmbedding.finetune.embedder.encoder_only.m3 import EncoderOnlyEmbedderM3Model

    torch.manual_seed(0)
    targets, scores = torch.rand(3, 4).softmax(1), torch.randn(3, 4)
    stock = EncoderOnlyEmbedderM3Model.distill_loss
    rows = [stock("m3_kd_loss", targets[i : i + 1], scores[i : i + 1], 4) for i in range(3)]
    torch.testing.assert_close(UnifiedModel.distill_loss("m3_kd_loss", targets, scores, 4), torch.stack(rows).mean())
    with pytest.raises(IndexError):
        stock("m3_kd_loss", targets, scores, 4)
