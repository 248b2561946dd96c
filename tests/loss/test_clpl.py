import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from clpl_moe import CLPLLoss
from helpers.embeddings import make_batch
from helpers.golden import GOLDEN, golden_case


def formula(
    query,
    passages,
    negative_queries,
    negative_index,
    passage_ids=None,
    query_ids=None,
    *,
    temperature,
    penalty_weight,
    in_batch_negatives,
    false_negative_margin,
    penalty="cosine",
    symmetric_weight=0.0,
    penalty_temperature=None,
    equal_weights=False,
    same_tower_negatives=False,
    hardness_weight=0.0,
):
    """The definition of the loss, one query and one pair at a time; returns its terms."""
    group = len(passages) // len(query)

    def sim(a, b):
        return a.dot(b) / (a.norm() * b.norm())

    def equal(ids, one, other):
        return ids is not None and ids[one] == ids[other]

    def cross_entropy(number, q, target, temperature):
        """Of a query, the ``number``-th of all, to find the passage of row ``target``."""
        own = target // group
        candidates = range(len(passages)) if in_batch_negatives else range(own * group, own * group + group)
        negatives = [
            sim(q, passages[row]) for row in candidates if row != target and not equal(passage_ids, row, target)
        ]
        if same_tower_negatives:
            for i, other in enumerate(query):
                if i != own and not equal(passage_ids, i * group, target) and not equal(query_ids, i, number):
                    negatives.append(sim(q, other))
            for row, other in enumerate(passages):
                if row // group != own and not equal(passage_ids, row, target):
                    negatives.append(sim(passages[target], other))
        positive = sim(q, passages[target])
        numerator = torch.exp(positive / temperature)
        denominator = numerator
        for similarity in negatives:
            limit = math.inf if false_negative_margin is None else false_negative_margin
            if similarity <= positive + limit:
                weight = math.exp(hardness_weight * similarity.item())
                denominator = denominator + weight * torch.exp(similarity / temperature)
        return -torch.log(numerator / denominator)

    def penalty_of(number, q, row):
        if penalty == "cosine":
            return (1 - sim(passages[row], q)) / (penalty_temperature or 1)
        return cross_entropy(len(query) + number, q, row, penalty_temperature or temperature)

    losses, contrastives, penalties, symmetrics, equal_parts = [], [], [], [], []
    answers = [(i * group, q) for i, q in enumerate(query)] + list(zip(negative_index.tolist(), negative_queries))
    for i, q in enumerate(query):
        positive = i * group
        contrastive = cross_entropy(i, q, positive, temperature)
        pairs = [
            penalty_of(number, own, row)
            for number, (row, own) in enumerate(zip(negative_index.tolist(), negative_queries))
            if row // group == i
        ]
        contrastives.append(contrastive)
        equal_parts += [contrastive, *pairs]
        if pairs:
            penalties.append(sum(pairs) / len(pairs))
            losses.append((1 - penalty_weight) * contrastive + penalty_weight * penalties[-1])
        else:
            losses.append(contrastive)
        numerator = torch.exp(sim(q, passages[positive]) / temperature)
        others = [
            torch.exp(sim(other, passages[positive]) / temperature)
            for row, other in answers
            if row != positive and (passage_ids is None or passage_ids[row] != passage_ids[positive])
        ]
        symmetrics.append(-torch.log(numerator / (numerator + sum(others))))
    mean_penalty = sum(penalties) / len(penalties) if penalties else torch.zeros(())
    losses = equal_parts if equal_weights else losses
    loss = sum(losses) / len(losses) + symmetric_weight * sum(symmetrics) / len(symmetrics)
    return loss, sum(contrastives) / len(contrastives), mean_penalty


@pytest.mark.parametrize("moe", [None, "intermediate", "output"])
def test_golden_numbers_of_the_2024_code(moe):
    """Embeddings with the cosines of the 2024 code: all that its loss depends on."""
    case = golden_case(moe)
    axes = torch.eye(10)
    query = axes[:1]
    cosines = torch.tensor(case["passage_dot_query"]).unsqueeze(1)
    passages = cosines * query + (1 - cosines**2).sqrt() * axes[1:6]
    cosines = torch.tensor(case["negq_dot_neg"]).unsqueeze(1)
    negative_queries = cosines * passages[1:] + (1 - cosines**2).sqrt() * axes[6:]
    terms = CLPLLoss(case["temperature"], case["lambda_"])(
        query, passages, negative_queries, torch.tensor([1, 2, 3, 4])
    )
    plain = CLPLLoss(case["temperature"], case["lambda_"])(query, passages)
    assert len(GOLDEN["cases"]) == 3
    assert terms.loss.item() == pytest.approx(case["loss_clpl"], rel=1e-4)
    assert terms.contrastive.item() == pytest.approx(case["loss_contrastive"], rel=1e-4)
    assert plain.loss.item() == pytest.approx(case["loss_contrastive"], rel=1e-4)
    assert terms.penalty.item() == pytest.approx(1 - cosines.mean().item(), rel=1e-4)


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_equals_the_formula_on_ragged_batches(data):
    batch, group = data.draw(st.integers(1, 4), "batch"), data.draw(st.integers(1, 4), "group")
    rows = st.integers(0, batch * group - 1)
    negative_index = data.draw(st.lists(rows, max_size=8), "negative_index")
    inputs = make_batch(batch, group, negative_index, 5, torch.float64, data.draw(st.integers(0, 1000), "seed"))
    if data.draw(st.booleans(), "ids"):
        inputs["passage_ids"] = torch.tensor([data.draw(st.integers(0, 3)) for _ in range(batch * group)])
        inputs["query_ids"] = torch.tensor([data.draw(st.integers(0, 3)) for _ in range(batch + len(negative_index))])
    options = {
        "temperature": data.draw(st.sampled_from([0.02, 0.1, 1.0]), "temperature"),
        "penalty_weight": data.draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]), "penalty_weight"),
        "in_batch_negatives": data.draw(st.booleans(), "in_batch_negatives"),
        "false_negative_margin": data.draw(st.sampled_from([None, -0.1, 0.0, 0.3]), "margin"),
        "penalty": data.draw(st.sampled_from(["cosine", "contrastive"]), "penalty"),
        "symmetric_weight": data.draw(st.sampled_from([0.0, 0.5]), "symmetric_weight"),
        "penalty_temperature": data.draw(st.sampled_from([None, 0.05, 2.0]), "penalty_temperature"),
        "equal_weights": data.draw(st.booleans(), "equal_weights"),
        "hardness_weight": data.draw(st.sampled_from([0.0, 5.0]), "hardness_weight"),
    }
    options["same_tower_negatives"] = options["in_batch_negatives"] and data.draw(st.booleans(), "same_tower")
    terms = CLPLLoss(**options)(**inputs)
    expected = formula(**inputs, **options)
    for found, value in zip((terms.loss, terms.contrastive, terms.penalty), expected):
        torch.testing.assert_close(found, value.to(found.dtype), rtol=1e-9, atol=1e-12)
    embeddings = [inputs[name] for name in ("query", "passages", "negative_queries")]
    found = torch.autograd.grad(terms.loss, embeddings, allow_unused=True, materialize_grads=True)
    wanted = torch.autograd.grad(expected[0], embeddings, allow_unused=True, materialize_grads=True)
    for gradient, value in zip(found, wanted):
        torch.testing.assert_close(gradient, value, rtol=1e-7, atol=1e-10)


EVERYTHING = {
    "penalty": "contrastive",
    "symmetric_weight": 0.5,
    "same_tower_negatives": True,
    "hardness_weight": 2.0,
    "false_negative_margin": 0.3,
}


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("weights", [None, [1, 0.5, 2]])
@pytest.mark.parametrize("options", [{}, EVERYTHING, EVERYTHING | {"equal_weights": True}])
def test_matryoshka_is_the_sum_of_the_losses_of_truncated_embeddings(options, weights, normalize):
    dims = [4, 8, 2]
    ids = {"passage_ids": torch.arange(9).clamp(max=7), "query_ids": torch.tensor([0, 1, 2, 1, 3, 4, 5])}
    inputs = make_batch(dtype=torch.float64)
    embeddings = [inputs.pop(name) for name in ("query", "passages", "negative_queries")]
    given = embeddings if normalize else [F.normalize(rows, dim=-1) for rows in embeddings]
    loss = CLPLLoss(0.1, 0.3, matryoshka_dims=dims, matryoshka_weights=weights, normalize=normalize, **options)
    found = loss(*given, **inputs, **ids)
    plain = CLPLLoss(0.1, 0.3, **options)
    parts = {dim: plain(*(rows[:, :dim] for rows in embeddings), **inputs, **ids) for dim in dims}
    weighted = [(weight, parts[dim]) for weight, dim in zip(weights or [1, 1, 1], dims)]
    expected = sum(weight * part.loss for weight, part in weighted)
    torch.testing.assert_close(found.loss, expected)
    torch.testing.assert_close(sum(found.added), sum(weight * sum(part.added) for weight, part in weighted))
    terms = {name: value for name, value in found.terms().items() if not name.startswith("loss_")}
    torch.testing.assert_close(terms, parts[8].terms())
    for dim, part in parts.items():
        torch.testing.assert_close(found.terms()[f"loss_{dim}"], part.loss.detach())
    gradients = torch.autograd.grad(found.loss, embeddings, retain_graph=True)
    for gradient, wanted in zip(gradients, torch.autograd.grad(expected, embeddings)):
        torch.testing.assert_close(gradient, wanted)


def test_matryoshka_of_the_whole_embeddings_is_the_loss_itself():
    inputs = make_batch()
    assert torch.equal(CLPLLoss(matryoshka_dims=[8])(**inputs).loss, CLPLLoss()(**inputs).loss)
    with pytest.raises(ValueError, match="matryoshka_dims: found 16, expected at most 8, the embeddings' dimensions"):
        CLPLLoss(matryoshka_dims=[4, 16])(**inputs)


@pytest.mark.parametrize("in_batch_negatives", [True, False])
@pytest.mark.parametrize("false_negative_margin", [None, 0.1])
@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"penalty": "contrastive", "symmetric_weight": 0.5},
        {"penalty_temperature": 0.2, "equal_weights": True},
        {"penalty_temperature": 0.2, "penalty": "contrastive", "same_tower_negatives": True},
    ],
)
def test_gradients_are_the_derivatives(in_batch_negatives, false_negative_margin, extra):
    in_batch_negatives = in_batch_negatives or "same_tower_negatives" in extra
    loss = CLPLLoss(
        0.5, 0.3, in_batch_negatives=in_batch_negatives, false_negative_margin=false_negative_margin, **extra
    )
    inputs = make_batch(2, 3, (1, 1, 4), 3, torch.float64)
    index, ids = inputs.pop("negative_index"), torch.tensor([0, 1, 2, 3, 0, 4])
    query_ids = torch.tensor([0, 1, 2, 1, 3])

    def scalar(query, passages, negative_queries):
        return loss(query, passages, negative_queries, index, ids, query_ids).loss

    assert torch.autograd.gradcheck(scalar, tuple(inputs.values()))


def test_one_number_by_hand():
    """Query at 90° to its negative, 0° to its positive; the negative at 60° to the query that it answers."""
    query = torch.tensor([[2.0, 0.0]])
    passages = torch.tensor([[1.0, 0.0], [0.0, 3.0]])
    negative_query = torch.tensor([[math.sin(math.pi / 3), math.cos(math.pi / 3)]])
    terms = CLPLLoss(1.0, 0.25)(query, passages, negative_query, torch.tensor([1]))
    contrastive = math.log(1 + math.exp(-1))
    assert terms.contrastive.item() == pytest.approx(contrastive)
    assert terms.penalty.item() == pytest.approx(0.5)
    assert terms.loss.item() == pytest.approx(0.75 * contrastive + 0.25 * 0.5)
    assert terms.positive_similarity.item() == pytest.approx(1.0)
    assert terms.negative_similarity.item() == pytest.approx(0.0, abs=1e-7)
    assert terms.negative_query_similarity.item() == pytest.approx(0.5)


@pytest.mark.parametrize("empty", [None, 0])
def test_without_pairs_it_is_the_plain_contrastive_loss(empty):
    inputs = make_batch(negative_index=())
    if empty is None:
        inputs["negative_queries"] = inputs["negative_index"] = None
    terms = CLPLLoss(penalty_weight=0.9)(**inputs)
    similarities = F.normalize(inputs["query"], dim=1) @ F.normalize(inputs["passages"], dim=1).T
    expected = F.cross_entropy(similarities / 0.02, torch.tensor([0, 3, 6]))
    torch.testing.assert_close(terms.loss, expected)
    assert terms.penalty.item() == 0
    assert terms.negative_query_similarity is None
    terms.loss.backward()
    assert inputs["query"].grad.isfinite().all()


def test_one_passage_each_has_no_negatives_of_its_own():
    query, passages = make_batch(group=1, negative_index=())["query"], make_batch(group=1)["passages"]
    assert CLPLLoss()(query, passages).negative_similarity is None
    alone = CLPLLoss(in_batch_negatives=False)(query, passages)
    assert alone.loss.item() == 0


def test_penalty_moves_negatives_and_their_queries_only():
    inputs = make_batch(negative_index=(1, 5))
    CLPLLoss(penalty_weight=1.0)(**inputs).penalty.backward()
    moved = inputs["passages"].grad.abs().sum(1) > 0
    assert moved.nonzero().squeeze(1).tolist() == [1, 5]
    assert (inputs["negative_queries"].grad.abs().sum(1) > 0).all()
    assert inputs["query"].grad is None or not inputs["query"].grad.any()


def test_reported_similarities_are_means_without_a_graph():
    inputs = make_batch()
    terms = CLPLLoss()(**inputs)
    query = F.normalize(inputs["query"], dim=1)
    passages = F.normalize(inputs["passages"], dim=1)
    own = (query.unsqueeze(1) * passages.view(3, 3, -1)).sum(-1)
    pairs = (passages[inputs["negative_index"]] * F.normalize(inputs["negative_queries"], dim=1)).sum(1)
    for found, expected in (
        (terms.positive_similarity, own[:, 0].mean()),
        (terms.negative_similarity, own[:, 1:].mean()),
        (terms.negative_query_similarity, pairs.mean()),
    ):
        torch.testing.assert_close(found, expected.detach())
        assert not found.requires_grad


def test_passages_equal_to_the_positive_are_no_negatives():
    inputs = make_batch(batch=2, group=2, negative_index=())
    with torch.no_grad():
        inputs["passages"][2] = inputs["passages"][0]  # the other query's positive is the same text
    ids = torch.tensor([7, 1, 7, 3])
    terms = CLPLLoss()(inputs["query"], inputs["passages"], passage_ids=ids)
    query, passages = F.normalize(inputs["query"], dim=1), F.normalize(inputs["passages"], dim=1)
    logits = query @ passages.T / 0.02
    first = -F.log_softmax(logits[0, [0, 1, 3]], dim=0)[0]
    second = -F.log_softmax(logits[1, [2, 1, 3]], dim=0)[0]
    torch.testing.assert_close(terms.loss, (first + second) / 2)


def test_masking_every_negative_leaves_no_loss_and_no_nan():
    inputs = make_batch(batch=2, group=2, negative_index=())
    terms = CLPLLoss()(inputs["query"], inputs["passages"], passage_ids=torch.zeros(4, dtype=torch.int64))
    terms.loss.backward()
    assert terms.loss.item() == 0
    assert not inputs["query"].grad.any()
    assert not inputs["passages"].grad.any()


def test_margin_leaves_out_what_is_far_above_the_positive():
    query = torch.tensor([[1.0, 0.0]])
    passages = torch.tensor([[0.6, 0.8], [1.0, 0.0], [0.8, 0.6]])  # similarities 0.6, 1.0, 0.8
    terms = CLPLLoss(1.0, false_negative_margin=0.3)(query, passages)
    assert terms.loss.item() == pytest.approx(math.log(1 + math.exp(0.2)))


def test_normalised_embeddings_can_be_taken_as_they_are():
    inputs = make_batch()
    for name in ("query", "passages", "negative_queries"):
        inputs[name] = F.normalize(inputs[name].detach(), dim=1)
    torch.testing.assert_close(CLPLLoss(normalize=False)(**inputs).loss, CLPLLoss()(**inputs).loss)
    inputs["query"] = inputs["query"] / 2
    assert CLPLLoss(normalize=False)(**inputs).loss != CLPLLoss()(**inputs).loss


def test_the_cosine_penalty_does_not_grow_with_the_embeddings():
    """Of embeddings that are not normalised, their product would: without bound, and against all other terms."""
    inputs = make_batch()
    found = CLPLLoss(normalize=False)(**inputs)
    torch.testing.assert_close(found.penalty, CLPLLoss()(**inputs).penalty)
    longer = inputs | {name: 5 * inputs[name] for name in ("passages", "negative_queries")}
    torch.testing.assert_close(CLPLLoss(normalize=False)(**longer).penalty, found.penalty)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_is_computed_in_float32_under_autocast(dtype):
    inputs = make_batch(dtype=dtype)
    with torch.autocast("cpu", dtype=dtype):
        terms = CLPLLoss()(**inputs)
    wide = {name: value.float() if value.is_floating_point() else value for name, value in inputs.items()}
    expected = CLPLLoss()(**wide)
    assert terms.loss.dtype == torch.float32
    assert torch.equal(terms.loss, expected.loss)
    assert torch.equal(terms.penalty, expected.penalty)
    terms.loss.backward()
    assert inputs["passages"].grad.dtype == dtype


def test_float64_stays_float64_under_autocast():
    inputs = make_batch(dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = CLPLLoss()(**inputs)
    assert terms.loss.dtype == torch.float64
    assert torch.equal(terms.loss, CLPLLoss()(**inputs).loss)


def test_penalty_weight_can_be_scheduled():
    loss, inputs = CLPLLoss(penalty_weight=0.0), make_batch()
    assert loss(**inputs).loss == loss(**inputs).contrastive
    loss.penalty_weight = 1.0
    assert loss(**inputs).loss != loss(**inputs).contrastive


@pytest.mark.parametrize("symmetric_weight", [0.0, 0.5])
def test_added_terms_are_the_loss_without_its_contrastive_term(symmetric_weight):
    loss = CLPLLoss(0.1, 0.3, symmetric_weight=symmetric_weight)
    for answered, share in (((1, 4, 8), 1.0), ((4, 5), 1 / 3), ((), 0.0)):
        terms = loss(**make_batch(negative_index=answered))
        symmetric = terms.symmetric if symmetric_weight else 0.0
        added = sum(terms.added, start=torch.zeros(()))
        torch.testing.assert_close(added, 0.3 * share * terms.penalty + symmetric_weight * symmetric)
        if share == 1:
            torch.testing.assert_close(terms.loss, 0.7 * terms.contrastive + added)


def test_terms_for_a_log_are_detached_and_those_that_the_batch_has():
    inputs = make_batch()
    whole = CLPLLoss(symmetric_weight=0.5)(**inputs).terms()
    names = ["contrastive", "penalty", "positive_similarity", "negative_similarity", "negative_query_similarity"]
    assert list(whole) == [*names, "symmetric"]
    assert not any(value.requires_grad for value in whole.values())
    without_pairs = CLPLLoss()(inputs["query"], inputs["passages"]).terms()
    assert list(without_pairs) == ["contrastive", "positive_similarity", "negative_similarity"]


@pytest.mark.parametrize("penalty", ["cosine", "contrastive"])
def test_penalty_temperature_divides_the_penaltys_similarities(penalty):
    inputs = make_batch()
    found = CLPLLoss(0.1, penalty=penalty, penalty_temperature=0.02)(**inputs)
    if penalty == "contrastive":
        torch.testing.assert_close(found.penalty, CLPLLoss(0.02, penalty=penalty)(**inputs).penalty)
    else:
        torch.testing.assert_close(found.penalty, CLPLLoss(penalty=penalty)(**inputs).penalty / 0.02)
    assert torch.equal(found.contrastive, CLPLLoss(0.1)(**inputs).contrastive)


@pytest.mark.parametrize("answered", [(1, 2, 4, 5, 7, 8), (1, 1, 1, 5), ()])
def test_equal_weights_are_a_mean_over_all_queries(answered):
    """One weight of the penalty does this only where each query has as many pairs."""
    inputs = make_batch(negative_index=answered)
    found = CLPLLoss(0.1, penalty="contrastive", equal_weights=True)(**inputs)
    queries = torch.cat([inputs["query"], inputs["negative_queries"]])
    logits = F.normalize(queries, dim=1) @ F.normalize(inputs["passages"], dim=1).T / 0.1
    expected = F.cross_entropy(logits, torch.tensor([0, 3, 6, *answered]))
    torch.testing.assert_close(found.loss, expected)
    added = sum(found.added, start=torch.zeros(()))
    torch.testing.assert_close(added + found.contrastive * 3 / len(queries), expected)
    weighed = [CLPLLoss(0.1, weight, penalty="contrastive")(**inputs).loss for weight in (2 / 3, 0.5, 4 / 7)]
    assert any(torch.allclose(loss, expected) for loss in weighed) == (answered != (1, 1, 1, 5))


def test_negatives_of_the_same_tower_by_hand():
    """The first query meets the second, its positive the second query's passages; its own group is left out of both."""
    inputs = make_batch(batch=2, group=2, negative_index=(1,))
    query, passages = F.normalize(inputs["query"], dim=1), F.normalize(inputs["passages"], dim=1)
    pair = F.normalize(inputs["negative_queries"], dim=1)[0]
    first = torch.cat([passages @ query[0], query[1:] @ query[0], passages[2:] @ passages[0]])
    second = torch.cat([passages @ query[1], query[:1] @ query[1], passages[:2] @ passages[2]])
    third = torch.cat([passages @ pair, query[1:] @ pair, passages[2:] @ passages[1]])
    terms = CLPLLoss(0.1, penalty="contrastive", same_tower_negatives=True)(**inputs)
    expected = F.cross_entropy(torch.stack([first, second]) / 0.1, torch.tensor([0, 2]))
    torch.testing.assert_close(terms.contrastive, expected)
    torch.testing.assert_close(terms.penalty, F.cross_entropy(third / 0.1, torch.tensor(1)))
    assert terms.contrastive > CLPLLoss(0.1)(**inputs).contrastive


def test_equal_texts_are_no_negatives_of_the_same_tower():
    """Neither a query that is the same, nor one whose positive is the same, nor that passage."""
    inputs = make_batch(batch=3, group=1, negative_index=())
    ids, query_ids = torch.tensor([5, 6, 5]), torch.tensor([7, 7, 8])
    loss = CLPLLoss(0.1, same_tower_negatives=True)
    terms = loss(inputs["query"], inputs["passages"], passage_ids=ids, query_ids=query_ids)
    query, passages = F.normalize(inputs["query"], dim=1), F.normalize(inputs["passages"], dim=1)
    candidates = [
        [query[0] @ passages[0], query[0] @ passages[1], passages[0] @ passages[1]],
        [query[1] @ p for p in (passages[1], passages[0], passages[2], query[2])]
        + [passages[1] @ passages[0], passages[1] @ passages[2]],
        [query[2] @ passages[2], query[2] @ passages[1], query[2] @ query[1], passages[2] @ passages[1]],
    ]
    expected = [-F.log_softmax(torch.stack(row) / 0.1, dim=0)[0] for row in candidates]
    torch.testing.assert_close(terms.loss, sum(expected) / 3)


def test_hard_negatives_weigh_more_without_a_gradient_of_the_weight():
    query = torch.tensor([[1.0, 0.0]], requires_grad=True)
    passages = torch.tensor([[0.6, 0.8], [0.8, 0.6], [0.0, 1.0]])  # similarities 0.6, 0.8, 0.0
    found = CLPLLoss(1.0, hardness_weight=5.0)(query, passages).loss
    parts = [math.exp(0.6), math.exp(5 * 0.8) * math.exp(0.8), 1.0]
    assert found.item() == pytest.approx(-math.log(parts[0] / sum(parts)))
    # The share of each negative in the sum pulls at the query, at right angles to it.
    found.backward()
    shares = [part / sum(parts) for part in parts]
    assert query.grad[0, 1].item() == pytest.approx(0.8 * (shares[0] - 1) + 0.6 * shares[1] + shares[2])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": torch.ones(8)}, "expected .B, D."),
        ({"query": torch.ones(3, 7)}, "expected .B, D."),
        ({"query": torch.ones(2, 8)}, "9 passages for 2 queries"),
        ({"query": torch.ones(0, 8)}, "9 passages for 0 queries"),
        ({"passages": torch.ones(0, 8)}, "0 passages for 3 queries"),
        ({"negative_index": None}, "give both, or neither"),
        ({"negative_queries": None}, "give both, or neither"),
        ({"negative_queries": torch.ones(4, 7)}, r"expected \(M, 8\)"),
        ({"negative_index": torch.tensor([1, 2])}, r"expected int64 \(4,\)"),
        ({"negative_index": torch.ones(4)}, "expected int64"),
        ({"negative_index": torch.ones(4, dtype=torch.bool)}, "expected int64"),
        ({"passage_ids": torch.zeros(3, dtype=torch.int64)}, r"expected \(9,\)"),
        ({"query_ids": torch.zeros(3, dtype=torch.int64)}, r"expected \(7,\), also for negative_queries"),
        ({"answer_ids": torch.tensor([1]), "answer_index": torch.tensor([0])}, "passage_ids belong together"),
        ({"passage_ids": torch.arange(9), "answer_ids": torch.tensor([1])}, "passage_ids belong together"),
        (
            {"passage_ids": torch.arange(9), "answer_ids": torch.tensor([1]), "answer_index": torch.tensor([0, 1])},
            r"expected \(K,\)",
        ),
    ],
)
def test_forward_refuses_what_does_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        CLPLLoss()(**(make_batch() | changes))
