import torch
from torch.nn.parallel import DistributedDataParallel

from clpl_moe import CLPLLoss
from helpers.embeddings import make_batch
from helpers.processes import run_in_processes

# Two processes with different numbers of pairs, and with ids that are equal across them.
BATCH, GROUP = 3, 2
PAIRS = [(1, 1, 5), (3,)]
OPTIONS = [
    {"temperature": 0.1, "penalty_weight": 0.3, "false_negative_margin": 0.2, "penalty": penalty}
    for penalty in ("cosine", "contrastive")
]
OPTIONS += [OPTIONS[1] | {"matryoshka_dims": [4, 2], "matryoshka_weights": [1, 0.5], "equal_weights": True}]
OPTIONS += [OPTIONS[1] | {"same_tower_negatives": True, "equal_weights": True, "hardness_weight": 2.0}]


class Projection(torch.nn.Module):
    """A model to train: embeds everything by one matrix."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = torch.nn.Linear(6, 4, dtype=torch.float64)

    def forward(self, *inputs):
        return [self.linear(rows) for rows in inputs]


def part_of(rank):
    inputs = make_batch(BATCH, GROUP, PAIRS[rank], 6, torch.float64, seed=rank)
    embeddings = [inputs[name].detach() for name in ("query", "passages", "negative_queries")]
    query_ids = torch.arange(BATCH + len(PAIRS[rank])) + 10 * rank
    query_ids[1] = query_ids[-1] = 2  # also one of the first process's third query
    # A passage of the other process is known to answer a query of this one, and one of its own.
    answers = torch.tensor([13 - rank, 11]), torch.tensor([rank, 0])
    return embeddings, inputs["negative_index"], torch.tensor([rank, 10, 11, 12 + rank, 1, 14]), query_ids, answers


def gradients_of_one_process(rank):
    model = Projection()
    embeddings, index, ids, query_ids, answers = part_of(rank)
    parallel = DistributedDataParallel(model)
    query, passages, negative_queries = parallel(*embeddings)
    losses = [CLPLLoss(**options, gather_across_devices=True) for options in OPTIONS]
    sum(loss(query, passages, negative_queries, index, ids, query_ids, *answers).loss for loss in losses).backward()
    with torch.no_grad():  # as in evaluation: nothing needs a gradient
        query, passages, negative_queries = model(*embeddings)
        without = CLPLLoss(gather_across_devices=True)(query, passages).loss
        pairs = (negative_queries, index) if rank == 0 else ()
        of_one = losses[-1](query, passages, *pairs).loss
    return {name: p.grad for name, p in model.named_parameters()}, without, of_one


def test_gradients_of_two_processes_are_those_of_the_joint_batch(tmp_path):
    results = run_in_processes(gradients_of_one_process, tmp_path)
    parts = [part_of(rank) for rank in range(2)]
    joint = [torch.cat(tensors) for tensors in zip(*(part[0] for part in parts))]
    index = torch.cat([parts[0][1], parts[1][1] + BATCH * GROUP])
    model = Projection()
    query, passages, negative_queries = model(*joint)
    ids = torch.cat([parts[0][2], parts[1][2]])
    of_query, of_pairs = zip(*(part[3].split([BATCH, len(pairs)]) for part, pairs in zip(parts, PAIRS)))
    query_ids = torch.cat([*of_query, *of_pairs])
    answers = torch.cat([part[4][0] for part in parts]), torch.cat([parts[0][4][1], parts[1][4][1] + BATCH])
    losses = [CLPLLoss(**options) for options in OPTIONS]
    sum(loss(query, passages, negative_queries, index, ids, query_ids, *answers).loss for loss in losses).backward()
    for gradients, _, _ in results:
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(gradients[name], parameter.grad)
    expected = CLPLLoss()(query, passages).loss
    torch.testing.assert_close((results[0][1] + results[1][1]) / 2, expected.detach())
    number = len(PAIRS[0])
    expected = losses[-1](query, passages, negative_queries[:number], index[:number]).loss
    torch.testing.assert_close((results[0][2] + results[1][2]) / 2, expected.detach())


def test_gathering_with_one_process_changes_nothing():
    inputs = make_batch()
    assert torch.equal(CLPLLoss(gather_across_devices=True)(**inputs).loss, CLPLLoss()(**inputs).loss)
