"""What tests of gradient caching compare it with, and how."""

import torch


def forward_with_graph(module, forward, chunks):
    """What ``cached_forward`` has to equal."""
    return tuple(torch.cat(parts) for parts in zip(*(forward(chunk) for chunk in chunks)))


def assert_close(found, expected, relative=1e-5):
    """Gradients by name: they deviate by ``relative`` of their joint norm at most, and each by a hundred times that of its
    own, since some are sums whose parts cancel in float32."""
    assert found.keys() == expected.keys()
    norm = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    deviation = torch.stack([(found[name] - gradient).norm() for name, gradient in expected.items()]).norm()
    assert norm > 0
    assert deviation <= relative * norm, (deviation, norm)
    for name, gradient in expected.items():
        # But for rounding, the biases of keys have no gradient: softmax does not see them.
        if not name.endswith("key.bias"):
            deviation = (found[name] - gradient).norm()
            assert deviation <= 100 * relative * gradient.norm(), (name, deviation, gradient.norm())


def gradients(module):
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
