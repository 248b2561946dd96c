"""The model card of a run: what was trained, on what, how, how well it retrieves, and how to load it.

Its front matter is what the hub reads: languages, base model, and results as ``model-index``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clpl_moe.common.errors import UserError, at
from clpl_moe.common.files import atomic_open
from clpl_moe.common.machine import versions
from clpl_moe.moe.inject import has_experts
from clpl_moe.report.results import read_metrics
from clpl_moe.train.callbacks import METRICS_FILE

if TYPE_CHECKING:
    from transformers import TrainerState

    from clpl_moe.train.runner import CLPLRunner

CARD = "README.md"
# Between these the card's results can be replaced by later ones.
_BEGIN, _END = "<!-- results -->", "<!-- end of results -->"

_CITATION = """```bibtex
@misc{yu2024clp,
  title = {Efficient fine-tuning methodology of text embedding models for information retrieval: contrastive learning penalty (CLP)},
  author = {Jeongsu Yu},
  year = {2024},
  eprint = {2412.17364},
  archivePrefix = {arXiv}
}
```"""

_METRIC_NAMES = {"ndcg@5": "nDCG@5", "ndcg@10": "nDCG@10", "recall@100": "R@100"}  # of evaluation in training


@dataclass
class Evaluated:
    """How well a model retrieves from one collection: ``metrics`` by their names in ``ir_measures``."""

    collection: str
    language: str
    split: str
    metrics: dict[str, float]
    before: dict[str, float] | None = None  # of the base model


def write_model_card(runner: CLPLRunner) -> None:
    """Write ``README.md`` of a finished run into its folder, from its options and its ``metrics.jsonl``."""
    output_dir = Path(runner.training_args.output_dir)
    course = output_dir / METRICS_FILE
    records = read_metrics(course) if course.exists() else []
    with atomic_open(output_dir / CARD) as file:
        file.write(model_card(runner, [record for record in records if "eval_ndcg@10" in record]))


def model_card(runner: CLPLRunner, evaluations: list[dict[str, float]]) -> str:
    """The text of the card."""
    from huggingface_hub import ModelCardData

    model_args, data_args, args = runner.model_args, runner.data_args, runner.training_args
    encoder, state, settings = runner.model.model, runner.trainer.state, runner.settings
    base, experts = model_args.model_name_or_path, has_experts(encoder)
    name = Path(args.output_dir).resolve().name
    results = _in_training(evaluations, _saved_step(state, args), args)
    languages = list(dict.fromkeys(x for x in (args.dev_language, args.ance_language) if x is not None))
    header = ModelCardData(
        language=languages or None,
        library_name="sentence-transformers",
        pipeline_tag="sentence-similarity",
        tags=["sentence-transformers", "feature-extraction", "clpl", *(["moe"] if experts else [])],
        # The hub takes names of its own only.
        base_model=base if re.fullmatch(r"[\w.-]+/[\w.-]+", base) and not Path(base).exists() else None,
        model_name=name,
        eval_results=_eval_results(results) or None,
    )
    trained = sum(p.numel() for p in runner.model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in encoder.parameters())
    data = ", ".join(f"`{Path(path).name}`" for path in data_args.train_data)
    rows = {
        "base model": f"`{Path(base).name if Path(base).is_absolute() else base}`",
        "examples": f"{len(runner.train_dataset):,} from {data}",
        "steps": f"{state.global_step:,}, {args.per_device_train_batch_size} queries × {args.world_size} device(s) ×"
        f" {args.gradient_accumulation_steps} accumulated, {data_args.train_group_size} passages a query",
        "loss": f"CLPL, temperature {args.temperature}, penalty weight {args.penalty_weight} ({args.penalty}), in-batch"
        f" negatives {'on' if args.in_batch_negatives else 'off'}"
        + (f", symmetric weight {args.symmetric_weight}" if args.symmetric_weight else ""),
        "experts": f"`{json.dumps(encoder.config.moe)}`" if experts else "none",
        "trained": f"{args.trainable}: {trained:,} of {total:,} parameters"
        + (f", embeddings and the lowest {args.frozen_layers} layers frozen" if args.frozen_layers else ""),
        "learning rate": f"{args.learning_rate}, {getattr(args.lr_scheduler_type, 'value', args.lr_scheduler_type)},"
        f" warmup {args.warmup_steps:g}",
        "negatives": f"mined again: {args.ance_refresh}" if args.ance_refresh else "as in the data",
        "lengths": f"queries {data_args.query_max_len}, passages {data_args.passage_max_len} tokens",
        "embedding": f"{settings.pooling} pooling{', normalised' if settings.normalize else ''}; query prompt"
        f" `{settings.query_prompt!r}`, passage prompt `{settings.passage_prompt!r}`",
        "seed": str(args.seed),
        "versions": ", ".join(f"{package} {version}" for package, version in versions().items()),
    }
    table = "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())])
    sections = [
        f"---\n{header.to_yaml(original_order=['language', 'library_name'])}\n---",
        f"# {name}",
        f"{rows['base model']}, fine-tuned for retrieval with contrastive learning penalty loss (CLPL) by clpl_moe.",
        _results_section(results),
        "## Training",
        table,
        "All options stand in `train_config.yaml`, the course of the run in `metrics.jsonl`.",
        "## Use",
        _use(args.output_dir if not Path(args.output_dir).is_absolute() else name, experts, settings),
        "## Citation",
        _CITATION,
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _use(name: str, experts: bool, settings: Any) -> str:
    pooled = {"cls": "states[:, 0]", "mean": "(states * mask).sum(1) / mask.sum(1)", "last_token": "states[:, -1]"}
    side = ', padding_side="left"' if settings.pooling == "last_token" else ""
    trust = f"the folder holds the experts' code, which `trust_remote_code={experts}` runs" if experts else ""
    return f"""With sentence-transformers{"; " + trust if trust else ""}:

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{name}", trust_remote_code={experts})
queries = model.encode(["…"], prompt_name="query")
passages = model.encode(["…"], prompt_name="document")
print(model.similarity(queries, passages))
```

With transformers:

```python
import torch
from transformers import AutoModel, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}"{side})
encoder = AutoModel.from_pretrained("{name}", trust_remote_code={experts})
batch = tokenizer(["{settings.query_prompt}…"], padding=True, truncation=True, return_tensors="pt")
with torch.no_grad():
    states, mask = encoder(**batch).last_hidden_state, batch["attention_mask"].unsqueeze(-1)
queries = torch.nn.functional.normalize({pooled[settings.pooling]}, dim=-1)
```

With clpl_moe, to train on or to evaluate:

```python
from clpl_moe import load_encoder

encoder, tokenizer = load_encoder("{name}")
```

```bash
python -m clpl_moe.evaluate --model {name} --collection COLLECTIONS --languages LANGUAGE --output results
```"""


def _saved_step(state: TrainerState, args: Any) -> int:
    """The step after which the model was what the run's folder holds."""
    best = state.best_model_checkpoint if args.load_best_model_at_end else None
    return state.global_step if best is None else int(best.rpartition("-")[2])


def _in_training(evaluations: list[dict[str, float]], step: int, args: Any) -> list[Evaluated]:
    """The evaluation after ``step``, where there was one, and that before training."""
    saved = [record for record in evaluations if record["step"] == step]
    if not saved:
        return []

    def metrics(record: dict[str, float]) -> dict[str, float]:
        return {shown: record[f"eval_{name}"] for name, shown in _METRIC_NAMES.items()}

    before = metrics(evaluations[0]) if evaluations[0]["step"] == 0 < step else None
    name = Path(args.dev_collection).resolve().name
    return [Evaluated(name, args.dev_language, args.dev_split, metrics(saved[-1]), before)]


def _eval_results(results: Sequence[Evaluated]) -> list[Any]:
    from huggingface_hub import EvalResult

    return [
        EvalResult(
            task_type="information-retrieval",
            task_name="Information Retrieval",
            dataset_type=result.collection,
            dataset_name=f"{result.collection} ({result.language})",
            dataset_config=result.language,
            dataset_split=result.split,
            metric_type=name.lower().replace("@", "_at_"),
            metric_name=name,
            metric_value=round(value, 6),
        )
        for result in results
        for name, value in result.metrics.items()
    ]


def _results_section(results: Sequence[Evaluated]) -> str:
    lines = []
    for result in results:
        names = list(result.metrics)
        lines += [
            f"{result.split.capitalize()} queries of `{result.collection}/{result.language}`:\n",
            f"| | {' | '.join(names)} |",
            "|---|" + "--:|" * len(names),
        ]
        for label, values in (("before training", result.before), ("after training", result.metrics)):
            if values is not None:
                cells = [f"{values[name]:.4f}" if name in values else "–" for name in names]
                lines.append(f"| {label} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join([_BEGIN, *(["## Results\n", *lines] if lines else []), _END])


def add_results(folder: str | Path, results: Sequence[Evaluated]) -> None:
    """Put results into the card of a run's folder, for the reader and for the hub, in place of those it has.

    Raises:
        UserError: the folder has no card of a run.
    """
    import yaml
    from huggingface_hub import ModelCard

    path = Path(folder) / CARD
    try:
        card = ModelCard.load(path, ignore_metadata_errors=True)
    except (ValueError, yaml.YAMLError):
        raise UserError(
            f"{at(path)}: no such file, or no model card; expected that of a run of clpl_moe.train"
        ) from None
    if _BEGIN not in card.text or _END not in card.text:
        raise UserError(f"{at(path)}: has no place for results, expected the lines {_BEGIN} and {_END}")
    before, rest = card.text.split(_BEGIN, 1)
    card.text = before + _results_section(results) + rest.split(_END, 1)[1]
    card.data.eval_results = _eval_results(results)
    card.data.model_name = card.data.model_name or Path(folder).resolve().name
    with atomic_open(path) as file:
        file.write(f"---\n{card.data.to_yaml(original_order=['language', 'library_name'])}\n---\n{card.text}")
