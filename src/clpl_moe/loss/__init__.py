"""The contrastive learning penalty loss, for any trainer."""

from clpl_moe.loss.clpl import CLPLLoss, CLPLOutput, Penalty, gather_rows
from clpl_moe.loss.sentence_transformers import SentenceTransformerCLPLLoss

__all__ = ["CLPLLoss", "CLPLOutput", "Penalty", "SentenceTransformerCLPLLoss", "gather_rows"]
