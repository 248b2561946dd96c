"""Puts model, data and trainer together, and runs the training."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from transformers import PreTrainedTokenizerBase, get_scheduler

from clpl_moe.common.allocator import keep_freed_memory
from clpl_moe.common.cli import load_yaml
from clpl_moe.common.errors import UserError, at
from clpl_moe.common.files import atomic_open, hash_file, refuse_unwritable, write_json
from clpl_moe.data.collator import CLPLCollator
from clpl_moe.data.dataset import CLPLTrainDataset
from clpl_moe.data.flag_embedding import EncoderOnlyEmbedderM3Runner
from clpl_moe.data.sampler import EpochBatchSampler
from clpl_moe.data.schema import data_files
from clpl_moe.encoder.load import HEAD_FILES, find_heads, load_encoder, read_head
from clpl_moe.encoder.packing import can_pack
from clpl_moe.encoder.settings import EmbeddingSettings, read_settings
from clpl_moe.loss import CLPLLoss
from clpl_moe.mine.index import PassageIndex
from clpl_moe.moe.inject import has_experts, inject_moe
from clpl_moe.retrieval.collection import Collection
from clpl_moe.retrieval.encode import check_lengths
from clpl_moe.retrieval.options import EncodingArguments
from clpl_moe.train.ance import NEGATIVES_FILE, NegativeRefresher
from clpl_moe.train.arguments import CLPLDataArguments, CLPLModelArguments, CLPLTrainingArguments
from clpl_moe.train.card import write_model_card
from clpl_moe.train.model import CLPLModel, choose_trainable
from clpl_moe.train.trainer import CLPLTrainer, newest_checkpoint

logger = logging.getLogger(__name__)

CONFIG_FILE = "train_config.yaml"
DATA_FILE = "train_data.json"

# What a checkpoint's weights and optimizer state are of; they do not fit a run that changes one of these.
_FIXED_IN_A_RUN = (
    "num_experts", "top_k", "moe_target", "moe_layers", "router", "trainable", "frozen_layers", "unified_finetuning",
    "colbert_dim", "fix_encoder", "fix_position_embedding",
    # Part of the optimizer's and the schedule's state, which come back with their old values.
    "optim", "learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon",
)  # fmt: skip


def resolve_settings(
    model_args: CLPLModelArguments, data_args: CLPLDataArguments, training_args: CLPLTrainingArguments
) -> EmbeddingSettings:
    """Pooling and prompts: as configured, and otherwise as the base model's folder says, whose prompts then stand in
    ``data_args``."""
    base = read_settings(model_args.model_name_or_path, cache_dir=model_args.cache_dir, token=model_args.token)
    prompts = {"query": "", "passage": ""}
    for kind, default in (("query", base.query_prompt), ("passage", base.passage_prompt)):
        name = f"{kind}_instruction_for_retrieval"
        given = getattr(data_args, name)
        instruction = (default or None) if given is None else given
        setattr(data_args, name, instruction)  # "" stays: no prompt, also where the base model has one
        if not instruction:
            continue
        form = getattr(data_args, f"{kind}_instruction_format")
        prompts[kind], _, after = form.format(instruction, "\0").partition("\0")
        if after:
            logger.warning(
                "%s_instruction_format puts text after the %s: the saved folder's prompt cannot say so, add it yourself"
                " when you encode",
                kind,
                kind,
            )
    return EmbeddingSettings(
        pooling=training_args.sentence_pooling_method or base.pooling,
        normalize=training_args.normalize_embeddings,
        query_prompt=prompts["query"],
        passage_prompt=prompts["passage"],
    )


def check_output_dir(args: CLPLTrainingArguments) -> None:
    """Resolve ``resume_from_checkpoint: true`` and refuse a folder that holds something else than the run to resume.

    Raises:
        UserError: the folder is not empty and holds no run that is to be resumed, or there is no such checkpoint.
    """
    output_dir = Path(args.output_dir)
    resume = args.resume_from_checkpoint
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"{at(output_dir)}: a file is in the way of the run folder; name another --output_dir")
    refuse_unwritable(output_dir / CONFIG_FILE)
    if resume is None:
        if output_dir.exists() and any(output_dir.iterdir()):
            raise UserError(
                f"{at(output_dir)}: the folder is not empty; name another --output_dir, or go on with the run in it:"
                " --resume_from_checkpoint true"
            )
    elif resume.lower() == "true":
        newest = newest_checkpoint(output_dir)
        # A run that was killed before its first checkpoint starts again from the beginning.
        if newest is None and output_dir.exists() and not (output_dir / CONFIG_FILE).exists():
            raise UserError(f"{at(output_dir)}: no run to resume, found neither a checkpoint nor {CONFIG_FILE}")
        args.resume_from_checkpoint = None if newest is None else str(newest)
    elif not (Path(resume) / "trainer_state.json").is_file():
        raise UserError(f"{at(resume)}: not a checkpoint of a run (no trainer_state.json); --resume_from_checkpoint")
    elif Path(resume).resolve() == output_dir.resolve():
        raise UserError(
            f"{at(resume)}: a run, and no checkpoint; --resume_from_checkpoint true goes on with its newest"
        )
    elif Path(resume).resolve().parent != output_dir.resolve() and output_dir.exists() and any(output_dir.iterdir()):
        raise UserError(
            f"{at(output_dir)}: the folder is not empty, and not the run that {resume} is of; name another --output_dir"
        )
    checkpoint = args.resume_from_checkpoint
    # DeepSpeed and FSDP have names of their own.
    if checkpoint is not None and not any(any(Path(checkpoint).glob(name)) for name in ("optimizer*", "global_step*")):
        raise UserError(
            f"{at(checkpoint)}: holds no state of an optimizer (a run's folder, or made with save_only_model), so that it"
            f" cannot be resumed; begin a new run with its weights: --model_name_or_path {checkpoint}"
        )


def resolved_config(*groups: object) -> dict[str, object]:
    """All options of the argument dataclasses as plain values, without secrets, as ``--config`` reads them."""
    values: dict[str, object] = {}
    for group in groups:
        for field in dataclasses.fields(group):
            secret = field.name == "token" or field.name.endswith("_token")
            if field.init and not secret:
                values[field.name] = getattr(group, field.name)
    values.pop("resume_from_checkpoint", None)
    # An empty list is the default of every option that takes one, but for this one's.
    values["report_to"] = values.get("report_to") or "none"
    return {name: _plain(value) for name, value in values.items() if value != []}


def _plain(value: object) -> object:
    return json.loads(json.dumps(value, default=lambda v: v.to_dict() if hasattr(v, "to_dict") else str(v)))


def check_same_run(config: dict[str, object], checkpoint: str | Path) -> None:
    """Compare the options of a resumed run with those that its checkpoint was made with, where these are still known.

    Raises:
        UserError: an option differs that the checkpoint does not fit. Others are warned of: the run is then not the one
            that it would have been.
    """
    path = Path(checkpoint).parent / CONFIG_FILE
    if not path.is_file():
        return
    before = load_yaml(path)
    names = sorted((before.keys() | config.keys()) - {"output_dir", "dry_run"})
    changed = {name: (before.get(name), config.get(name)) for name in names if before.get(name) != config.get(name)}
    for name in _FIXED_IN_A_RUN:
        if name in changed:
            old, new = changed[name]
            raise UserError(
                f"{name} is {new}, but the run to resume has {old} ({path}): resume it with that, or begin a new run with"
                f" its weights: --model_name_or_path {checkpoint} and another --output_dir"
            )
    if changed:
        what = ", ".join(f"{name} {old} -> {new}" for name, (old, new) in changed.items())
        logger.warning("resumed with other options than %s: %s", path, what)


def describe_data(data_args: CLPLDataArguments, training_args: CLPLTrainingArguments) -> dict[str, Any]:
    """What decides which example comes when, besides the options: the files' contents and the number of processes."""
    world = training_args.world_size
    return {
        "files": [[str(path), hash_file(path)] for path in data_files(data_args.train_data)],
        "processes": world,
        "batch_of_all": world * training_args.per_device_train_batch_size * training_args.gradient_accumulation_steps,
    }


def check_same_data(now: dict[str, Any], checkpoint: str | Path) -> None:
    """Compare :func:`describe_data` of a resumed run with that of the run that its checkpoint is of.

    Raises:
        UserError: the data's contents differ (another path is none), or the number of processes and with it the batch:
            some examples would be seen twice in an epoch, others not at all.
    """
    path = Path(checkpoint).parent / DATA_FILE
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        files, processes, batch = before["files"], before["processes"], before["batch_of_all"]
    except FileNotFoundError:
        return
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"{at(path)}: cannot be read, though the run to resume wrote it; restore or remove it"
        ) from None
    if [digest for _, digest in files] != [digest for _, digest in now["files"]]:
        known = {digest for _, digest in files}
        new = [name for name, digest in now["files"] if digest not in known]
        raise UserError(
            f"{at(new[0]) if new else 'train_data'}: not the data of the run to resume, as {path} lists them: put these"
            " back, or begin a new run on the new data, from this one's weights if you like: --model_name_or_path"
            f" {checkpoint} and another --output_dir"
        )
    if processes == now["processes"]:
        return
    was = f"{now['processes']} processes, but the run to resume had {processes}"
    if batch != now["batch_of_all"]:
        raise UserError(
            f"{was}, and {batch} examples a step where now there are {now['batch_of_all']}: start as many processes, or"
            " choose per_device_train_batch_size and gradient_accumulation_steps for the same number"
        )
    logger.warning("%s: the batches are the same, but dropout and other random draws are not", was)


def check_batches(sampler: EpochBatchSampler) -> None:
    """Raise :class:`UserError` where an epoch has no batch: a run would end without a step."""
    if len(sampler) == 0:
        size = sampler.batch_size * sampler.num_processes
        raise UserError(
            f"dataloader_drop_last leaves out everything: no file has the {size} examples of a batch; lower"
            " per_device_train_batch_size or remove dataloader_drop_last"
        )


def check_gathering(in_batch_negatives: Sequence[bool], data_args: CLPLDataArguments, world_size: int) -> None:
    """Raise :class:`UserError` where some processes of a step would gather negatives and others would not: they would wait
    for each other forever."""
    if world_size > 1 and not data_args.same_dataset_within_batch and len(set(in_batch_negatives)) > 1:
        raise UserError(
            "negatives_cross_device cannot mix files with in-batch negatives and files without (*no_in_batch_neg) in a"
            " batch: set same_dataset_within_batch"
        )


def check_optimizer(args: CLPLTrainingArguments) -> None:
    """Make the optimizer and the schedule for one number, since they check their options no sooner.

    Raises:
        UserError: an option is out of range, or the optimizer's package is not installed.
    """
    name = getattr(args.optim, "value", args.optim)
    if any(family in name for family in ("galore", "apollo", "lomo")):  # they look at the model's own modules
        return
    steps = args.max_steps if args.max_steps > 0 else 10_000
    try:
        kind, options = CLPLTrainer.get_optimizer_cls_and_kwargs(args)
        optimizer = kind([nn.Parameter(torch.zeros(1))], **options)
        get_scheduler(
            args.lr_scheduler_type,
            optimizer,
            num_warmup_steps=args.get_warmup_steps(steps),
            num_training_steps=steps,
            scheduler_specific_kwargs=args.lr_scheduler_kwargs,
        )
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(
            f"optimizer {name} or lr_scheduler_type {getattr(args.lr_scheduler_type, 'value', args.lr_scheduler_type)}:"
            f" {' '.join(str(error).split())}"
        ) from None
    except RuntimeError:  # one that takes no parameters of this kind or device; the real ones may be others
        return


class CLPLRunner(EncoderOnlyEmbedderM3Runner):
    """FlagEmbedding's runner with CLPL, experts, evaluation in training and exact resume.

    Raises:
        UserError: anything that the user can mend; before any file is written.
    """

    def __init__(
        self,
        model_args: CLPLModelArguments,
        data_args: CLPLDataArguments,
        training_args: CLPLTrainingArguments,
    ) -> None:
        check_output_dir(training_args)
        if training_args.fp16_asked and not torch.accelerator.is_available():
            raise UserError(
                "fp16 needs a CUDA device and none was found: run on a machine with one, or train on the CPU with"
                " --fp16 false (configs/quickstart.yaml is made for that)"
            )
        check_optimizer(training_args)
        # Ours first, since the parent's logs every option at length.
        logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
        self.settings = resolve_settings(model_args, data_args, training_args)
        self.evaluator = None
        if training_args.use_cpu:
            keep_freed_memory()
        # The folder was checked above; the parent's own check, which this turns off, ends in a ValueError.
        training_args.do_train = False
        super().__init__(model_args, data_args, training_args)
        training_args.do_train = True

    def load_tokenizer_and_model(self) -> tuple[PreTrainedTokenizerBase, CLPLModel]:
        args, training = self.model_args, self.training_args
        encoder, tokenizer = load_encoder(
            args.model_name_or_path,
            trust_remote_code=args.trust_remote_code,
            cache_dir=args.cache_dir,
            token=args.token,
            tokenizer=args.tokenizer_name,
        )
        check_lengths(encoder, self.data_args.query_max_len, self.data_args.passage_max_len, args.model_name_or_path)
        config = args.moe_config()
        if has_experts(encoder):
            logger.warning("the base model has experts of its own, which are kept: %s", encoder.config.moe)
        elif config is not None:
            try:
                inject_moe(encoder, config)
            except ValueError as error:
                raise UserError(f"{at(args.model_name_or_path)}: {error}") from None
        base = {"model": encoder, "colbert_linear": None, "sparse_linear": None}
        self.base_heads = read_heads(
            args.model_name_or_path, required=training.unified_finetuning, cache_dir=args.cache_dir, token=args.token
        )
        if training.unified_finetuning:
            base |= make_heads(self.base_heads, args.model_name_or_path, encoder.config.hidden_size, args.colbert_dim)
        model = CLPLModel(
            base,
            loss=CLPLLoss(
                training.temperature,
                training.penalty_weight,
                in_batch_negatives=training.in_batch_negatives,
                false_negative_margin=training.false_negative_margin,
                normalize=training.normalize_embeddings,
                gather_across_devices=training.negatives_cross_device and training.world_size > 1,
                penalty=training.penalty,
                symmetric_weight=training.symmetric_weight,
            ),
            settings=self.settings,
            mask_duplicates=training.mask_duplicates,
            balance_loss_weight=training.balance_loss_weight,
            z_loss_weight=training.z_loss_weight,
            grad_cache_tokens=training.grad_cache_tokens,
            tokenizer=tokenizer,
            # One process has all passages already.
            negatives_cross_device=training.negatives_cross_device and training.world_size > 1,
            sub_batch_size=training.sub_batch_size,
            kd_loss_type=training.kd_loss_type,
            unified_finetuning=training.unified_finetuning,
            use_self_distill=training.use_self_distill,
            self_distill_start_step=training.self_distill_start_step,
        )
        try:
            choose_trainable(
                model,
                training.trainable,
                fix_position_embedding=training.fix_position_embedding,
                fix_encoder=training.fix_encoder,
                frozen_layers=training.frozen_layers,
            )
        except ValueError as error:
            raise UserError(str(error)) from None
        return tokenizer, model

    def load_train_dataset(self) -> CLPLTrainDataset:
        return CLPLTrainDataset(self.data_args, seed=self.training_args.seed)

    def load_data_collator(self) -> CLPLCollator:
        return CLPLCollator(
            tokenizer=self.tokenizer,
            query_max_len=self.data_args.query_max_len,
            passage_max_len=self.data_args.passage_max_len,
            sub_batch_size=self.training_args.sub_batch_size,
            pad_to_multiple_of=self.data_args.pad_to_multiple_of,
            padding=True,
            return_tensors="pt",
            packing=self._packs(),
        )

    def _packs(self) -> bool:
        args = self.training_args
        # Sparse and multi-vector losses need the states of all tokens, in rows.
        whole = args.unified_finetuning or (args.sub_batch_size or -1) > 0
        # Gradient caching cuts packed batches, also for encoders that pad them after all.
        wanted = args.grad_cache_tokens is not None or (args.packing and can_pack(self.model.model))
        return wanted and not whole

    def load_trainer(self) -> CLPLTrainer:
        evaluator, refresher = self._make_evaluator(), self._make_refresher()
        try:
            return CLPLTrainer(
                model=self.model,
                args=self.training_args,
                train_dataset=self.train_dataset,
                data_collator=self.data_collator,
                processing_class=self.tokenizer,
                settings=self.settings,
                max_length=max(self.data_args.query_max_len, self.data_args.passage_max_len),
                base_heads=self.base_heads,
                evaluator=evaluator,
                same_dataset_within_batch=self.data_args.same_dataset_within_batch,
                refresher=refresher,
            )
        except (ValueError, ImportError, RuntimeError) as error:  # transformers checks some options no sooner
            raise UserError(" ".join(str(error).split())) from error
        except Exception as error:  # of the network or the hub: there are many
            if not self.training_args.push_to_hub:
                raise
            raise UserError(
                f"push_to_hub: the hub does not open the repository ({' '.join(str(error).split())}): check the network"
                " and the login (hf auth login), or leave push_to_hub out and upload the run folder afterwards"
            ) from None

    def _make_evaluator(self) -> Callable[[nn.Module], dict[str, float]] | None:
        args = self.training_args
        if args.dev_collection is None:
            return None
        from clpl_moe.evaluate.evaluation import evaluate_retrieval

        collection = Collection.load(args.dev_collection, args.dev_language, args.dev_split)

        def evaluator(encoder: nn.Module) -> dict[str, float]:
            result = evaluate_retrieval(
                encoder,
                self.tokenizer,
                collection,
                settings=self.settings,
                query_max_len=self.data_args.query_max_len,
                passage_max_len=self.data_args.passage_max_len,
                top_k=100,
                batch_tokens=args.dev_batch_tokens,
                metrics=("nDCG@5", "nDCG@10", "R@100"),
                dtype=args.encode_dtype,
                progress=False,
            )
            names = {"nDCG@5": "ndcg@5", "nDCG@10": "ndcg@10", "R@100": "recall@100"}
            return {names[name]: value for name, value in result.metrics.items()}

        return evaluator

    def _make_refresher(self) -> NegativeRefresher | None:
        args = self.training_args
        if args.ance_refresh is None:
            return None
        return NegativeRefresher(
            self.train_dataset,
            open_ance_index(self.data_args, args),
            args.ance_selection(),
            EncodingArguments(
                query_max_len=self.data_args.query_max_len,
                passage_max_len=self.data_args.passage_max_len,
                batch_tokens=args.dev_batch_tokens,
            ),
            every=args.ance_refresh,
            seed=args.seed,
            folder=Path(args.output_dir) / "embeddings",
        )

    def run(self) -> None:
        """Train, from the beginning or from a checkpoint, and leave the model in the run folder."""
        output_dir = Path(self.training_args.output_dir)
        check_batches(self.trainer.batch_sampler)
        if self.training_args.negatives_cross_device:
            check_gathering(self.train_dataset.in_batch_negatives, self.data_args, self.training_args.world_size)
        config = resolved_config(self.model_args, self.data_args, self.training_args)
        data = describe_data(self.data_args, self.training_args)
        if self.training_args.resume_from_checkpoint is not None:
            check_same_run(config, self.training_args.resume_from_checkpoint)
            check_same_data(data, self.training_args.resume_from_checkpoint)
            self.training_args.eval_on_start = False  # it was done when the run began
            if self.trainer.refresher is not None:
                self.trainer.refresher.load(Path(self.training_args.resume_from_checkpoint) / NEGATIVES_FILE)
        if self.trainer.is_world_process_zero():
            with atomic_open(output_dir / CONFIG_FILE) as file:
                yaml.safe_dump(config, file, allow_unicode=True, sort_keys=False)
            write_json(output_dir / DATA_FILE, data)
        checkpoint = self.training_args.resume_from_checkpoint
        if checkpoint is not None and self.trainer.is_over(checkpoint):
            self.trainer.load_result(checkpoint)
        else:
            self.trainer.train(resume_from_checkpoint=checkpoint)
        self.trainer.save_model()
        self.trainer.save_state()
        if self.trainer.is_world_process_zero():
            write_model_card(self)
            print(f"saved to {output_dir}: the model, its card README.md, metrics.jsonl and {CONFIG_FILE}")


def open_ance_index(data_args: CLPLDataArguments, training_args: CLPLTrainingArguments) -> PassageIndex:
    """The passages that refreshes mine from.

    Raises:
        UserError: the collection or the store of positive queries has a fault, or the run wants teacher scores too.
    """
    if data_args.knowledge_distillation:
        raise UserError(
            "knowledge_distillation needs scores of a teacher, mined negatives have none: unset ance_refresh"
        )
    collection = Collection.load(training_args.ance_collection, training_args.ance_language, training_args.ance_split)
    return PassageIndex.load(collection, training_args.ance_positive_queries)


def read_heads(path: str, *, required: bool, **hub: str | None) -> dict[str, dict[str, torch.Tensor]]:
    """The weights of the sparse and multi-vector heads that a base model has, by file name.

    Args:
        path: folder or hub name.
        required: whether they are trained, so that it must be known if there are any.
        hub: ``cache_dir`` and ``token``.

    Raises:
        UserError: a file is not a head, or the hub gives no answer although ``required``; otherwise that is warned of.
    """
    try:
        files = find_heads(path, **hub)
    except UserError as error:
        if required:
            raise
        logger.warning("%s. The folders of this run will have none: only dense embeddings will be of use", error)
        return {}
    return {name: read_head(file) for name, file in files.items()}


def make_heads(
    weights: dict[str, dict[str, torch.Tensor]], path: str, hidden_size: int, colbert_dim: int
) -> dict[str, nn.Linear]:
    """The heads of a base model as modules, new ones where it has none.

    Raises:
        UserError: the base model's heads have other shapes.
    """
    widths = {"sparse_linear.pt": 1, "colbert_linear.pt": colbert_dim if colbert_dim > 0 else hidden_size}
    heads = {}
    for name in HEAD_FILES:
        head = heads[Path(name).stem] = nn.Linear(hidden_size, widths[name])
        if name not in weights:
            logger.warning("%s has no %s: training begins with a new one", path, name)
            continue
        try:
            head.load_state_dict(weights[name])
        except RuntimeError as error:
            raise UserError(
                f"{at(path)}: {name} does not fit a head of {hidden_size} to {widths[name]}: {error}"
            ) from None
    return heads
