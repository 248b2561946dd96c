import pytest
import torch

from clpl_moe.encoder import precision
from clpl_moe.encoder.precision import autocast, compute_dtype
from helpers.tiny import make_encoder


def test_compute_dtype(monkeypatch):
    model = make_encoder()
    for fast, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(precision, "fast_bfloat16", lambda device, fast=fast: fast)
        assert compute_dtype(model) == expected
    assert compute_dtype(model, torch.bfloat16) == torch.bfloat16
    assert compute_dtype(model.bfloat16(), torch.float32) == torch.bfloat16


@pytest.mark.parametrize("inside", [False, True])
def test_autocast_decides_whatever_stands_around_it(inside):
    linear = torch.nn.Linear(4, 4)
    with torch.autocast("cpu", torch.bfloat16, enabled=inside):
        for dtype in (torch.float32, torch.bfloat16):
            with autocast(linear, dtype):
                assert linear(torch.ones(4)).dtype == dtype
