"""A local server that speaks OpenAI's chat API, for the tests of judged benchmarks.

`JudgeServer(reply)`: `reply(body)` gives the text for the request's JSON, or a `Reply` for anything else. It keeps every
request that came in (`requests`), and how many were open at once (`most_at_once`).
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Reply:
    """An answer over HTTP that is not simply a text: a status, headers, a raw body, a delay."""

    text: str | None = ""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: str | None = None
    seconds: float = 0.0

    def content(self, model: str) -> bytes:
        if self.body is not None:
            return self.body.encode()
        if self.status != 200:
            return json.dumps({"error": {"message": self.text, "code": None}}).encode()
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": self.text}}
        usage = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
        completion = {"id": "c", "object": "chat.completion", "created": 1, "model": f"{model}-0613"}
        return json.dumps({**completion, "choices": [choice], "usage": usage}).encode()


class JudgeServer:
    def __init__(self, reply: Callable[[dict[str, Any]], str | Reply]):
        self.reply = reply
        self.requests: list[dict[str, Any]] = []
        self.keys: set[str] = set()
        self.times: list[float] = []
        self.most_at_once = 0
        self._open = 0
        self._lock = threading.Lock()

    def __enter__(self) -> JudgeServer:
        judge = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: object) -> None:
                pass

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with judge._lock:
                    judge.requests.append(body)
                    judge.times.append(time.monotonic())
                    judge.keys.add(self.headers.get("Authorization", ""))
                    judge._open += 1
                    judge.most_at_once = max(judge.most_at_once, judge._open)
                try:
                    self._answer(body)
                finally:
                    with judge._lock:
                        judge._open -= 1

            def _answer(self, body: dict[str, Any]) -> None:
                if self.path != "/v1/chat/completions":
                    reply = Reply(f"no such path: {self.path}", status=404)
                else:
                    reply = judge.reply(body)
                    reply = Reply(reply) if isinstance(reply, str) else reply
                time.sleep(reply.seconds)
                content = reply.content(body["model"])
                try:
                    self.send_response(reply.status)
                    for name, value in {"Content-Type": "application/json", **reply.headers}.items():
                        self.send_header(name, value)
                    self.send_header("Content-Length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(content)
                except (BrokenPipeError, ConnectionResetError):  # the client gave up, or was killed
                    self.close_connection = True

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def arguments(self) -> list[str]:
        return ["--judge", "gpt-test", "--judge-url", self.url]


def user_text(body: dict[str, Any]) -> str:
    return body["messages"][-1]["content"]
