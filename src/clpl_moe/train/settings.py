"""Pooling and prompts of a run."""

from __future__ import annotations

import logging

from clpl_moe.encoder.settings import EmbeddingSettings, read_settings
from clpl_moe.train.arguments import CLPLDataArguments, CLPLModelArguments, CLPLTrainingArguments

logger = logging.getLogger(__name__)


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
