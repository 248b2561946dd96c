"""The model card of a run: what was trained, on what, how, how well it retrieves, and how to load it.

Its text is the template ``card.md``. Its front matter is what the hub reads: languages, base model, and results as
``model-index``.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clpl_moe.check.calls import TOOLS, describe, find_tools
from clpl_moe.common.compressed import refuse_no_file
from clpl_moe.common.errors import UserError, at
from clpl_moe.common.files import atomic_open, read_json
from clpl_moe.common.machine import versions
from clpl_moe.common.markup import as_code, as_python, in_markdown
from clpl_moe.data.formats import entry_path

if TYPE_CHECKING:
    from clpl_moe.encoder.settings import EmbeddingSettings
    from clpl_moe.train import TrainResult
    from clpl_moe.train.model import CLPLModel
    from clpl_moe.train.plan import Plan

CARD = "README.md"
_FIRST = ["language", "library_name"]  # of the front matter
# Between these the card's results can be replaced by later ones.
_BEGIN, _END = "<!-- results -->", "<!-- end of results -->"


@dataclass
class Evaluated:
    """How well a model retrieves from one collection: ``metrics`` by their names in ``ir_measures``."""

    collection: str
    language: str
    split: str
    metrics: dict[str, float]
    before: dict[str, float] | None = None  # of the base model
    label: str = "after training"


def write_model_card(
    plan: Plan,
    settings: EmbeddingSettings,
    model: CLPLModel,
    steps: int,
    result: TrainResult,
) -> None:
    """Write ``README.md`` of a finished run of ``steps`` optimizer steps into its folder."""
    import jinja2
    from huggingface_hub import ModelCardData

    from clpl_moe.train.sharding import whole_size  # which loads torch

    args, base, experts = plan.training_args, plan.model_args.model_name_or_path, plan.experts is not None
    dense = args.merge_experts or not experts
    adapter = args.trainable == "lora" and not args.merge_experts
    name = args.folder.resolve().name
    results = []
    metrics, before, label = result.after, result.before, "after training"
    if result.alpha == 0:
        before, label = None, "the base model, kept"
    elif result.alpha < 1:
        label += ", mixed with the base model"
    if metrics is not None and args.dev_collection is not None:
        collection = Path(args.dev_collection).resolve().name
        results.append(Evaluated(collection, ", ".join(args.dev_languages), args.dev_split, metrics, before, label))
    header = ModelCardData(
        language=list(dict.fromkeys(x for x in (*args.dev_languages, args.ance_language) if x is not None)) or None,
        library_name="sentence-transformers",
        pipeline_tag="sentence-similarity",
        tags=["sentence-transformers", "feature-extraction", "clpl", *([] if dense else ["moe"])],
        # The hub takes names of its own only.
        base_model=base if re.fullmatch(r"[\w.-]+/[\w.-]+", base) and not Path(base).exists() else None,
        model_name=name,
        eval_results=_eval_results(results) or None,
    )
    shown = name if args.folder.is_absolute() else args.folder
    max_length = read_json(args.folder / "sentence_bert_config.json", dict)["max_seq_length"]
    described = describe(args.folder, settings, max_length, shown)
    tools = TOOLS
    if adapter:  # of adapters, none puts experts into the base model
        tools = [] if experts else find_tools(["sentence-transformers", "transformers"])
    template = Path(__file__).with_name("card.md").read_text(encoding="utf-8")
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    environment.filters |= {
        "text": in_markdown,
        "code": as_code,
        "py": as_python,
        "sh": lambda word: shlex.quote(str(word)),
    }
    card = environment.from_string(template).render(
        header=header.to_yaml(original_order=_FIRST),
        name=name,
        folder=shown,
        base=Path(base).name if Path(base).is_absolute() else base,
        revision=plan.model_args.revision,
        results=_results_section(results),
        plan=plan,
        alpha=result.alpha,
        steps=steps,
        parameters=sum(whole_size(p) for p in model.model.parameters()),
        trained_parameters=sum(whole_size(p) for p in model.parameters() if p.requires_grad),
        args=args,
        data=plan.data_args,
        settings=settings,
        own_code=described.own_code,
        calls=[(tool.name, tool.call(described)) for tool in tools if tool.fits(described) is None],
        experts=json.dumps(plan.experts) if experts else None,
        adapter=adapter,
        files=", ".join(as_code(entry_path(entry).name) for entry in plan.data_args.train_data),
        versions=", ".join(f"{package} {version}" for package, version in versions().items()),
    )
    with atomic_open(args.folder / CARD) as file:
        file.write(card)


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
            f"{in_markdown(result.split.capitalize())} queries of {as_code(f'{result.collection}/{result.language}')}:\n",
            f"| | {' | '.join(map(in_markdown, names))} |",
            "|---|" + "--:|" * len(names),
        ]
        for label, values in (("before training", result.before), (result.label, result.metrics)):
            if values is not None:
                cells = [f"{values[name]:.4f}" if name in values else "–" for name in names]
                lines.append(f"| {label} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join([_BEGIN, *(["## Results\n", *lines] if lines else []), _END])


def add_results(folder: str | Path, results: Sequence[Evaluated]) -> None:
    """Put results into the card of a run's folder, for the reader and for the hub, in place of those it has; raises
    :class:`UserError` for a folder without a card."""
    import yaml
    from huggingface_hub import ModelCard

    path = Path(folder) / CARD
    refuse_no_file(path)
    if not path.exists():
        raise UserError(f"{at(path)}: no such file; expected the card of a run")
    try:
        card = ModelCard.load(path, ignore_metadata_errors=True)
    except (ValueError, yaml.YAMLError):
        raise UserError(
            f"{at(path)}: no model card; expected text in UTF-8, with options in YAML at its head"
        ) from None
    before, begin, rest = card.text.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not begin or not end:
        raise UserError(f"{at(path)}: has no place for results, expected the lines {_BEGIN} and {_END}")
    card.text = before + _results_section(results) + after
    card.data.eval_results = _eval_results(results)
    card.data.model_name = card.data.model_name or Path(folder).resolve().name
    with atomic_open(path) as file:
        file.write(f"---\n{card.data.to_yaml(original_order=_FIRST)}\n---\n{card.text}")
