"""Make a folder with a random encoder of BGE-M3's shape: what counts for speed, without its 2.3 GB of weights.

``python benchmarks/random_model.py FOLDER --tokenizer models/small-encoder``
"""

from __future__ import annotations

import argparse

import torch
from transformers import AutoTokenizer, XLMRobertaConfig, XLMRobertaModel

from gpu import BGE_M3


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="folder to write")
    parser.add_argument("--tokenizer", required=True, help="model folder with XLM-R's tokenizer")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    shape = BGE_M3 | {"vocab_size": max(BGE_M3["vocab_size"], len(tokenizer))}
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        encoder = XLMRobertaModel(XLMRobertaConfig(**shape), add_pooling_layer=False)
    encoder.save_pretrained(args.folder)
    tokenizer.save_pretrained(args.folder)


if __name__ == "__main__":
    main()
