"""Rewrite prompts with a server that has the chat interface of OpenAI (vLLM, llama.cpp, Ollama, OpenAI and others)."""

from __future__ import annotations

import http.client
import json
import os
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

from postgen.errors import UserError, check_number, cut, first_line, shown
from postgen.prompt.instructions import messages_for
from postgen.prompt.target import Target

URL = "https://api.openai.com/v1"
"""Address that is used without another one."""
KEY = "OPENAI_API_KEY"
"""Environment variable with the key."""
_URL_VARIABLE = "OPENAI_BASE_URL"
_LARGEST = 2**22
_PASSING = frozenset((408, 409, 429, 500, 502, 503, 504))
"""Status codes after which another try may succeed."""
_LONGEST_WAIT = 30.0


class ApiRewriter:
    """Rewriter that asks `POST <url>/chat/completions`.

    The key is only read from an environment variable, and appears in no message, cache or sidecar. Redirects are not
    followed, so that it is sent to no other host.

    Args:
        model: name of the model on the server.
        url: address up to the version, such as `http://127.0.0.1:8000/v1`; None: the environment variable
            `OPENAI_BASE_URL`, otherwise that of OpenAI.
        key_variable: name of the environment variable with the key. A server at another address than OpenAI's may
            need none.
        timeout: seconds for one try, above 0 and at most 3600.
        retries: further tries if the server is busy or does not answer, at most 100.
        backoff: seconds before the second try, doubled for each further one, at most 30.
        temperature: 0 to 10; the seed is sent too.
        max_tokens: largest number of tokens of an answer.

    Raises:
        UserError: the address or a number is wrong, or OpenAI's address is used without a key.
    """

    def __init__(
        self,
        model: str,
        url: str | None = None,
        *,
        key_variable: str = KEY,
        timeout: float = 60.0,
        retries: int = 2,
        backoff: float = 1.0,
        temperature: float = 0.0,
        max_tokens: int = 512,
    ) -> None:
        if not isinstance(model, str) or not model.strip():
            raise UserError(f"the model of a server must be named, got {shown(model)}")
        check_number("timeout", timeout, 0.001, 3600)
        check_number("retries", retries, 0, 100, whole=True)
        check_number("backoff", backoff, 0, 30)
        check_number("temperature", temperature, 0, 10)
        check_number("max_tokens", max_tokens, 1, 100_000, whole=True)
        self.model, self.url = model, (url or os.environ.get(_URL_VARIABLE) or URL).rstrip("/")
        self.key_variable, self.timeout, self.retries, self.backoff = key_variable, timeout, retries, backoff
        self.temperature, self.max_tokens, self.seeded = temperature, max_tokens, temperature > 0
        self.name = f"api:{model}"
        self._place()
        if self.url == URL and not os.environ.get(key_variable):
            raise UserError(
                f"{URL} needs a key: set the environment variable {key_variable}, or name another server as"
                f" api:{model}@http://127.0.0.1:8000/v1"
            )

    def settings(self) -> Mapping[str, Any]:
        """Return the settings for the key of a cache, without the key of the server."""
        return {
            "model": self.model,
            "url": self.url,
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
        }

    def __call__(self, prompts: Sequence[str], target: Target, seed: int) -> list[str]:
        """Return the answers.

        Raises:
            UserError: the server cannot be reached, refuses, or answers something else than a chat completion.
        """
        return [self._answer(prompt, target, seed) for prompt in prompts]

    def _answer(self, prompt: str, target: Target, seed: int) -> str:
        body = {
            "model": self.model,
            "messages": messages_for(prompt, target),
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
            "seed": seed,
        }
        told = self._tried(json.dumps(body).encode())
        try:
            text = json.loads(told)["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
            raise UserError(f"{self.url} is no chat server, it answered {_short(told)}") from error
        if not isinstance(text, str):
            return ""  # some servers answer null where the model only called a tool; the guard refuses it
        return text

    def _tried(self, body: bytes) -> bytes:
        problem = ""
        for attempt in range(self.retries + 1):
            wait = min(self.backoff * 2 ** (attempt - 1), _LONGEST_WAIT) if attempt else 0.0
            time.sleep(wait)
            try:
                status, told = self._request(body)
            except (OSError, http.client.HTTPException) as error:
                late = isinstance(error, TimeoutError)
                problem = f"no answer within {self.timeout:g} seconds" if late else self._hidden(first_line(error))
                continue
            if status == 200:
                return told
            problem = f"status {status}: {self._hidden(_reason(told))}"
            if status not in _PASSING:
                break
        raise UserError(f"the server {self.url} with the model {self.model} cannot be asked: {problem}")

    def _request(self, body: bytes) -> tuple[int, bytes]:
        secure, host, port, path = self._place()
        kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        connection = kind(host, port, timeout=self.timeout)
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if key := os.environ.get(self.key_variable):
            headers["Authorization"] = f"Bearer {key.strip()}"
        try:
            connection.connect()
            with _Deadline(connection.sock, self.timeout):
                try:
                    connection.request("POST", f"{path}/chat/completions", body, headers)
                except (ValueError, UnicodeError):  # the message of http.client would show the key
                    raise UserError(
                        f"the key in {self.key_variable} cannot be sent: it has characters that no key has"
                    ) from None
                answer = connection.getresponse()
                data = answer.read(_LARGEST + 1)
        finally:
            connection.close()
        if len(data) > _LARGEST:
            raise UserError(f"the server {self.url} answered more than {_LARGEST:,} bytes")
        return answer.status, data

    def _place(self) -> tuple[bool, str, int | None, str]:
        """Return whether the address is secure, its host, port and path.

        Raises:
            UserError: the address is wrong.
        """
        try:
            parts = urlsplit(self.url)
            port = parts.port
        except ValueError:
            parts, port = urlsplit(""), None
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise UserError(
                f"{shown(self.url)} is not the address of a server: it must be like http://127.0.0.1:8000/v1"
            )
        if parts.username is not None or parts.password is not None:
            raise UserError(f"the address of a server must have no name and password: set {self.key_variable} instead")
        return parts.scheme == "https", parts.hostname, port, parts.path.rstrip("/")

    def _hidden(self, text: str) -> str:
        """Return a text without the key, which some servers repeat in their messages."""
        key = (os.environ.get(self.key_variable) or "").strip()
        return text.replace(key, "***") if key else text


class _Deadline:
    """Ends the use of a socket after some seconds: a timeout of a socket begins again with each byte that arrives.

    Raises:
        TimeoutError: the enclosed code did not end in time.
    """

    def __init__(self, sock: socket.socket, seconds: float) -> None:
        self._sock, self._late = sock, False
        self._timer = threading.Timer(seconds, self._end)
        self._timer.daemon = True

    def __enter__(self) -> None:
        self._timer.start()

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        if self._late:
            raise TimeoutError

    def _end(self) -> None:
        self._late = True
        with suppress(OSError):  # the connection may have ended just now
            self._sock.shutdown(socket.SHUT_RDWR)


def _reason(told: bytes) -> str:
    """Return the message of an error answer in one line."""
    try:
        error = json.loads(told)["error"]
        return cut(" ".join(str(error["message"] if isinstance(error, dict) else error).split()), 160)
    except (ValueError, KeyError, TypeError, RecursionError):
        return _short(told)


def _short(told: bytes) -> str:
    return shown(" ".join(told[:400].decode(errors="replace").split())[:80])
