"""CLPL in sentence-transformers' trainer: ``python examples/sentence_transformers_trainer.py --model models/small-encoder``.

The loss takes its columns by their order: query, positive, negatives, then one query for each negative. An empty string
stands for a negative whose queries are not known. With ``num_negatives=2`` there are two columns of negatives, and then
two columns of their queries.
"""

from __future__ import annotations

import argparse

from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)

from clpl_moe import SentenceTransformerCLPLLoss

ROWS = [
    {
        "anchor": "When does the night ferry leave?",
        "positive": "The last boat to the islands departs at half past eleven in the evening.",
        "negative_1": "The first boat to the islands departs at six in the morning.",
        "negative_query_1": "How early can one take a boat?",
    },
    {
        "anchor": "How is the bread kept fresh?",
        "positive": "Wrapped in linen, a loaf stays soft for four days.",
        "negative_1": "A loaf is baked for forty minutes at a falling temperature.",
        "negative_query_1": "How long does the bread stay in the oven?",
    },
    {
        "anchor": "Who looks after the lighthouse?",
        "positive": "A retired teacher cleans the lamp and keeps its log.",
        "negative_1": "The lighthouse was painted red and white after the war.",
        "negative_query_1": "",
    },
    {
        "anchor": "Why did the mill close?",
        "positive": "When the river was diverted, the mill lost its water and stopped work.",
        "negative_1": "The mill ground rye and barley for nine villages.",
        "negative_query_1": "What was made at the mill?",
    },
]


def main(argv: list[str] | None = None) -> SentenceTransformer:
    """Train on :data:`ROWS` and save the model."""
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("--model", default="models/small-encoder", help="folder or hub name")
    parser.add_argument(
        "--output", default="runs/sentence-transformers", help="folder of the run; the model is in final/"
    )
    parser.add_argument("--epochs", type=int, default=1)
    options = parser.parse_args(argv)

    model = SentenceTransformer(options.model)
    # The prompts of the encoder, for each column; BGE-M3 has none.
    queries, passages = ((model.prompts or {}).get(kind) or "" for kind in ("query", "document"))
    prompts = {
        "anchor": queries,
        "positive": passages,
        "negative_1": passages,
        "negative_query_1": queries,
    }
    loss = SentenceTransformerCLPLLoss(
        model,
        temperature=0.02,
        penalty_weight=0.8,
        penalty="contrastive",
        num_negatives=1,
        query_prompt=queries,
    )
    arguments = SentenceTransformerTrainingArguments(
        options.output,
        prompts={column: prompt for column, prompt in prompts.items() if prompt},
        num_train_epochs=options.epochs,
        per_device_train_batch_size=4,
        learning_rate=2e-5,
        report_to="none",
    )
    columns = {name: [row[name] for row in ROWS] for name in ROWS[0]}
    trainer = SentenceTransformerTrainer(
        model=model, args=arguments, train_dataset=Dataset.from_dict(columns), loss=loss
    )
    trainer.train()
    model.save_pretrained(f"{options.output}/final")
    return model


if __name__ == "__main__":
    main()
