"""What a run reads besides its base model: training set, dev collection, and the passages that refreshes mine from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from clpl_moe.common.errors import UserError
from clpl_moe.data.dataset import CLPLTrainDataset
from clpl_moe.data.sampler import EpochBatchSampler
from clpl_moe.mine.index import PassageIndex
from clpl_moe.retrieval.collection import Collection
from clpl_moe.train.arguments import CLPLDataArguments, CLPLTrainingArguments


@dataclass
class RunData:
    """The data of a run; ``dev`` and ``index`` are None without evaluation and without refreshes."""

    dataset: CLPLTrainDataset
    batches: EpochBatchSampler
    dev: Collection | None
    index: PassageIndex | None


def open_data(data_args: CLPLDataArguments, args: CLPLTrainingArguments) -> RunData:
    """Open and check the data of a run.

    Raises:
        UserError: data or a collection have a fault, no batch can be made, or the run wants scores of mined negatives.
    """
    dataset = CLPLTrainDataset(data_args, seed=args.seed)
    batches = EpochBatchSampler(
        dataset.part_sizes,
        args.per_device_train_batch_size,
        args.seed if args.data_seed is None else args.data_seed,
        process_index=args.process_index,
        num_processes=args.world_size,
        separate_parts=data_args.same_dataset_within_batch,
        drop_last=args.dataloader_drop_last,
    )
    if len(batches) == 0:  # a run would end without a step
        raise UserError(
            f"dataloader_drop_last leaves out everything: no file has the {batches.batch_size * args.world_size} examples"
            " of a batch; lower per_device_train_batch_size or remove dataloader_drop_last"
        )
    if args.negatives_cross_device:
        check_gathering(dataset.in_batch_negatives, data_args, args.world_size)
    dev = index = None
    if args.dev_collection is not None and args.dev_language is not None:
        dev = Collection.load(args.dev_collection, args.dev_language, args.dev_split)
    if args.ance_refresh is not None and args.ance_collection is not None and args.ance_language is not None:
        if data_args.knowledge_distillation:
            raise UserError(
                "knowledge_distillation needs scores of a teacher, mined negatives have none: unset ance_refresh"
            )
        corpus = Collection.load(args.ance_collection, args.ance_language, args.ance_split)
        index = PassageIndex.load(corpus, args.ance_positive_queries)
    return RunData(dataset, batches, dev, index)


def check_gathering(in_batch_negatives: Sequence[bool], data_args: CLPLDataArguments, world_size: int) -> None:
    """Refuse what makes some processes of a step gather negatives and others not: they would wait for each other."""
    if world_size > 1 and not data_args.same_dataset_within_batch and len(set(in_batch_negatives)) > 1:
        raise UserError(
            "negatives_cross_device cannot mix files with in-batch negatives and files without (*no_in_batch_neg) in a"
            " batch: set same_dataset_within_batch"
        )
