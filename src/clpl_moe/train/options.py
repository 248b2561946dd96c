"""The options of training that this package adds, or whose default it changes, in the groups that ``--help`` shows.

All others, such as ``learning_rate``, are FlagEmbedding's and transformers' (:mod:`clpl_moe.train.arguments`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, get_args

from clpl_moe.common.errors import OptionError
from clpl_moe.common.options import Bounds, option
from clpl_moe.loss.options import LossTermOptions, Penalty
from clpl_moe.mine.options import PositiveScore, Sampling, SelectionArguments
from clpl_moe.moe.config import TARGETS, MoEConfig

_OF_THE_LOSS = {field.name: field.metadata["help"] for field in fields(LossTermOptions)}


def _as_in_mine(name: str, **metadata: Any) -> Any:
    """A field that refreshes share with ``mine``: its default and help stand there."""
    shared = SelectionArguments.__dataclass_fields__[name]
    metadata |= {key: value for key, value in shared.metadata.items() if key == "action"}
    return option(f"As mine's {name}: {shared.metadata['help']}.", shared.default, **metadata)


@dataclass
class ModelOptions:
    """The experts that are put into the base model."""

    model_name_or_path: str = option("The base model: a folder, or a name on the hub.")
    revision: str | None = option(
        "Commit, branch or tag of a base model on the hub; not given: the newest. The run's config and card name the commit.",
        None,
    )
    token: str | None = option("Token for the hub; not given: HF_TOKEN of the environment, or the stored login.", None)
    num_experts: int = option(
        "Experts per layer; 0 trains the dense model. A base model with experts keeps its own.", 2, least=0, most=1_024
    )
    top_k: int = option("Experts that each token goes to.", 1, least=1, most=1_024)
    moe_target: str = option("Which Linear of the FFN becomes experts, or the whole FFN.", "ffn", choices=list(TARGETS))
    moe_layers: str = option(
        "Layers with experts: trained (those above frozen_layers), all, every:2 (from the last), or numbers such as 8,9,10,11.",
        "trained",
    )
    router: str = option(
        "How experts are chosen and weighted: straight_through, softmax_topk, topk_softmax (of the 2024 code, whose router"
        " does not learn at top_k 1), random, given (by experts_of_data), or a router of your own, registered before.",
        "straight_through",
    )
    router_init_std: float = option("Standard deviation of the router's first weights.", 0.02, least=0, most=1_000)

    def moe_config(self, trained: Sequence[int] | None = None) -> MoEConfig | None:
        """What to inject, or None for a dense model; ``trained`` are the layers that moe_layers trained means, None: not known
        yet. Raises ValueError where the options do not fit together."""
        if self.num_experts == 0:
            return None
        if self.router in ("given", "random") and self.top_k > 1:
            raise OptionError("top_k", f"found {self.top_k}, expected 1 with router {self.router}")
        layers: str | list[int] = self.moe_layers
        if layers == "trained":
            layers = "all" if trained is None else list(trained)
        return MoEConfig(self.num_experts, self.top_k, self.moe_target, layers, self.router, self.router_init_std)


@dataclass
class DataOptions:
    """The data, and how they are cut into groups and tokens."""

    train_data: list[str] = option("Files or folders of training data, or hub:NAME (see docs/data-formats.md).", [])
    experts_of_data: list[int] | None = option(
        "With router given: for each entry of train_data, in order, the expert that its texts go to; an expert that none"
        " names stays the base's.",
        None,
        least=0,
        most=1_023,
    )
    train_group_size: int = option("Passages per query: one positive, the rest negatives.", 5, least=1, most=4_096)
    query_max_len: int | None = option(
        "Longest query in tokens, the queries of negatives included; longer ones are cut. 0, or not given: from the data, the"
        " longest of a sample, 32 to 128.",
        None,
        least=3,
        most=1_000_000,
    )
    passage_max_len: int | None = option(
        "Longest passage in tokens; longer ones are cut. 0, or not given: from the data, so that 95% of a sample are whole,"
        " 128 to 512.",
        None,
        least=3,
        most=1_000_000,
    )
    queries_per_negative: int = option(
        "At most so many queries of each negative are used in a step.", 3, least=0, most=1_000
    )
    distinct_batches: bool = option(
        "No step has two examples whose queries are the same, or whose positives are near copies of each other: what no key"
        " tells to be the same text would be a negative. Takes time at the start: a million passages some minutes.",
        False,
    )
    query_instruction_for_retrieval: str | None = option(
        "Prompt before each query; not given: the prompt in the base model's folder.", None
    )
    passage_instruction_for_retrieval: str | None = option(
        "Prompt before each passage; not given: the prompt in the base model's folder.", None
    )


@dataclass
class LossOptions(LossTermOptions):
    """The loss."""

    # The recipe; CLPLLoss has the published values.
    temperature: float = option(_OF_THE_LOSS["temperature"], 0.01)
    penalty_weight: float = option(_OF_THE_LOSS["penalty_weight"], 0.8)
    penalty: Penalty = option(_OF_THE_LOSS["penalty"], "contrastive")
    mask_duplicates: bool = option(
        "Leave out of a query's negatives what any line of the data knows to answer it, copies included.", True
    )
    guide_margin: float | None = option(
        "Leave out negatives whose score by a guide (neg_guide_scores, else neg_scores) is above their positive's less this"
        " margin; not given: none. 0 leaves out what the guide finds more similar than the positive.",
        None,
        least=-1_000_000,
        most=1_000_000,
    )
    balance_loss_weight: float = option("Weight of the routers' load-balancing loss.", 0.0, least=0, most=1_000_000)
    z_loss_weight: float = option("Weight of the routers' z-loss.", 0.0, least=0, most=1_000_000)


@dataclass
class RunOptions:
    """What is trained, and how the run goes."""

    output_dir: str | None = option("Run folder; must be new or empty, unless resuming.", None)
    dry_run: bool = option("Check config and data, print the plan, and stop; loads no weights.", False)
    resume_from_checkpoint: str | None = option(
        "true continues the newest checkpoint in output_dir; or a checkpoint's folder.", None
    )
    trainable: str = option(
        "What is trained: experts and routers, all FFN layers, the whole encoder, or adapters (lora) beside weights that stay.",
        "full",
        choices=["moe", "ffn", "full", "lora"],
    )
    frozen_layers: int | None = option(
        "How many of the lowest layers are frozen, and the embeddings with them: faster, less memory; 0: none. Not given: two"
        " thirds, or those below the first layer with experts where moe_layers or the base model says which have some.",
        None,
        least=0,
        most=1_000,
    )
    frozen_cache_gb: float = option(
        "Keep the outputs of the frozen layers by text, up to so many GB of memory (of each process), so that steps and evaluations do not"
        " compute them again: float32, or float16 with bf16 and fp16. The frozen layers then have no dropout. 0: off.",
        0.0,
        least=0,
        most=1_000_000,
    )
    learning_rate: float = option("The rate after the warm-up, which then falls to 0.", 2e-5)
    warmup_steps: float = option("Steps in which the learning rate rises; below 1: share of all steps.", 0.1)
    weight_decay: float = option("AdamW's weight decay.", 0.01)
    num_train_epochs: float | None = option(
        "Passes over the data. Not given: one, or up to three where these are fewer than 100 steps.", None
    )
    sentence_pooling_method: str | None = option(
        "How tokens become one embedding; not given: as the base model's folder says, or cls.",
        None,
        choices=["cls", "mean", "last_token"],
    )
    packing: bool = option(
        "No padding: all texts of a step in one stream, equal ones once; false pads as FlagEmbedding does."
        " unified_finetuning, sub_batch_size and encoders other than XLM-R, RoBERTa and BERT are padded anyway.",
        True,
    )
    grad_cache_tokens: int | None = option(
        "Tokens per chunk of gradient caching: a large batch takes the memory of one chunk; not given: off.",
        None,
        least=1,
        most=1_000_000_000,
    )
    bf16: bool | None = option(
        "bfloat16 mixed precision; not given: where the hardware is fast at it and fp16 is not set. Without it"
        " and fp16, evaluation and mining in training are in float32, too.",
        None,
    )
    dataloader_num_workers: int | None = option(
        "Processes that tokenise; not given: 2 with an accelerator, 0 on a CPU.", None, least=0, most=256
    )
    logging_steps: float = option("Steps between two logs; below 1: share of all steps.", 10)
    logging_nan_inf_filter: bool | None = option(
        "Leave losses of nan or inf out of what is logged, which waits for the device in every step; not given: with"
        " fp16 only, which skips such steps. Otherwise training stops at the first log with one.",
        None,
    )
    save_total_limit: int | None = option(
        "Checkpoints kept, the best one among them where there is a dev_collection; 0: all.", 2, least=0, most=1_000_000
    )
    stop_on_sigusr1: bool = option(
        "SIGUSR1 ends training as SIGTERM does: after the current step, with a checkpoint. Slurm sends it as a warning.",
        False,
    )
    report_to: str | None = option(
        "Where to log besides metrics.jsonl: tensorboard, wandb, none, ...", "tensorboard", nargs="+"
    )
    merge_experts: bool | None = option(
        "Merge each layer's experts into one at the end: the run's folder holds a dense model, and its folder 'experts' the one"
        " with experts. Both are evaluated on dev_collection. Not given: where there are experts, but without adapters.",
        None,
    )
    merge_base_alpha: list[float] | None = option(
        "Mix the trained weights with the base model's: shares of the trained ones, such as 0.5 0.75. With a dev_collection the"
        " best of them, of the trained model and of the base model is kept; without one, give one share. 1: not mixed. Not"
        " given: 0.5 0.75 where there is evaluation in training.",
        None,
        least=0,
        most=1,
    )
    do_train: bool = option("Kept for FlagEmbedding's configs; training always runs.", True)


@dataclass
class LoRAOptions:
    """The adapters of ``trainable: lora``."""

    lora_rank: int = option("Rank of the adapters, of each expert's, too.", 16, least=1, most=4_096)
    lora_alpha: int = option("Adapters are multiplied by this over their rank.", 32, least=1, most=1_000_000)
    lora_dropout: float = option("Dropout before the adapters; 0 with experts.", 0.0, least=0, most=0.99)
    lora_targets: list[str] = option(
        "Linear layers with adapters: attention, ffn (dense or experts), or of the FFN only experts. Routers are trained whole.",
        ["attention", "ffn"],
        choices=["attention", "ffn", "experts"],
    )
    merge_adapter: bool = option(
        "Also save the model with the adapter added to its weights, in the folder 'merged' of the run.", False
    )


@dataclass
class EvaluationOptions:
    """Evaluation in training."""

    dev_collection: str | None = option(
        "Collection folder for evaluation in training (see docs/data-formats.md).", None
    )
    dev_language: str | None = option(
        "Language folder within dev_collection; of several, the means decide.", None, nargs="+"
    )
    dev_expert: int | None = option(
        "With router given: the expert that texts of evaluation go to.", None, least=0, most=1_023
    )
    dev_split: str = option("Split of dev_collection: its queries and qrels.", "dev")
    dev_batch_tokens: int | None = option(
        "Tokens per batch when dev_collection or ance_collection is encoded; 2,048 on CPUs, else 16,384.",
        None,
        least=1,
        most=1_000_000_000,
    )
    eval_on_start: bool | None = option(
        "Evaluate the base model, too, before the first step. Where no checkpoint is better, output_dir gets the base model."
        " Not given: where there is a dev_collection.",
        None,
    )
    metric_for_best_model: str | None = option(
        "Metric of dev_collection that decides which checkpoint is best.", "ndcg@10"
    )
    early_stopping_patience: int | None = option(
        "Evaluations without improvement of metric_for_best_model after which training stops.",
        None,
        least=1,
        most=1_000_000_000,
    )


@dataclass
class RefreshOptions:
    """Negatives mined again as training goes on."""

    ance_refresh: str | None = option(
        "Mine negatives again with the current weights: epoch (before each but the first), or a number of"
        " steps; not given: never. The whole corpus of ance_collection is encoded each time.",
        None,
    )
    ance_collection: str | None = option(
        "Collection folder that negatives are mined from (see docs/data-formats.md).", None
    )
    ance_language: str | None = option("Language folder within ance_collection.", None)
    ance_split: str = option("Split of ance_collection: passages reserved to others are no negatives.", "train")
    ance_positive_queries: str | None = option(
        "JSONL of passage ids and the queries that each answers (docid, queries), for the penalty; not given:"
        " the collection's positive_queries.jsonl, where there is one.",
        None,
    )
    ance_rank_from: int = _as_in_mine("rank_from")
    ance_rank_to: int = _as_in_mine("rank_to")
    ance_negatives: int = _as_in_mine("negatives")
    ance_sampling: str = _as_in_mine("sampling", choices=list(get_args(Sampling)))
    ance_sampling_temperature: float = _as_in_mine("sampling_temperature")
    ance_max_positive_ratio: float = _as_in_mine("max_positive_ratio")
    ance_margin: float | None = _as_in_mine("margin")
    ance_positive_score: str = _as_in_mine("positive_score", choices=list(get_args(PositiveScore)))
    ance_max_overlap: float = _as_in_mine("max_overlap")


# In the order of ``--help``, by title.
OPTIONS: dict[str, type[Any]] = {
    "model and experts": ModelOptions,
    "data": DataOptions,
    "loss": LossOptions,
    "training": RunOptions,
    "LoRA": LoRAOptions,
    "evaluation in training": EvaluationOptions,
    "negatives mined in training": RefreshOptions,
}

# Metrics of evaluation in training, and their names in ``ir_measures``.
DEV_METRICS = {"ndcg@5": "nDCG@5", "ndcg@10": "nDCG@10", "recall@100": "R@100"}

_POSITIVE = Bounds(1, 1_000_000_000)
_NOT_NEGATIVE = Bounds(0)
# Bounds of options that are FlagEmbedding's and transformers'.
INHERITED_BOUNDS = {
    **dict.fromkeys(("per_device_train_batch_size", "gradient_accumulation_steps"), Bounds(1, 1_000_000)),
    **dict.fromkeys(("learning_rate", "max_grad_norm"), _NOT_NEGATIVE),
    "weight_decay": Bounds(0, 1_000),
    **dict.fromkeys(("seed", "data_seed"), Bounds(0, 2**32 - 1)),
    "num_train_epochs": Bounds(-1, 1_000_000),
    "max_steps": Bounds(-1, 1_000_000_000),
    "warmup_steps": Bounds(0, 1_000_000_000),
    **dict.fromkeys(("logging_steps", "save_steps", "eval_steps"), Bounds(most=1_000_000_000)),
    "eval_delay": Bounds(0, 1_000_000_000),
    "dataloader_prefetch_factor": Bounds(1, 10_000),
    "torch_empty_cache_steps": _POSITIVE,
    "ddp_timeout": Bounds(1, 10_000_000),
    "ddp_bucket_cap_mb": Bounds(1, 1_000_000),
    "colbert_dim": Bounds(-1, 65_536),
    "sub_batch_size": Bounds(-1, 1_000_000),
    "pad_to_multiple_of": Bounds(1, 65_536),
    "max_example_num_per_dataset": _POSITIVE,
    "shuffle_ratio": Bounds(0, 1),
    **dict.fromkeys(("small_threshold", "drop_threshold", "self_distill_start_step"), Bounds(-1, 1_000_000_000_000)),
}

# Options of FlagEmbedding and transformers that change nothing here. Training always runs, evaluation in training retrieves
# from a collection, tokenizers are fast ones, and batches are drawn by a sampler of this package. A run that resumes goes on in
# the middle of its epoch: with ignore_data_skip it would have some examples twice, and others never.
WITHOUT_EFFECT = (
    *("do_train", "do_eval", "do_predict", "use_fast_tokenizer", "mrl_dims"),
    *("per_device_eval_batch_size", "prediction_loss_only", "eval_accumulation_steps", "eval_do_concat_batches"),
    *("eval_use_gather_object", "include_for_metrics", "batch_eval_metrics", "bf16_full_eval", "fp16_full_eval"),
    *("label_names", "remove_unused_columns", "train_sampling_strategy", "group_by_length", "length_column_name"),
    *("average_tokens_across_devices", "include_num_input_tokens_seen", "use_liger_kernel", "liger_kernel_config"),
    *("dataloader_multiprocessing_context", "dataloader_in_order", "ignore_data_skip"),
)

# Options of transformers that nothing would look at, and what to do instead.
REFUSED = (
    ("auto_find_batch_size", "lower per_device_train_batch_size, or set grad_cache_tokens"),
    ("label_smoothing_factor", "remove it"),
    ("neftune_noise_alpha", "remove it"),
)
