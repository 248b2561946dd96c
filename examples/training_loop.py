"""CLPL and experts in a training loop of one's own: ``python examples/training_loop.py models/small-encoder runs/loop``."""

from __future__ import annotations

import sys

import torch

from clpl_moe import CLPLLoss, Encoder, MoEConfig, inject_moe

# Query, positive, hard negative, the queries that the negative answers.
ROWS = [
    (
        "등대는 언제 불을 켜나요?",
        "등대지기는 해가 지기 십 분 전에 불을 켠다.",
        "등대의 불빛은 삼십 킬로미터 밖에서도 보인다.",
        ["등대 불빛은 얼마나 멀리 보이나요?", "배에서 등대가 보이는 거리는?"],
    ),
    (
        "빵 반죽은 얼마나 쉬게 해야 하나요?",
        "반죽은 따뜻한 곳에서 두 시간 동안 쉬게 한다.",
        "빵은 이백 도에서 사십 분 동안 굽는다.",
        ["빵은 몇 도에서 굽나요?"],
    ),
    (
        "마을 도서관은 누가 지었나요?",
        "도서관은 은퇴한 목수 세 사람이 지었다.",
        "도서관은 월요일마다 문을 닫는다.",
        ["도서관이 쉬는 날은 언제인가요?"],
    ),
    (
        "강을 건너는 다리는 왜 무너졌나요?",
        "홍수로 기둥 아래의 흙이 쓸려 나가 다리가 무너졌다.",
        "새 다리는 자전거와 사람만 건널 수 있다.",
        [],  # not known: this negative has no penalty
    ),
]


def train(model: str, output: str, epochs: int = 3) -> list[float]:
    """Train on :data:`ROWS`, save the encoder to ``output``, and return the loss of each step."""
    torch.manual_seed(0)
    encoder = Encoder.load(model)
    inject_moe(encoder, MoEConfig(num_experts=2, layers="every:2"))
    optimizer = torch.optim.AdamW(encoder.train().parameters(), lr=2e-5)
    loss_function = CLPLLoss(temperature=0.02, penalty_weight=0.1)
    losses = []
    for _ in range(epochs):
        for rows in (ROWS[:2], ROWS[2:]):
            query = encoder.embed([row[0] for row in rows], "query")  # (B, D)
            passages = encoder.embed([text for row in rows for text in row[1:3]], "passage")  # (2B, D)
            # Passage 2i + 1 is the negative of row i.
            pairs = [(text, 2 * i + 1) for i, row in enumerate(rows) for text in row[3]]
            negative_queries = encoder.embed([text for text, _ in pairs], "query")  # (M, D)
            negative_index = torch.tensor([place for _, place in pairs], device=encoder.device)  # (M,)
            terms = loss_function(query, passages, negative_queries, negative_index)
            terms.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(terms.loss.item())
            print(f"loss {losses[-1]:.4f}  contrastive {terms.contrastive:.4f}  penalty {terms.penalty:.4f}")
    encoder.save(output)
    return losses


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python examples/training_loop.py MODEL OUTPUT")
    train(*sys.argv[1:])
