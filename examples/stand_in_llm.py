"""A stand-in for a language model, to try ``synthesize`` and ``judge`` without one: ``python examples/stand_in_llm.py --port 8077``.

It serves ``/v1/chat/completions`` as an OpenAI-compatible server does, but answers by rules: it takes two words of a
passage and asks what they have to do with each other, and a passage answers a query whose words it holds. This shows that
the steps fit together; train with the answers of a real model.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

# By script of the passage: a letter range, endings that are no part of the word, and questions.
RULES = [
    (
        r"[\uac00-\ud7a3]",
        r"(에서는|으로|에서|에게|부터|까지|은|는|이|가|을|를|의|에|로|와|과|도)$",
        [
            "{0}은(는) {1}와(과) 어떤 관계가 있나요?",
            "{1}에 대해 말할 때 {0}이(가) 나오는 이유는?",
            "{0} {1} 어떻게 된 건가요?",
        ],
    ),
    (r"[\u0600-\u06ff]", r"$", ["{0} چه ارتباطی با {1} دارد؟", "دربارهٔ {0} و {1} چه می‌دانیم؟"]),
    (r"[\u0900-\u097f]", r"$", ["{0} का {1} से क्या संबंध है?", "{0} और {1} के बारे में क्या पता है?"]),
    (r".", r"$", ["what does {0} have to do with {1}?", "how are {0} and {1} related?"]),
]


def write_query(passage: str, number: int) -> str:
    """The question of this number, from 0, about a passage; always the same one."""
    _, ending, questions = next(rule for rule in RULES if len(re.findall(rule[0], passage)) > len(passage) / 4)
    words = [re.sub(ending, "", word) for word in re.findall(r"[^\W\d_][\w\u0900-\u097f\u200c]*", passage)]
    first = words[0] if words else "?"
    others = sorted({word for word in words if len(word) > 1 and word != first}, key=lambda w: (-len(w), w))[:8]
    draw = int(hashlib.sha256(passage.encode()).hexdigest(), 16) + number
    other = others[draw % len(others)] if others else first
    return questions[draw % len(questions)].format(first, other)


def write_verdicts(prompt: str) -> str | None:
    """Whether each passage of a question of ``judge`` answers the query; None where the prompt is no such question."""
    query = re.search(r"<query>\s*(.*?)\s*</query>", prompt, re.DOTALL)
    passages = re.findall(r"<passage (\d+)>\s*(.*?)\s*</passage \1>", prompt, re.DOTALL)
    if not query or not passages:
        return None
    words = re.findall(r"[^\W_][\w\u0900-\u097f\u200c]+", query[1])
    verdicts = []
    for number, passage in passages:
        share = sum(word in passage for word in words) / max(len(words), 1)
        answers = "yes" if share > 0.8 else "partly" if share > 0.5 else "no"
        verdicts.append({"passage": int(number), "answers": answers, "query": write_query(passage, 0)})
    return json.dumps({"verdicts": verdicts}, ensure_ascii=False)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = request["messages"][-1]["content"]
        passage = re.search(r"<passage>\s*(.*?)\s*</passage>", prompt, re.DOTALL)
        number = re.search(r"\d+", prompt[: passage.start()] if passage else prompt)
        queries = (write_query(passage[1] if passage else prompt, i) for i in range(int(number[0]) if number else 1))
        answer = write_verdicts(prompt) or "\n".join(queries)
        body = {
            "object": "chat.completion",
            "model": request["model"],
            "choices": [{"index": 0, "message": {"role": "assistant", "content": answer}, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": len(prompt) // 2, "completion_tokens": len(answer) // 2},
        }
        data = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args) -> None:
        """Silent: a line a request helps nobody."""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, default=8077)
    server = ThreadingHTTPServer(("127.0.0.1", parser.parse_args().port), Handler)
    print(f"http://127.0.0.1:{server.server_port}/v1", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()
