"""A router of your own: noise on the logits while training, so that experts near the first choice are tried as well.

Run it: ``python examples/own_router.py``. It puts experts with this router into a tiny encoder, trains it for a few steps,
saves it and loads it again. To fine-tune with it, import this file before training:

    import own_router
    from clpl_moe.train import train

    train(config="ko", router="noisy", output_dir="runs/ko-noisy")

A model with such a router loads wherever the class has been registered, so wherever this file has been imported;
elsewhere it is refused with the router's name.
"""

import tempfile

import torch
from torch import Tensor
from transformers import XLMRobertaConfig, XLMRobertaModel

from clpl_moe import MoEConfig, inject_moe
from clpl_moe.moe import Router, register_router


@register_router("noisy")
class NoisyRouter(Router):
    """Straight-through weights (1 at ``top_k`` 1, with the probability's gradient) on logits that get noise in training."""

    unit_at_top_1 = True  # a promise that saves a product; without it the result is the same

    def score(self, x: Tensor) -> Tensor:
        """Logits (T, N) of tokens x (T, in_features); with Gaussian noise while training."""
        logits = super().score(x)
        return logits + 0.1 * torch.randn_like(logits) if self.training else logits

    def weigh(self, logits: Tensor, experts: Tensor) -> Tensor:
        """Weights (T, top_k) of the chosen experts (T, top_k): they sum to 1, so that injection keeps the function."""
        chosen = logits.softmax(-1).gather(-1, experts)
        return chosen / chosen.sum(-1, keepdim=True).detach()


def main() -> None:
    """Inject, train, save, load."""
    torch.manual_seed(0)
    shape = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    dense = XLMRobertaModel(XLMRobertaConfig(**shape, intermediate_size=64)).eval()
    batch = {"input_ids": torch.randint(4, 100, (8, 12)), "attention_mask": torch.ones(8, 12, dtype=torch.long)}
    with torch.no_grad():
        before = dense(**batch).last_hidden_state

    encoder = inject_moe(dense, MoEConfig(num_experts=4, router="noisy"))
    with torch.no_grad():
        change = (encoder(**batch).last_hidden_state - before).abs().max()
    print(f"injection changes the output by at most {change:.0e}")

    optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-3)
    encoder.train()
    for step in range(5):
        hidden = encoder(**batch).last_hidden_state[:, 0]
        similarities = hidden[:4] @ hidden[4:].T
        loss = torch.nn.functional.cross_entropy(similarities, torch.arange(4))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1}: loss {loss.item():.3f}")

    encoder.eval()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        encoder.save_pretrained(folder)
        loaded = type(encoder).from_pretrained(folder).eval()
        change = (loaded(**batch).last_hidden_state - encoder(**batch).last_hidden_state).abs().max()
    router = loaded.encoder.layer[0].intermediate.router
    print(f"saved and loaded with {type(router).__name__}, the output differs by at most {change:.0e}")


if __name__ == "__main__":
    main()
