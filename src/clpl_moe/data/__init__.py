"""Training data: its schema, the dataset, the batches and their tokens."""
