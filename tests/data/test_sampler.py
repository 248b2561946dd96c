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
    """Also the short last ones, up to examples that fill them where processes gather each other's passages."""
    sizes = [10, 7]
    options = {"epoch": epoch, "separate_parts": separate}
    one = batches(sizes, 4, **options)
    shares = [batches(sizes, 2, process_index=i, num_processes=2, even=True, **options) for i in (0, 1)]
    assert len(one) == len(shares[0]) == len(shares[1])
    filled = 0
    for whole, first, second in zip(one, *shares):
        assert len(first) == len(second)
        assert (first + second)[: len(whole)] == whole
        filled += len(first + second) - len(whole)
    assert filled == 1


def steps_of(sizes, batch_size, processes, accumulation, **options):
    """For each optimizer step the batches that count, as they come, over all passes and processes."""
    options |= {"accumulation": accumulation, "num_processes": processes}
    samplers = [EpochBatchSampler(sizes, batch_size, 3, process_index=i, **options) for i in range(processes)]
    shares = [list(sampler) for sampler in samplers]
    steps = []
    for first in range(0, len(samplers[0]), accumulation):
        counts = [sampler.queries(first, accumulation) for sampler in samplers]
        step = [
            shares[i][first + number][: counts[i][0][number]]
            for number in range(accumulation)
            for i in range(processes)
        ]
        assert {total for _, total in counts} == {sum(map(len, step))}
        assert all(shares[i][first + number] for number in range(accumulation) for i in range(processes))
        steps.append([batch for batch in step if batch])
    return steps


@pytest.mark.parametrize("separate", [False, True])
def test_every_split_of_a_batch_has_the_same_examples(separate):
    """The order is a function of the place in the epoch: a resumed run may divide its batch in another way."""
    expected = steps_of([48, 5, 13], 12, 1, 1, separate_parts=separate)
    assert sorted(i for step in expected for batch in step for _, i in batch) == list(range(66))
    for batch_size, processes, accumulation in [(6, 2, 1), (2, 1, 6), (2, 2, 3), (2, 3, 2), (2, 6, 1), (1, 4, 3)]:
        found = steps_of([48, 5, 13], batch_size, processes, accumulation, separate_parts=separate)
        assert [[d for batch in step for d in batch] for step in found] == [s for (s,) in expected]
        if batch_size == 2:  # equal slices: in-batch negatives stay, too
            assert found == steps_of([48, 5, 13], 2, 2, 3, separate_parts=separate)


def test_checkpoints_of_before_have_batches_planned_for_single_passes():
    one = EpochBatchSampler([10, 7], 2, 3, accumulation=4, whole_steps=False)
    assert list(one) == batches([10, 7], 2)
    assert one.queries(8, 1) == ([len(list(one)[8])], len(list(one)[8]))


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
