"""The reward server under clients that are slow, silent, many, gone or malformed."""

import json
import socket
import threading
import time
from contextlib import ExitStack, closing, contextmanager, suppress

import pytest
import torch
from safetensors.torch import save

from postgen.rewards import RewardRunner
from postgen.rewards.remote import RemoteReward
from postgen.rewards.serve import RewardServer
from postgen.rewards.wire import MEDIA_TYPE, WireError, pack, unpack

CLIP = torch.full((2, 3, 8, 8), 0.5)
GOOD = pack(["a"], [CLIP])
HEAD = f"POST /score HTTP/1.1\r\nHost: x\r\nContent-Type: {MEDIA_TYPE}\r\n"


def level(completions):
    return [float(clip.mean()) for clip in completions]


@contextmanager
def serving(reward=level, **options):
    server = RewardServer(reward, port=0, **options)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def server():
    with serving(max_bytes=100_000, idle=0.3) as one:
        yield one


def connect(server):
    return closing(socket.create_connection(("127.0.0.1", server.server_port), timeout=10))


def told(connection):
    """The whole answer, until the server closes: status, headers, content."""
    data = b""
    while chunk := connection.recv(65536):
        data += chunk
    head, _, body = data.partition(b"\r\n\r\n")
    return int(head.split()[1]), head.decode(), json.loads(body)


def answer(server, data):
    with connect(server) as connection:
        connection.sendall(data)
        return told(connection)


def good(server):
    return answer(server, f"{HEAD}Content-Length: {len(GOOD)}\r\n\r\n".encode() + GOOD)


STARTS = ["", "GET", HEAD, f"{HEAD}Content-Length: 90000\r\n\r\n", f"{HEAD}Transfer-Encoding: chunked\r\n\r\n"]


def test_slow_clients_hold_up_nobody():
    with serving() as server, ExitStack() as stack:
        for start in STARTS:
            for _ in range(20):
                stack.enter_context(connect(server)).sendall(start.encode())
        begin = time.monotonic()
        assert good(server)[0] == 200
        assert time.monotonic() - begin < 2.5  # before the first of them is dropped


@pytest.mark.parametrize("start", STARTS)
def test_slow_clients_are_dropped(server, start):
    with connect(server) as silent, connect(server) as dripping:
        silent.sendall(start.encode())
        silent.settimeout(5)
        if "chunked" in start:
            assert told(silent)[0] == 400
        else:
            assert silent.recv(1000) == b""
        # Nor does a byte now and then keep a connection.
        dripping.sendall(start.encode())
        end = time.monotonic() + 5
        with suppress(OSError):
            while time.monotonic() < end:
                dripping.sendall(b"x")
                time.sleep(0.05)
        assert time.monotonic() < end


@pytest.mark.parametrize(
    "length",
    ["inf", "nan", "1e3", "1e30", "-1", "-9999999999999999999", "+5", "0x10", "5.0", "", "9" * 5000, "1_000", "1 1"],
)
def test_lengths_that_are_none(server, length):
    data = f"{HEAD}Content-Length: {length}\r\n\r\n".encode("latin1") + GOOD
    status, _, content = answer(server, data)
    assert (status, "Content-Length is no number" in content["error"]) == (400, True)


def test_requests_that_are_none(server):
    two = f"{HEAD}Content-Length: 3\r\nContent-Length: 4\r\n\r\nabcd"
    chunked = f"{HEAD}Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n"
    both = f"{HEAD}Transfer-Encoding: chunked\r\nContent-Length: {len(GOOD)}\r\n\r\n"
    wrong = {two: 400, chunked: 400, both: 400, f"{HEAD}Content-Length: {10**12}\r\n\r\n": 413, f"{HEAD}\r\n": 411}
    wrong |= {"nonsense\r\n\r\n": 400, "GET /health HTTP/9.9\r\n\r\n": 505, "PUT /score HTTP/1.1\r\n\r\n": 405}
    wrong |= {f"\r\nGET /{'x' * 70000} HTTP/1.1\r\n\r\n": 414}
    wrong |= {"\r\n" * 9: 400, "\r\n\r\nGET /health HTTP/1.1\r\n\r\n": 200}
    wrong |= {f"GET /{'x' * 70000} HTTP/1.1\r\n\r\n": 414, f"{HEAD}X: {'x' * 70000}\r\n\r\n": 431}
    wrong |= {f"{HEAD}Content-Length: 0\r\n\r\n": 400, HEAD + "X: y\r\n" * 200 + "\r\n": 431}
    for data, status in wrong.items():
        assert answer(server, data.encode())[0] == status, data[:200]
    assert good(server)[0] == 200


def test_an_answer_to_head_has_no_content(server):
    with connect(server) as connection:
        connection.sendall(b"HEAD /health HTTP/1.1\r\n\r\n")
        data = b"".join(iter(lambda: connection.recv(65536), b""))
    assert data.startswith(b"HTTP/1.0 405 ")
    assert data.endswith(b"\r\n\r\n")


def request(prompts=("a",), fps=8.0, clip=CLIP, columns=None, text=None):
    text = text or json.dumps({"prompts": prompts, "fps": fps, "columns": columns or {}})
    tensors = {"clip.0": clip, "request": torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)}
    return save(tensors)


@pytest.mark.parametrize(
    "fps", ["Infinity", "-Infinity", "NaN", "1e30", "1e400", "1" + "0" * 12, "9" * 5000, "0", "-1"]
)
def test_frame_rates_that_are_none(fps):
    assert unpack(request(fps=8))["fps"] == 8
    with pytest.raises(WireError, match=r"fps must be null or a number above 0|not a request"):
        unpack(request(text=f'{{"prompts": ["a"], "fps": {fps}, "columns": {{}}}}'))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"prompts": "a"}, "prompts must be a list"),
        ({"prompts": [1]}, "prompts must be texts"),
        ({"fps": True}, "fps must be"),
        ({"fps": "8"}, "fps must be"),
        ({"clip": CLIP * torch.nan}, r"values of a clip must lie in \[0,1\], got \[nan"),
        ({"clip": CLIP / 0}, "must lie in"),
        ({"clip": CLIP * 1e30}, "must lie in"),
        ({"clip": CLIP - 1}, "must lie in"),
        ({"clip": CLIP[:0]}, "must have pixels"),
        ({"clip": CLIP.double()}, "uint8 or float32"),
        ({"columns": {"n": "x"}}, "one value a prompt"),
        ({"text": "[" * 100_000}, "not a request"),
    ],
)
def test_contents_that_are_none(wrong, message):
    with pytest.raises(WireError, match=message):
        unpack(request(**wrong))


def test_a_clip_of_nan_has_no_score_and_costs_the_others_nothing(server):
    spoilt = CLIP.clone()
    spoilt[0, 0, 0, 0] = torch.nan
    for exact in (True, False):
        with pytest.raises(WireError, match="no finite numbers"):
            pack(["a"], [spoilt], exact=exact)
        runner = RewardRunner([RemoteReward(server.url, name="r", exact=exact)])
        values = runner(["a", "b"], [spoilt, CLIP], number=[1, 2]).values[:, 0]
        assert values[0].isnan()
        assert values[1] == pytest.approx(0.5, abs=0.01)


def test_a_burst_is_answered_and_never_reset():
    entered, go = threading.Event(), threading.Event()

    def waits(completions):
        entered.set()
        go.wait(20)
        return level(completions)

    outcomes = []
    with serving(waits) as server:

        def one():
            try:
                outcomes.append(good(server)[:2])
            except OSError as error:
                outcomes.append((repr(error), ""))

        threads = [threading.Thread(target=one) for _ in range(100)]
        for thread in threads:
            thread.start()
        entered.wait(10)
        end = time.monotonic() + 20
        while sum(status == 503 for status, _ in outcomes) < 100 - 32 and time.monotonic() < end:
            time.sleep(0.01)
        go.set()
        for thread in threads:
            thread.join(20)
    assert sorted(status for status, _ in outcomes) == [200] * 32 + [503] * 68
    assert all("Retry-After: 1" in head for status, head in outcomes if status == 503)


def test_clients_that_leave_are_not_told_of_nor_scored(capfd, caplog):
    seen, entered, go = [], threading.Event(), threading.Event()

    def counts(prompts, completions):
        seen.extend(prompts)
        entered.set()
        go.wait(20)
        return level(completions)

    caplog.set_level("WARNING")
    with serving(counts) as server:
        first = threading.Thread(target=good, args=(server,))
        first.start()
        entered.wait(10)
        body = pack(["left"], [CLIP])
        for length in (len(body), 10):
            with connect(server) as connection:
                connection.sendall(f"{HEAD}Content-Length: {len(body)}\r\n\r\n".encode() + body[:length])
        time.sleep(0.3)
        go.set()
        first.join(10)
        assert good(server)[0] == 200
    assert seen == ["a", "a"]
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []


def test_a_server_that_asks_for_patience_gets_it(monkeypatch):
    waited = []
    monkeypatch.setattr(threading.Event, "wait", lambda self, seconds=None: waited.append(seconds))
    remote = RemoteReward("http://127.0.0.1:1", retries=2, backoff=0.25)
    answers = iter([(503, "7"), (503, "soon"), (200, "")])

    class Response:
        def __init__(self):
            self.status, after = next(answers)
            self.headers = {"Retry-After": after}
            self.parts = [b'{"scores": [1]}', b""]

        def read1(self, size):
            return self.parts.pop(0)

    monkeypatch.setattr("http.client.HTTPConnection.request", lambda *a: None)
    monkeypatch.setattr("http.client.HTTPConnection.getresponse", lambda self: Response())
    remote._limit = 10**6
    assert json.loads(remote._ask(b"", threading.Event())) == {"scores": [1]}
    assert waited == [7.0, 0.5]


def test_who_closes_its_side_before_its_turn_is_told_so():
    with serving() as server, connect(server) as connection, server.busy:
        connection.sendall(f"{HEAD}Content-Length: {len(GOOD)}\r\n\r\n".encode() + GOOD)
        connection.shutdown(socket.SHUT_WR)
        time.sleep(0.1)
        server.busy.release()
        try:
            status, _, content = told(connection)
        finally:
            server.busy.acquire()
    assert (status, content["error"]) == (
        400, "the client left before its turn: keep the connection open until the answer",
    )  # fmt: skip


def test_who_sends_less_than_it_said_is_told_so(server):
    with connect(server) as connection:
        connection.sendall(f"{HEAD}Content-Length: {len(GOOD) + 1}\r\n\r\n".encode() + GOOD)
        connection.shutdown(socket.SHUT_WR)
        status, _, content = told(connection)
    assert (status, content["error"].partition(":")[0]) == (400, "the client left before it had sent all")
    assert good(server)[0] == 200
