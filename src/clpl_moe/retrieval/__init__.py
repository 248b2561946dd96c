"""Retrieval that mining, evaluation and training share: collections, embeddings of a corpus on disk, exact search."""
