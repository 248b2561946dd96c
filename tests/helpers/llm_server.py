"""An OpenAI-compatible server that misbehaves on purpose: ``python tests/llm_server.py FOLDER``, in a process of its own.

``FOLDER/plan.json`` says for each passage (known by the number in ``passage <n>.``) what to do at its first, second …
request (and ever after, where the last ends in "…"); after that, and for the others, a good answer. ``FOLDER/log.jsonl`` gets a line for each thing done, before
which the server makes sure that the client still listens. While ``FOLDER/hold`` exists, answers wait: those to the names in it,
or, where it is empty, all. A file ``FOLDER/held-…`` stands there for each that waits.

Of a question with ``query <n>.`` the plan has the name ``q<n>``, and a good answer is the truth about its passages: one that
holds ``answer <n>.`` answers, one that holds ``half <n>.`` answers in part. It is JSON where the request has a schema.
"""

from __future__ import annotations

import json
import re
import select
import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

lock = threading.Lock()
meeting = threading.Barrier(3)
seen: dict[str, int] = {}
working = 0


def good(number: str) -> str:
    return f"{number}번째 물음은 무엇에 관한 것인가요?"


def truth(content: str, query: str) -> list[str]:
    """For each passage of a question whether it answers."""
    passages = re.findall(r"<passage (\d+)>\n(.*?)\n</passage \1>", content, re.DOTALL)
    return [
        "yes" if f"answer {query}." in text else "partly" if f"half {query}." in text else "no" for _, text in passages
    ]


def judgement(request: dict, query: str) -> str:
    content = request["messages"][0]["content"]
    verdicts = truth(content, query)
    if "response_format" not in request:
        return "\n".join(f"[{number}] {answers}" for number, answers in enumerate(verdicts, 1))
    fields = request["response_format"]["json_schema"]["schema"]["properties"]["verdicts"]["items"]["required"]
    entries = []
    for number, answers in enumerate(verdicts, 1):
        passage = re.search(rf"<passage {number}>\npassage (\d+)", content)
        entry = {"passage": number, "answers": answers, "query": good(passage[1]) if passage else ""}
        entries.append({name: entry[name] for name in fields})
    return json.dumps({"verdicts": entries}, ensure_ascii=False)


TEXTS = {
    "empty": " \n",
    "wrong language": "What is this passage about?",
    "copied": "질문: «이것은 시험을 위한 글이다.»",
    "long": "왜 " * 150,
}


PAID = ("good", "first only", "contradiction", *TEXTS, "malformed")  # whole answers, of use or not


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        global working
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        content = request["messages"][0]["content"]
        query = re.search(r"query (\d+)\.", content)
        number = f"q{query[1]}" if query else re.search(r"passage (\d+)\.", content)[1]
        with lock:
            turn = seen[number] = seen.get(number, -1) + 1
            working += 1
        todo = [*plan.get(number, []), *plan.get("all", [])]
        forever = todo[-1] if todo and todo[-1].endswith("…") else "good"
        what = (todo[turn] if turn < len(todo) else forever).removesuffix("…")
        if what == "no schema":
            what = "400" if "response_format" in request else "good"
        time.sleep(seconds)
        if what == "meet":
            meeting.wait(60)  # until three requests are under way
        self.hold(what, number)
        with lock:
            at_once, working = working, working - 1
        entry = {"time": time.time(), "passage": number, "what": what, "at_once": at_once, "request": request}
        with lock:
            entry["what"] = "gone" if self.gone() else what
            log.write(json.dumps(entry) + "\n")
            log.flush()
        self.act(what, number, request)

    def hold(self, what: str, number: str) -> None:
        held = folder / f"held-{threading.get_ident()}"
        while what in PAID and self.is_held(number) and not self.gone():
            held.touch()
            time.sleep(0.01)
        held.unlink(missing_ok=True)

    def is_held(self, number: str) -> bool:
        try:
            names = (folder / "hold").read_text().split()
        except FileNotFoundError:
            return False
        return not names or number in names

    def gone(self) -> bool:
        """Whether the client has closed the connection."""
        readable, _, _ = select.select([self.connection], [], [], 0)
        if not readable:
            return False
        try:
            return self.connection.recv(1, socket.MSG_PEEK) == b""
        except OSError:
            return True

    def act(self, what: str, number: str, request: dict) -> None:
        echo = f"your key is {self.headers['Authorization']}, prompt {number}"
        if what == "429":
            self.reply(429, {"error": {"message": echo}}, {"Retry-After": "1"})
        elif what == "429 for long":
            self.reply(429, {"error": {"message": echo}}, {"Retry-After": "600"})
        elif what == "long 400":
            self.reply(400, {"error": {"message": "x" * 265 + echo}})
        elif what in ("400", "401", "402", "404", "500", "503"):
            self.reply(int(what), {"error": {"message": echo}})
        elif what == "html":
            self.send(502, f"<html>{echo}</html>".encode(), {"Content-Type": "text/html"})
        elif what == "timeout":
            while not self.gone():
                time.sleep(0.05)
        elif what == "cut":
            self.cut()
        elif what == "cut in the middle":
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", "500")
            self.end_headers()
            self.wfile.write(b'{"choices": [{"message": {"content": "')
            self.cut()
        elif what == "malformed":
            self.send(200, b'{"choices": [{"message": {"content": "\xea\xb0', {"Content-Type": "application/json"})
        elif what == "no choices":
            self.reply(200, {"choices": [], "usage": None, "echo": echo})
        elif what == "echo":
            self.answer(f"질문이 무엇인가요 {self.headers['Authorization']} {number}")
        elif what == "surrogate":
            self.answer(f"{number}번째 물음은 \ud83d 무엇인가요?")
        elif what == "boxer":
            self.answer(f"{number}번째 boxer는 누구인가요?")
        elif what == "first only":
            self.answer(judgement(request, number[1:]).partition(", {")[0].partition("\n")[0])
        elif what == "contradiction":
            self.answer("[1] yes\n[1] no")
        else:
            self.answer(TEXTS.get(what) or (judgement(request, number[1:]) if number[0] == "q" else good(number)))

    def answer(self, text: str) -> None:
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        self.reply(200, {"choices": [choice], "usage": {"prompt_tokens": 100, "completion_tokens": 7}})

    def reply(self, status: int, body: dict, headers: dict | None = None) -> None:
        self.send(status, json.dumps(body).encode(), {"Content-Type": "application/json", **(headers or {})})

    def send(self, status: int, data: bytes, headers: dict) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def cut(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *args):
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # of more than these, the system lets some wait for a second

    def handle_error(self, request, address):
        """Clients that go away are what these tests are about."""


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    plan = json.loads((folder / "plan.json").read_text())
    seconds = float(sys.argv[2]) if len(sys.argv) > 2 else 0.0
    log = (folder / "log.jsonl").open("a")
    server = Server(("127.0.0.1", 0), Handler)
    print(f"http://127.0.0.1:{server.server_port}/v1", flush=True)
    server.serve_forever()
