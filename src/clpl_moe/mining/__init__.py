"""Hard negatives: which passages may be one, and which of these are taken. For ``mine`` and for refreshes in training."""
