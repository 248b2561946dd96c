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

if TYPE_CHECKING:
    from clpl_moe.encoder.settings import EmbeddingSettings
    from clpl_moe.train.arguments import CLPLDataArguments, CLPLModelArguments, CLPLTrainingArguments

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


@dataclass
class CardFacts:
    """A finished run, as far as its card tells of it.

    Attributes:
        settings: pooling and prompts.
        experts: what the experts are; None: there are none.
        steps: optimizer steps of the run.
        saved_step: the step after which the model was as saved.
        evaluations: the records of ``metrics.jsonl`` that hold metrics of the dev collection.
    """

    model_args: CLPLModelArguments
    data_args: CLPLDataArguments
    training_args: CLPLTrainingArguments
    settings: EmbeddingSettings
    experts: dict[str, Any] | None
    parameters: int
    trained_parameters: int
    examples: int
    steps: int
    saved_step: int
    evaluations: list[dict[str, float]]


def write_model_card(facts: CardFacts) -> None:
    """Write ``README.md`` of a finished run into its folder."""
    with atomic_open(facts.training_args.folder / CARD) as file:
        file.write(model_card(facts))


def model_card(facts: CardFacts) -> str:
    """The text of the card."""
    from huggingface_hub import ModelCardData

    model_args, data_args, args = facts.model_args, facts.data_args, facts.training_args
    base, experts = model_args.model_name_or_path, facts.experts is not None
    name = args.folder.resolve().name
    results = _in_training(facts)
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
    data = ", ".join(f"`{Path(path).name}`" for path in data_args.train_data)
    rows = {
        "base model": f"`{Path(base).name if Path(base).is_absolute() else base}`",
        "examples": f"{facts.examples:,} from {data}",
        "steps": f"{facts.steps:,}, {args.per_device_train_batch_size} queries × {args.world_size} device(s) ×"
        f" {args.gradient_accumulation_steps} accumulated, {data_args.train_group_size} passages a query",
        "loss": f"CLPL, temperature {args.temperature}, penalty weight {args.penalty_weight} ({args.penalty}), in-batch"
        f" negatives {'on' if args.in_batch_negatives else 'off'}"
        + (f", symmetric weight {args.symmetric_weight}" if args.symmetric_weight else ""),
        "experts": f"`{json.dumps(facts.experts)}`" if experts else "none",
        "trained": f"{args.trainable}: {facts.trained_parameters:,} of {facts.parameters:,} parameters"
        + (f", embeddings and the lowest {args.frozen_layers} layers frozen" if args.frozen_layers else ""),
        "learning rate": f"{args.learning_rate}, {getattr(args.lr_scheduler_type, 'value', args.lr_scheduler_type)},"
        f" warmup {args.warmup_steps:g}",
        "negatives": f"mined again: {args.ance_refresh}" if args.ance_refresh else "as in the data",
        "lengths": f"queries {data_args.query_max_len}, passages {data_args.passage_max_len} tokens",
        "embedding": f"{facts.settings.pooling} pooling{', normalised' if facts.settings.normalize else ''}; query prompt"
        f" `{facts.settings.query_prompt!r}`, passage prompt `{facts.settings.passage_prompt!r}`",
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
        _use(str(args.folder) if not args.folder.is_absolute() else name, experts, facts.settings),
        "## Citation",
        _CITATION,
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _use(name: str, experts: bool, settings: EmbeddingSettings) -> str:
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
from clpl_moe import Encoder

encoder = Encoder.load("{name}")
queries = encoder.encode_queries(["…"])
passages = encoder.encode_passages(["…"])
```

```bash
python -m clpl_moe.evaluate --model {name} --collection COLLECTIONS --languages LANGUAGE --output results
```"""


def _in_training(facts: CardFacts) -> list[Evaluated]:
    """The evaluation of the saved model, where there was one, and the evaluation before training."""
    args, saved = facts.training_args, metrics_at(facts.evaluations, facts.saved_step)
    if saved is None or args.dev_collection is None or args.dev_language is None:
        return []
    before = metrics_at(facts.evaluations, 0) if facts.saved_step > 0 else None
    name = Path(args.dev_collection).resolve().name
    return [Evaluated(name, args.dev_language, args.dev_split, saved, before)]


def metrics_at(evaluations: list[dict[str, float]], step: int) -> dict[str, float] | None:
    """The metrics of an evaluation in training after ``step``, the latest if there are several; None without one."""
    found = [record for record in evaluations if record["step"] == step]
    return {shown: found[-1][f"eval_{name}"] for name, shown in _METRIC_NAMES.items()} if found else None


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
