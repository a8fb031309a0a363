"""Closed parts of Gradio's HTTP interface, tested on a real server."""

import os
import shutil
import socket
from pathlib import Path

import pytest

from postgen import UserError
from postgen.apps import demo
from postgen.apps.guard import uploads_folder
from postgen.apps.hosts import Names
from postgen.apps.settings import AppSettings

pytest.importorskip("gradio")
import httpx

MOST = 20_000
RESULT = "20260101-000000-generate-0123abcd"
FILE = {"meta": {"_type": "gradio.FileData"}}


@pytest.fixture(scope="module")
def served(tiny_wan, tmp_path_factory):
    outputs = tmp_path_factory.mktemp("outputs")
    made = demo.launch(AppSettings(model=str(tiny_wan), outputs=outputs, port=0, upload_bytes=MOST), warm=False)
    (made.app.history.folder / RESULT).mkdir()
    (made.app.history.folder / RESULT / "video.mp4").write_bytes(b"a result")
    (outputs / "private.txt").write_text("private")
    (made.app.history.folder / RESULT / "link.mp4").symlink_to(outputs / "private.txt")
    (made.app.history.folder / RESULT / "folder").symlink_to(outputs)
    yield made
    made.close()


@pytest.fixture
def web(served):
    with httpx.Client(base_url=served.url, trust_env=False, timeout=30) as client:
        yield client


def test_results_and_uploads_are_given_and_nothing_that_links_lead_to(web, served):
    folder = served.app.history.folder / RESULT
    assert web.get(f"/gradio_api/file={folder}/video.mp4").content == b"a result"
    sent = web.post("/gradio_api/upload", files=[("files", ("a.mp4", b"an upload"))]).json()[0]
    assert web.get(f"/gradio_api/file={sent}").content == b"an upload"
    (folder / "long.state").mkdir()
    (folder / "long.state" / "state.json").write_text("private")
    paths = ["link.mp4", "folder/private.txt", "../../private.txt", "%2e%2e/%2e%2e/private.txt", "a%00b", "a" * 5000]
    for path in (*paths, "long.state/state.json"):
        for route in ("file=", "file/"):
            answer = web.get(f"/gradio_api/{route}{folder}/{path}")
            assert (answer.status_code, b"private" in answer.content) == (403, False), path


def test_no_address_is_fetched_for_anybody(web):
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(0.3)
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/a.mp4"
        for route in ("file=", "file/", "proxy="):
            assert web.get(f"/gradio_api/{route}{url}").status_code in (403, 404)
        # Gradio itself would fetch 192.0.2.1, because it is not a private address.
        for path in (url, "http://192.0.2.1/a.mp4", "https://192.0.2.1/a.mp4"):
            assert web.get(f"/gradio_api/file={path}").status_code == 403
            called = web.post("/gradio_api/call/score", json={"data": [{"path": path, **FILE}, "", "", ["motion"]]})
            assert called.status_code == 403
        with pytest.raises(TimeoutError):
            listening.accept()


@pytest.mark.parametrize("path", ["/etc/passwd", "file:///etc/passwd", "../x", "", "\0", "data:video/mp4;base64,AA=="])
def test_a_call_opens_uploads_alone_and_says_nothing_of_places(web, path):
    for value in ({"path": path, **FILE}, {"video": {"path": path, **FILE}}, [{"path": path}]):
        for route in ("call/score", "run/score", "api/score", "queue/join", "call/v2/score"):
            answer = web.post(f"/gradio_api/{route}", json={"data": [value, "", "", ["motion"]], "session_hash": "a"})
            assert answer.status_code == 403
            assert os.getcwd() not in answer.text
    deep = "[" * 100_000
    assert web.post("/gradio_api/call/score", content=deep).status_code in (400, 422)


@pytest.mark.parametrize(
    "route",
    ["proxy=http://a.b/c", "deep_link?session_hash=a", "runs", "run-history/records", "custom_component/a/b/c/d"],
)
def test_routes_that_the_page_does_not_need_are_closed(web, route):
    assert web.get(f"/gradio_api/{route}").status_code == 404


def test_a_recording_is_not_taken(web):
    assert web.post("/gradio_api/process_recording", files=[("file", ("a.mp4", b"a"))]).status_code == 404
    assert web.post("/gradio_api/component_server", json={}).status_code == 404


def kept():
    return sum(file.stat().st_size for file in uploads_folder().rglob("*") if file.is_file())


def test_of_an_upload_that_is_refused_nothing_is_kept(web, served):
    shutil.rmtree(uploads_folder(), ignore_errors=True)
    too_large = {"files": ("a.mp4", b"0" * (MOST + 1))}
    answer = web.post("/gradio_api/upload", files=too_large)
    assert (answer.status_code, kept()) == (413, 0)
    # The server reads a large upload to its end; otherwise the client would see a closed connection, not the answer.
    assert web.post("/gradio_api/upload", files={"files": ("a.mp4", b"0" * 2**23)}).status_code == 413
    # Many small files in one request, and an invalid file name.
    many = [("files", (f"{n}.mp4", bytes([n]) * (MOST // 2))) for n in range(12)]
    answer = web.post("/gradio_api/upload", files=many)
    assert answer.status_code == 413
    assert "make it smaller" in answer.text
    assert web.post("/gradio_api/upload", files={"files": ("..", b"0")}).status_code == 400
    wait(lambda: kept() == 0)
    assert web.post("/gradio_api/upload", content=(part for part in (b"0", b"1"))).status_code == 411
    assert web.post("/gradio_api/call/score", content=b" " * (2**22 + 1)).status_code == 413


def test_of_an_upload_that_breaks_off_nothing_is_kept(web, served):
    shutil.rmtree(uploads_folder(), ignore_errors=True)
    host = httpx.URL(served.url)
    head = (
        f"POST /gradio_api/upload HTTP/1.1\r\nHost: {host.host}:{host.port}\r\nContent-Length: {MOST}\r\n"
        "Content-Type: multipart/form-data; boundary=x\r\n\r\n"
        '--x\r\nContent-Disposition: form-data; name="files"; filename="a.mp4"\r\n\r\n'
    )
    with socket.create_connection((host.host, host.port)) as breaking:
        breaking.sendall(head.encode() + b"0" * 9000)
        wait(lambda: kept() > 0)
    wait(lambda: kept() == 0)


def test_a_length_beside_chunks_and_a_form_without_an_end(web, served):
    shutil.rmtree(uploads_folder(), ignore_errors=True)
    host = httpx.URL(served.url)
    part = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.mp4"\r\n\r\n' + b"0" * 9000
    kind = "multipart/form-data; boundary=x"
    head = f"POST /gradio_api/upload HTTP/1.1\r\nHost: {host.host}:{host.port}\r\nContent-Type: {kind}\r\n"
    with socket.create_connection((host.host, host.port)) as sending:
        sending.sendall(f"{head}Content-Length: 9\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
        sending.sendall(b"%x\r\n%s\r\n0\r\n\r\n" % (len(part), part))
        assert sending.recv(100).split()[1] in (b"400", b"411")
    assert web.post("/gradio_api/upload", content=part, headers={"content-type": kind}).json() == []
    wait(lambda: kept() == 0)


def wait(done):
    import time

    limit = time.monotonic() + 10
    while not done():
        assert time.monotonic() < limit
        time.sleep(0.02)


def test_the_folder_of_uploads_is_that_of_the_server(served):
    assert Path(os.environ["GRADIO_TEMP_DIR"]) == uploads_folder()


def raw(served, head, kind="GET / HTTP/1.1"):
    host = httpx.URL(served.url)
    with socket.create_connection((host.host, host.port), timeout=10) as sending:
        sending.sendall(f"{kind}\r\n{head.format(port=host.port)}\r\nConnection: close\r\n\r\n".encode("latin-1"))
        got = b""
        while part := sending.recv(65536):
            got += part
    return int(got.split(b" ", 2)[1]), got.partition(b"\r\n\r\n")[2]


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1", "[::1]", "LOCALHOST", "127.0.0.2"])
def test_a_server_answers_under_its_own_names(served, name):
    assert raw(served, f"Host: {name}:{{port}}\r\nOrigin: http://{name}:{{port}}")[0] == 200
    assert raw(served, f"Host: {name}")[0] == 200  # without a port, as behind a forwarded port


@pytest.mark.parametrize(
    "head",
    [
        *(
            "Host: rebound.example:{port}",
            "Host: localhost.rebound.example",
            "Host: 192.0.2.1:{port}",
            "Host: 0.0.0.0",
        ),
        *("Host: a@localhost", "Host: [::1", "Host: 127.0.0.1:7860:1", "Host:", "Host: xn--\xe4", "X: no host"),
        *("Host: localhost:{port}\r\nHost: rebound.example",),
        *(
            f"Host: localhost:{{port}}\r\nOrigin: {o}"
            for o in ("http://rebound.example", "null", "http://localhost:1")
        ),
        "Host: localhost:{port}\r\nOrigin: http://localhost:{port}.rebound.example",
    ],
)
def test_a_server_answers_under_no_other_name_and_to_no_other_site(served, head):
    version = "HTTP/1.0" if head.startswith("X") else "HTTP/1.1"
    for kind in (f"GET / {version}", f"GET /gradio_api/queue/data?session_hash=a {version}"):
        status, body = raw(served, head, kind)
        assert status == 403 or (status == 400 and b"Invalid HTTP" in body), (kind, body)  # 400 comes from uvicorn
        assert b"<html" not in body
        assert body.count(b"\n") <= 1
    called = raw(served, f"{head}\r\nContent-Length: 0", f"POST /gradio_api/call/history {version}")
    assert called[0] in (400, 403)


def test_a_socket_of_another_site_is_refused(served):
    socketed = "Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA=="
    assert raw(served, f"Host: rebound.example\r\n{socketed}")[0] == 403


@pytest.mark.parametrize(
    ("names", "head", "right"),
    [
        (Names(host="127.0.0.1", allowed=("app.example.org",)), {"host": "app.example.org"}, True),
        (Names(host="127.0.0.1", allowed=("app.example.org",)), {"host": "b.app.example.org"}, False),
        # A proxy that puts the address of this server into Host.
        (
            Names(host="127.0.0.1", allowed=("App.example.org",)),
            {"host": "127.0.0.1:7860", "origin": "https://app.example.org"},
            True,
        ),
        (Names(host="0.0.0.0"), {"host": "192.0.2.7:7860", "origin": "http://192.0.2.7:7860"}, True),
        (Names(host="0.0.0.0"), {"host": socket.gethostname()}, True),
        (Names(host="0.0.0.0"), {"host": "rebound.example"}, False),
        (Names(host="box.lan"), {"host": "box.lan:80"}, True),
        (Names(host="::1"), {"host": "[::1]:7860"}, True),
        (Names(host="127.0.0.1", allowed=("*",)), {"host": "who-ever.hf.space", "origin": "null"}, True),
    ],
)
def test_names_of_a_server(names, head, right):
    said = names.refused([(key.encode(), value.encode()) for key, value in head.items()])
    assert (said is None) == right


@pytest.mark.parametrize("name", ["http://a.b", "a.b/c", "a.b:80", "", "a b", "*.b"])
def test_a_name_that_no_browser_sends_is_refused(name):
    with pytest.raises(UserError, match="allow_host takes a name"):
        AppSettings(allow_hosts=(name,))
