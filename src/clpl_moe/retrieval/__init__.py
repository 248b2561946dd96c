"""Retrieval: encode a collection, search it exactly, score the result. Mining and every evaluation use it."""
