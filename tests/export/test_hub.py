"""Uploads, to a stand-in for the hub."""

import types

import pytest
from huggingface_hub.errors import HfHubHTTPError

from clpl_moe import UserError
from clpl_moe.export import export
from clpl_moe.export.__main__ import main


@pytest.fixture
def hub(monkeypatch):
    """The calls that the hub gets."""
    calls = []

    class Api:
        def create_repo(self, name, **options):
            calls.append(("create_repo", name, options))
            return types.SimpleNamespace(repo_id=f"me/{name}" if "/" not in name else name)

        def create_branch(self, name, **options):
            calls.append(("create_branch", name, options))

        def upload_folder(self, **options):
            files = sorted(path.name for path in options["folder_path"].iterdir())
            calls.append(("upload_folder", files, options))
            return types.SimpleNamespace(commit_url=f"https://hub/{options['repo_id']}/commit/1")

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    return calls


def test_the_folder_is_uploaded_with_its_card(tiny_encoder, tmp_path, hub, capsys):
    main([str(tiny_encoder), str(tmp_path / "out"), "--push_to_hub", "me/mine"])
    (_, name, created), (_, files, options) = hub
    assert (name, created) == ("me/mine", {"private": False, "exist_ok": True})
    assert {"README.md", "model.safetensors", "config.json", "tokenizer.json", "modules.json"} <= set(files)
    assert (options["repo_id"], options["revision"]) == ("me/mine", None)
    assert 'SentenceTransformer("me/mine")' in (tmp_path / "out/README.md").read_text()
    assert capsys.readouterr().out.endswith("uploaded: https://hub/me/mine/commit/1\n")


def test_a_branch_and_a_private_model(tiny_encoder, tmp_path, hub):
    options = {"push_to_hub": "mine", "hub_revision": "v2", "hub_private": True}
    exported = export(input=tiny_encoder, output=tmp_path / "out", **options)
    assert [call[0] for call in hub] == ["create_repo", "create_branch", "upload_folder"]
    assert hub[0][2]["private"]
    assert hub[1][1:] == ("me/mine", {"branch": "v2", "exist_ok": True})
    assert hub[2][2]["revision"] == "v2"
    assert exported.commit == "https://hub/me/mine/commit/1"


def test_a_hub_that_refuses_leaves_the_folder(tiny_encoder, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        response = types.SimpleNamespace(headers={}, request=None)
        raise HfHubHTTPError("401 Client Error: Invalid username or password.", response=response)

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", refuse)
    with pytest.raises(
        UserError, match=r"push_to_hub: HfHubHTTPError: 401 Client Error.*out is complete: .*hf upload me/mine"
    ):
        export(input=tiny_encoder, output=tmp_path / "out", push_to_hub="me/mine")
    assert (tmp_path / "out/model.safetensors").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"push_to_hub": "a/b/c"}, "push_to_hub: "),
        ({"hub_revision": "v2"}, "hub_revision: goes with push_to_hub"),
        ({"int8": True}, "int8: goes with to onnx"),
        ({"check_texts": "a.txt"}, "check_texts: goes with to onnx"),
        ({"to": "onnx", "dtype": "float16"}, "dtype: found float16, expected float32 with to onnx"),
        ({"to": "onnx", "check_texts": "none.txt"}, "none.txt: no such file or folder"),
    ],
)
def test_wrong_options_end_before_the_work(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        export(**{"input": "no such model", "output": tmp_path / "out", **options})
    assert not (tmp_path / "out").exists()
