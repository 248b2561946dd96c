import pytest
import torch

from clpl_moe import CLPLLoss
from clpl_moe.data.dataset import Example
from clpl_moe.encoder.settings import EmbeddingSettings, pool
from clpl_moe.train.model import UnifiedModel
from helpers.tiny import checkpoint_gradients
from helpers.training_model import assert_same, gradients, make_batch


@pytest.mark.parametrize("pooling", ["cls", "mean", "last_token"])
@pytest.mark.parametrize("own", [False, True])
def test_loss_is_that_of_the_encoders_embeddings(make_model, tiny_tokenizer, pooling, own):
    settings = EmbeddingSettings(pooling=pooling)
    batch = make_batch(tiny_tokenizer, no_in_batch_neg_flag=own)
    output, found = gradients(make_model(settings=settings), batch)
    encoder = make_model(settings=settings).model

    def embed(features):
        return pool(encoder(**features).last_hidden_state, features["attention_mask"], pooling)

    expected = CLPLLoss(0.1, 0.3, in_batch_negatives=not own)(
        embed(batch["queries"]),
        embed(batch["passages"]),
        negative_queries=embed(batch["negative_queries"]),
        negative_index=batch["negative_index"],
        passage_ids=batch["passage_ids"],
    )
    torch.testing.assert_close(output.loss, expected.loss)
    for name in ("contrastive", "penalty", "positive_similarity", "negative_similarity", "negative_query_similarity"):
        torch.testing.assert_close(output.terms[name], getattr(expected, name).detach())
        assert not output.terms[name].requires_grad
    assert output.terms["penalty"] > 0.001
    expected.loss.backward()
    assert_same(found, {f"model.{n}": p.grad for n, p in encoder.named_parameters() if p.grad is not None})
    assert any("router" in name and gradient.abs().max() > 0 for name, gradient in found.items())


@pytest.mark.parametrize("pooling", ["cls", "mean", "last_token"])
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("scores", [None, [3.0, 1.0, 0.0, 2.0, 1.5, 0.0]])
@pytest.mark.parametrize("num_experts", [0, 2])
def test_packed_batches_give_the_same_losses_and_gradients(
    make_model, tiny_tokenizer, pooling, own, scores, num_experts
):
    changes = {"no_in_batch_neg_flag": own, "teacher_scores": scores}
    # The routers of the last layer see one token a text, and equal texts once: the balance is another one.
    options = {"settings": EmbeddingSettings(pooling=pooling), "num_experts": num_experts}
    batches = [make_batch(tiny_tokenizer, packing=packing, **changes) for packing in (False, True)]
    assert len(batches[1]["texts"]) == 10  # of 11, one is there twice
    padded, packed = (gradients(make_model(**options), batch) for batch in batches)
    torch.testing.assert_close(packed[0].loss, padded[0].loss, atol=1e-5, rtol=1e-5)
    for name in padded[0].terms.keys() - {"balance", "z", "expert_load"}:
        torch.testing.assert_close(packed[0].terms[name], padded[0].terms[name], atol=1e-5, rtol=1e-5)
    assert packed[0].terms.keys() == padded[0].terms.keys()
    assert_same(packed[1], padded[1], atol=1e-5, rtol=1e-3)


TERMS = {"penalty": "contrastive", "same_tower_negatives": True, "hardness_weight": 2.0, "equal_weights": True}
MATRYOSHKA = {"penalty_weight": 0.3, "matryoshka_dims": [32, 8], "matryoshka_weights": [1.0, 0.5]}


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("terms", [TERMS, MATRYOSHKA])
def test_every_term_of_the_loss_in_padded_packed_and_cached_batches(make_model, tiny_tokenizer, own, terms):
    """Own negatives only, as a file of data may ask for, are none of the same tower."""
    changes = {"no_in_batch_neg_flag": own}
    batches = [make_batch(tiny_tokenizer, packing=packing, **changes) for packing in (False, True)]
    models = [make_model(loss=CLPLLoss(0.1, **terms), grad_cache_tokens=tokens) for tokens in (None, None, 20)]
    padded, packed, cached = (gradients(m, b) for m, b in zip(models, (*batches, batches[1])))
    query, passages, negatives = (
        pool(models[0].model(**batches[0][name]).last_hidden_state, batches[0][name]["attention_mask"], "mean")
        for name in ("queries", "passages", "negative_queries")
    )
    options = terms | ({"in_batch_negatives": False, "same_tower_negatives": False} if own else {})
    ids = {name: batches[0][name] for name in ("negative_index", "passage_ids", "query_ids")}
    torch.testing.assert_close(padded[0].loss, CLPLLoss(0.1, **options)(query, passages, negatives, **ids).loss)
    for output, found in (packed, cached):
        torch.testing.assert_close(output.loss, padded[0].loss, atol=1e-5, rtol=1e-5)
        assert_same(found, padded[1], atol=1e-5, rtol=1e-3)


def test_a_teacher_is_followed_in_all_dimensions(make_model, tiny_tokenizer):
    batch = make_batch(tiny_tokenizer, teacher_scores=[3.0, 1.0, 0.0, 2.0, 1.5, 0.0])
    losses = {}
    for dims in ([32], [8], [32, 8]):
        output = make_model(loss=CLPLLoss(0.1, 0.3, matryoshka_dims=dims))(**batch)
        losses[tuple(dims)] = torch.stack([output.loss, output.terms["distillation"]])
    torch.testing.assert_close(losses[32, 8], losses[32,] + losses[8,])
    plain = make_model(loss=CLPLLoss(0.1, 0.3))(**batch)
    torch.testing.assert_close(losses[32,], torch.stack([plain.loss, plain.terms["distillation"]]))


def test_copies_of_a_query_are_left_out(make_model, tiny_tokenizer):
    examples = [Example("and c", [text], [], None, True) for text in ("cc cc", "x y z z y")]
    batch = make_batch(tiny_tokenizer, examples=examples)
    loss = CLPLLoss(0.1, same_tower_negatives=True)
    masked, counted = (make_model(loss=loss, mask_duplicates=value)(**batch).loss for value in (True, False))
    assert masked < counted


def test_packed_batch_goes_through_the_encoder_once(make_model, tiny_tokenizer):
    model, calls = make_model(), []
    model.model.embeddings.register_forward_hook(lambda *_: calls.append(1))
    model(**make_batch(tiny_tokenizer, packing=True))
    assert len(calls) == 1


def test_packed_batches_are_refused_in_unified_finetuning(make_model, tiny_tokenizer):
    with pytest.raises(ValueError, match="unified_finetuning needs padded batches"):
        make_model(unified_finetuning=True)(**make_batch(tiny_tokenizer, packing=True))


def test_duplicates_of_the_positive_are_left_out(make_model, tiny_tokenizer):
    """The second query's negative is the first one's positive, word for word."""
    batch = make_batch(tiny_tokenizer)
    masked, counted = (make_model(mask_duplicates=value)(**batch).loss for value in (True, False))
    assert masked < counted


def test_without_queries_of_negatives_the_loss_is_the_contrastive_one(make_model, tiny_tokenizer):
    batch = make_batch(tiny_tokenizer, negative_queries=None, negative_index=None)
    output = make_model()(**batch)
    assert output.loss.item() == output.terms["contrastive"].item()
    assert "penalty" not in output.terms
    assert output.loss.item() == make_model(loss=CLPLLoss(0.1, 0.0))(**batch).loss.item()


def test_routers_losses_are_added_and_logged(make_model, tiny_tokenizer):
    batch = make_batch(tiny_tokenizer)
    plain, weighted = (make_model(**w)(**batch) for w in ({}, {"balance_loss_weight": 0.5, "z_loss_weight": 0.25}))
    added = 0.5 * plain.terms["balance"] + 0.25 * plain.terms["z"]
    assert added > 0.1
    torch.testing.assert_close(weighted.loss, plain.loss + added)
    assert plain.terms["expert_load"].shape == (2, 2)
    torch.testing.assert_close(plain.terms["expert_load"].sum(1), torch.ones(2))
    assert "expert_load" not in make_model(num_experts=0)(**batch).terms


@pytest.mark.parametrize("kind", ["kl_div", "m3_kd_loss"])
@pytest.mark.parametrize("unified", [False, True])
@pytest.mark.parametrize("own", [False, True])
def test_teacher_scores(make_model, tiny_tokenizer, kind, unified, own):
    """Distillation takes the contrastive term's place, the penalty's part stays."""
    options = {"kd_loss_type": kind, "unified_finetuning": unified}
    scores = [3.0, 1.0, 0.0, 2.0, 1.5, 0.0]
    batch = make_batch(tiny_tokenizer, teacher_scores=scores, no_in_batch_neg_flag=own)
    output, found = gradients(make_model(**options), batch)
    assert torch.isfinite(output.loss)
    assert output.terms["distillation"] != output.terms["contrastive"]
    other = make_model(**options)(**batch | {"teacher_scores": scores[::-1]})
    assert other.terms["distillation"] != output.terms["distillation"]
    heavier = make_model(loss=CLPLLoss(0.1, 0.9), **options)(**batch)
    assert heavier.loss != output.loss
    assert all(torch.isfinite(gradient).all() for gradient in found.values())


@pytest.mark.parametrize("own", [False, True])
def test_a_penalty_weight_changed_during_training_reaches_batches_of_both_kinds(make_model, tiny_tokenizer, own):
    batch = make_batch(tiny_tokenizer, no_in_batch_neg_flag=own)
    model, expected = make_model(), make_model(loss=CLPLLoss(0.1, 0.9))(**batch).loss
    before = model(**batch).loss
    model.dense_loss.penalty_weight = 0.9
    assert model(**batch).loss == expected != before


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("pairs", [True, False])
def test_distillation_takes_the_contrastive_terms_place(make_model, tiny_tokenizer, own, pairs):
    """The contrastive term has no part in the loss, not even a negative one; of the penalty, a query without pairs has none."""
    loss = CLPLLoss(0.1, 0.3, symmetric_weight=0.5)
    batch = make_batch(tiny_tokenizer, teacher_scores=[3.0, 1.0, 0.0, 2.0, 1.5, 0.0], no_in_batch_neg_flag=own)
    batch["negative_queries"] = batch["negative_queries"] if pairs else None
    # Of two queries the second has none.
    kept = batch["negative_index"] < 3
    batch["negative_index"] = batch["negative_index"][kept] if pairs else None
    if pairs:
        batch["negative_queries"] = {name: values[kept] for name, values in batch["negative_queries"].items()}
    output = make_model(loss=loss, kd_loss_type="m3_kd_loss")(**batch)
    terms, share = output.terms, 0.5 * 0.3 if pairs else 0.0
    expected = terms["distillation"] + share * terms.get("penalty", 0.0) + 0.5 * terms["symmetric"]
    torch.testing.assert_close(output.loss, expected)


def test_a_pass_that_failed_leaves_nothing_to_the_next(make_model, tiny_tokenizer, monkeypatch):
    batch, other = make_batch(tiny_tokenizer), make_batch(tiny_tokenizer)
    other["queries"] = {name: values.flip(0)[:, :1] for name, values in other["queries"].items()}
    expected = make_model(balance_loss_weight=0.5)(**batch).loss
    model = make_model(balance_loss_weight=0.5)
    with monkeypatch.context() as patched:
        patched.setattr(model.dense_loss, "forward", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(**other)
    assert model(**batch).loss == expected


def test_in_evaluation_mode_there_are_embeddings_and_no_loss(make_model, tiny_tokenizer):
    output = make_model().eval()(**make_batch(tiny_tokenizer))
    assert output.loss is None
    assert (output.q_reps.shape, output.p_reps.shape) == ((2, 32), (6, 32))


@pytest.mark.parametrize("packing", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(make_model, tiny_tokenizer, packing):
    batch = make_batch(tiny_tokenizer, packing=packing)
    plain = make_model(balance_loss_weight=0.1)
    checkpointed = make_model(balance_loss_weight=0.1)
    checkpoint_gradients(checkpointed.model)
    first, second = gradients(plain, batch), gradients(checkpointed, batch)
    assert first[0].loss.item() == second[0].loss.item()
    assert_same(second[1], first[1], rtol=0, atol=0)
    assert second[0].terms["expert_load"].equal(first[0].terms["expert_load"])


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
