"""How does the time of a training step grow with sequence length, batch size and number of experts?

``python benchmarks/scaling.py --model models/small-encoder``

A step is forward, CLPL, backward and AdamW of the experts, on random tokens without padding; one query and one passage of
the same length for each example. For each curve the exponent is named: the slope of the line fitted to the logarithms.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch

from common import (
    DTYPES,
    alternate,
    benchmark_parser,
    pick_device,
    pick_precision,
    slope,
    summary,
    synchronize,
    write_result,
)

CURVES = {"length": "tokens a text", "batch": "examples a step", "experts": "experts N"}


def make_step(
    model: str, *, experts: int, batch: int, length: int, device: str, precision: str, target: str = "intermediate"
) -> Callable[[], float]:
    """A function that makes one training step and returns its seconds."""
    from clpl_moe import CLPLLoss
    from clpl_moe.encoder.load import load_encoder
    from clpl_moe.moe.config import MoEConfig
    from clpl_moe.moe.inject import expert_parameters, inject_moe

    encoder, _ = load_encoder(model)
    inject_moe(encoder, MoEConfig(experts, 1, target))
    encoder.requires_grad_(False)
    trained = [parameter.requires_grad_(True) for _, parameter in expert_parameters(encoder)]
    encoder.to(device).train()
    optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=True)
    loss = CLPLLoss(0.02, 0.1)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, encoder.config.vocab_size, (2 * batch, length), generator=generator).to(device)
    mask = torch.ones_like(ids)

    def step() -> float:
        synchronize(device)
        start = time.perf_counter()
        with torch.autocast(device, DTYPES[precision], enabled=precision != "fp32"):
            embeddings = encoder(input_ids=ids, attention_mask=mask).last_hidden_state.mean(1)
        loss(embeddings[:batch], embeddings[batch:]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        synchronize(device)
        return time.perf_counter() - start

    return step


def measure(
    model: str, points: list[dict[str, int]], *, device: str, precision: str, rounds: int, target: str
) -> list[list[float]]:
    """Seconds of a step at each point (``experts``, ``batch``, ``length``), one figure a round, points in alternation."""

    def at(point: dict[str, int]) -> float:
        # Made anew each time, since all points' optimizer states together may not fit.
        step = make_step(model, **point, device=device, precision=precision, target=target)
        step()
        return min(step() for _ in range(2))

    results = alternate({str(i): (lambda point=point: at(point)) for i, point in enumerate(points)}, rounds)
    return list(results.values())


def draw(path: Path, curves: dict[str, dict]) -> None:
    """One panel a curve, both axes logarithmic."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter

    figure, axes = plt.subplots(1, len(curves), figsize=(4 * len(curves), 3.4), layout="constrained", squeeze=False)
    for axis, (name, curve) in zip(axes[0], curves.items()):
        medians = [s["median"] for s in curve["seconds"]]
        low = [s["median"] - s["low"] for s in curve["seconds"]]
        high = [s["high"] - s["median"] for s in curve["seconds"]]
        axis.errorbar(curve["values"], medians, yerr=[low, high], marker="o", capsize=3)
        axis.set(xscale="log", yscale="log", xlabel=CURVES[name], ylabel="seconds a step")
        axis.set_xticks(curve["values"], map(str, curve["values"]))
        axis.set_xticks([], minor=True)
        # At least a factor of four, or a small change looks like a cliff.
        middle = (min(medians) * max(medians)) ** 0.5
        axis.set_ylim(min(min(medians) * 0.9, middle / 2), max(max(medians) * 1.1, middle * 2))
        # Plain numbers, also between powers of ten where the axis is short.
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_title(f"grows with exponent {curve['exponent']:.2f}", fontsize=10)
        axis.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=150)
    print(f"wrote {path}")


def main() -> None:
    """The command line."""
    parser = benchmark_parser(__doc__, "scaling.json")
    parser.add_argument("--target", default="intermediate", choices=["intermediate", "output", "ffn"])
    parser.add_argument("--length", type=int, nargs="+", default=[32, 64, 128, 256, 512], help="tokens a text")
    parser.add_argument("--batch", type=int, nargs="+", default=[2, 4, 8, 16], help="examples a step")
    parser.add_argument("--experts", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--at", type=int, nargs=3, default=[128, 4, 2], metavar=("LENGTH", "BATCH", "EXPERTS"),
                        help="what is held fixed while another varies")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    device = pick_device(args.device)
    settings = {
        "device": device,
        "precision": pick_precision(args.precision, device),
        "target": args.target,
        "rounds": args.rounds,
    }
    fixed = dict(zip(CURVES, args.at, strict=True))
    points = [(name, value) for name in CURVES for value in getattr(args, name)]
    seconds = measure(args.model, [fixed | {name: value} for name, value in points], **settings)
    curves, rows = {}, []
    for name, label in CURVES.items():
        summaries = [summary(s) for (of, _), s in zip(points, seconds) if of == name]
        values = getattr(args, name)
        exponent = slope(values, [s["median"] for s in summaries]) if len(values) > 1 else 0.0
        curves[name] = {"values": values, "seconds": summaries, "exponent": exponent}
        rows.append(
            {
                "varied": label,
                "from": values[0],
                "to": values[-1],
                "s/step at first": round(summaries[0]["median"], 3),
                "s/step at last": round(summaries[-1]["median"], 3),
                "exponent": round(exponent, 2),
                "largest spread": f"{max(s['spread'] for s in summaries):.0%}",
            }
        )
    write_result(
        args.output,
        "Growth of the time of a training step.",
        settings | {"model": Path(args.model).name, "fixed": fixed},
        rows,
        curves,
    )
    draw(args.output.with_suffix(".png"), curves)


if __name__ == "__main__":
    main()
