import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clpl_moe.loss.grad_cache import cached_forward, chunks_by_tokens
from helpers.grad_cache import assert_close, forward_with_graph, gradients


class TestCachedForward:
    """The core, on a small network whose two outputs both matter to the loss."""

    @staticmethod
    def network():
        torch.manual_seed(0)
        return torch.nn.Sequential(
            torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Dropout(0.3), torch.nn.Linear(16, 4)
        )

    @staticmethod
    def run(function, network, chunks, seed=3, scale=1.0):
        def forward(chunk):
            output = network(chunk)
            return output, output.square().sum().view(1)

        torch.manual_seed(seed)
        embeddings, sums = function(network, forward, chunks)
        loss = (embeddings @ embeddings.T).logsumexp(1).mean() + sums.sum().sqrt()
        (loss * scale).backward()
        return loss.detach(), torch.rand(3)

    @pytest.mark.parametrize("sizes", [[4, 1, 3], [1] * 8, [5, 3]])
    def test_values_gradients_and_random_state_are_those_of_a_pass_with_graphs(self, sizes):
        chunks = torch.randn(8, 6).split(sizes)
        one, two = self.network(), self.network()
        expected, found = self.run(forward_with_graph, one, chunks), self.run(cached_forward, two, chunks)
        assert found[0] == expected[0]
        # Whatever is drawn afterwards is as without caching.
        assert found[1].equal(expected[1])
        assert_close(gradients(two), gradients(one))

    @pytest.mark.gpu
    @pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
    def test_on_a_gpu(self, dtype):
        """Dropout draws from the device's generator, and the backward pass runs in another thread."""
        chunks = torch.randn(8, 6, device="cuda").split([4, 1, 3])
        one, two = self.network().cuda(), self.network().cuda()
        with torch.autocast("cuda", dtype, enabled=dtype is not None, cache_enabled=False):
            expected, found = self.run(forward_with_graph, one, chunks), self.run(cached_forward, two, chunks)
        assert found[0] == expected[0]
        assert_close(gradients(two), gradients(one))

    def test_gradients_add_up_over_calls(self):
        one, two = self.network(), self.network()
        for seed in (1, 2):
            chunks = torch.randn(8, 6, generator=torch.Generator().manual_seed(seed)).split(2)
            self.run(forward_with_graph, one, chunks, seed)
            self.run(cached_forward, two, chunks, seed)
        assert_close(gradients(two), gradients(one))

    def test_each_parameter_gets_its_gradient_once_and_complete(self):
        """As the hooks of DistributedDataParallel need it."""
        network, seen = self.network(), []
        for parameter in network.parameters():
            parameter.register_post_accumulate_grad_hook(lambda p: seen.append((p, p.grad.clone())))
        self.run(cached_forward, network, torch.randn(8, 6).split(2))
        assert len(seen) == 4
        assert all(gradient.equal(parameter.grad) for parameter, gradient in seen)

    def test_one_chunk_at_a_time_holds_activations(self):
        alive, most = 0, 0

        class Count(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                nonlocal alive, most
                alive += 1
                most = max(most, alive)
                return x.clone()

            @staticmethod
            def backward(ctx, gradient):
                nonlocal alive
                alive -= 1
                return gradient

        network = torch.nn.Linear(6, 4)

        def forward(chunk):
            output = network(chunk)
            return (Count.apply(output) if output.requires_grad else output,)

        (embeddings,) = cached_forward(network, forward, torch.randn(8, 6).split(1))
        assert most == 0
        embeddings.sum().backward()
        assert (alive, most) == (0, 1)

    def test_one_chunk_is_forwarded_once(self):
        network, calls = self.network(), 0

        def forward(chunk):
            nonlocal calls
            calls += 1
            return (network(chunk),)

        cached_forward(network, forward, [torch.randn(8, 6)])[0].sum().backward()
        assert calls == 1
        with pytest.raises(ValueError, match="no chunks"):
            cached_forward(network, forward, [])

    def test_frozen_and_unused_parameters_stay_without_gradients(self):
        network = self.network()
        network[0].requires_grad_(False)
        network.unused = torch.nn.Linear(2, 2)

        def forward(chunk):
            return (network[3](network[2](network[1](network[0](chunk)))),)

        cached_forward(network, forward, torch.randn(8, 6).split(2))[0].sum().backward()
        assert gradients(network).keys() == {"3.weight", "3.bias"}
        network.requires_grad_(False)
        assert not cached_forward(network, forward, torch.randn(8, 6).split(2))[0].requires_grad
        with torch.no_grad():
            assert not cached_forward(network, forward, torch.randn(8, 6).split(2))[0].requires_grad

    def test_a_parameter_changed_in_between_is_noticed(self):
        network = self.network()
        (embeddings,) = cached_forward(network, lambda chunk: (network(chunk),), torch.randn(8, 6).split(2))
        with torch.no_grad():
            network[0].weight.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            embeddings.sum().backward()

    def test_weights_cast_by_autocast_still_get_gradients_elsewhere(self):
        """Fails without the cache's clearing only where torch has the fault that this works around."""
        network = self.network()
        with torch.autocast("cpu", torch.bfloat16):
            cached_forward(network, lambda chunk: (network(chunk),), torch.randn(8, 6).split(2))
            network(torch.randn(8, 6)).sum().backward()
        assert gradients(network).keys() == {"0.weight", "0.bias", "3.weight", "3.bias"}


@given(st.lists(st.integers(1, 40), max_size=60), st.integers(1, 200))
def test_chunks_hold_every_text_once_within_the_budget(lengths, budget):
    chunks = chunks_by_tokens(lengths, budget)
    assert sorted(row for rows in chunks for row in rows) == list(range(len(lengths)))
    for rows in chunks:
        assert len(rows) == 1 or len(rows) * max(lengths[row] for row in rows) <= budget
    in_order = [lengths[row] for rows in chunks for row in rows]
    assert in_order == sorted(lengths, reverse=True)
    # None of them could have taken one text more.
    assert all((len(rows) + 1) * lengths[rows[0]] > budget for rows in chunks[:-1])
