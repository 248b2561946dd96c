import pytest

from helpers.synthesis import Llm


@pytest.fixture
def llm(tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    servers = []

    def start(plan=None, seconds=0.0):
        servers.append(Llm(tmp_path / f"server{len(servers)}", plan or {}, seconds))
        return servers[-1]

    yield start
    for server in servers:
        server.process.kill()
        server.process.wait()
