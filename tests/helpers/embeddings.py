import torch


def make_batch(batch=3, group=3, negative_index=(1, 1, 5, 8), dim=8, dtype=torch.float32, seed=0):
    """Keyword arguments of a loss: embeddings that need a gradient, of any length."""
    generator = torch.Generator().manual_seed(seed)

    def rows(count):
        return torch.randn(count, dim, generator=generator, dtype=dtype).requires_grad_()

    return {
        "query": rows(batch),
        "passages": rows(batch * group),
        "negative_queries": rows(len(negative_index)),
        "negative_index": torch.tensor(negative_index, dtype=torch.int64),
    }
