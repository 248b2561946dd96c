import pytest
import torch

from clpl_moe.common.errors import UserError
from clpl_moe.encoder.heads import HEAD_FILES, find_heads, read_head


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
