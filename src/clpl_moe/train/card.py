"""The model card of a run: what was trained, on what, how, how well it retrieves, and how to load it.

Its text is the template ``card.md``. Its front matter is what the hub reads: languages, base model, and results as
``model-index``.
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
from clpl_moe.train.options import DEV_METRICS

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

    from clpl_moe.encoder.settings import EmbeddingSettings
    from clpl_moe.train.plan import Plan

CARD = "README.md"
# Between these the card's results can be replaced by later ones.
_BEGIN, _END = "<!-- results -->", "<!-- end of results -->"
_POOLED = {"cls": "states[:, 0]", "mean": "(states * mask).sum(1) / mask.sum(1)", "last_token": "states[:, -1]"}


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
        steps: optimizer steps of the run; ``saved_step``: those after which the model was as saved.
        evaluations: the records of ``metrics.jsonl`` that hold metrics of the dev collection.
    """

    plan: Plan
    settings: EmbeddingSettings
    parameters: int
    trained_parameters: int
    steps: int
    saved_step: int
    evaluations: list[dict[str, float]]


def write_model_card(facts: CardFacts) -> None:
    """Write ``README.md`` of a finished run into its folder."""
    import jinja2
    from huggingface_hub import ModelCardData

    plan = facts.plan
    args, base, experts = plan.training_args, plan.model_args.model_name_or_path, plan.experts is not None
    name = args.folder.resolve().name
    results = _in_training(facts)
    header = ModelCardData(
        language=list(dict.fromkeys(x for x in (args.dev_language, args.ance_language) if x is not None)) or None,
        library_name="sentence-transformers",
        pipeline_tag="sentence-similarity",
        tags=["sentence-transformers", "feature-extraction", "clpl", *(["moe"] if experts else [])],
        # The hub takes names of its own only.
        base_model=base if re.fullmatch(r"[\w.-]+/[\w.-]+", base) and not Path(base).exists() else None,
        model_name=name,
        eval_results=_eval_results(results) or None,
    )
    template = Path(__file__).with_name("card.md").read_text(encoding="utf-8")
    card = jinja2.Template(template, undefined=jinja2.StrictUndefined, keep_trailing_newline=True).render(
        header=_front_matter(header),
        name=name,
        folder=name if args.folder.is_absolute() else args.folder,
        base=Path(base).name if Path(base).is_absolute() else base,
        results=_results_section(results),
        facts=facts,
        plan=plan,
        args=args,
        data=plan.data_args,
        settings=facts.settings,
        pooled=_POOLED,
        experts=json.dumps(plan.experts) if experts else None,
        files=", ".join(f"`{Path(path).name}`" for path in plan.data_args.train_data),
        versions=", ".join(f"{package} {version}" for package, version in versions().items()),
    )
    with atomic_open(args.folder / CARD) as file:
        file.write(card)


def _front_matter(data: ModelCardData) -> str:
    return data.to_yaml(original_order=["language", "library_name"])


def _in_training(facts: CardFacts) -> list[Evaluated]:
    """The evaluation of the saved model, where there was one, and the evaluation before training."""
    args, saved = facts.plan.training_args, metrics_at(facts.evaluations, facts.saved_step)
    if saved is None or args.dev_collection is None or args.dev_language is None:
        return []
    before = metrics_at(facts.evaluations, 0) if facts.saved_step > 0 else None
    name = Path(args.dev_collection).resolve().name
    return [Evaluated(name, args.dev_language, args.dev_split, saved, before)]


def metrics_at(evaluations: list[dict[str, float]], step: int) -> dict[str, float] | None:
    """The metrics of an evaluation in training after ``step``, the latest if there are several; None without one."""
    found = [record for record in evaluations if record["step"] == step]
    return {shown: found[-1][f"eval_{name}"] for name, shown in DEV_METRICS.items()} if found else None


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
        file.write(f"---\n{_front_matter(card.data)}\n---\n{card.text}")
