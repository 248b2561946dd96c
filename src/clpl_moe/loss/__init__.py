"""The contrastive learning penalty loss, for any trainer."""

from clpl_moe.loss.clpl import CLPLLoss, CLPLOutput
from clpl_moe.loss.distributed import gather_rows
from clpl_moe.loss.options import CLPLOptions, Penalty
from clpl_moe.loss.sentence_transformers import SentenceTransformerCLPLLoss

__all__ = ["CLPLLoss", "CLPLOptions", "CLPLOutput", "Penalty", "SentenceTransformerCLPLLoss", "gather_rows"]
