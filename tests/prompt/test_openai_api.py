"""The rewriter that asks a chat server, with a real server on this machine."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from postgen.errors import UserError
from postgen.prompt import ApiRewriter, PromptEnhancer, Target, get_rewriter

KEY = "sk-secret-123"


class Server(ThreadingHTTPServer):
    """Answers with `status` and `body`, and keeps the requests."""

    daemon_threads = True
    status: list[int]
    body: bytes
    wait = 0.0
    drips = False
    """Whether the body is sent in single bytes, one each 20 ms."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.status, self.asked = [200], list[dict[str, Any]]()
        self.answer("Sure: A shiny red ball rolls.")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def answer(self, text: Any) -> None:
        self.body = json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append({"path": self.path, "headers": dict(self.headers), **json.loads(body)})
        time.sleep(self.server.wait)
        status = self.server.status.pop(0) if len(self.server.status) > 1 else self.server.status[0]
        self.send_response(status)
        if 300 <= status < 400:
            self.send_header("Location", "http://127.0.0.1:1/v1")
        self.end_headers()
        if not self.server.drips:
            self.wfile.write(self.server.body)
            return
        with suppress(OSError):
            for byte in self.server.body:
                self.wfile.write(bytes((byte,)))
                time.sleep(0.02)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with Server() as found:
        thread = threading.Thread(target=found.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield found
        found.shutdown()
        thread.join()


def asked(server: Server, **settings: Any) -> list[str]:
    return ApiRewriter("tiny", server.url, backoff=0.0, **settings)(["a red ball"], Target(), 3)


def test_a_server_is_asked(server: Server) -> None:
    rewriter = get_rewriter(f"api:org/tiny@{server.url}/")
    assert PromptEnhancer(rewriter)(["a red ball"]) == ["A shiny red ball rolls."]
    told = server.asked[0]
    assert (told["path"], told["model"], told["seed"]) == ("/v1/chat/completions", "org/tiny", 0)
    assert told["messages"][-1] == {"role": "user", "content": "a red ball"}
    assert told["headers"]["Authorization"] == f"Bearer {KEY}"
    assert KEY not in json.dumps([rewriter.settings(), rewriter.name])


def test_a_busy_server_is_asked_again(server: Server) -> None:
    server.status = [503, 429, 200]
    assert asked(server) == ["Sure: A shiny red ball rolls."]
    assert len(server.asked) == 3


@pytest.mark.parametrize(
    ("status", "body", "message", "tries"),
    [
        (503, b"busy", "status 503: 'busy'", 3),
        (401, json.dumps({"error": {"message": f"wrong key {KEY}"}}).encode(), r"status 401: wrong key \*\*\*", 1),
        (404, b'{"error": "no such model"}', "status 404: no such model", 1),
        (302, b"", "status 302", 1),
        (200, b"<html>hello</html>", "is no chat server, it answered '<html>", 1),
        (200, b'{"choices": []}', "is no chat server", 1),
        (200, b"\xff\xfe", "is no chat server", 1),
        (200, b"[" * 100_000, "is no chat server", 1),
    ],
)
def test_an_error_is_one_line(server: Server, status: int, body: bytes, message: str, tries: int) -> None:
    server.status, server.body = [status], body
    with pytest.raises(UserError, match=message) as caught:
        asked(server)
    assert KEY not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(server.asked) == tries


def test_a_slow_or_absent_server_is_one_line(server: Server) -> None:
    server.wait = 0.3
    with pytest.raises(UserError, match=r"no answer within 0\.05 seconds"):
        asked(server, timeout=0.05, retries=0)
    with pytest.raises(UserError, match="cannot be asked"):
        ApiRewriter("m", "http://127.0.0.1:1/v1", retries=0)(["a"], Target(), 0)


def test_a_server_that_never_ends_its_answer_is_one_line(server: Server) -> None:
    server.drips = True
    with pytest.raises(UserError, match=r"no answer within 0\.2 seconds"):
        asked(server, timeout=0.2, retries=0)
    server.drips = False
    assert asked(server, timeout=5) == ["Sure: A shiny red ball rolls."]


def test_no_content_is_an_empty_answer(server: Server) -> None:
    server.answer(None)
    assert asked(server) == [""]


def test_a_key_that_cannot_be_sent_is_not_shown(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\nX: 1")
    with pytest.raises(UserError, match="the key in OPENAI_API_KEY cannot be sent") as caught:
        asked(server)
    assert KEY not in str(caught.value)


def test_the_address_comes_from_the_environment(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    assert get_rewriter("api:tiny").url == server.url
    monkeypatch.delenv("OPENAI_BASE_URL")
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(UserError, match="needs a key: set the environment variable OPENAI_API_KEY"):
        get_rewriter("api:tiny")


@pytest.mark.parametrize("url", ["ftp://a", "http://", "http://a:x/v1", "a", "http://u:p@h/v1", "http://h/v1?k=1"])
def test_a_wrong_address_is_refused(url: str) -> None:
    with pytest.raises(UserError, match="address"):
        ApiRewriter("m", url)


@pytest.mark.parametrize("setting", ["timeout", "retries", "backoff", "temperature", "max_tokens"])
def test_wrong_numbers_are_refused(setting: str) -> None:
    with pytest.raises(UserError, match=setting):
        ApiRewriter("m", "http://127.0.0.1:1", **{setting: float("nan")})  # type: ignore[arg-type]
    with pytest.raises(UserError, match="must be named"):
        ApiRewriter(" ", "http://127.0.0.1:1")
