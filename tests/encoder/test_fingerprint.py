import torch

from clpl_moe.encoder import load_encoder
from clpl_moe.encoder.fingerprint import model_fingerprint


def test_follows_the_content(tiny_encoder, tmp_path):
    model, tokenizer = load_encoder(tiny_encoder)
    first = model_fingerprint(model, tokenizer)
    tokenizer(["x", "yy"], padding=True, truncation=True, max_length=5)
    assert model_fingerprint(model, tokenizer) == first
    model.save_pretrained(tmp_path / "copy")
    tokenizer.save_pretrained(tmp_path / "copy")
    copy, copied_tokenizer = load_encoder(tmp_path / "copy")
    assert model_fingerprint(copy, copied_tokenizer) == first
    with torch.no_grad():
        copy.encoder.layer[1].output.dense.bias[3] += 1e-6
    assert model_fingerprint(copy, copied_tokenizer) != first
    copied_tokenizer.add_tokens(["newtoken"])
    assert model_fingerprint(model, copied_tokenizer) != first
