"""Auxiliary losses of the routers, and how evenly tokens are spread over the experts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .install import layer_states
from .layer import RouterRecord


@dataclass
class RouterTerms:
    """What the routers' records of one step come to; L layers with experts, N experts.

    Attributes:
        balance: scalar with a graph, mean over layers of the load-balancing loss; 1 where loads are even.
        z: scalar with a graph, mean over layers of the router z-loss.
        load: (L, N) share of the assignments that each expert got; rows sum to 1.
        layers: the number of each of the L layers in the encoder.
    """

    balance: Tensor
    z: Tensor
    load: Tensor
    layers: list[int]


def track_routers(encoder: nn.Module, enabled: bool = True) -> None:
    """Let the encoder's routers record while it trains, until :func:`pop_router_terms` takes the records.

    Under gradient checkpointing the losses of the records have gradients only with ``use_reentrant=False``, the default
    of transformers: the other kind runs the forward pass without a graph.
    """
    for _, state, _ in layer_states(encoder):
        state.tracking = enabled
        state.records.clear()


def take_router_records(encoder: nn.Module) -> tuple[Tensor, ...]:
    """What the routers recorded since the last call, summed over forward passes; the encoder forgets it.

    Returns:
        counts (1, L, N), probability sums (1, L, N) and z-sums (1, L) of L layers with experts, all float32 or wider, the
        latter two with their graph; or nothing where nothing was recorded. See :class:`RouterRecord`.
    """
    layers = []
    for _, state, _ in layer_states(encoder):
        if state.records:
            fields = zip(*((r.counts, r.probability_sums, r.z_sum) for r in state.records), strict=True)
            layers.append([torch.stack(values).sum(0) for values in fields])
            state.records.clear()
    return tuple(torch.stack(values).unsqueeze(0) for values in zip(*layers, strict=True))


def put_router_records(encoder: nn.Module, counts: Tensor, probability_sums: Tensor, z_sums: Tensor) -> None:
    """Give back what C calls of :func:`take_router_records` took: (C, L, N), (C, L, N) and (C, L)."""
    for layer, (_, state, _) in enumerate(layer_states(encoder)):
        record = RouterRecord(
            counts[:, layer].detach().sum(0), probability_sums[:, layer].sum(0), z_sums[:, layer].sum()
        )
        state.records.append(record)


def pop_router_terms(encoder: nn.Module) -> RouterTerms | None:
    """Losses and loads of all forward passes since the last call; forgets them. None where nothing was recorded.

    The balance loss is Switch's, ``N · Σ_e f_e · P_e`` with ``f_e`` the share of assignments and ``P_e`` the mean
    probability of expert ``e`` (arXiv:2101.03961, equation 4); the z-loss is the mean squared log-sum-exp of the logits
    (ST-MoE, arXiv:2202.08906, equation 5). With several processes, shares and numbers of tokens are those of all, so that
    gradients averaged over the processes equal those of one process on the joint batch.
    """
    balances, zs, loads, layers = [], [], [], []
    for index, state, router in layer_states(encoder):
        if not state.records:
            continue
        counts = torch.stack([r.counts for r in state.records]).sum(0)
        probabilities = torch.stack([r.probability_sums for r in state.records]).sum(0)
        z_sum = torch.stack([r.z_sum for r in state.records]).sum()
        processes = 1
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            processes = dist.get_world_size()
            dist.all_reduce(counts)
        assignments = counts.sum().clamp(min=1)  # no token at all is no reason for NaN
        tokens = assignments / router.top_k
        # This process's part of a mean over all, times the processes, since gradients are averaged over them.
        balances.append(counts.numel() * (counts / assignments * probabilities).sum() * processes / tokens)
        zs.append(z_sum * processes / tokens)
        loads.append(counts / assignments)
        layers.append(index)
        state.records.clear()
    if not layers:
        return None
    return RouterTerms(torch.stack(balances).mean(), torch.stack(zs).mean(), torch.stack(loads), layers)
