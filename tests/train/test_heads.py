import pytest
import torch

from clpl_moe.common.errors import UserError
from clpl_moe.train.heads import read_heads
from helpers.tiny_training import arguments, make_runner, write_triplets


def test_heads_of_another_shape_are_refused(tiny_encoder, tmp_path):
    data = write_triplets(tmp_path / "t.jsonl", 4)
    with pytest.raises(UserError, match=r"colbert_linear\.pt does not fit a head of 32 to 16"):
        make_runner(arguments(tiny_encoder, data, tmp_path / "a", unified_finetuning=True, colbert_dim=16))


class Hub:
    """Stands in for the hub: gives the files of one folder, or no answer."""

    def __init__(self, monkeypatch, folder):
        self.folder, self.asked, self.error = folder, [], None
        monkeypatch.setattr("huggingface_hub.hf_hub_download", self.download)

    def download(self, repository, name, **hub):
        from huggingface_hub.errors import EntryNotFoundError

        self.asked.append((name, hub))
        if self.error is not None:
            raise self.error.__new__(self.error)
        if not (self.folder / name).exists():
            raise EntryNotFoundError.__new__(EntryNotFoundError)
        return str(self.folder / name)


def test_heads_of_a_hub_model(tiny_encoder, tmp_path, monkeypatch, caplog):
    from huggingface_hub.errors import LocalEntryNotFoundError

    hub = Hub(monkeypatch, tiny_encoder)
    heads = read_heads("someone/m3", required=False, cache_dir="cache", token="secret")
    assert heads["sparse_linear.pt"]["weight"].equal(torch.load(tiny_encoder / "sparse_linear.pt")["weight"])
    assert list(heads) == ["sparse_linear.pt", "colbert_linear.pt"]
    assert hub.asked[0] == ("sparse_linear.pt", {"cache_dir": "cache", "token": "secret"})
    # A model that has none, and is known to have none.
    hub.folder = tmp_path
    assert read_heads("someone/e5", required=True) == {}
    assert not caplog.records
    # It cannot be told: warned of where they are only kept, an error where they are trained.
    hub.error = LocalEntryNotFoundError
    assert read_heads("someone/m3", required=False) == {}
    assert "cannot be told whether there are sparse and multi-vector heads" in caplog.text
    with pytest.raises(UserError, match="someone/m3: neither a folder here nor a model that the hub gives"):
        read_heads("someone/m3", required=True)


def test_heads_that_cannot_be_read(tiny_encoder, tmp_path):
    (tmp_path / "sparse_linear.pt").write_bytes(b"no tensors")
    with pytest.raises(UserError, match=r"sparse_linear\.pt: the head cannot be read"):
        read_heads(str(tmp_path), required=False)
