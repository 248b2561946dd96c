"""Puts model, data and trainer together, and runs the training."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path

import torch
import yaml
from torch import nn
from transformers import PreTrainedTokenizerBase, set_seed

from clpl_moe.common.allocator import keep_freed_memory
from clpl_moe.common.errors import UserError, at
from clpl_moe.common.files import atomic_open, write_json
from clpl_moe.data.collator import CLPLCollator
from clpl_moe.data.dataset import CLPLTrainDataset
from clpl_moe.encoder import Encoder
from clpl_moe.encoder.lengths import check_lengths
from clpl_moe.encoder.packing import can_pack
from clpl_moe.loss import CLPLLoss
from clpl_moe.mine.index import PassageIndex
from clpl_moe.moe.inject import has_experts, inject_moe
from clpl_moe.retrieval.collection import Collection
from clpl_moe.retrieval.options import EncodingArguments
from clpl_moe.train.ance import NEGATIVES_FILE, NegativeRefresher
from clpl_moe.train.arguments import CLPLDataArguments, CLPLModelArguments, CLPLTrainingArguments
from clpl_moe.train.card import CardFacts, metrics_at, write_model_card
from clpl_moe.train.checks import check_batches, check_gathering, check_optimizer
from clpl_moe.train.heads import make_heads, read_heads
from clpl_moe.train.metrics_file import METRICS_FILE, read_metrics
from clpl_moe.train.model import CLPLModel
from clpl_moe.train.plan import Plan, describe
from clpl_moe.train.result import TrainResult
from clpl_moe.train.resume import DATA_FILE, check_output_dir, check_same_data, check_same_run, describe_data
from clpl_moe.train.settings import resolve_settings
from clpl_moe.train.stored_config import CONFIG_FILE, resolved_config
from clpl_moe.train.trainable import choose_trainable
from clpl_moe.train.trainer import CLPLTrainer

logger = logging.getLogger(__name__)


class CLPLRunner:
    """Model, data and trainer of a run, made from its options.

    Attributes:
        trainer: ready to train.
        plan: what the run is.

    Raises:
        UserError: anything that the user can mend; before any file is written.
    """

    def __init__(
        self,
        model_args: CLPLModelArguments,
        data_args: CLPLDataArguments,
        training_args: CLPLTrainingArguments,
    ) -> None:
        self.model_args, self.data_args, self.training_args = model_args, data_args, training_args
        check_output_dir(training_args)
        if training_args.fp16_asked and not torch.accelerator.is_available():
            raise UserError(
                "fp16 needs a CUDA device and none was found: run on a machine with one, or set fp16 false to train on the"
                " CPU (configs/quickstart.yaml is made for that)"
            )
        check_optimizer(training_args)
        self.settings = resolve_settings(model_args, data_args, training_args)
        if training_args.use_cpu:
            keep_freed_memory()
        set_seed(training_args.seed)
        self.tokenizer, self.model = self.load_tokenizer_and_model()
        self.train_dataset = CLPLTrainDataset(data_args, seed=training_args.seed)
        self.data_collator = self.load_data_collator()
        self.dev = open_dev_collection(training_args)
        self.index = open_ance_index(data_args, training_args)
        self.trainer = self.load_trainer()
        self.plan = describe(
            model_args,
            data_args,
            training_args,
            encoder=self.model.model,
            dataset=self.train_dataset,
            batches=self.trainer.batch_sampler,
            dev=self.dev,
            index=self.index,
        )

    def load_tokenizer_and_model(self) -> tuple[PreTrainedTokenizerBase, CLPLModel]:
        args, training = self.model_args, self.training_args
        self.encoder = Encoder.load(
            args.model_name_or_path,
            settings=self.settings,
            compute_dtype=training.encode_dtype,
            device="cpu",
            trust_remote_code=args.trust_remote_code,
            cache_dir=args.cache_dir,
            token=args.token,
            tokenizer=args.tokenizer_name,
        )
        encoder, tokenizer = self.encoder.model, self.encoder.tokenizer
        check_lengths(encoder, self.data_args.query_max_len, self.data_args.passage_max_len, args.model_name_or_path)
        config = args.moe_config()
        if has_experts(encoder):
            logger.warning("the base model has experts of its own, which are kept: %s", encoder.config.moe)
        elif config is not None:
            try:
                inject_moe(encoder, config)
            except ValueError as error:
                raise UserError(f"{at(args.model_name_or_path)}: {error}") from None
        base: dict[str, nn.Module | None] = {"model": encoder, "colbert_linear": None, "sparse_linear": None}
        self.base_heads = read_heads(
            args.model_name_or_path, required=training.unified_finetuning, cache_dir=args.cache_dir, token=args.token
        )
        if training.unified_finetuning:
            base |= make_heads(self.base_heads, args.model_name_or_path, encoder.config.hidden_size, args.colbert_dim)
        model = CLPLModel(
            base,
            loss=CLPLLoss(**dataclasses.asdict(training.loss_options())),
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
                encoder,
                training.trainable,
                fix_position_embedding=training.fix_position_embedding,
                fix_encoder=training.fix_encoder,
                frozen_layers=training.frozen_layers,
                heads=training.unified_finetuning,
            )
        except ValueError as error:
            raise UserError(str(error)) from None
        return tokenizer, model

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
                encoder=self.encoder,
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

    def _make_evaluator(self) -> Callable[[Encoder], dict[str, float]] | None:
        collection = self.dev
        if collection is None:
            return None
        from clpl_moe.evaluate.evaluation import evaluate_retrieval

        def evaluator(encoder: Encoder) -> dict[str, float]:
            metrics = ("nDCG@5", "nDCG@10", "R@100")
            result = evaluate_retrieval(
                encoder, collection, self._encoding(), top_k=100, metrics=metrics, progress=False
            )
            names = {"nDCG@5": "ndcg@5", "nDCG@10": "ndcg@10", "R@100": "recall@100"}
            return {names[name]: value for name, value in result.metrics.items()}

        return evaluator

    def _make_refresher(self) -> NegativeRefresher | None:
        args = self.training_args
        if self.index is None or args.ance_refresh is None:
            return None
        return NegativeRefresher(
            self.train_dataset,
            self.index,
            args.ance_selection(),
            self._encoding(),
            every=args.ance_refresh,
            seed=args.seed,
            folder=args.folder / "embeddings",
        )

    def _encoding(self) -> EncodingArguments:
        """How texts are encoded in between steps."""
        data_args = self.data_args
        return EncodingArguments(
            data_args.query_max_len, data_args.passage_max_len, self.training_args.dev_batch_tokens
        )

    def run(self, on_plan: Callable[[Plan], None] | None = None) -> TrainResult:
        """Train, from the beginning or from a checkpoint, and leave the model in the run folder.

        Args:
            on_plan: gets the plan when all has been checked, before the first step.
        """
        args, output_dir = self.training_args, self.training_args.folder
        check_batches(self.trainer.batch_sampler)
        if args.negatives_cross_device:
            check_gathering(self.train_dataset.in_batch_negatives, self.data_args, args.world_size)
        config = resolved_config(self.model_args, self.data_args, args)
        data = describe_data(self.data_args, args)
        checkpoint = args.resume_from_checkpoint
        if checkpoint is not None:
            check_same_run(config, checkpoint)
            check_same_data(data, checkpoint)
            args.eval_on_start = False  # it was done when the run began
            if self.trainer.refresher is not None:
                self.trainer.refresher.load(Path(checkpoint) / NEGATIVES_FILE)
        if self.trainer.is_world_process_zero():
            with atomic_open(output_dir / CONFIG_FILE) as file:
                yaml.safe_dump(config, file, allow_unicode=True, sort_keys=False)
            write_json(output_dir / DATA_FILE, data)
            if on_plan is not None:
                on_plan(self.plan)
        if checkpoint is not None and self.trainer.is_over(checkpoint):
            self.trainer.load_result(checkpoint)
        else:
            self.trainer.train(resume_from_checkpoint=checkpoint)
        self.trainer.save_model()
        self.trainer.save_state()
        facts = self._card_facts()
        if self.trainer.is_world_process_zero():
            write_model_card(facts)
        best = self.trainer.state.best_model_checkpoint
        return TrainResult(
            output_dir,
            before=metrics_at(facts.evaluations, 0),
            after=metrics_at(facts.evaluations, facts.saved_step) if facts.saved_step > 0 else None,
            best_checkpoint=None if best is None else output_dir / Path(best).name,
            metrics_file=output_dir / METRICS_FILE,
            plan=self.plan,
        )

    def _card_facts(self) -> CardFacts:
        state, encoder = self.trainer.state, self.model.model
        best = state.best_model_checkpoint if self.training_args.load_best_model_at_end else None
        course = self.training_args.folder / METRICS_FILE
        records = read_metrics(course) if course.exists() else []
        return CardFacts(
            self.model_args,
            self.data_args,
            self.training_args,
            self.settings,
            experts=encoder.config.moe if has_experts(encoder) else None,
            parameters=sum(p.numel() for p in encoder.parameters()),
            trained_parameters=sum(p.numel() for p in self.model.parameters() if p.requires_grad),
            examples=len(self.train_dataset),
            steps=state.global_step,
            saved_step=state.global_step if best is None else int(best.rpartition("-")[2]),
            evaluations=[record for record in records if "eval_ndcg@10" in record],
        )


def open_dev_collection(args: CLPLTrainingArguments) -> Collection | None:
    """The collection of evaluation in training, or None."""
    if args.dev_collection is None or args.dev_language is None:
        return None
    return Collection.load(args.dev_collection, args.dev_language, args.dev_split)


def open_ance_index(data_args: CLPLDataArguments, training_args: CLPLTrainingArguments) -> PassageIndex | None:
    """The passages that refreshes mine from; None without refreshes.

    Raises:
        UserError: the collection or the store of positive queries has a fault, or the run wants teacher scores too.
    """
    args = training_args
    if args.ance_refresh is None or args.ance_collection is None or args.ance_language is None:
        return None
    if data_args.knowledge_distillation:
        raise UserError(
            "knowledge_distillation needs scores of a teacher, mined negatives have none: unset ance_refresh"
        )
    collection = Collection.load(args.ance_collection, args.ance_language, args.ance_split)
    return PassageIndex.load(collection, args.ance_positive_queries)
