"""Remote rewards against real servers on this machine: the reference server, and servers that misbehave."""

import http.client
import json
import socket
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from postgen.errors import UserError
from postgen.rewards import RewardRunner, get_reward
from postgen.rewards.remote import RemoteError, RemoteReward
from postgen.rewards.serve import RewardServer
from postgen.rewards.wire import MEDIA_TYPE, WireError, pack, read_scores, unpack

CLIPS = [torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(k)) for k in range(3)]
PROMPTS = ["a", "b", "c"]


def level(prompts, completions, shift=None):
    return [float(c.mean()) + (float(shift[k]) if shift else 0.0) for k, c in enumerate(completions)]


def broken(completions):
    raise RuntimeError("out of luck")


@contextmanager
def running(server):
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


class Odd(BaseHTTPRequestHandler):
    """Says it is fine, then does what its server's `answer` does."""

    def do_GET(self):
        self.say(200, {"reward": "odd", "max_bytes": 10**9})

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.server.posts += 1
        self.server.answer(self)

    def say(self, status, content):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


class Quiet(ThreadingHTTPServer):
    """Prints nothing about clients that leave early: a test that reads standard error may run by then."""

    def handle_error(self, request, client_address):
        pass


@contextmanager
def odd(answer):
    server = Quiet(("127.0.0.1", 0), Odd)
    server.daemon_threads = True
    server.answer, server.posts = answer, 0
    with running(server):
        server.url = f"http://127.0.0.1:{server.server_port}"
        yield server


def remote(url, **options):
    return RemoteReward(url, **({"retries": 1, "backoff": 0.01, "timeout": 5.0} | options))


def score(*rewards, **columns):
    return RewardRunner(rewards)(PROMPTS, CLIPS, must_score=False, **columns)


@pytest.fixture(scope="module")
def server():
    with running(RewardServer(level, port=0, max_bytes=100_000)) as running_server:
        yield running_server


def test_scores_cross_the_wire(server):
    exact = score(remote(server.url, exact=True)).values[:, 0]
    torch.testing.assert_close(exact, torch.tensor([c.mean() for c in CLIPS]))
    rounded = score(remote(server.url)).values[:, 0]
    torch.testing.assert_close(rounded, exact, atol=1e-3, rtol=0)


def test_columns_cross_the_wire(server):
    numbers = score(remote(server.url), shift=[1.0, 2.0, 3.0]).values
    tensors = score(remote(server.url), shift=[torch.tensor(k + 1.0) for k in range(3)]).values
    torch.testing.assert_close(numbers, tensors)
    assert (numbers[:, 0] - score(remote(server.url)).values[:, 0]).tolist() == pytest.approx([1.0, 2.0, 3.0])


def test_an_address_is_a_reward_and_is_asked_beside_the_others(server):
    reward = get_reward(server.url, timeout=5.0)
    assert reward.is_async
    assert reward.name == f"127.0.0.1:{server.server_port}"
    assert score(reward, level).failed == {reward.name: 0, "level": 0}


def test_health(server):
    assert remote(server.url).health() == {"reward": "level", "max_bytes": 100_000}
    RewardRunner([remote(server.url)]).load()
    with pytest.raises(RemoteError, match="no server listens there"):
        remote(f"http://127.0.0.1:{free_port()}").health()
    with pytest.raises(UserError, match="no server listens there: start `postgen serve-reward"):
        RewardRunner([remote(f"http://127.0.0.1:{free_port()}")]).load()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_an_absent_server_is_survived():
    result = score(remote(f"http://127.0.0.1:{free_port()}", name="gone"), level)
    assert result.failed == {"gone": 3, "level": 0}
    assert "no server listens there: start `postgen serve-reward" in result.errors["gone"]


def test_a_500_server_is_tried_again_and_survived():
    with odd(lambda handler: handler.say(500, {"error": "boom"})) as server:
        result = score(remote(server.url, retries=2, name="r"), level)
        assert result.failed == {"r": 3, "level": 0}
        assert "returned status 500" in result.errors["r"]
        assert server.posts == 3


def test_a_server_that_recovers_is_used():
    def second_time(handler):
        fine = handler.server.posts > 1
        handler.say(200 if fine else 503, {"scores": [1, 2.5, None]} if fine else {"error": "busy"})

    with odd(second_time) as server:
        result = score(remote(server.url, name="r"))
    assert result.values[:2, 0].tolist() == [1.0, 2.5]
    assert result.failed == {"r": 1}


def test_a_refusal_is_not_tried_again():
    with odd(lambda handler: handler.say(400, {"error": "no"})) as server:
        assert score(remote(server.url, retries=5, name="r")).failed == {"r": 3}
        assert server.posts == 1


def test_a_hung_server_is_survived():
    release = threading.Event()
    with odd(lambda handler: release.wait(20)) as server:
        start = time.monotonic()
        result = score(remote(server.url, timeout=0.2, name="r"), level)
        assert time.monotonic() - start < 3
        release.set()
    assert result.failed == {"r": 3, "level": 0}
    assert "no response within 0.2 s" in result.errors["r"]


def test_the_time_limit_of_the_runner_holds_for_a_hung_server():
    release = threading.Event()
    with odd(lambda handler: release.wait(20)) as server:
        start = time.monotonic()
        runner = RewardRunner([remote(server.url, timeout=15.0, name="r")], timeout=0.2)
        assert runner(PROMPTS, CLIPS, must_score=False).failed == {"r": 3}
        assert time.monotonic() - start < 3
        release.set()


def test_a_server_that_drips_is_survived():
    def drip(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        for _ in range(100):
            handler.wfile.write(b" ")
            time.sleep(0.05)

    with odd(drip) as server:
        start = time.monotonic()
        assert score(remote(server.url, timeout=0.3, retries=0, name="r")).failed == {"r": 3}
        assert time.monotonic() - start < 2


@pytest.mark.parametrize(
    "answer",
    [{"scores": [1.0]}, {"scores": [1.0] * 4}, {"scores": "abc"}, {"scores": ["a", 1, 2]}, {"x": 1}, [1, 2, 3]],
)
def test_wrong_answers_are_survived(answer):
    with odd(lambda handler: handler.say(200, answer)) as server:
        result = score(remote(server.url, name="r"), level)
    assert result.failed == {"r": 3, "level": 0}
    assert "WireError" in result.errors["r"]


def test_an_answer_without_end_is_cut_off():
    def flood(handler):
        handler.send_response(200)
        handler.end_headers()
        try:
            while True:
                handler.wfile.write(b"x" * 2**20)
        except OSError:
            pass

    with odd(flood) as server:
        assert score(remote(server.url, retries=0, name="r")).failed == {"r": 3}


def test_a_request_above_the_limit_is_not_sent_and_survived(server):
    large = [torch.rand(40, 3, 32, 32)] * 3
    result = RewardRunner([remote(server.url, name="r"), level])(PROMPTS, large)
    assert result.failed == {"r": 3, "level": 0}
    assert "above the limit" in result.errors["r"]
    assert score(remote(server.url, name="r")).failed == {"r": 0}


def post(server, body, *, path="/score", kind=MEDIA_TYPE, length=None):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=5)
    connection.putrequest("POST", path)
    connection.putheader("Content-Type", kind)
    if length is not False:
        connection.putheader("Content-Length", str(len(body) if length is None else length))
    connection.endheaders()
    connection.send(body)
    response = connection.getresponse()
    answer = response.status, json.loads(response.read())
    connection.close()
    return answer


def test_the_server_refuses_what_it_should(server):
    good = pack(PROMPTS, CLIPS)
    assert post(server, good)[0] == 200
    assert post(server, b"x" * 200_000)[0] == 413
    assert post(server, good, kind="text/plain")[0] == 415
    assert post(server, b"", length=False)[0] == 411
    assert post(server, good, path="/etc/passwd")[0] == 404
    assert post(server, b"not safetensors")[0] == 400
    assert post(server, pack(["a"], [CLIPS[0]], columns={"depth": [1]}))[0] == 200
    status, answer = post(server, pack(["a"], [CLIPS[0]], columns={"must_score": [1]}))
    assert status == 400
    assert "no column can be named 'must_score'" in answer["error"]
    assert remote(server.url).health()["reward"] == "level"  # and is well afterwards


def test_a_reward_that_fails_there_is_a_failure_here():
    with running(RewardServer(broken, port=0)) as server:
        result = score(remote(server.url, name="r"), level)
    assert result.failed == {"r": 3, "level": 0}
    assert "out of luck" in result.errors["r"]


def test_the_server_listens_on_this_machine_only(server):
    assert server.server_address[0] == "127.0.0.1"
    with pytest.raises(UserError, match="choose another --port"):
        RewardServer(level, port=server.server_port)


@pytest.mark.parametrize("url", ["ftp://x", "http://", "http://x:99999", "https:/x"])
def test_addresses_are_checked(url):
    with pytest.raises(UserError, match="not the address of a reward"):
        RemoteReward(url)


@pytest.mark.parametrize("options", [{"timeout": 0}, {"retries": -1}, {"batch_bytes": 0}, {"backoff": -1.0}])
def test_numbers_are_checked(options):
    with pytest.raises(UserError, match="must be above 0"):
        RemoteReward("http://127.0.0.1:1", **options)


def test_wire_round_trip():
    data = pack(["a", "b"], CLIPS[:2], fps=8.0, columns={"depth": [torch.ones(2), torch.zeros(3)], "n": [1, "x"]})
    back = unpack(data)
    assert back["prompts"] == ["a", "b"]
    assert back["fps"] == 8.0
    assert back["n"] == [1, "x"]
    assert [tuple(d.shape) for d in back["depth"]] == [(2,), (3,)]
    for clip, sent in zip(back["completions"], CLIPS, strict=False):
        torch.testing.assert_close(clip, sent, atol=0.5 / 255 + 1e-6, rtol=0)
    with pytest.raises(WireError, match="neither JSON nor a tensor"):
        pack(["a"], CLIPS[:1], columns={"x": [object()]})


@pytest.mark.parametrize("data", [b"", b"\0" * 8, b"\xff" * 64, pack(["a"], [])])
def test_garbage_is_no_request(data):
    with pytest.raises(WireError, match="not a request"):
        unpack(data)


def test_infinite_scores_are_none():
    assert read_scores(b'{"scores": [Infinity, NaN, 1]}', 3) == [None, None, 1.0]
