import pytest
import torch
from huggingface_hub.utils import are_progress_bars_disabled
from transformers.utils import logging as transformers_logging

from clpl_moe import Encoder
from clpl_moe.common.errors import UserError
from clpl_moe.encoder import load_encoder
from clpl_moe.encoder.weights import (
    HEAD_FILES,
    find_heads,
    load_weights,
    model_fingerprint,
    no_bar_of_weights,
    read_head,
    read_weights,
    weight_names,
)
from helpers.tiny import make_batch, make_encoder, make_moe


@pytest.mark.parametrize("size", ["20KB", "5GB"])
def test_weights_in_one_file_or_several(tmp_path, size):
    encoder, batch = make_moe(), make_batch([9, 4])
    encoder.save_pretrained(tmp_path, max_shard_size=size)
    assert (tmp_path / "model.safetensors.index.json").is_file() is (size == "20KB")
    other = make_moe(perturb=False)
    load_weights(other, tmp_path)
    torch.testing.assert_close(other(**batch)[0], encoder(**batch)[0])
    state = encoder.state_dict()
    assert sorted(weight_names(str(tmp_path), {})) == sorted(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in read_weights(str(tmp_path), {}).items())


def test_load_weights_refuses_another_model(tmp_path):
    make_encoder().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="the weights do not fit this model"):
        load_weights(make_moe(), tmp_path)


def test_heads_of_a_folder(tiny_encoder, tmp_path):
    files = find_heads(tiny_encoder)
    assert sorted(files) == sorted(HEAD_FILES)
    assert {name: tuple(read_head(file)["weight"].shape) for name, file in files.items()} == {
        "sparse_linear.pt": (1, 32),
        "colbert_linear.pt": (32, 32),
    }
    assert find_heads(tmp_path) == {}


@pytest.mark.parametrize(
    "content", [[1], {"weight": torch.ones(2, 3)}, {"weight": torch.ones(2, 3), "bias": torch.ones(3)}]
)
def test_other_files_are_refused(tmp_path, content):
    torch.save(content, tmp_path / "sparse_linear.pt")
    with pytest.raises(UserError, match="sparse_linear.pt: not a head"):
        read_head(str(tmp_path / "sparse_linear.pt"))


def test_a_hub_model_has_what_the_hub_has(tmp_path, monkeypatch):
    from huggingface_hub import errors

    def download(repository, name, **hub):
        assert (repository, hub) == ("some/model", {"token": "secret"})
        if name == "colbert_linear.pt":
            raise errors.EntryNotFoundError.__new__(errors.EntryNotFoundError)
        return str(tmp_path / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert find_heads("some/model", token="secret") == {"sparse_linear.pt": str(tmp_path / "sparse_linear.pt")}


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


@pytest.mark.parametrize("enabled", [True, False])
def test_no_bar_of_weights_and_the_setting_is_as_before(tiny_encoder, tmp_path, capfd, enabled):
    before = transformers_logging.is_progress_bar_enabled(), are_progress_bars_disabled()
    (transformers_logging.enable_progress_bar if enabled else transformers_logging.disable_progress_bar)()
    try:
        Encoder.load(tiny_encoder).save(tmp_path)
        assert transformers_logging.is_progress_bar_enabled() == enabled
        assert are_progress_bars_disabled() != enabled
        with no_bar_of_weights():
            assert not transformers_logging.is_progress_bar_enabled()
            assert are_progress_bars_disabled() != enabled  # downloads show theirs
    finally:
        transformers_logging.enable_progress_bar()
    assert before == (True, False)
    assert capfd.readouterr().err == ""
