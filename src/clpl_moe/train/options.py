"""The options of training that this package adds, or whose default it changes, in the groups that ``--help`` shows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, get_args

from clpl_moe.loss.options import LossTermOptions
from clpl_moe.mine.options import Sampling, SelectionArguments
from clpl_moe.moe.config import TARGETS, MoEConfig


def _as_in_mine(name: str, **metadata: Any) -> Any:
    """A field that refreshes share with ``mine``: its default and help stand there."""
    shared = SelectionArguments.__dataclass_fields__[name]
    return field(default=shared.default, metadata={"help": f"As mine's {name}: {shared.metadata['help']}.", **metadata})


@dataclass
class ModelOptions:
    """The experts that are put into the base model."""

    TITLE: ClassVar[str] = "model and experts"

    model_name_or_path: str = field(metadata={"help": "The base model: a folder, or a name on the hub."})
    token: str | None = field(
        default=None,
        metadata={"help": "Token for the hub; not given: HF_TOKEN of the environment, or the stored login."},
    )
    num_experts: int = field(
        default=2,
        metadata={"help": "Experts per layer; 0 trains the dense model. A base model with experts keeps its own."},
    )
    top_k: int = field(default=1, metadata={"help": "Experts that each token goes to."})
    moe_target: str = field(
        default="intermediate",
        metadata={
            "help": "Which Linear of the FFN becomes experts, or the whole FFN.",
            "choices": list(TARGETS),
        },
    )
    moe_layers: str = field(
        default="all",
        metadata={"help": "Layers with experts: all, every:2 (from the last), or numbers such as 8,9,10,11."},
    )
    router: str = field(
        default="straight_through",
        metadata={
            "help": "How experts are weighted: straight_through, softmax_topk, topk_softmax (of the 2024 code, whose router"
            " does not learn at top_k 1), or a router of your own, registered before."
        },
    )
    router_init_std: float = field(default=0.02, metadata={"help": "Standard deviation of the router's first weights."})

    def moe_config(self) -> MoEConfig | None:
        """What to inject, or None for a dense model; raises ValueError where the options do not fit together."""
        if self.num_experts == 0:
            return None
        return MoEConfig(
            num_experts=self.num_experts,
            top_k=self.top_k,
            target=self.moe_target,
            layers=self.moe_layers,
            router=self.router,
            router_init_std=self.router_init_std,
        )


@dataclass
class DataOptions:
    """The data, and how they are cut into groups and tokens."""

    TITLE: ClassVar[str] = "data"

    train_data: list[str] = field(
        default_factory=list, metadata={"help": "Files or folders of training JSONL (see docs/data-formats.md)."}
    )
    train_group_size: int = field(default=8, metadata={"help": "Passages per query: one positive, the rest negatives."})
    query_max_len: int = field(
        default=32,
        metadata={"help": "Longest query in tokens, the queries of negatives included; longer ones are cut."},
    )
    passage_max_len: int = field(default=128, metadata={"help": "Longest passage in tokens; longer ones are cut."})
    queries_per_negative: int = field(
        default=1, metadata={"help": "At most so many queries of each negative are used in a step."}
    )
    query_instruction_for_retrieval: str | None = field(
        default=None,
        metadata={"help": "Prompt before each query; not given: the prompt in the base model's folder."},
    )
    passage_instruction_for_retrieval: str | None = field(
        default=None,
        metadata={"help": "Prompt before each passage; not given: the prompt in the base model's folder."},
    )


@dataclass
class LossOptions(LossTermOptions):
    """The loss."""

    TITLE: ClassVar[str] = "loss"

    mask_duplicates: bool = field(
        default=True, metadata={"help": "Leave out negatives whose text is the query's own positive."}
    )
    balance_loss_weight: float = field(default=0.0, metadata={"help": "Weight of the routers' load-balancing loss."})
    z_loss_weight: float = field(default=0.0, metadata={"help": "Weight of the routers' z-loss."})


@dataclass
class RunOptions:
    """What is trained, and how the run goes."""

    TITLE: ClassVar[str] = "training"

    output_dir: str | None = field(
        default=None, metadata={"help": "Run folder; must be new or empty, unless resuming."}
    )
    dry_run: bool = field(
        default=False, metadata={"help": "Check config and data, print the plan, and stop; loads no weights."}
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={"help": "true continues the newest checkpoint in output_dir; or a checkpoint's folder."},
    )
    trainable: str = field(
        default="moe",
        metadata={
            "help": "What is trained: experts and routers, all FFN layers, or the whole encoder.",
            "choices": ["moe", "ffn", "full"],
        },
    )
    frozen_layers: int = field(
        default=0,
        metadata={
            "help": "How many of the lowest layers are frozen, and the embeddings with them: faster, less memory; 0: none."
        },
    )
    sentence_pooling_method: str | None = field(
        default=None,
        metadata={
            "help": "How tokens become one embedding; not given: as the base model's folder says, or cls.",
            "choices": ["cls", "mean", "last_token"],
        },
    )
    packing: bool = field(
        default=True,
        metadata={
            "help": "No padding: all texts of a step in one stream, equal ones once; false pads as FlagEmbedding does."
            " unified_finetuning, sub_batch_size and encoders other than XLM-R, RoBERTa and BERT are padded anyway."
        },
    )
    grad_cache_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Tokens per chunk of gradient caching: a large batch takes the memory of one chunk; not given: off."
        },
    )
    bf16: bool | None = field(
        default=None,
        metadata={
            "help": "bfloat16 mixed precision; not given: where the hardware is fast at it and fp16 is not set. Without it"
            " and fp16, evaluation and mining in training are in float32, too."
        },
    )
    dataloader_num_workers: int | None = field(
        default=None,
        metadata={"help": "Processes that tokenise; not given: 2 with an accelerator, 0 on a CPU."},
    )
    logging_steps: float = field(default=10, metadata={"help": "Steps between two logs; below 1: share of all steps."})
    logging_nan_inf_filter: bool | None = field(
        default=None,
        metadata={
            "help": "Leave losses of nan or inf out of what is logged, which waits for the device in every step; not given: with"
            " fp16 only, which skips such steps. Otherwise training stops at the first log with one."
        },
    )
    save_total_limit: int | None = field(
        default=2,
        metadata={"help": "Checkpoints kept, the best one among them where there is a dev_collection; 0: all."},
    )
    report_to: str | None = field(
        default="tensorboard",
        metadata={"help": "Where to log besides metrics.jsonl: tensorboard, wandb, none, ...", "nargs": "+"},
    )
    do_train: bool = field(default=True, metadata={"help": "Kept for FlagEmbedding's configs; training always runs."})


@dataclass
class EvaluationOptions:
    """Evaluation in training."""

    TITLE: ClassVar[str] = "evaluation in training"

    dev_collection: str | None = field(
        default=None, metadata={"help": "Collection folder for evaluation in training (see docs/data-formats.md)."}
    )
    dev_language: str | None = field(default=None, metadata={"help": "Language folder within dev_collection."})
    dev_split: str = field(default="dev", metadata={"help": "Split of dev_collection: its queries and qrels."})
    dev_batch_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Tokens per batch when dev_collection or ance_collection is encoded; 2,048 on CPUs, else 16,384."
        },
    )
    metric_for_best_model: str | None = field(
        default="ndcg@10",
        metadata={"help": "Metric of dev_collection that decides which checkpoint is best."},
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata={"help": "Evaluations without improvement of metric_for_best_model after which training stops."},
    )


@dataclass
class RefreshOptions:
    """Negatives mined again as training goes on."""

    TITLE: ClassVar[str] = "negatives mined in training"

    ance_refresh: str | None = field(
        default=None,
        metadata={
            "help": "Mine negatives again with the current weights: epoch (before each but the first), or a number of"
            " steps; not given: never. The whole corpus of ance_collection is encoded each time."
        },
    )
    ance_collection: str | None = field(
        default=None, metadata={"help": "Collection folder that negatives are mined from (see docs/data-formats.md)."}
    )
    ance_language: str | None = field(default=None, metadata={"help": "Language folder within ance_collection."})
    ance_split: str = field(
        default="train",
        metadata={"help": "Split of ance_collection: passages reserved to others are no negatives."},
    )
    ance_positive_queries: str | None = field(
        default=None,
        metadata={
            "help": "JSONL of passage ids and the queries that each answers (docid, queries), for the penalty; not given:"
            " the collection's positive_queries.jsonl, where there is one."
        },
    )
    ance_rank_from: int = _as_in_mine("rank_from")
    ance_rank_to: int = _as_in_mine("rank_to")
    ance_negatives: int = _as_in_mine("negatives")
    ance_sampling: str = _as_in_mine("sampling", choices=list(get_args(Sampling)))
    ance_sampling_temperature: float = _as_in_mine("sampling_temperature")
    ance_max_positive_ratio: float = _as_in_mine("max_positive_ratio")
    ance_margin: float | None = _as_in_mine("margin")
    ance_max_overlap: float = _as_in_mine("max_overlap")


OPTIONS: tuple[type[Any], ...] = (
    ModelOptions,
    DataOptions,
    LossOptions,
    RunOptions,
    EvaluationOptions,
    RefreshOptions,
)

# Options of FlagEmbedding and transformers that change nothing here. Training always runs, evaluation in training retrieves
# from a collection, tokenizers are fast ones, and batches are drawn by a sampler of this package.
WITHOUT_EFFECT = (
    *("do_train", "do_eval", "do_predict", "use_fast_tokenizer", "mrl_dims"),
    *("per_device_eval_batch_size", "prediction_loss_only", "eval_accumulation_steps", "eval_do_concat_batches"),
    *("eval_use_gather_object", "include_for_metrics", "batch_eval_metrics", "bf16_full_eval", "fp16_full_eval"),
    *("label_names", "remove_unused_columns", "train_sampling_strategy", "group_by_length", "length_column_name"),
    *("average_tokens_across_devices", "include_num_input_tokens_seen", "use_liger_kernel", "liger_kernel_config"),
    *("dataloader_multiprocessing_context", "dataloader_in_order"),
)
