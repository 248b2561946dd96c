import pytest

from clpl_moe.data.sampler import EpochBatchSampler


def batches(sizes, batch_size, *, epoch=0, seed=3, **options):
    sampler = EpochBatchSampler(sizes, batch_size, seed, **options)
    sampler.set_epoch(epoch)
    found = list(sampler)
    assert len(found) == len(sampler)
    return found


def indices(found):
    return [index for batch in found for _, index in batch]


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("epoch", [0, 1])
def test_processes_share_the_batches_of_one_process(separate, epoch):
    """Also the short last ones, up to examples that fill them."""
    sizes = [10, 7]
    options = {"epoch": epoch, "separate_parts": separate}
    one = batches(sizes, 4, **options)
    shares = [batches(sizes, 2, process_index=i, num_processes=2, **options) for i in (0, 1)]
    assert len(one) == len(shares[0]) == len(shares[1])
    filled = 0
    for whole, first, second in zip(one, *shares):
        assert len(first) == len(second)
        assert (first + second)[: len(whole)] == whole
        filled += len(first + second) - len(whole)
    assert filled == 1


@pytest.mark.parametrize("separate", [False, True])
def test_each_example_once_an_epoch(separate):
    found = batches([10, 7], 4, separate_parts=separate)
    assert sorted(indices(found)) == list(range(17))
    assert {draw[0] for batch in found for draw in batch} == {0}


def test_order_depends_on_seed_and_epoch_only():
    first = batches([30], 4)
    assert first == batches([30], 4)
    assert indices(first) != indices(batches([30], 4, epoch=1)) != indices(batches([30], 4, seed=4))
    sampler = EpochBatchSampler([30], 4, 3)
    list(sampler)
    assert list(sampler) == first


def test_separate_parts_do_not_mix():
    """And, unlike FlagEmbedding's, go on in another order in each epoch, whatever epoch a run resumes in."""
    found = batches([10, 7], 4, separate_parts=True)
    assert [len({index < 10 for _, index in batch}) for batch in found] == [1] * 5
    assert sorted(len(batch) for batch in found) == [2, 3, 4, 4, 4]
    assert any(index < 10 for _, index in found[-1]) or any(index < 10 for _, index in found[-2])
    mixed = batches([10, 7], 4)
    assert any(len({index < 10 for _, index in batch}) == 2 for batch in mixed)


def test_drop_last():
    assert [len(batch) for batch in batches([10, 7], 4, drop_last=True)] == [4] * 4
    assert [len(batch) for batch in batches([10, 7], 4, drop_last=True, separate_parts=True)] == [4] * 3


def test_fewer_examples_than_processes():
    shares = [batches([1], 2, process_index=i, num_processes=4) for i in range(4)]
    assert shares == [[[(0, 0)]]] * 4
