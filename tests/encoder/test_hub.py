import socket

import pytest
from huggingface_hub import constants

from clpl_moe.encoder import hub, weights
from clpl_moe.encoder.weights import find_file


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
