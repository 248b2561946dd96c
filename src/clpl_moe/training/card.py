"""The model card of a run: what was trained, on what, how, and how to load it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from clpl_moe.files import atomic_open
from clpl_moe.moe.inject import has_experts
from clpl_moe.training.callbacks import METRICS_FILE

if TYPE_CHECKING:
    from clpl_moe.training.runner import CLPLRunner

_CITATION = """```bibtex
@misc{yu2024clp,
  title = {Efficient fine-tuning methodology of text embedding models for information retrieval: contrastive learning penalty (CLP)},
  author = {Jeongsu Yu},
  year = {2024},
  eprint = {2412.17364},
  archivePrefix = {arXiv}
}
```"""


def write_model_card(runner: CLPLRunner) -> None:
    """Write ``README.md`` of a finished run into its folder, from its options and its ``metrics.jsonl``."""
    output_dir = Path(runner.training_args.output_dir)
    with atomic_open(output_dir / "README.md") as file:
        file.write(model_card(runner, _evaluations(output_dir / METRICS_FILE)))


def _evaluations(path: Path) -> list[dict[str, float]]:
    if not path.exists():
        return []
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [record for record in records if "eval_ndcg@10" in record]


def model_card(runner: CLPLRunner, evaluations: list[dict[str, float]]) -> str:
    """The text of the card."""
    model_args, data_args, args = runner.model_args, runner.data_args, runner.training_args
    encoder, state, settings = runner.model.model, runner.trainer.state, runner.settings
    header = {
        "library_name": "sentence-transformers",
        "pipeline_tag": "sentence-similarity",
        "tags": [
            "sentence-transformers",
            "feature-extraction",
            "clpl",
            *(["moe"] if has_experts(encoder) else []),
        ],
        "base_model": model_args.model_name_or_path,
    }
    if args.dev_language is not None:
        header = {"language": [args.dev_language], **header}
    trained = sum(p.numel() for p in runner.model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in encoder.parameters())
    experts = f"`{json.dumps(encoder.config.moe)}`" if has_experts(encoder) else "none"
    data = ", ".join(f"`{Path(path).name}`" for path in data_args.train_data)
    sections = [
        f"---\n{yaml.safe_dump(header, allow_unicode=True, sort_keys=False)}---",
        f"# {Path(args.output_dir).name}",
        f"`{model_args.model_name_or_path}`, fine-tuned for retrieval with contrastive learning penalty loss (CLPL) by"
        " clpl_moe.",
        _results(evaluations, args),
        "## Training",
        f"""| | |
|---|---|
| examples | {len(runner.train_dataset):,} from {data} |
| steps | {state.global_step:,}, {args.per_device_train_batch_size} queries × {args.world_size} device(s) × {args.gradient_accumulation_steps} accumulated, {data_args.train_group_size} passages a query |
| loss | CLPL, temperature {args.temperature}, penalty weight {args.penalty_weight}, in-batch negatives {"on" if args.in_batch_negatives else "off"} |
| experts | {experts} |
| trained | {args.trainable}: {trained:,} of {total:,} parameters |
| learning rate | {args.learning_rate}, {getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)} |
| lengths | queries {data_args.query_max_len}, passages {data_args.passage_max_len} tokens |
| embedding | {settings.pooling} pooling{", normalised" if settings.normalize else ""}; query prompt `{settings.query_prompt!r}`, passage prompt `{settings.passage_prompt!r}` |

All options stand in `train_config.yaml`, the course of the run in `metrics.jsonl`.""",
        "## Use",
        f"""```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{args.output_dir}", trust_remote_code={has_experts(encoder)})
queries = model.encode(["…"], prompt_name="query")
passages = model.encode(["…"], prompt_name="document")
print(model.similarity(queries, passages))
```""",
        "## Citation",
        _CITATION,
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _results(evaluations: list[dict[str, float]], args) -> str:
    if not evaluations:
        return ""
    metrics = ("ndcg@5", "ndcg@10", "recall@100")
    key = f"eval_{args.metric_for_best_model.removeprefix('eval_')}"
    rows = {"before training": evaluations[0]} if evaluations[0]["step"] == 0 else {}
    rows["after training (best checkpoint)"] = max(evaluations, key=lambda record: record[key])
    table = [
        f"## Results\n\nDev queries of `{Path(args.dev_collection).name}/{args.dev_language}`:\n",
        f"| | step | {' | '.join(metrics)} |",
        "|---|---|" + "---|" * len(metrics),
    ]
    for name, record in rows.items():
        table.append(
            f"| {name} | {record['step']} | " + " | ".join(f"{record[f'eval_{m}']:.4f}" for m in metrics) + " |"
        )
    return "\n".join(table)
