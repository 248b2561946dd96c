import socket

import pytest
from huggingface_hub import constants
from transformers import AutoModel, AutoTokenizer

from clpl_moe.common.errors import UserError
from clpl_moe.encoder import hub, weights
from clpl_moe.encoder.load import load_encoder
from clpl_moe.encoder.weights import find_file
from clpl_moe.llm.local import LocalModel
from clpl_moe.llm.options import AskingArguments
from clpl_moe.mine.rerank import Reranker
from clpl_moe.validate.reading import _load_counter
from helpers.hub import put_into_cache


@pytest.fixture
def endpoint(monkeypatch):
    """An address at which nothing listens, or, once something does, nothing but what the test answers."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub._out_of_reach.cache_clear()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{listener.getsockname()[1]}")
        yield listener
    hub._out_of_reach.cache_clear()


@pytest.fixture
def requests(monkeypatch):
    """With what transformers is asked for files; and how often somebody looks whether the hub is there."""
    asked, session = [], hub.get_session
    looks = []
    monkeypatch.setattr(weights, "cached_file", lambda path, name, **options: asked.append(options))
    monkeypatch.setattr(hub, "get_session", lambda: looks.append(1) or session())
    return asked, looks


def test_a_hub_out_of_reach_is_looked_for_once(endpoint, requests, monkeypatch):
    asked, looks = requests
    monkeypatch.setattr("time.monotonic", lambda: 1000.0)
    for name in ("config.json", "adapter_config.json", "model.safetensors"):
        find_file("some/model", name, {"revision": "main"})
    assert [options["local_files_only"] for options in asked] == [True] * 3
    assert asked[0]["revision"] == "main"
    assert len(looks) == 1
    monkeypatch.setattr("time.monotonic", lambda: 1100.0)  # it may be there again
    find_file("some/model", "config.json")
    assert len(looks) == 2


def test_nobody_looks_for_the_hub_to_read_a_folder(endpoint, requests, tmp_path):
    assert hub.asked({"revision": None}, tmp_path) == {"revision": None}
    assert not requests[1]
    assert hub.asked({}, tmp_path / "none") == {"local_files_only": True}


def test_a_name_that_is_nowhere_is_told_at_once(endpoint, monkeypatch):
    """huggingface_hub asks again and again for a file, which takes most of a minute."""
    asked = []
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *_, **__: asked.append(1))
    arguments = AskingArguments(
        train_data=["x"], output="y", language="ko", model="models/none", backend="transformers"
    )
    for load in (
        lambda: _load_counter("models/none", revision=None),
        lambda: LocalModel(arguments, False),
        lambda: Reranker("models/none", 8, 1, trust_remote_code=False),
    ):
        with pytest.raises(UserError, match="models/none: neither a folder here nor a model that could be fetched"):
            load()
    assert not asked


def test_a_model_in_the_cache_is_loaded_without_asking_the_hub(endpoint, tiny_encoder, tmp_path, monkeypatch):
    seen = []
    fetched = {cls: cls.from_pretrained for cls in (AutoModel, AutoTokenizer)}
    put_into_cache(monkeypatch, tmp_path / "cache", "some/model", {"0" * 40: tiny_encoder}, main="0" * 40)
    for cls, load in fetched.items():
        monkeypatch.setattr(cls, "from_pretrained", lambda *a, _load=load, **o: seen.append(o) or _load(*a, **o))
    load_encoder("some/model")
    assert [options["local_files_only"] for options in seen] == [True, True]


@pytest.mark.parametrize("status", [200, 404])
def test_a_hub_that_answers_is_asked(endpoint, requests, status):
    import threading

    def answer():
        connection, _ = endpoint.accept()
        with connection:
            connection.recv(4096)
            connection.sendall(f"HTTP/1.1 {status} Said\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode())

    endpoint.listen()
    server = threading.Thread(target=answer, daemon=True)
    server.start()
    find_file("some/model", "config.json")
    server.join(10)
    assert "local_files_only" not in requests[0][0]


def test_without_a_network_by_setting_nobody_looks(endpoint, requests, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    find_file("some/model", "config.json")
    assert requests == ([{"_raise_exceptions_for_missing_entries": False}], [])
