"""Every option of training: FlagEmbedding's and transformers', with those of :mod:`clpl_moe.train.options` in front."""

from __future__ import annotations

import logging
import signal
from dataclasses import dataclass, fields
from pathlib import Path
from string import Formatter
from typing import TYPE_CHECKING, Any

from clpl_moe.common.errors import OptionError
from clpl_moe.common.options import check_bounds, check_needs
from clpl_moe.data.flag_embedding import (
    AbsEmbedderDataArguments,
    EncoderOnlyEmbedderM3ModelArguments,
    EncoderOnlyEmbedderM3TrainingArguments,
)
from clpl_moe.loss.options import CLPLOptions, LossTermOptions
from clpl_moe.mine.options import SelectionArguments
from clpl_moe.train import checks
from clpl_moe.train.options import (
    INHERITED_BOUNDS,
    DataOptions,
    EvaluationOptions,
    LoRAOptions,
    LossOptions,
    ModelOptions,
    RefreshOptions,
    RunOptions,
)

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


@dataclass
class CLPLModelArguments(ModelOptions, EncoderOnlyEmbedderM3ModelArguments):
    """The base model and the experts that are put into it."""

    def __post_init__(self) -> None:
        self.without_effect = checks.drop_without_effect(self)
        if self.config_name is not None:
            raise ValueError("config_name has no effect: the base model's own config.json is read, remove it")
        check_bounds(self, INHERITED_BOUNDS)
        self.revision = self.revision or None  # "" takes back a config's
        self.moe_config()

    @property
    def hub(self) -> dict[str, Any]:
        """What the hub is asked with."""
        return {"cache_dir": self.cache_dir, "token": self.token, "revision": self.revision}

    @property
    def of_saved(self) -> dict[str, Any]:
        """What ``Encoder.load`` takes for a folder of the run, whose adapter may belong to a base model of the hub."""
        return {"trust_remote_code": self.trust_remote_code, "cache_dir": self.cache_dir, "token": self.token}


@dataclass
class CLPLDataArguments(DataOptions, AbsEmbedderDataArguments):
    """The training data and how it is cut into groups and tokens."""

    def __post_init__(self) -> None:
        if not self.train_data:
            raise ValueError("train_data is missing: name at least one file or folder of training JSONL")
        if isinstance(self.train_data, str):
            self.train_data = [self.train_data]
        self.query_max_len, self.passage_max_len = self.query_max_len or None, self.passage_max_len or None
        # Two tokens only begin and end a text. Without a query of its own, a negative has no penalty.
        check_bounds(self, INHERITED_BOUNDS)
        check_needs(self, dict.fromkeys(("small_threshold", "drop_threshold"), "same_dataset_within_batch"))
        if self.experts_of_data is not None and len(self.experts_of_data) != len(self.train_data):
            found, expected = len(self.experts_of_data), len(self.train_data)
            raise OptionError("experts_of_data", f"found {found}, expected one for each of train_data's {expected}")
        for name in ("query_instruction_format", "passage_instruction_format"):
            value = getattr(self, name).replace("\\n", "\n")
            if not _has_two_places(value):
                raise ValueError(f"{name} is {value!r}: expected two places, '{{}}{{}}', for the prompt and the text")
            setattr(self, name, value)


def _has_two_places(form: str) -> bool:
    """Whether ``str.format`` puts two texts into a form, one after the other."""
    try:
        places = [parts[1:] for parts in Formatter().parse(form) if parts[1] is not None]
    except ValueError:
        return False
    return places == [("", "", None)] * 2


@dataclass
class CLPLTrainingArguments(
    LossOptions, RunOptions, LoRAOptions, EvaluationOptions, RefreshOptions, EncoderOnlyEmbedderM3TrainingArguments
):
    """The loss, what is trained, evaluation in training, and everything that transformers' Trainer offers.

    Besides the defaults of :mod:`clpl_moe.train.options`, these are changed: non-reentrant gradient checkpointing,
    ``use_cpu`` where there is no accelerator. With ``dev_collection``, evaluation follows ``save_strategy`` unless it is
    set, and the best checkpoint is loaded at the end.
    """

    def __post_init__(self) -> None:
        self.without_effect = checks.drop_without_effect(self)
        if self.dev_collection is not None and "do_eval" in self.without_effect:
            self.without_effect.remove("do_eval")  # there is evaluation
        if not self.output_dir:
            raise ValueError("output_dir is missing: name the folder of the run")
        if self.use_mrl:
            raise ValueError("use_mrl: FlagEmbedding's M3 models do not support it, set matryoshka_dims instead")
        if self.matryoshka_dims and not self.normalize_embeddings:
            raise ValueError(
                "matryoshka_dims need normalize_embeddings: truncated embeddings are compared by their cosine"
            )
        checks.check_options(self)
        self.fp16_asked = self.fp16
        # A run that resumes does not evaluate it again.
        self.base_counts = bool(self.eval_on_start and self.load_best_model_at_end)
        checks.choose_device(self)
        if self.resume_from_checkpoint in ("false", "False", ""):
            self.resume_from_checkpoint = None
        super().__post_init__()
        checks.drop_without_effect(self)  # some are derived from others
        if self.n_gpu > 1:
            # transformers would take torch's DataParallel, which cannot divide these batches.
            on_all = f"torchrun --nproc_per_node {self.n_gpu} -m clpl_moe.train ..."
            logger.warning(f"training on one of {self.n_gpu} GPUs; on all of them: {on_all}")
            self._n_gpu = 1

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.output_dir or "")

    @property
    def shares(self) -> list[float]:
        """The shares of the trained weights that are tried in mixtures with the base model's."""
        return [alpha for alpha in self.merge_base_alpha or [] if alpha != 1]

    @property
    def dev_languages(self) -> list[str]:
        """The languages of evaluation in training."""
        given = self.dev_language
        return [] if given is None else [given] if isinstance(given, str) else list(dict.fromkeys(given))

    @property
    def stop_signals(self) -> list[signal.Signals]:
        """What ends training after the current step, with a checkpoint."""
        return [signal.SIGTERM, *([signal.SIGUSR1] if self.stop_on_sigusr1 else [])]

    @property
    def encode_dtype(self) -> torch.dtype | None:
        """The precision to encode in between steps, as :class:`clpl_moe.encoder.Encoder` takes it: float32
        where training is in float32, else None, what suits the hardware."""
        import torch

        return None if self.bf16 or self.fp16_asked else torch.float32

    def loss_options(self) -> CLPLOptions:
        """Options of the loss; raises ValueError where one is out of range."""
        terms = {f.name: getattr(self, f.name) for f in fields(LossTermOptions)}
        return CLPLOptions(
            **terms, normalize=self.normalize_embeddings, gather_across_devices=self.negatives_cross_device
        )

    def adapter_in_words(self) -> str:
        """The adapters of ``trainable: lora``, for plan and card."""
        dropout = f", dropout {self.lora_dropout:g}" if self.lora_dropout else ""
        return f"LoRA of rank {self.lora_rank}, alpha {self.lora_alpha}{dropout}, on {' and '.join(self.lora_targets)}"

    def ance_selection(self) -> SelectionArguments:
        """What refreshes mine; raises OptionError where the options do not fit together."""
        names = SelectionArguments.__dataclass_fields__
        try:
            return SelectionArguments(**{name: getattr(self, f"ance_{name}") for name in names})
        except OptionError as error:
            raise OptionError(f"ance_{error.option}", error.fault) from None
