"""An encoder of BGE-M3's shape on a GPU: what experts cost, how near the hardware's limit training and encoding come.

``PYTHONPATH=src python benchmarks/gpu.py`` needs torch, transformers and numpy only, no weights and no data: the encoder is
random, made on the device, and the texts are random tokens with lengths as in retrieval data. It writes
``benchmarks/results/gpu.json``:

- the rate of the bf16 matrix product 8192³, the best of several tries, which the shares below are of;
- a training step (packed texts, CLPL, the Linear layers that ``trainable: moe`` trains, bf16 autocast over float32 weights,
  fused AdamW), dense and with N experts at k = 1: milliseconds, peak memory, share of that rate, and whether anything in it
  waits for the device;
- the same with the loop over experts as the code of 2024 had it;
- encoding of passages in bfloat16, dense and with experts;
- the kernels in which the device spends its time, by share.

``--device cpu --quick`` runs everything once on a small shape, to see that it works.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn
from transformers import XLMRobertaConfig, XLMRobertaModel

from clpl_moe import CLPLLoss, MoEConfig, inject_moe
from clpl_moe.common.errors import UserError, command
from clpl_moe.encoder.packing import PackedTexts, embed_packed
from common import (
    RESULTS,
    encoder_flops,
    matmul_rate,
    peak_memory,
    reset_peak_memory,
    seconds,
    side_by_side,
    write_result,
)
from experts import LoopIntermediate, waits_for_device

BGE_M3 = {
    "vocab_size": 250002,
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "max_position_embeddings": 8194,
    "type_vocab_size": 1,
}
QUICK = BGE_M3 | {"vocab_size": 1000, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
QUICK |= {"intermediate_size": 256, "max_position_embeddings": 514}


def make_encoder(shape: dict[str, int], device: torch.device, num_experts: int = 0, *, loop: bool = False) -> nn.Module:
    """A random encoder without dropout on ``device``, dense or with experts at k = 1 in every intermediate Linear."""
    torch.manual_seed(0)
    config = XLMRobertaConfig(**shape, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    with device:
        encoder = XLMRobertaModel(config, add_pooling_layer=False)
        if loop:
            for layer in encoder.encoder.layer:
                layer.intermediate = LoopIntermediate(layer.intermediate.dense, num_experts, 1)
        elif num_experts:
            inject_moe(encoder, MoEConfig(num_experts, 1))
    return encoder.to(device)


def random_texts(count: int, shortest: int, longest: int, vocabulary: int, device: torch.device) -> PackedTexts:
    """Texts of random tokens; lengths uniform from ``shortest`` to ``longest``, sorted."""
    generator = torch.Generator().manual_seed(count)
    lengths = torch.randint(shortest, longest + 1, (count,), generator=generator).sort().values.tolist()
    sequences = [torch.randint(4, vocabulary, (length,), generator=generator).tolist() for length in lengths]
    return PackedTexts.from_sequences(sequences).to(device)


def training_texts(queries: int, group: int, longest: int, vocabulary: int, device: torch.device) -> PackedTexts:
    """Queries, as many queries of negatives, and ``group`` passages for each query."""
    short = random_texts(2 * queries, 6, 32, vocabulary, device)
    long = random_texts(queries * group, 32, longest, vocabulary, device)
    return PackedTexts(torch.cat([short.input_ids, long.input_ids]), torch.cat([short.lengths, long.lengths]))


def step_flops(shape: dict[str, int], lengths: list[int]) -> float:
    """Of one training step: also all inputs' gradients, and the weights' gradients of the intermediate Linear layers, which
    are the ones trained."""
    weights = 2 * sum(lengths) * shape["hidden_size"] * shape["intermediate_size"] * shape["num_hidden_layers"]
    linear, attention = encoder_flops(shape, lengths)
    return 2 * linear + 3 * attention + weights


def training_step(encoder: nn.Module, queries: int, group: int, texts: PackedTexts) -> Callable[[], None]:
    """One step: the first texts are the queries and the queries of negatives, the others the passages."""
    device = texts.input_ids.device
    encoder.train().requires_grad_(False)
    trained = [p for name, p in encoder.named_parameters() if ".intermediate." in name]
    for parameter in trained:
        parameter.requires_grad_()
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    loss = CLPLLoss()
    # A negative of each query has a query of its own.
    negative_index = torch.arange(queries, device=device) * group + 1

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16):
            embeddings = embed_packed(encoder, texts, pooling="cls")
        own, of_negatives, passages = embeddings.split([queries, queries, queries * group])
        loss(own, passages, of_negatives, negative_index).loss.backward()
        optimizer.step()

    return run


def kernel_shares(call: Callable[[], None], device: torch.device) -> dict[str, float]:
    """The 15 kernels that a call spends most of the device's time in, with their shares; nothing on a CPU."""
    if device.type == "cpu":
        return {}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        seconds(call, device)
    spent: Counter[str] = Counter()
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation:
            spent[event.name[:100]] += event.self_device_time_total
    total = sum(spent.values())
    return {name: round(time / total, 3) for name, time in spent.most_common(15)}


@command
def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--queries", type=int, nargs="+", default=[32, 64, 96], help="queries of training steps")
    parser.add_argument("--group", type=int, default=5, help="passages for each query")
    parser.add_argument("--passages", type=int, default=512, help="passages of an encoding pass")
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--quick", action="store_true", help="a small shape and two repetitions: does it run at all?")
    parser.add_argument("--output", type=Path, default=RESULTS / "gpu.json")
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("no CUDA device was found; --device cpu --quick only checks that this runs")
    shape, longest, matrix = (QUICK, 48, 256) if args.quick else (BGE_M3, 512, 8192)
    queries, passages, repeats = ([2], 4, 2) if args.quick else (args.queries, args.passages, args.repeats)
    group = args.group

    rates = [matmul_rate(device, torch.bfloat16, matrix, repeats)]
    corpus = random_texts(passages, 32, longest, shape["vocab_size"], device)
    rows, measurements = [], {"corpus_tokens": len(corpus.input_ids)}

    def measure(name: str, make: Callable[..., Callable[[], None]], variant: tuple[int, bool], work: float) -> None:
        try:
            call = make(*variant)
            call()
            reset_peak_memory(device.type)
            call()
            memory = peak_memory(device.type)
            waits = waits_for_device(call) if device.type == "cuda" else None
            shares = kernel_shares(call, device)
            # The dense encoder beside each, so that the ratio is of one time.
            times = side_by_side({"dense": make(0), name: call}, device, repeats, warmup=2)
            rates.append(matmul_rate(device, torch.bfloat16, matrix, repeats))
        except torch.OutOfMemoryError:
            print(f"{name}: does not fit in the device's memory, left out", flush=True)
            return
        measurements[name] = times | {"kernels": shares, "operations": work}
        rows.append(
            {
                "pass": name,
                "ms": round(1000 * times[name]["seconds"], 1),
                "time / dense": times[name]["ratio"],
                "peak GiB": round(memory / 2**30, 2),
                "share of matmul": None,  # known at the end
                "waits for device": waits,
            }
        )
        print(rows[-1], flush=True)

    def training(count: int, texts: PackedTexts, experts: int, loop: bool = False) -> Callable[[], None]:
        return training_step(make_encoder(shape, device, experts, loop=loop), count, group, texts)

    def encoding(experts: int, loop: bool = False) -> Callable[[], None]:
        encoder = make_encoder(shape, device, experts, loop=loop).to(torch.bfloat16).eval()

        @torch.inference_mode()
        def encode() -> None:
            embed_packed(encoder, corpus, pooling="cls", normalize=True)

        return encode

    sizes = {"dense": (0, False), "N=2": (2, False), "N=4": (4, False), "N=8": (8, False)}
    loops = {"2024 loop N=2": (2, True), "2024 loop N=8": (8, True)}
    for count in queries:
        texts = training_texts(count, group, longest, shape["vocab_size"], device)
        measurements[f"tokens of {count} queries"] = len(texts.input_ids)
        work = step_flops(shape, texts.lengths.tolist())
        for name, variant in (sizes | loops if count == queries[0] else sizes).items():
            measure(f"training step of {count} queries, {name}", partial(training, count, texts), variant, work)
    work = sum(encoder_flops(shape, corpus.lengths.tolist()))
    for name in ("dense", "N=2", "N=8"):
        measure(f"encoding, {name}", encoding, sizes[name], work)
    rate = max(rates)
    for row in rows:
        measured = measurements[row["pass"]]
        row["share of matmul"] = round(measured["operations"] / measured[row["pass"]]["seconds"] / rate, 3)
        print(f"{row['pass']}: {row['share of matmul']:.0%} of {rate / 1e12:.0f} TFLOP/s")
    measurements["matmul_tflops"] = [round(value / 1e12, 1) for value in rates]
    settings = {
        "model": "random weights" if args.quick else "BGE-M3's shape, random weights",
        "precision": "bf16",
        "shape": shape,
        "queries": queries,
        "group": group,
        "longest": longest,
        "passages": passages,
        "repeats": repeats,
    }
    question = (
        "What do experts cost in a training step of BGE-M3's shape on a GPU, and how near is the hardware's limit?"
    )
    write_result(args.output, question, settings, rows, measurements)


if __name__ == "__main__":
    main()
