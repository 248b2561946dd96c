import torch

from clpl_moe.moe.layer_state import LayerState
from clpl_moe.moe.router import StraightThrough


def test_slots_are_sorted_by_expert_and_found_again():
    router = StraightThrough(6, 4, 2).double()
    torch.nn.init.normal_(router.weight)
    x = torch.randn(9, 6, dtype=torch.float64)
    assignment = router(x, LayerState())
    experts = (x @ router.weight.T).topk(2).indices  # (T, k)
    assert assignment.sizes == [int((experts == e).sum()) for e in range(4)]
    assert torch.equal(assignment.rows[assignment.inverse].view(9, 2), torch.arange(9).unsqueeze(1).expand(9, 2))
    slot_experts = torch.arange(4).repeat_interleave(torch.tensor(assignment.sizes))
    assert torch.equal(slot_experts[assignment.inverse].view(9, 2), experts)
