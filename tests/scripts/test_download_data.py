"""``scripts/download_data.sh`` against a server on this machine; what follows the download is a stand-in."""

import os
import shutil
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "download_data.sh"
pytestmark = pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")


@pytest.fixture
def server():
    class Server(BaseHTTPRequestHandler):
        files = {  # noqa: RUF012
            f"/{language}_CLPL_train_data.jsonl": f'{{"query": "{language}"}}\n'.encode() * 100
            for language in ("ko", "fa", "hi")
        }
        asked, ranges = [], True

        def do_GET(self):
            wanted = self.headers.get("Range")
            self.asked.append((self.path, wanted))
            content = self.files.get(self.path)
            if content is None:
                return self.send_error(404)
            start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and self.ranges else 0
            if start >= len(content):
                return self.send_error(416)
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            self.wfile.write(content[start:])

        def log_message(self, *_):
            pass

    made = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=made.serve_forever, daemon=True).start()
    Server.address = f"http://127.0.0.1:{made.server_port}"
    yield Server
    made.shutdown()
    made.server_close()


def run(tmp_path, address, *languages, code=0, **variables):
    """Run the script in ``tmp_path`` where an environment is set up, with a ``python`` that notes its arguments and ends with
    ``code``."""
    environment = tmp_path / "venv"
    (environment / "bin").mkdir(parents=True, exist_ok=True)
    python = environment / "bin" / "python"
    python.write_text(f'#!/bin/sh\necho "$@" >> "{tmp_path}/calls"\nexit {code}\n')
    python.chmod(0o755)
    (environment / "bin" / "activate").write_text(f'PATH="{environment}/bin:$PATH"\n')
    (environment / ".installed").touch()
    own = {"VENV": str(environment), "DATA_URL": address, "OUTPUT": str(tmp_path / "data"), "no_proxy": "*"}
    return subprocess.run(
        ["bash", str(SCRIPT), *languages],
        cwd=tmp_path,
        env=os.environ | own | variables,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_files_come_once_and_are_checked(tmp_path, server):
    done = run(tmp_path, server.address)
    assert done.returncode == 0, done.stderr
    files = [tmp_path / "data" / f"{language}_CLPL_train_data.jsonl" for language in ("ko", "fa", "hi")]
    for path in files:
        assert path.read_bytes() == server.files[f"/{path.name}"]
        assert f"  {path}" in done.stdout
    assert "100 lines, SHA-256 " in done.stdout
    assert (tmp_path / "calls").read_text().split() == ["-m", "clpl_moe.validate", *map(str, files)]
    server.asked.clear()
    assert run(tmp_path, server.address, "fa", code=2).returncode == 2  # as validate ends
    assert server.asked == []


def test_the_folder_is_seen_from_where_the_caller_is(tmp_path, server):
    done = run(tmp_path, server.address, "ko", OUTPUT="my own")
    assert done.returncode == 0, done.stderr
    file = tmp_path / "my own" / "ko_CLPL_train_data.jsonl"
    assert file.read_bytes() == server.files[f"/{file.name}"]
    assert (tmp_path / "calls").read_text() == f"-m clpl_moe.validate {file}\n"


@pytest.mark.parametrize(
    ("share", "ranges"), [(0.4, True), (0.4, False), (1.0, True)], ids=["middle", "no range", "all"]
)
def test_an_interrupted_download_goes_on(tmp_path, server, share, ranges):
    server.ranges = ranges
    content = server.files["/ko_CLPL_train_data.jsonl"]
    part = tmp_path / "data" / "ko_CLPL_train_data.jsonl.part"
    part.parent.mkdir()
    there = int(len(content) * share)
    part.write_bytes(content[:there])
    done = run(tmp_path, server.address, "ko")
    assert done.returncode == 0, done.stderr
    assert part.with_suffix("").read_bytes() == content
    assert not part.exists()
    # Some versions of curl take what is there for the whole when nothing comes after it, others are asked again.
    assert [asked for _, asked in server.asked][:1] == [f"bytes={there}-"]
    assert ranges or server.asked[-1][1] is None


def test_what_goes_wrong_is_said(tmp_path, server):
    done = run(tmp_path, server.address, "ko", "xx")
    assert (done.returncode, server.asked) == (2, [])
    assert "error: found 'xx', expected ko, fa or hi" in done.stderr
    content = server.files.pop("/fa_CLPL_train_data.jsonl")
    part = tmp_path / "data" / "fa_CLPL_train_data.jsonl.part"
    part.parent.mkdir()
    part.write_bytes(content[:70])
    done = run(tmp_path, server.address, "fa")
    assert done.returncode == 2
    assert part.read_bytes() == content[:70]  # what had come stays
    part.unlink()
    assert f"place the file at {tmp_path}/data/fa_CLPL_train_data.jsonl yourself" in done.stderr
    server.files["/fa_CLPL_train_data.jsonl"] = b"version https://git-lfs.github.com/spec/v1\n"
    done = run(tmp_path, server.address, "fa")
    assert done.returncode == 2
    assert "found something else than JSON lines" in done.stderr
    assert not (tmp_path / "data" / "fa_CLPL_train_data.jsonl").exists()
    assert not (tmp_path / "calls").exists()
