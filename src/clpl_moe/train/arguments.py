"""Every option of training: FlagEmbedding's, with defaults changed and fields added where this package differs."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, get_args

from clpl_moe.common.errors import UserError
from clpl_moe.data.flag_embedding import (
    AbsEmbedderDataArguments,
    EncoderOnlyEmbedderM3ModelArguments,
    EncoderOnlyEmbedderM3TrainingArguments,
)
from clpl_moe.mine.select import Sampling, SelectionArguments
from clpl_moe.moe.config import ROUTERS, TARGETS, MoEConfig
from clpl_moe.train.compat import prefer_activation_checkpointing

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


def _as_in_mine(name: str, **metadata: Any) -> Any:
    """A field that refreshes share with ``mine``: its default and help stand there."""
    shared = SelectionArguments.__dataclass_fields__[name]
    return field(default=shared.default, metadata={"help": f"As mine's {name}: {shared.metadata['help']}.", **metadata})


def _check_numbers(options: Any, **least: float) -> None:
    """Raise ValueError where a number is below its least value or not finite; None is no number."""
    for name, bound in least.items():
        value = getattr(options, name)
        if value is not None and not (bound <= value < math.inf):
            raise ValueError(f"{name} is {value}: choose a number of at least {bound}")


@dataclass
class CLPLModelArguments(EncoderOnlyEmbedderM3ModelArguments):
    """The base model and the experts that are put into it."""

    token: str | None = field(
        default=None,
        metadata={"help": "Hub token; without it, HF_TOKEN of the environment or the stored login."},
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
            "help": "How experts are weighted; topk_softmax is that of the 2024 code, whose router does not learn at top_k 1.",
            "choices": list(ROUTERS),
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

    def __post_init__(self) -> None:
        if self.config_name is not None:
            raise ValueError("config_name has no effect: the base model's own config.json is read, remove it")
        self.moe_config()


@dataclass
class CLPLDataArguments(AbsEmbedderDataArguments):
    """The training data and how it is cut into groups and tokens."""

    train_data: str | None = field(
        default=None,
        metadata={"help": "Files or folders of training JSONL (see data/README.md).", "nargs": "+"},
    )
    train_group_size: int = field(default=8, metadata={"help": "Passages per query: one positive, the rest negatives."})
    query_max_len: int = field(
        default=32,
        metadata={"help": "Longest query in tokens, also of the negatives' queries; longer ones are cut."},
    )
    passage_max_len: int = field(default=128, metadata={"help": "Longest passage in tokens; longer ones are cut."})
    queries_per_negative: int = field(
        default=1, metadata={"help": "At most so many positive queries of each negative are used in a step."}
    )
    query_instruction_for_retrieval: str | None = field(
        default=None,
        metadata={"help": "Prompt before each query; without it, the base model folder's own prompt."},
    )
    passage_instruction_for_retrieval: str | None = field(
        default=None,
        metadata={"help": "Prompt before each passage; without it, the base model folder's own prompt."},
    )

    def __post_init__(self) -> None:
        if not self.train_data:
            raise ValueError("train_data is missing: name at least one file or folder of training JSONL (--train_data)")
        if isinstance(self.train_data, str):
            self.train_data = [self.train_data]
        _check_numbers(self, pad_to_multiple_of=1, max_example_num_per_dataset=1, shuffle_ratio=0)
        if self.train_group_size < 1:
            raise ValueError(
                f"train_group_size is {self.train_group_size}: choose at least 1 (2 or more for negatives)"
            )
        for name in ("query_max_len", "passage_max_len"):
            if getattr(self, name) < 3:
                raise ValueError(
                    f"{name} is {getattr(self, name)}: choose at least 3, two tokens only begin and end a text"
                )
        if self.queries_per_negative < 0:
            raise ValueError(f"queries_per_negative is {self.queries_per_negative}: choose 0 (no penalty) or more")
        for name in ("query_instruction_format", "passage_instruction_format"):
            value = getattr(self, name).replace("\\n", "\n")
            if value.count("{}") != 2:
                raise ValueError(f"{name} is {value!r}: expected two places, '{{}}{{}}', for the prompt and the text")
            setattr(self, name, value)


@dataclass
class CLPLTrainingArguments(EncoderOnlyEmbedderM3TrainingArguments):
    """The loss, what is trained, evaluation in training, and everything that transformers' Trainer offers.

    Changed defaults: ``logging_steps`` 10, ``report_to`` tensorboard, ``save_total_limit`` 2,
    ``metric_for_best_model`` ndcg@10, ``logging_nan_inf_filter`` with ``fp16`` only, non-reentrant gradient checkpointing,
    ``use_cpu`` where there is no accelerator, ``dataloader_num_workers`` 2 where there is one, and ``bf16`` where the
    hardware is fast at it and ``fp16`` is not asked for. With ``dev_collection``, evaluation follows ``save_strategy``
    unless it is set, and the best checkpoint is loaded at the end.
    """

    output_dir: str | None = field(
        default=None, metadata={"help": "Run folder; must be new or empty, unless resuming."}
    )
    do_train: bool = field(default=True, metadata={"help": "Kept for FlagEmbedding's configs; training always runs."})
    penalty_weight: float = field(
        default=0.1, metadata={"help": "λ: the penalty's share of the loss; 0 is the plain contrastive loss."}
    )
    penalty: str = field(
        default="cosine",
        metadata={
            "help": "The penalty: distance of negatives from their queries, as published, or contrastive: these queries have"
            " to find the negatives among the step's passages.",
            "choices": ["cosine", "contrastive"],
        },
    )
    symmetric_weight: float = field(
        default=0.0, metadata={"help": "Weight of the term in which each positive has to find its query; 0: none."}
    )
    in_batch_negatives: bool = field(
        default=True, metadata={"help": "Whether other queries' passages are negatives too."}
    )
    false_negative_margin: float | None = field(
        default=None,
        metadata={"help": "Leave out negatives more similar to the query than its positive by over this margin."},
    )
    mask_duplicates: bool = field(
        default=True, metadata={"help": "Leave out negatives whose text is the query's own positive."}
    )
    balance_loss_weight: float = field(default=0.0, metadata={"help": "Weight of the routers' load-balancing loss."})
    z_loss_weight: float = field(default=0.0, metadata={"help": "Weight of the routers' z-loss."})
    grad_cache_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Tokens per chunk of gradient caching: large batches in the memory of this many tokens; none: off."
        },
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
            "help": "So many of the lowest layers stay as they are, and the embeddings with them: faster, less memory;"
            " 0: none."
        },
    )
    sentence_pooling_method: str | None = field(
        default=None,
        metadata={
            "help": "How tokens become one embedding; without it, as the base model's folder says, else cls.",
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
    bf16: bool | None = field(
        default=None,
        metadata={
            "help": "bfloat16 mixed precision; not given: where the hardware is fast at it and fp16 is not set. Without it"
            " and fp16, evaluation and mining in training are in float32, too."
        },
    )
    dev_collection: str | None = field(
        default=None, metadata={"help": "Collection folder for evaluation in training (see data/README.md)."}
    )
    dev_language: str | None = field(default=None, metadata={"help": "Language folder within dev_collection."})
    dev_split: str = field(default="dev", metadata={"help": "Split of dev_collection: its queries and qrels."})
    dev_batch_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Tokens per batch when dev_collection or ance_collection is encoded; 2,048 on CPUs, else 16,384."
        },
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata={"help": "Stop after so many evaluations without improvement of metric_for_best_model."},
    )
    ance_refresh: str | None = field(
        default=None,
        metadata={
            "help": "Mine negatives again with the current weights: epoch (before each but the first), or every so many"
            " steps; none: off. The whole corpus of ance_collection is encoded each time."
        },
    )
    ance_collection: str | None = field(
        default=None, metadata={"help": "Collection folder that negatives are mined from (see data/README.md)."}
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
    dry_run: bool = field(
        default=False, metadata={"help": "Check config and data, print the plan, and stop; loads no weights."}
    )
    logging_steps: float = field(
        default=10, metadata={"help": "Log every so many steps, or share of all steps below 1."}
    )
    logging_nan_inf_filter: bool | None = field(
        default=None,
        metadata={
            "help": "Leave losses of nan or inf out of what is logged, which waits for the device in every step; not given: with"
            " fp16 only, which skips such steps. Otherwise training stops at the first log with one."
        },
    )
    dataloader_num_workers: int | None = field(
        default=None,
        metadata={
            "help": "Processes that tokenise; not given: 2 beside an accelerator, so that it does not wait, else 0."
        },
    )
    save_total_limit: int | None = field(
        default=2,
        metadata={"help": "Checkpoints kept, the best one among them where there is a dev_collection; 0: all."},
    )
    metric_for_best_model: str | None = field(
        default="ndcg@10",
        metadata={"help": "Metric of dev_collection that decides which checkpoint is best."},
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={"help": "true continues the newest checkpoint in output_dir; or a checkpoint's folder."},
    )
    report_to: str | None = field(
        default="tensorboard",
        metadata={"help": "Where to log besides metrics.jsonl: tensorboard, wandb, none, ...", "nargs": "+"},
    )

    def __post_init__(self) -> None:
        import torch

        from clpl_moe.retrieval.encode import fast_bfloat16

        if not self.output_dir:
            raise ValueError("output_dir is missing: name the run's folder (--output_dir)")
        if self.use_mrl:
            raise ValueError("use_mrl: FlagEmbedding's M3 models do not support it, remove it")
        self._check_run()
        self._check_loss()
        self._check_grad_cache()
        self._check_evaluation()
        self._check_ance()
        self.fp16_asked = self.fp16
        # Asked for before the parent looks at devices: without it, processes on a machine without accelerators do not
        # find each other.
        if not self.use_cpu and not torch.accelerator.is_available():
            logger.warning("no GPU was found: training on the CPU, where BGE-M3 takes days (use_cpu true: meant so)")
            self.use_cpu = True
        device = torch.device("cpu" if self.use_cpu else torch.accelerator.current_accelerator().type)
        if self.bf16 is None:
            self.bf16 = not self.fp16 and fast_bfloat16(device)
        elif self.bf16 and not fast_bfloat16(device):
            logger.warning(
                "bf16 is emulated on this %s, and slow: --bf16 false, with --fp16 true on a GPU", device.type
            )
        if self.fp16 and self.use_cpu:
            self.fp16 = False
        if self.logging_nan_inf_filter is None:
            self.logging_nan_inf_filter = self.fp16_asked
        if self.fsdp and self.use_cpu:
            logger.warning("fsdp is for GPUs: these processes hold the whole model each")
        if self.dataloader_num_workers is None:
            self.dataloader_num_workers = 0 if self.use_cpu else 2
        if self.gradient_checkpointing and self.gradient_checkpointing_kwargs is None:
            self.gradient_checkpointing_kwargs = {"use_reentrant": False}
        prefer_activation_checkpointing(self)
        if self.resume_from_checkpoint in ("false", "False", ""):
            self.resume_from_checkpoint = None
        super().__post_init__()
        if self.n_gpu > 1:
            # transformers would take torch's DataParallel, which cannot divide these batches.
            logger.warning(
                "training on one of %d GPUs; on all of them: torchrun --nproc_per_node %d -m clpl_moe.train ...",
                self.n_gpu,
                self.n_gpu,
            )
            self._n_gpu = 1

    def _check_run(self) -> None:
        """What transformers and torch would stop at in the middle, take for something else, or not look at."""
        for name, instead in (
            ("auto_find_batch_size", "lower per_device_train_batch_size, or set grad_cache_tokens"),
            ("label_smoothing_factor", "remove it"),
            ("neftune_noise_alpha", "remove it"),
        ):
            if getattr(self, name):
                raise ValueError(f"{name} is {getattr(self, name)}, and has no effect in this training: {instead}")
        _check_numbers(
            self,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=1,
            learning_rate=0,
            max_grad_norm=0,
            weight_decay=0,
            save_total_limit=0,
            dataloader_num_workers=0,
            seed=0,
            data_seed=0,
            dev_batch_tokens=1,
            early_stopping_patience=1,
            frozen_layers=0,
        )
        if self.seed >= 2**32:
            raise ValueError(f"seed is {self.seed}: choose a number below 2**32")
        for name in ("logging_steps", "save_steps", "eval_steps"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} is {value}: choose a number of steps, or a share of all below 1")
        if not self.max_steps > 0 and not 0 < self.num_train_epochs < math.inf:
            raise ValueError(f"num_train_epochs is {self.num_train_epochs}: choose a number above 0, or set max_steps")
        if self.sub_batch_size is not None and self.sub_batch_size < 1 and self.sub_batch_size != -1:
            raise ValueError(f"sub_batch_size is {self.sub_batch_size}: choose at least 1, or -1 for whole batches")

    def _check_loss(self) -> None:
        from clpl_moe.loss import CLPLLoss

        CLPLLoss(
            self.temperature,
            self.penalty_weight,
            in_batch_negatives=self.in_batch_negatives,
            false_negative_margin=self.false_negative_margin,
            gather_across_devices=self.negatives_cross_device,
            penalty=self.penalty,
            symmetric_weight=self.symmetric_weight,
        )
        _check_numbers(self, balance_loss_weight=0, z_loss_weight=0)

    def _check_grad_cache(self) -> None:
        if self.grad_cache_tokens is None:
            return
        if self.grad_cache_tokens < 1:
            raise ValueError(
                f"grad_cache_tokens is {self.grad_cache_tokens}: choose at least 1, such as 16384, or none to turn it off"
            )
        if self.unified_finetuning:
            raise ValueError(
                "grad_cache_tokens caches dense embeddings only, unified_finetuning needs every token's: choose one of them"
            )
        if self.sub_batch_size is not None and self.sub_batch_size > 0:
            raise ValueError(
                "grad_cache_tokens and sub_batch_size both cut batches into chunks: leave out sub_batch_size, which saves"
                " hardly any memory in training"
            )
        if self.fsdp:
            raise ValueError(
                "grad_cache_tokens needs every parameter whole in the backward pass, and FSDP shards them: leave out one"
                " of the two"
            )

    def _check_evaluation(self) -> None:
        if self.dev_collection is None:
            for name in ("early_stopping_patience", "dev_language"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} needs a collection to evaluate on: set dev_collection")
            wanted = self.eval_strategy != "no" or self.eval_on_start or self.load_best_model_at_end
            if wanted or self.save_strategy == "best":
                raise ValueError("evaluation in training needs a collection to evaluate on: set dev_collection")
            return
        if self.dev_language is None:
            raise ValueError("dev_collection needs dev_language, the folder within it, such as ko")
        if self.eval_strategy == "no" and self.save_strategy == "best":
            raise ValueError("save_strategy best needs evaluations: set eval_strategy to steps or epoch")
        if self.eval_strategy == "no" and self.save_strategy == "no" and self.early_stopping_patience is not None:
            raise ValueError("early_stopping_patience needs evaluations: set save_strategy or eval_strategy")
        if self.eval_strategy == "no":
            self.eval_strategy, self.eval_steps = self.save_strategy, self.eval_steps or self.save_steps
        if self.save_strategy != "no":
            self.load_best_model_at_end = True
        if self.greater_is_better is None:
            self.greater_is_better = True
        known = ("ndcg@5", "ndcg@10", "recall@100")
        if (self.metric_for_best_model or "").removeprefix("eval_") not in known:
            raise ValueError(
                f"metric_for_best_model is {self.metric_for_best_model!r}: choose one of {', '.join(known)}"
            )

    def _check_ance(self) -> None:
        if self.ance_refresh is None:
            if self.ance_collection is not None:
                raise ValueError("ance_collection is for mining in training: set ance_refresh, such as epoch")
            return
        if self.ance_refresh != "epoch" and not (self.ance_refresh.isdecimal() and int(self.ance_refresh) > 0):
            raise ValueError(f"ance_refresh is {self.ance_refresh!r}: choose epoch, or a number of steps of at least 1")
        for name in ("ance_collection", "ance_language"):
            if getattr(self, name) is None:
                raise ValueError(f"ance_refresh needs {name}: where the passages are that negatives are mined from")
        if self.fsdp:
            raise ValueError(
                "ance_refresh lets each process encode a part of the corpus, and FSDP shards parameters: leave out one of"
                " the two"
            )
        self.ance_selection()

    @property
    def encode_dtype(self) -> torch.dtype | None:
        """The precision to encode in between steps, as :func:`clpl_moe.retrieval.encode.encode` takes it: float32
        where training is in float32, else None, what suits the hardware."""
        import torch

        return None if self.bf16 or self.fp16_asked else torch.float32

    def ance_selection(self) -> SelectionArguments:
        """What refreshes mine; raises ValueError where the options do not fit together."""
        names = SelectionArguments.__dataclass_fields__
        try:
            return SelectionArguments(**{name: getattr(self, f"ance_{name}") for name in names})
        except UserError as error:
            raise ValueError(str(error).replace("--", "--ance_")) from None
