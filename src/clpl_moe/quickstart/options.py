"""Options of the quickstart."""

from __future__ import annotations

from dataclasses import dataclass

from clpl_moe.common.options import check_bounds, check_outputs, option


@dataclass
class QuickstartArguments:
    """Where the quickstart's folders lie, and how long it trains."""

    model: str = option(
        "folder of the encoder to train; the small encoder is written there if it does not exist",
        "models/small-encoder",
    )
    output_dir: str = option(
        "run folder: the trained model, its card, checkpoints; one that exists is resumed", "runs/quickstart"
    )
    results: str = option("folder for the results before and after training", "results/quickstart")
    max_steps: int | None = option(
        "optimizer steps; not given: as many as the config quickstart says", None, least=1, most=1_000_000_000
    )

    def __post_init__(self) -> None:
        check_bounds(self)
        check_outputs(self, "model", "output_dir", "results")
