import pytest
import torch

from clpl_moe.encoder.packing import PackedTexts, embed_packed
from clpl_moe.moe.balance import measure_load, pop_router_terms, track_routers
from clpl_moe.moe.install import layer_states
from helpers.processes import run_in_processes
from helpers.tiny import make_batch, make_encoder, make_moe


def terms_of(encoder, *batches):
    """What is recorded of some batches in training."""
    track_routers(encoder.train())
    for batch in batches:
        encoder(**batch)
    return pop_router_terms(encoder)


@pytest.mark.parametrize("target", ["intermediate", "output", "ffn"])
@pytest.mark.parametrize("top_k", [1, 2])
def test_losses_by_hand(target, top_k):
    encoder, inputs = make_moe(target, top_k=top_k), {}
    for index, _, router in layer_states(encoder):
        router.register_forward_hook(lambda _, args, __, index=index: inputs.setdefault(index, []).append(args[0]))
    terms = terms_of(encoder, make_batch([9, 4]), make_batch([3, 6, 2], 1))
    balances, zs, loads = [], [], []
    for index, _, router in layer_states(encoder):
        tokens = torch.cat(inputs[index])
        assert len(tokens) == 24  # of two batches, without padding
        logits = tokens @ router.weight.T
        p = logits.softmax(1)
        count = torch.zeros(3)
        for row in logits:
            for expert in row.argsort(descending=True)[:top_k].tolist():
                count[expert] += 1
        share = count / count.sum()
        balances.append(3 * sum(share[e] * p[:, e].mean() for e in range(3)))
        zs.append((logits.exp().sum(1).log() ** 2).mean())
        loads.append(share)
    torch.testing.assert_close(terms.balance, sum(balances) / 2)
    torch.testing.assert_close(terms.z, sum(zs) / 2)
    torch.testing.assert_close(terms.load, torch.stack(loads))
    weights = [router.weight for _, _, router in layer_states(encoder)]
    found = torch.autograd.grad(terms.balance + terms.z, weights, retain_graph=True)
    wanted = torch.autograd.grad((sum(balances) + sum(zs)) / 2, weights)
    for gradient, expected in zip(found, wanted):
        torch.testing.assert_close(gradient, expected)
        assert gradient.any()


def test_balance_is_one_where_loads_are_even_and_grows_to_the_number_of_experts():
    encoder = make_moe(num_experts=4, perturb=False, router_init_std=0.0)
    torch.testing.assert_close(terms_of(encoder, make_batch([9, 4])).balance, torch.tensor(1.0))
    encoder = make_moe(num_experts=4, perturb=False)
    # A token's state has mean 0 and length √32 there, so that only a bias can send all to one expert.
    for layer in encoder.encoder.layer:
        layer.attention.output.LayerNorm.bias.data[0] = 10.0
    for _, _, router in layer_states(encoder):
        router.weight.data.zero_()[2, 0] = 5.0
    terms = terms_of(encoder, make_batch([9, 4]))
    torch.testing.assert_close(terms.balance, torch.tensor(4.0))
    assert terms.load.tolist() == [[0, 0, 1, 0]] * 2


def test_balance_loss_evens_the_load():
    encoder = make_moe(num_experts=2)
    routers = [router.weight for _, _, router in layer_states(encoder)]
    optimizer, batch = torch.optim.Adam(routers, lr=0.05), make_batch([30, 30])
    before = terms_of(encoder, batch)
    for _ in range(40):
        optimizer.zero_grad()
        terms_of(encoder, batch).balance.backward()
        optimizer.step()
    after = terms_of(encoder, batch)
    assert after.balance < before.balance
    assert after.load.max() < before.load.max()


def test_records_only_in_training_and_only_where_asked():
    encoder, batch = make_moe().train(), make_batch([9, 4])
    encoder(**batch)
    assert pop_router_terms(encoder) is None
    track_routers(encoder)
    encoder.eval()(**batch)
    assert pop_router_terms(encoder) is None
    encoder.train()(**batch)
    assert pop_router_terms(encoder) is not None
    assert pop_router_terms(encoder) is None  # it forgets
    encoder(**batch)
    track_routers(encoder)  # from here on
    assert pop_router_terms(encoder) is None


def test_only_layers_with_experts_have_a_load():
    assert terms_of(make_moe(layers=[1]), make_batch([9, 4])).load.shape == (1, 3)


def test_padding_only_gives_numbers():
    batch = make_batch([3])
    terms = terms_of(make_moe(), {**batch, "attention_mask": batch["attention_mask"] * 0})
    assert terms.balance.isfinite()
    assert terms.z.isfinite()


def test_not_an_encoder_with_layers():
    with pytest.raises(ValueError, match="has no layers"):
        pop_router_terms(torch.nn.Linear(2, 2))
    assert pop_router_terms(make_encoder()) is None


BATCHES = [make_batch([9, 4]), make_batch([3, 6, 2], 1)]


def terms_of_one_process(rank):
    """Terms of this process's batch, and the gradients averaged over the processes."""
    encoder = make_moe(top_k=2)
    terms = terms_of(encoder, BATCHES[rank])
    (terms.balance + 0.1 * terms.z).backward()
    averaged = {}
    for index, _, router in layer_states(encoder):
        averaged[index] = router.weight.grad
        torch.distributed.all_reduce(averaged[index])
        averaged[index] /= torch.distributed.get_world_size()
    return terms.balance.detach(), terms.load, averaged


def test_two_processes_give_the_gradients_of_the_joint_batch(tmp_path):
    """With batches of different numbers of tokens."""
    results = run_in_processes(terms_of_one_process, tmp_path)
    encoder = make_moe(top_k=2)
    terms = terms_of(encoder, *BATCHES)
    (terms.balance + 0.1 * terms.z).backward()
    torch.testing.assert_close((results[0][0] + results[1][0]) / 2, terms.balance.detach())
    for _, load, averaged in results:
        torch.testing.assert_close(load, terms.load)
        for index, _, router in layer_states(encoder):
            torch.testing.assert_close(averaged[index], router.weight.grad)


@pytest.mark.parametrize("target", ["intermediate", "ffn"])
def test_the_load_is_measured_in_evaluation(target):
    encoder, batches = make_moe(target), (make_batch([9, 4]), make_batch([3, 6, 2], 1))
    expected = terms_of(encoder, *batches).load
    load = measure_load(encoder.eval(), lambda: [encoder(**batch) for batch in batches])
    torch.testing.assert_close(load, expected)
    assert load.std() > 0.05
    encoder(**batches[0])
    assert all(state.loads is None for _, state, _ in layer_states(encoder))  # nothing goes on counting


def test_the_load_of_experts_that_all_see_every_token_is_their_mean_weight():
    encoder, weights = make_moe(top_k=3), []
    for _, _, router in layer_states(encoder):
        router.register_forward_hook(lambda _, args, assignment: weights.append(assignment.weights.mean(0)))
    load = measure_load(encoder, lambda: encoder(**make_batch([9, 4])))
    torch.testing.assert_close(load, torch.stack(weights))


def test_a_load_that_nobody_chose_is_even():
    load = measure_load(make_moe(num_experts=4), lambda: None)
    assert torch.equal(load, torch.full((2, 4), 0.25))


@pytest.mark.parametrize("router", ["given", "random"])
def test_routers_that_choose_one_expert_count_one(router):
    encoder = make_moe(num_experts=2, top_k=2, router=router).train()
    texts = PackedTexts.from_sequences([[5, 6, 7], [8, 9]])
    texts.experts = torch.tensor([1, 1])

    def run():
        embed_packed(encoder, texts, pooling="mean")

    track_routers(encoder)
    run()
    terms = pop_router_terms(encoder)
    assert (terms.balance, terms.load.sum()) == (1, 2)
    load = measure_load(encoder, run)
    assert ((load == 0) | (load == 1)).all()
