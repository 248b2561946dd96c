"""What experts cost beside the dense layers that they replace: the feed-forward part, and a whole training step.

``python benchmarks/experts.py`` measures on the CPU, or with ``--device cuda`` on a GPU, and writes
``benchmarks/results/experts.json``. Dense layers, this package's experts and a loop over experts as the code of 2024 had it run in
turn within one process. Every ratio is to the dense layers in the same repetition.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import XLMRobertaConfig, XLMRobertaModel
from transformers.models.xlm_roberta.modeling_xlm_roberta import XLMRobertaLayer

from clpl_moe import CLPLLoss, MoEConfig, inject_moe
from clpl_moe.common.allocator import keep_freed_memory
from clpl_moe.encoder.packing import PackedTexts, embed_packed
from common import RESULTS, print_table, side_by_side, write_result

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class LoopIntermediate(nn.Module):
    """Experts as the code of 2024 had them: for each expert its tokens by ``torch.where``, results added in place."""

    def __init__(self, dense: nn.Linear, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.gate = nn.Linear(dense.in_features, num_experts, bias=False)
        self.experts = nn.ModuleList(nn.Linear(dense.in_features, dense.out_features) for _ in range(num_experts))
        for expert in self.experts:
            expert.load_state_dict(dense.state_dict())
        self.top_k = top_k
        self.activation = nn.GELU()

    def forward(self, hidden: Tensor) -> Tensor:
        flat = hidden.reshape(-1, hidden.shape[-1])
        chosen, experts = self.gate(flat).topk(self.top_k, dim=-1)
        weights = chosen.softmax(-1, dtype=torch.float32).to(flat.dtype)
        mixed = flat.new_zeros(flat.shape[0], self.experts[0].out_features)
        for index, expert in enumerate(self.experts):
            tokens, rank = torch.where(experts == index)
            mixed[tokens] += weights[tokens, rank, None] * expert(flat[tokens])
        return self.activation(mixed.view(*hidden.shape[:-1], -1))


class FeedForward(nn.Module):
    """The feed-forward part of one encoder layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.intermediate = layer.intermediate
        self.output = layer.output

    def forward(self, hidden: Tensor) -> Tensor:
        return self.output(self.intermediate(hidden), hidden)


def feed_forward(num_experts: int = 1, top_k: int = 1, *, style: str = "dense") -> FeedForward:
    """The feed-forward part of a layer of XLM-R large without dropout: ``style`` dense, ours or loop."""
    torch.manual_seed(0)
    config = XLMRobertaConfig(
        vocab_size=10,
        hidden_size=1024,
        intermediate_size=4096,
        num_attention_heads=16,
        num_hidden_layers=1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    if style == "ours":
        encoder = inject_moe(XLMRobertaModel(config), MoEConfig(num_experts, top_k))
        return FeedForward(encoder.encoder.layer[0])
    layer = XLMRobertaLayer(config)
    if style == "loop":
        layer.intermediate = LoopIntermediate(layer.intermediate.dense, num_experts, top_k)
    return FeedForward(layer)


def measure_feed_forward(
    device: torch.device,
    dtype: torch.dtype,
    *,
    tokens: int = 4096,
    sizes: tuple[tuple[int, int], ...] = ((2, 1), (8, 1), (2, 2), (8, 2)),
    repeats: int = 7,
) -> dict[str, dict[str, float]]:
    """Times of forward and backward by the feed-forward part on ``tokens`` tokens; names such as ``ours N=2 k=1``."""
    x = torch.randn(1, tokens, 1024, device=device, dtype=dtype).requires_grad_()
    direction = torch.randn_like(x)

    def call(module: FeedForward) -> Callable[[], None]:
        module.to(device=device, dtype=dtype).train()

        def run() -> None:
            module.zero_grad(set_to_none=True)
            x.grad = None
            module(x).backward(direction)

        return run

    calls = {"dense": call(feed_forward())}
    for num_experts, top_k in sizes:
        for style in ("ours", "loop"):
            calls[f"{style} N={num_experts} k={top_k}"] = call(feed_forward(num_experts, top_k, style=style))
    return side_by_side(calls, device, repeats)


def training_step(
    encoder: nn.Module,
    device: torch.device,
    *,
    queries: int = 8,
    query_length: int = 32,
    passages: int = 32,
    passage_length: int = 96,
    texts: str = "packed",
    dtype: torch.dtype = torch.float32,
) -> Callable[[], None]:
    """One step of contrastive training, optimizer included, of the Linear layers that ``trainable: moe`` trains.

    The dense encoder trains its intermediate Linear layers in the same places.

    Args:
        encoder: dense, or with experts.
        device: where it is to run.
        queries: number of queries.
        query_length: their length in tokens.
        passages: number of passages, a multiple of ``queries``.
        passage_length: their (greatest) length in tokens.
        texts: ``packed``, as the trainer does it, in one stream, lengths from half to all of the length; ``padded``, the same
            lengths, queries and passages in a batch each; ``equal``, all of the full length, without a mask.
        dtype: what autocast computes in.
    """
    encoder.to(device).train().requires_grad_(False)
    trained = [p for name, p in encoder.named_parameters() if ".intermediate." in name]
    for parameter in trained:
        parameter.requires_grad_()
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)  # as the trainer
    loss = CLPLLoss()
    generator = torch.Generator().manual_seed(0)

    def draw(count: int, length: int) -> list[Tensor]:
        shortest = length if texts == "equal" else length // 2
        lengths = torch.randint(shortest, length + 1, (count,), generator=generator).tolist()
        return [torch.randint(4, encoder.config.vocab_size, (n,), generator=generator) for n in lengths]

    def pad(part: list[Tensor]) -> dict[str, Tensor | None]:
        ids = nn.utils.rnn.pad_sequence(part, batch_first=True, padding_value=encoder.config.pad_token_id)
        mask = None if texts == "equal" else ids.ne(encoder.config.pad_token_id).long().to(device)
        return {"input_ids": ids.to(device), "attention_mask": mask}

    parts = draw(queries, query_length), draw(passages, passage_length)
    stream = PackedTexts.from_sequences([ids.numpy() for part in parts for ids in part]).to(device)
    inputs = [pad(part) for part in parts]

    def embed() -> Sequence[Tensor]:
        if texts == "packed":
            return embed_packed(encoder, stream, pooling="mean").split([queries, passages])
        return [encoder(**part).last_hidden_state[:, 0] for part in inputs]

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            query, passage = embed()
        loss(query, passage).loss.backward()
        optimizer.step()

    return run


def small_encoder() -> XLMRobertaModel:
    """An encoder of the small encoder's shape (12 layers, width 384), random: weights do not change how long it takes."""
    torch.manual_seed(0)
    config = XLMRobertaConfig(
        vocab_size=10_000,
        hidden_size=384,
        intermediate_size=1536,
        num_attention_heads=12,
        num_hidden_layers=12,
        max_position_embeddings=514,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return XLMRobertaModel(config)


def measure_step(
    device: torch.device,
    *,
    make: Callable[[], XLMRobertaModel] = small_encoder,
    sizes: tuple[tuple[int, int], ...] = ((2, 1), (8, 1)),
    repeats: int = 7,
    **options,
) -> dict[str, dict[str, float]]:
    """Times of a :func:`training_step` with experts and without."""
    calls = {"dense": training_step(make(), device, **options)}
    for num_experts, top_k in sizes:
        encoder = inject_moe(make(), MoEConfig(num_experts, top_k))
        calls[f"ours N={num_experts} k={top_k}"] = training_step(encoder, device, **options)
    return side_by_side(calls, device, repeats)


def waits_for_device(call: Callable[[], None]) -> bool:
    """Whether a call on CUDA makes the host wait for the device, as far as torch notices."""
    call()  # the first one sets up libraries
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--experts", type=int, nargs="+", default=[2, 8], help="numbers of experts N")
    parser.add_argument("--top_k", type=int, nargs="+", default=[1, 2], help="experts of each token")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="few tokens and repetitions: does it run at all?")
    parser.add_argument("--output", type=Path, default=RESULTS / "experts.json")
    args = parser.parse_args()
    device = torch.device(args.device)
    tokens, repeats = (256, 2) if args.quick else (args.tokens, args.repeats)
    sizes = tuple((n, k) for k in args.top_k for n in args.experts if not (args.quick and k > 1))
    results: dict[str, dict[str, dict[str, float]]] = {}

    def measured(title: str, times: dict[str, dict[str, float]]) -> None:
        print_table(title, times)
        results[title] = times

    for name in args.dtypes:
        times = measure_feed_forward(device, DTYPES[name], tokens=tokens, sizes=sizes, repeats=repeats)
        measured(f"FFN 1024 → 4096 → 1024, {tokens} tokens, {name}", times)
    lengths = {"passages": 8, "passage_length": 32} if args.quick else {}
    for texts, name in (("packed", "in one stream"), ("padded", "padded"), ("equal", "texts of equal length")):
        times = measure_step(device, texts=texts, repeats=repeats, **lengths)
        measured(f"training step of the small encoder, float32, {name}", times)
    rows = [
        {
            "forward and backward of": title,
            "with": name,
            "time / dense": row["ratio"],
            "quartiles": f"{row['ratio_low']} to {row['ratio_high']}",
        }
        for title, times in results.items()
        for name, row in times.items()
        if name != "dense"
    ]
    settings = {
        "model": "random weights",
        "precision": " and ".join(args.dtypes),
        "threads": torch.get_num_threads(),
        "tokens": tokens,
        "repeats": repeats,
    }
    write_result(args.output, "What experts cost beside the dense layers they replace.", settings, rows, results)


if __name__ == "__main__":
    keep_freed_memory()
    main()
