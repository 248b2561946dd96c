"""Puts model, data and trainer together, and runs the training."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import nn
from transformers import set_seed
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from clpl_moe.common.allocator import keep_freed_memory
from clpl_moe.common.errors import UserError
from clpl_moe.common.files import write_json
from clpl_moe.common.output import Output, writing
from clpl_moe.common.yaml_files import write_yaml
from clpl_moe.data.collator import CLPLCollator
from clpl_moe.data.lengths import token_counter
from clpl_moe.encoder import Encoder
from clpl_moe.encoder.frozen_cache import set_frozen_cache
from clpl_moe.encoder.load import read_config
from clpl_moe.encoder.settings import check_lengths
from clpl_moe.encoder.weights import resolved_revision
from clpl_moe.loss import CLPLLoss
from clpl_moe.moe.inject import has_experts, merge_experts
from clpl_moe.retrieval.options import EncodingArguments
from clpl_moe.train import TrainResult, resume
from clpl_moe.train.ance import NEGATIVES_FILE, NegativeRefresher
from clpl_moe.train.arguments import CLPLDataArguments, CLPLModelArguments, CLPLTrainingArguments
from clpl_moe.train.base_model import (
    add_experts,
    check_dimensions,
    choose_trainable,
    give_experts,
    make_frozen_cache,
    make_heads,
    packs,
    read_heads,
    resolve_settings,
)
from clpl_moe.train.card import CARD, write_model_card
from clpl_moe.train.checks import check_optimizer
from clpl_moe.train.keep import Keeper
from clpl_moe.train.lengths import Lengths, choose_lengths, longest_counted
from clpl_moe.train.lora import name_base
from clpl_moe.train.metrics_file import METRICS_FILE, read_metrics
from clpl_moe.train.model import CLPLModel
from clpl_moe.train.options import DEV_METRICS
from clpl_moe.train.plan import EXPERTS_FOLDER, Plan, describe, open_data
from clpl_moe.train.sharding import check_sharding, load_models_whole
from clpl_moe.train.trainer import CLPLTrainer, lengths_of, set_lengths
from clpl_moe.train.verdict import verdict_of

logger = logging.getLogger(__name__)

MERGED_FOLDER = "merged"
_FILES_OF_A_MODEL = ("*.safetensors", "*.safetensors.index.json", "*.py", "adapter_config.json", "moe_config.json")
_OPTIONS_OF_THE_MODEL = (
    *("mask_duplicates", "balance_loss_weight", "z_loss_weight", "grad_cache_tokens", "sub_batch_size", "kd_loss_type"),
    *("unified_finetuning", "use_self_distill", "self_distill_start_step"),
)


class CLPLRunner:
    """Model, data, trainer and plan of a run, made from its options; all that the user can mend is raised as
    :class:`UserError` before any file is written."""

    def __init__(
        self, model_args: CLPLModelArguments, data_args: CLPLDataArguments, training_args: CLPLTrainingArguments
    ) -> None:
        self.model_args, self.data_args, self.training_args = model_args, data_args, training_args
        resume.check_output_dir(training_args)
        resume.keep_options(model_args, data_args, training_args)
        if training_args.fp16_asked and not torch.accelerator.is_available():
            raise UserError(
                "fp16 needs a CUDA device and none was found: run on a machine with one, or set fp16 false to train on the"
                " CPU (configs/quickstart.yaml is made for that)"
            )
        check_optimizer(training_args)
        read_config(model_args.model_name_or_path, **model_args.hub)  # of a model that is nowhere nothing else is told
        self.settings = resolve_settings(model_args, data_args, training_args)
        if training_args.use_cpu:
            keep_freed_memory()
        set_seed(training_args.seed)
        load_models_whole()
        self.encoder = self._load_encoder(tell=True)
        self.base_heads = read_heads(
            model_args.model_name_or_path, required=training_args.unified_finetuning, **model_args.hub
        )
        self.model = self._make_model()
        choose_trainable(self.encoder.model, training_args)
        set_frozen_cache(self.encoder.model, make_frozen_cache(self.encoder.model, training_args))
        name_base(self.encoder.model, model_args.model_name_or_path, model_args.revision)
        self.data = open_data(data_args, training_args, resume.batches_of_whole_steps(training_args))
        self.lengths = self._choose_lengths()
        self.trainer = self._make_trainer()
        if self.trainer.sharding is not None:
            check_sharding(training_args, self.trainer.sharding, has_experts(self.encoder.model))
            load_models_whole()  # the trainer has made ready for others
        self.plan = describe(model_args, data_args, training_args, self.encoder.model, self.data, self.lengths)

    def _load_encoder(self, tell: bool = False) -> Encoder:
        args = self.model_args
        encoder = Encoder.load(
            args.model_name_or_path,
            settings=self.settings,
            compute_dtype=self.training_args.encode_dtype,
            device="cpu",
            trust_remote_code=args.trust_remote_code,
            tokenizer=args.tokenizer_name,
            **args.hub,
        )
        # What config and card name, so that the run can be repeated.
        args.revision = resolved_revision(args.model_name_or_path, **args.hub) or args.revision
        data_args, model = self.data_args, encoder.model
        check_lengths(model, data_args.query_max_len, data_args.passage_max_len, args.model_name_or_path)
        check_dimensions(model, self.training_args)
        if tell and has_experts(model):
            logger.warning("the base model has experts of its own, which are kept: %s", model.config.moe)
        add_experts(model, args, self.training_args)
        give_experts(model, args, data_args, self.training_args)
        return encoder

    def _choose_lengths(self) -> Lengths:
        model, tokenizer = self.encoder.model, self.encoder.tokenizer
        state = lengths_of(tokenizer)
        try:
            return choose_lengths(
                self.data_args,
                self.data.dataset,
                model,
                token_counter(tokenizer, longest_counted(model)),
                name=self.model_args.model_name_or_path,
                checkpoint=self.training_args.resume_from_checkpoint,
            )
        finally:
            set_lengths(tokenizer, *state)

    def _make_model(self) -> CLPLModel:
        args, training, encoder = self.model_args, self.training_args, self.encoder.model
        base: dict[str, nn.Module | None] = {"model": encoder, "colbert_linear": None, "sparse_linear": None}
        if training.unified_finetuning:
            base |= make_heads(self.base_heads, args.model_name_or_path, encoder.config.hidden_size, args.colbert_dim)
        return CLPLModel(
            base,
            loss=CLPLLoss(**dataclasses.asdict(training.loss_options())),
            settings=self.settings,
            tokenizer=self.encoder.tokenizer,
            # One process has all passages already.
            negatives_cross_device=training.negatives_cross_device and training.world_size > 1,
            **{name: getattr(training, name) for name in _OPTIONS_OF_THE_MODEL},
        )

    def _make_trainer(self) -> CLPLTrainer:
        args, data_args, limits = self.training_args, self.data_args, self.lengths.limits
        collator = CLPLCollator(
            tokenizer=self.encoder.tokenizer,
            query_max_len=limits["query_max_len"],
            passage_max_len=limits["passage_max_len"],
            sub_batch_size=args.sub_batch_size,
            pad_to_multiple_of=data_args.pad_to_multiple_of,
            padding=True,
            return_tensors="pt",
            packing=packs(self.encoder.model, args),
            negatives_cross_device=self.model.dense_loss.gather_across_devices,
        )
        encoding = EncodingArguments(limits["query_max_len"], limits["passage_max_len"], args.dev_batch_tokens)
        evaluator, refresher = self._make_evaluator(encoding), self._make_refresher(encoding)
        try:
            return CLPLTrainer(
                model=self.model,
                args=args,
                train_dataset=self.data.dataset,
                data_collator=collator,
                batch_sampler=self.data.batches,
                encoder=self.encoder,
                base_heads=self.base_heads,
                evaluator=evaluator,
                refresher=refresher,
            )
        except (ValueError, ImportError, RuntimeError) as error:  # transformers checks some options no sooner
            raise UserError(" ".join(str(error).split())) from error
        except Exception as error:  # of the network or the hub: there are many
            if not args.push_to_hub:
                raise
            raise UserError(
                f"push_to_hub: the hub does not open the repository ({' '.join(str(error).split())}): check the network"
                " and the login (hf auth login), or leave push_to_hub out and upload the run folder afterwards"
            ) from None

    def _make_evaluator(self, encoding: EncodingArguments) -> Callable[[Encoder], dict[str, float]] | None:
        collections = self.data.dev
        if not collections:
            return None
        from clpl_moe.evaluate.evaluation import evaluate_retrieval
        from clpl_moe.retrieval.store import encode_passages

        args = self.training_args
        shared = args.world_size > 1  # processes share the passages, the first one searches
        cache = Output(args.folder, inside=True).embeddings if shared else None

        def evaluator(encoder: Encoder) -> dict[str, float]:
            if shared and args.process_index > 0:
                for collection in collections:
                    encode_passages(encoder, collection.passages, encoding, cache=cache, progress=False)
                return {}
            known = list(DEV_METRICS.values())
            found = [
                evaluate_retrieval(
                    encoder, one, encoding, top_k=100, metrics=known, cache=cache, progress=False
                ).metrics
                for one in collections
            ]
            if cache is not None:
                shutil.rmtree(cache, ignore_errors=True)
            return {name: fmean(metrics[metric] for metrics in found) for name, metric in DEV_METRICS.items()}

        return evaluator

    def _make_refresher(self, encoding: EncodingArguments) -> NegativeRefresher | None:
        args, data = self.training_args, self.data
        if data.index is None or args.ance_refresh is None:
            return None
        return NegativeRefresher(
            data.dataset,
            data.index,
            args.ance_selection(),
            encoding,
            every=args.ance_refresh,
            seed=args.seed,
            folder=Output(args.folder, inside=True).embeddings,
        )

    def run(self, on_plan: Callable[[Plan], None] | None = None) -> TrainResult:
        """Train, from the beginning or from a checkpoint, and leave the model in the run folder. ``on_plan`` gets the plan
        when all has been checked, before the first step."""
        args, output_dir = self.training_args, self.training_args.folder
        config = resume.resolved_config(self.model_args, self.data_args, args)
        data = resume.describe_data(self.data_args, args)
        checkpoint = args.resume_from_checkpoint
        if checkpoint is not None:
            whole_steps = self.data.batches.whole_steps
            resume.check_same_data(data, checkpoint, whole_steps)
            resume.check_same_run(config, checkpoint, whole_steps)
            args.eval_on_start = False  # it was done when the run began
            if self.trainer.refresher is not None:
                self.trainer.refresher.load(Path(checkpoint) / NEGATIVES_FILE)
        self.trainer.wait()  # until all have found the folder as it was, and their data without a fault
        first = self.trainer.is_world_process_zero()

        def write() -> None:
            if first:
                write_yaml(output_dir / resume.CONFIG_FILE, config)
                write_json(output_dir / resume.DATA_FILE, data)

        if first and on_plan is not None:
            on_plan(self.plan)
        if checkpoint is not None and self.trainer.is_over(checkpoint):
            self.trainer.load_result(checkpoint)
            write()
        else:
            self.trainer.begin.functions.append(write)  # by then the checkpoint has turned out to fit
            self.trainer.train(resume_from_checkpoint=checkpoint)
        if first:
            (output_dir / CARD).unlink(missing_ok=True)  # it is written last: what has one is whole
        self.trainer.save_model(_internal_call=args.merge_experts)  # what is not the result is not pushed
        self.trainer.save_state()
        self.trainer.remove_extra()
        result = self._result()
        if args.push_to_hub and (args.merge_experts or result.alpha != 1):
            self.trainer.push_to_hub(commit_message="Model save", revision=args.hub_revision)
        if first:
            write_model_card(self.plan, self.settings, self.model, self.trainer.state.global_step, result)
        return result

    def _result(self) -> TrainResult:
        """Choose what the folders keep, where the run folder holds the trained model now."""
        args, output_dir, state = self.training_args, self.training_args.folder, self.trainer.state
        best = self.trainer.best_checkpoint(output_dir)
        checkpoint = output_dir / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if best is not None and args.load_best_model_at_end:
            checkpoint = best
        step = int(checkpoint.name.rpartition("-")[2])
        evaluated = self.trainer.of_first(_evaluations(state.log_history))
        experts = self._merge_experts() if args.merge_experts else None
        trained = evaluated.get(step)
        # Trained weights that lie nowhere else stay.
        checkpoint = experts or checkpoint
        counts = args.base_counts and self.trainer.of_first(checkpoint.is_dir())
        keeper = Keeper(self.trainer, self.model_args, self._load_base, evaluated.get(0) if counts else None)
        kept = keeper.keep(output_dir, trained) if experts is None else keeper.keep(output_dir, None, evaluate=True)
        result = TrainResult(
            output_dir,
            before=evaluated.get(0),
            after=kept.metrics,
            best_checkpoint=best,
            metrics_file=output_dir / METRICS_FILE,
            plan=self.plan,
            experts=experts,
            with_experts=None if experts is None else trained,
            merged=self._merge_adapter() if args.merge_adapter else None,
            alpha=kept.alpha,
            candidates=kept.candidates,
        )
        result.verdict = verdict_of(result, self._records(), step, checkpoint)
        return result

    def _merge_experts(self) -> Path:
        """Make the model in the run folder dense; returns the folder that keeps it with its experts."""
        output_dir = self.training_args.folder
        experts = output_dir / EXPERTS_FOLDER
        if self.trainer.is_world_process_zero():
            # Not the one in memory, which may be divided among processes.
            encoder = Encoder.load(output_dir, device="cpu", **self.model_args.of_saved)  # with its adapter merged
            encoder.save(experts)
            merge_experts(encoder)
            # Weights that are replaced may be mapped from their file.
            with writing(output_dir, inside=True) as place, place.additions(output_dir) as new:
                encoder.save(new)
                written = {path.name for path in new.iterdir()}
            for pattern in _FILES_OF_A_MODEL:  # what dense models have not, or have in fewer parts
                for path in output_dir.glob(pattern):
                    if path.name not in written:
                        path.unlink()
        self.trainer.wait()
        return experts

    def _merge_adapter(self) -> Path:
        """Save the model of the run folder a second time, with its adapter merged; returns the folder."""
        merged = self.training_args.folder / MERGED_FOLDER
        if self.trainer.is_world_process_zero():
            Encoder.load(self.training_args.folder, device="cpu", **self.model_args.of_saved).save(merged)
        self.trainer.wait()
        return merged

    def _load_base(self) -> Encoder:
        """The base model as the run began with it."""
        set_seed(self.training_args.seed)  # which decides the first weights of routers
        return self._load_encoder()

    def _records(self) -> list[dict[str, Any]]:
        """The course of the run as the first process has it, so that all say the same of it."""
        course = self.training_args.folder / METRICS_FILE
        return self.trainer.of_first(read_metrics(course) if course.exists() else [])


def _evaluations(records: Sequence[dict[str, Any]]) -> dict[int, dict[str, float]]:
    """Metrics of the dev collection after each step with an evaluation; the latest, where there were several."""
    return {
        record["step"]: {shown: record[f"eval_{name}"] for name, shown in DEV_METRICS.items()}
        for record in records
        if all(isinstance(record.get(f"eval_{name}"), float) for name in DEV_METRICS)
    }
