import pytest
import torch

from clpl_moe.train.terms import TermSums, joined


def test_means_are_weighted_and_take_the_memory_of_one_batch():
    sums = TermSums()
    for number in range(1000):
        sums.add({"loss": torch.tensor(float(number)), "load": torch.tensor([1.0, number])}, 1.0)
    sums.add({"loss": torch.tensor(10_000.0)}, 0.5)
    sums.add({"loss": torch.tensor(torch.nan)}, 0)  # without a query of its own
    assert sums.plain() == {"loss": (499_500 + 5000, 1000.5), "load": ([1000, 499_500], 1000)}
    assert len(torch.tensor(sums.plain()["load"][0])) == 2
    sums.clear()
    assert sums.plain() == {}


def test_sums_go_on_where_they_were_kept():
    values, whole, first, second = torch.rand(9), TermSums(), TermSums(), TermSums()
    for value in values:
        whole.add({"loss": value}, 1.0)
    for value in values[:4]:
        first.add({"loss": value}, 1.0)
    second.restore(first.plain())
    for value in values[4:]:
        second.add({"loss": value}, 1.0)
    assert second.plain() == whole.plain()


def test_sums_of_a_checkpoint_follow_the_values_to_their_device():
    sums = TermSums()
    sums.restore({"loss": (1.0, 2.0)})
    sums.add({"loss": torch.ones((), device="meta")}, 1.0)  # a device that every machine has
    assert [(total.device.type, weights) for total, weights in sums._sums.values()] == [("meta", 3.0)]


def test_processes_may_know_different_terms():
    found = joined([{"a": (1.0, 2.0), "b": ([1.0, 2.0], 1.0)}, {"a": (2.0, 1.0)}, {}])
    assert found == {"a": (3.0, 3.0), "b": ([1.0, 2.0], 1.0)}
    assert joined([{}]) == {}
    assert found["a"][0] / found["a"][1] == pytest.approx(1)
