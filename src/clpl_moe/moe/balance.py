"""Auxiliary losses of the routers, and how evenly tokens are spread over the experts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .install import layer_states
from .layer_state import RouterRecord
from .router import Router


@dataclass
class RouterTerms:
    """What the routers' records of one step come to; L layers with experts, N experts."""

    balance: Tensor
    """Scalar with a graph, mean over layers of the load-balancing loss; 1 where loads are even."""
    z: Tensor
    """Scalar with a graph, mean over layers of the router z-loss."""
    load: Tensor
    """(L, N) share of the assignments that each expert got; rows sum to 1."""


def track_routers(encoder: nn.Module) -> None:
    """Let the encoder's routers record while it trains, until :func:`pop_router_terms` takes the records.

    Under gradient checkpointing the losses of the records have gradients only with ``use_reentrant=False``, the default
    of transformers: the other kind runs the forward pass without a graph.
    """
    for _, state, _ in layer_states(encoder):
        state.tracking = True
        state.records.clear()


def take_router_records(encoder: nn.Module) -> tuple[Tensor, ...]:
    """What the routers recorded since the last call, summed over forward passes; forgets it.

    Returns counts (1, L, N), probability sums (1, L, N) and z-sums (1, L), all float32 or wider, the latter two with their
    graph; or an empty tuple where nothing was recorded.
    """
    records = [record for _, record in _take_sums(encoder)]
    return tuple(torch.stack(values).unsqueeze(0) for values in zip(*records, strict=True))


def put_router_records(encoder: nn.Module, counts: Tensor, probability_sums: Tensor, z_sums: Tensor) -> None:
    """Give back what C calls of :func:`take_router_records` took: (C, L, N), (C, L, N) and (C, L)."""
    for layer, (_, state, _) in enumerate(layer_states(encoder)):
        sums = counts[:, layer].detach().sum(0), probability_sums[:, layer].sum(0), z_sums[:, layer].sum()
        state.records.append(RouterRecord(*sums))


def pop_router_terms(encoder: nn.Module) -> RouterTerms | None:
    """Losses and loads of all forward passes since the last call; forgets them. None where nothing was recorded.

    The balance loss is Switch's, ``N · Σ_e f_e · P_e`` with ``f_e`` the share of assignments and ``P_e`` the mean
    probability of expert ``e`` (arXiv:2101.03961, equation 4); the z-loss is the mean squared log-sum-exp of the logits
    (ST-MoE, arXiv:2202.08906, equation 5). With several processes, shares and numbers of tokens are those of all, so that
    gradients averaged over the processes equal those of one process on the joint batch.
    """
    balances, zs, loads = [], [], []
    for router, record in _take_sums(encoder):
        counts = record.counts
        processes = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        if processes > 1:
            dist.all_reduce(counts)
        assignments = counts.sum().clamp(min=1)  # no token at all is no reason for NaN
        tokens = assignments / router.top_k
        # This process's part of a mean over all, times the processes, since gradients are averaged over them.
        balances.append(counts.numel() * (counts / assignments * record.probability_sums).sum() * processes / tokens)
        zs.append(record.z_sum * processes / tokens)
        loads.append(counts / assignments)
    if not loads:
        return None
    return RouterTerms(torch.stack(balances).mean(), torch.stack(zs).mean(), torch.stack(loads))


@torch.no_grad()
def measure_load(encoder: nn.Module, run: Callable[[], object]) -> Tensor:
    """Share of the tokens that each expert gets while ``run()`` calls the encoder, in any mode: (L, N); rows sum to 1.

    Where every token goes to every expert, its share is the mean of its weights; where nothing chooses, it is even.
    """
    layers = layer_states(encoder)
    for _, state, _ in layers:
        state.loads = []
    try:
        run()
        even = [torch.ones(len(router.weight), device=router.weight.device) for _, _, router in layers]
        sums = [sum(state.loads or [], start=empty * 0) for (_, state, _), empty in zip(layers, even, strict=True)]
    finally:
        for _, state, _ in layers:
            state.loads = None
    loads = [found if found.any() else empty for found, empty in zip(sums, even, strict=True)]
    return torch.stack([load / load.sum() for load in loads])


def _take_sums(encoder: nn.Module) -> Iterator[tuple[Router, RouterRecord]]:
    """Each router that recorded something, and the sum of its records, which its layer forgets."""
    for _, state, router in layer_states(encoder):
        if state.records:
            sums = RouterRecord(*(torch.stack(values).sum(0) for values in zip(*state.records, strict=True)))
            state.records.clear()
            yield router, sums
