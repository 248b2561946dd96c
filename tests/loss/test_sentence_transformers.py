import os

import pytest
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss
from sentence_transformers.sentence_transformer.training_args import SentenceTransformerTrainingArguments

from clpl_moe import (
    CachedSentenceTransformerCLPLLoss,
    CLPLLoss,
    MoEConfig,
    SentenceTransformerCLPLLoss,
    inject_moe,
    load_encoder,
    save_encoder,
)
from clpl_moe.loss import sentence_transformers as loss_module
from clpl_moe.moe.install import layer_states
from helpers.grad_cache import assert_close, forward_with_graph, gradients
from helpers.processes import run_in_processes

COLUMNS = {
    "anchor": ["누가 썼나", "کی ساخته شد", "कब बना", "who reads it"],
    "positive": ["그가 썼다", "سال پیش ساخته شد", "कल बना", "he reads it"],
    "negative_1": ["그가 읽었다", "آن بزرگ است", "वह बड़ा है", "he sold it"],
    "negative_2": ["멀리 갔다", "او رفت", "वह गया", "it is red"],
    "negative_query_1": ["누가 읽었나", "", "क्या बड़ा है", ""],
    "negative_query_2": ["", "", "कौन गया", "what is red"],
    "more_1": ["언제 읽었나", "چه بزرگ است", "", ""],
    "more_2": ["", "", "", ""],
}
# The rows of the passages (three for each anchor) that the queries above belong to, column by column.
PAIRS = {
    "negative_query_1": {0: 1, 2: 7},
    "negative_query_2": {2: 8, 3: 11},
    "more_1": {0: 1, 1: 4},
    "more_2": {},
}


@pytest.fixture
def model(tmp_path, tiny_encoder):
    """A model that pools by the first token and normalises, as BGE-M3 does."""
    save_encoder(*load_encoder(tiny_encoder), tmp_path / "model", max_length=64)
    return SentenceTransformer(str(tmp_path / "model"), device="cpu")


def features(model, names, prompt=None):
    return [model.preprocess(COLUMNS[name], prompt=prompt) for name in names]


def expected_terms(model, names, **options):
    """The terms from embeddings of single columns, with each pair written out."""
    embed = {name: model(model.preprocess(COLUMNS[name]))["sentence_embedding"] for name in names}
    passages = torch.stack([embed["positive"], embed["negative_1"], embed["negative_2"]], dim=1).flatten(0, 1)
    pairs = [(embed[name][row], passage) for name in names[4:] for row, passage in PAIRS[name].items()]
    queries = torch.stack([query for query, _ in pairs]) if pairs else None
    index = torch.tensor([passage for _, passage in pairs]) if pairs else None
    return CLPLLoss(**options)(embed["anchor"], passages, queries, index)


@pytest.mark.parametrize("columns", [4, 6, 8])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"in_batch_negatives": False},
        {"false_negative_margin": 0.05},
        {"penalty": "contrastive", "symmetric_weight": 0.5},
        {"penalty_temperature": 0.1, "same_tower_negatives": True, "hardness_weight": 2.0, "equal_weights": True},
    ],
)
def test_equals_the_loss_of_the_embeddings(model, columns, options):
    names = list(COLUMNS)[:columns]
    loss = SentenceTransformerCLPLLoss(model, 0.1, 0.3, num_negatives=2, **options)
    found = loss(iter(features(model, names)), None)
    expected = expected_terms(model, names, temperature=0.1, penalty_weight=0.3, **options)
    torch.testing.assert_close(found, expected.loss)
    assert (expected.penalty > 0) == (columns > 4)
    parameters = [p for name, p in model.named_parameters() if "pooler" not in name]
    for gradient, wanted in zip(torch.autograd.grad(found, parameters), torch.autograd.grad(expected.loss, parameters)):
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-6)


def test_matryoshka_is_that_of_sentence_transformers(model):
    dims, weights = [32, 8, 4], [1.0, 0.5, 0.25]
    options = {"num_negatives": 2, "penalty": "contrastive", "symmetric_weight": 0.5}
    inputs = features(model, list(COLUMNS))
    ours = SentenceTransformerCLPLLoss(model, 0.1, 0.3, matryoshka_dims=dims, matryoshka_weights=weights, **options)(
        inputs
    )
    plain = SentenceTransformerCLPLLoss(model, 0.1, 0.3, **options)
    theirs = MatryoshkaLoss(model, plain, dims, weights)([dict(column) for column in inputs], None)
    torch.testing.assert_close(ours, theirs)
    parameters = [p for name, p in model.named_parameters() if "pooler" not in name]
    for gradient, wanted in zip(torch.autograd.grad(ours, parameters), torch.autograd.grad(theirs, parameters)):
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="matryoshka_dims: found 64, expected at most 32"):
        SentenceTransformerCLPLLoss(model, num_negatives=2, matryoshka_dims=[64])


def test_only_empty_queries_is_the_plain_contrastive_loss(model):
    names = list(COLUMNS)[:4]
    inputs = features(model, [*names, "more_2", "more_2"])
    found = SentenceTransformerCLPLLoss(model, num_negatives=2)(inputs)
    torch.testing.assert_close(found, SentenceTransformerCLPLLoss(model, num_negatives=2)(inputs[:4]))


def test_unknown_characters_are_no_empty_query(model):
    names = list(COLUMNS)[:4]
    unknown = model.preprocess(["漢", "", "", ""])
    assert unknown["input_ids"][0].tolist() == [0, 3, 2]
    empty = model.preprocess([""] * 4)
    loss = SentenceTransformerCLPLLoss(model, num_negatives=2)
    inputs = features(model, names)
    assert loss([*inputs, unknown, empty]) != loss([*inputs, empty, empty])


def test_empty_queries_are_found_behind_a_prompt(model):
    names = list(COLUMNS)[:6]
    plain = features(model, names)
    prompted = plain[:4] + features(model, names[4:], prompt="query: ")
    loss = SentenceTransformerCLPLLoss(model, num_negatives=2, query_prompt="query: ")
    reference = SentenceTransformerCLPLLoss(model, num_negatives=2)
    given = []
    for module, inputs in ((loss, prompted), (reference, plain)):
        module.loss.register_forward_pre_hook(lambda _, args: given.append(args[3].tolist()))
        module(inputs)
    assert given[0] == given[1] == [1, 7, 8, 11]
    with pytest.raises(ValueError, match=r"query_prompt is '', but a column .* comes with a prompt"):
        reference(prompted)
    with pytest.raises(ValueError, match=r"query_prompt is 'query: ', but .* comes without a prompt"):
        loss(plain)


def test_passages_of_the_same_text_are_no_negatives(model):
    columns = [["q", "r"], ["same", "other"], ["x", "same"]]
    inputs = [model.preprocess(column) for column in columns]
    found = SentenceTransformerCLPLLoss(model, num_negatives=1)(inputs)
    query, positive, negative = (model(model.preprocess(column))["sentence_embedding"] for column in columns)
    passages = torch.stack([positive, negative], dim=1).flatten(0, 1)
    expected = CLPLLoss()(query, passages, passage_ids=torch.tensor([0, 1, 2, 0])).loss
    torch.testing.assert_close(found, expected)
    assert found < CLPLLoss()(query, passages).loss
    with_queries = [*inputs, model.preprocess(["", ""])]
    torch.testing.assert_close(SentenceTransformerCLPLLoss(model, num_negatives=1)(with_queries), expected)


def test_queries_of_the_same_text_are_no_negatives(model):
    columns = [["q", "q", "r"], ["one", "two", "three"], ["x", "y", "z"], ["r", "", "q"]]
    inputs = [model.preprocess(column) for column in columns]
    options = {"penalty": "contrastive", "same_tower_negatives": True}
    found = SentenceTransformerCLPLLoss(model, num_negatives=1, **options)(inputs)
    query, positive, negative, own = (model(features)["sentence_embedding"] for features in inputs)
    passages, index = torch.stack([positive, negative], dim=1).flatten(0, 1), torch.tensor([1, 5])
    # "one" and "two" answer the same query, as does "z"; "x" and "three" another.
    ids = {"passage_ids": torch.arange(6), "query_ids": torch.tensor([0, 0, 1, 1, 0])}
    answers = {
        "answer_ids": torch.tensor([2, 5, 0, 5, 1, 4, 0, 2]),
        "answer_index": torch.tensor([0, 0, 1, 1, 2, 3, 4, 4]),
    }
    expected = CLPLLoss(**options)(query, passages, own[[0, 2]], index, **ids, **answers).loss
    torch.testing.assert_close(found, expected)
    assert found < CLPLLoss(**options)(query, passages, own[[0, 2]], index).loss
    without = SentenceTransformerCLPLLoss(model, num_negatives=1, **options)(inputs[:3])
    ids = {"passage_ids": torch.arange(6), "query_ids": torch.tensor([0, 0, 1])}
    answers = {"answer_ids": torch.tensor([2, 0]), "answer_index": torch.tensor([0, 1])}
    expected = CLPLLoss(**options)(query, passages, **ids, **answers).loss
    torch.testing.assert_close(without, expected)


def test_pairs_without_negatives(model):
    inputs = features(model, ["anchor", "positive"])
    assert SentenceTransformerCLPLLoss(model, num_negatives=0)(inputs).isfinite()
    with pytest.raises(ValueError, match="found 3 columns, with num_negatives=0 expected 2"):
        SentenceTransformerCLPLLoss(model, num_negatives=0)(features(model, list(COLUMNS)[:3]))


@pytest.mark.parametrize("columns", [1, 2, 3, 5, 7])
def test_refuses_columns_that_do_not_fit(model, columns):
    with pytest.raises(ValueError, match=f"found {columns} columns, with num_negatives=2 expected 4"):
        SentenceTransformerCLPLLoss(model, num_negatives=2)(features(model, list(COLUMNS)[:columns]))


@pytest.mark.parametrize("options", [{"num_negatives": -1}, {"num_negatives": 1.5}])
def test_constructor_refuses(model, options):
    with pytest.raises(ValueError, match="give the number of columns of negatives"):
        SentenceTransformerCLPLLoss(model, **options)


def test_refuses_features_without_tokens(model):
    loss = SentenceTransformerCLPLLoss(model, num_negatives=0)
    images = {"pixel_values": torch.zeros(2, 3, 4, 4)}
    with pytest.raises(ValueError, match="the model's features are pixel_values"):
        loss([images, images])


def test_trains_experts_of_the_encoder_inside(model):
    with pytest.raises(ValueError, match=r"SentenceTransformer\.forward does not take attention_mask"):
        inject_moe(model, MoEConfig())
    encoder = model[0].auto_model
    inject_moe(encoder, MoEConfig())
    SentenceTransformerCLPLLoss(model, num_negatives=2)(features(model, list(COLUMNS)[:6])).backward()
    assert all(router.weight.grad.any() for _, _, router in layer_states(encoder))


# Of the four texts of a column, a mini-batch of three leaves one over.
CACHED = {
    "mini_batch_size": 3,
    "penalty": "contrastive",
    "same_tower_negatives": True,
    "matryoshka_dims": [32, 8],
}


@pytest.mark.parametrize("options", [{"mini_batch_size": 1}, {"mini_batch_size": 4}, CACHED])
@pytest.mark.parametrize("columns", [4, 8])
def test_cached_gradients_are_those_of_the_whole_batch(model, columns, options):
    whole = {name: value for name, value in options.items() if name != "mini_batch_size"} | {"num_negatives": 2}
    inputs = features(model, list(COLUMNS)[:columns])
    expected = SentenceTransformerCLPLLoss(model, 0.1, 0.3, **whole)([dict(column) for column in inputs])
    found = CachedSentenceTransformerCLPLLoss(model, 0.1, 0.3, **options, num_negatives=2)(inputs)
    torch.testing.assert_close(found, expected)
    found.backward()
    cached = gradients(model)
    model.zero_grad()
    expected.backward()
    assert_close(cached, gradients(model))
    with torch.no_grad():
        without = CachedSentenceTransformerCLPLLoss(model, 0.1, 0.3, **options, num_negatives=2)(inputs)
    torch.testing.assert_close(without, expected.detach())


def test_cached_gradients_with_dropout(model, monkeypatch):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.3
    model.train()
    inputs = features(model, list(COLUMNS))
    loss = CachedSentenceTransformerCLPLLoss(model, 0.1, 0.3, num_negatives=2, mini_batch_size=3)
    found = []
    for forward in (loss_module.cached_forward, forward_with_graph):  # both draw for the same mini-batches
        monkeypatch.setattr(loss_module, "cached_forward", forward)
        model.zero_grad()
        torch.manual_seed(1)
        value = loss(inputs)
        torch.rand(3)  # in between others draw, too
        value.backward()
        found.append((value.detach(), gradients(model), torch.rand(3)))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][2], found[1][2])
    assert_close(found[0][1], found[1][1])
    assert loss(inputs) != loss(inputs)  # there is dropout


def test_a_mini_batch_is_as_wide_as_its_longest_text(model):
    short = CachedSentenceTransformerCLPLLoss(model, num_negatives=0, mini_batch_size=1)
    columns = [model.preprocess(texts) for texts in (["a", "a longer one", "b"], ["c", "dd", "e"])]
    widths = []
    model[0].register_forward_pre_hook(lambda _, args: widths.append(args[0]["input_ids"].shape[1]))
    short(columns)
    assert widths == [3, 12, 3, 3, 4, 3]


def test_cached_loss_refuses(model):
    inputs = features(model, list(COLUMNS)[:4])
    loss = CachedSentenceTransformerCLPLLoss(model, num_negatives=2)
    with pytest.raises(ValueError, match="set its matryoshka_dims instead"):
        MatryoshkaLoss(model, loss, [32, 8])(inputs, None)
    for size in (0, 1.5):
        with pytest.raises(ValueError, match="mini_batch_size is .*: give a number of texts"):
            CachedSentenceTransformerCLPLLoss(model, num_negatives=2, mini_batch_size=size)


def gradients_of_one_process(rank):
    """Of a half of the rows, under DistributedDataParallel, which averages them."""
    model = SentenceTransformer(os.environ["CLPL_TEST_MODEL"], device="cpu")
    loss = CachedSentenceTransformerCLPLLoss(
        model, 0.1, 0.3, num_negatives=2, mini_batch_size=1, gather_across_devices=True
    )
    loss.model = torch.nn.parallel.DistributedDataParallel(model)  # as the trainer does
    half = slice(2 * rank, 2 * rank + 2)
    inputs = [model.preprocess(texts[half]) for texts in list(COLUMNS.values())[:6]]
    for _ in range(2):  # the second pass needs that the first one was whole
        model.zero_grad()
        value = loss([dict(column) for column in inputs])
        value.backward()
    return value.detach(), gradients(model)


@pytest.mark.slow
def test_cached_gradients_of_two_processes_are_those_of_the_joint_batch(model, tmp_path, monkeypatch):
    monkeypatch.setenv("CLPL_TEST_MODEL", str(tmp_path / "model"))
    results = run_in_processes(gradients_of_one_process, tmp_path)
    expected = SentenceTransformerCLPLLoss(model, 0.1, 0.3, num_negatives=2)(features(model, list(COLUMNS)[:6]))
    expected.backward()
    joint = gradients(model)
    for _, found in results:
        unused = {name: found.pop(name) for name in found.keys() - joint.keys()}
        assert all("pooler" in name and not gradient.any() for name, gradient in unused.items())
        assert_close(found, joint)
    torch.testing.assert_close((results[0][0] + results[1][0]) / 2, expected.detach())


def train(folder, output, penalty_weight, kind=SentenceTransformerCLPLLoss, **options):
    """Train a fresh model with the real trainer; returns it, the model and the terms of each forward pass."""
    model = SentenceTransformer(str(folder), device="cpu")
    dataset = Dataset.from_dict({name: texts * 2 for name, texts in COLUMNS.items()})
    loss = kind(model, 0.1, penalty_weight, num_negatives=2, query_prompt="query: ", **options)
    terms = []
    loss.loss.register_forward_hook(lambda _, __, output: terms.append(output))
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(output),
        per_device_train_batch_size=4,
        max_steps=12,
        learning_rate=5e-3,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        prompts=dict.fromkeys(("anchor", *PAIRS), "query: "),
    )
    trainer = SentenceTransformerTrainer(
        model=model, args=arguments, train_dataset=dataset, eval_dataset=dataset, loss=loss
    )
    trainer.train()
    return trainer, model, terms


def test_trains_in_the_real_trainer(model, tmp_path):
    trainer, trained, terms = train(tmp_path / "model", tmp_path / "run", 0.5)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 12
    assert losses[0] == pytest.approx(terms[0].loss.item(), abs=1e-4)
    assert sum(losses[-3:]) < sum(losses[:3]) * 0.5
    before = model.state_dict()
    assert any(not torch.equal(value, before[name]) for name, value in trained.state_dict().items())
    assert trainer.evaluate()["eval_loss"] < losses[0]
    _, _, plain = train(tmp_path / "model", tmp_path / "plain", 0.0)
    assert terms[11].penalty < plain[11].penalty * 0.8  # what the penalty is for
    # The cached loss takes the same steps, with the card's settings and paper.
    options = {"kind": CachedSentenceTransformerCLPLLoss, "mini_batch_size": 3}
    _, cached, same = train(tmp_path / "model", tmp_path / "cached", 0.5, **options)
    for one, other in zip(same, terms[:12], strict=True):
        torch.testing.assert_close(one.loss, other.loss, rtol=1e-2, atol=1e-2)
    cached.save_pretrained(str(tmp_path / "cached_model"))
    card = (tmp_path / "cached_model" / "README.md").read_text()
    assert '"mini_batch_size": 3' in card
    assert "2101.06983" in card
    trained.save_pretrained(str(tmp_path / "trained"))
    card = (tmp_path / "trained" / "README.md").read_text()
    assert "SentenceTransformerCLPLLoss" in card
    assert '"temperature": 0.1' in card
    assert "2412.17364" in card
