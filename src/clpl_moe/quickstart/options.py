"""Options of the quickstart."""

from __future__ import annotations

from dataclasses import dataclass, field

from clpl_moe.common.errors import require_at_least


@dataclass
class QuickstartArguments:
    """Where the quickstart's folders lie, and how long it trains."""

    model: str = field(
        default="models/small-encoder",
        metadata={"help": "folder of the encoder to train; the small encoder is written there if it does not exist"},
    )
    output_dir: str = field(
        default="runs/quickstart",
        metadata={"help": "run folder: the trained model, its card, checkpoints; one that exists is resumed"},
    )
    results: str = field(
        default="results/quickstart", metadata={"help": "folder for the results before and after training"}
    )
    max_steps: int | None = field(
        default=None, metadata={"help": "optimizer steps; not given: as many as the config quickstart says"}
    )

    def __post_init__(self) -> None:
        require_at_least(self, max_steps=1)
