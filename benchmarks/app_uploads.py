"""Test of the upload limits: does the app refuse every upload over a limit, and delete its files?

    python -m benchmarks.app_uploads

The test starts a real server with small limits. The server refuses some uploads by their headers or during the
transfer: too large, chunked without a length, cut off, too many parts. Other files are small, but contain too much or
are not what their name says: the server accepts the upload, and the call that uses the file refuses it. After each
upload the test counts the files on the disk of the server.
"""

from __future__ import annotations

import io
import json
import socket
import subprocess
import time
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import imageio_ffmpeg

from benchmarks.app_paths import Web
from tests.apps.served import serving

MOST = 256 * 2**10
"""Largest upload, in bytes."""
SECONDS = 2.0
"""Longest uploaded video, in seconds."""
_ROUTE = "/gradio_api/upload"
_KIND = "multipart/form-data; boundary=x"
_WAIT = 10.0
"""Seconds within which the files of a refused upload must be deleted."""
Outcome = tuple[int, str]
"""HTTP status (0 without an answer) and text of the answer."""


def part(name: str, content: bytes) -> bytes:
    """Return a file as one part of a multipart form."""
    head = f'--x\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'
    return head.encode() + content + b"\r\n"


def _whole(*parts: bytes) -> bytes:
    return b"".join(parts) + b"--x--\r\n"


def _sent(web: Web, body: bytes) -> Outcome:
    status, told = web.ask("POST", _ROUTE, body, _KIND)
    return status, told.decode(errors="replace")


def _raw(web: Web, head: str, body: bytes, *, leave: bool = False) -> Outcome:
    """Send raw bytes; return the outcome, with status 0 if there is no answer.

    Args:
        web: client of the server.
        head: further header lines.
        body: body of the request.
        leave: whether to close the connection before the answer.
    """
    place = urllib.parse.urlsplit(web.url)
    text = f"POST {_ROUTE} HTTP/1.1\r\nHost: {place.netloc}\r\nContent-Type: {_KIND}\r\n{head}\r\n\r\n"
    answer = b""
    at = (place.hostname or "", place.port or 80)
    with socket.create_connection(at, timeout=_WAIT) as connection, suppress(OSError):  # the server may close it
        connection.sendall(text.encode() + body)
        if leave:
            time.sleep(0.5)
            return 0, "left"
        while b"\r\n\r\n" not in answer and (more := connection.recv(2**16)):
            answer += more
    words = answer.split(maxsplit=2)
    return (int(words[1]) if len(words) > 1 and words[1].isdigit() else 0), answer[-200:].decode(errors="replace")


def stopped_uploads() -> dict[str, Callable[[Web], Outcome]]:
    """Return uploads that the server must refuse, by what is wrong with them."""
    full = _whole(part("a.mp4", b"0" * MOST))
    more = _whole(part("a.mp4", b"0" * MOST), part("b.mp4", b"1" * MOST))
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in (more[:5000], more[5000:])) + b"0\r\n\r\n"
    return {
        "one byte over the limit": lambda web: _sent(web, _whole(part("a.mp4", b"0" * (MOST + 1)))),
        "32 MiB": lambda web: _sent(web, _whole(part("a.mp4", b"0" * 2**25))),
        "a length of 1 TiB": lambda web: _raw(web, f"Content-Length: {2**40}", full, leave=True),
        "in chunks, without a length": lambda web: _raw(web, "Transfer-Encoding: chunked", chunks),
        "in chunks, with a length": lambda web: _raw(web, "Content-Length: 100\r\nTransfer-Encoding: chunked", chunks),
        "no length": lambda web: _raw(web, "Connection: close", full),
        "two lengths": lambda web: _raw(web, f"Content-Length: 10\r\nContent-Length: {len(full)}", full),
        "a negative length": lambda web: _raw(web, "Content-Length: -1", full),
        "left in the middle": lambda web: _raw(web, f"Content-Length: {len(full)}", full[:99_000], leave=True),
        "many parts over the limit": lambda web: _sent(
            web, _whole(*(part(f"{n}.mp4", b"0" * (MOST // 4)) for n in range(12)))
        ),
        "many parts without a length": lambda web: _raw(
            web,
            "Transfer-Encoding: chunked",
            b"".join(b"%x\r\n%s\r\n" % (len(one), one) for one in [part("a.mp4", b"0" * 99_000)] * 9) + b"0\r\n\r\n",
        ),
        "1,500 parts": lambda web: _sent(web, _whole(*(part("", b"0") for n in range(1500)))),
        "a part without a name": lambda web: _sent(
            web, _whole(b"--x\r\nContent-Disposition: form-data\r\n\r\n" + b"0" * 9000 + b"\r\n")
        ),
        "a form that never ends": lambda web: _sent(web, part("a.mp4", b"0" * 9000)),
    }


def refused_files(folder: Path) -> dict[str, tuple[str, bytes]]:
    """Return files that can be uploaded but that a call must refuse: name and content, by what is wrong with them."""
    from PIL import Image

    long = _video(folder / "long.mp4", "64x64", rate=8, seconds=30)
    picture = io.BytesIO()
    Image.new("RGB", (6000, 6000)).save(picture, "PNG")
    # This video has more pixels than the limit of 2**28, and is shorter than the longest allowed duration.
    many = _video(folder / "many.mp4", "1920x1080", rate=120, seconds=1.5)
    return {
        "30 seconds": ("a.mp4", long),
        "180 frames of 1920x1080": ("a.mp4", many),
        "30 seconds, called a picture": ("a.png", long),
        "a picture of 36 million pixels": ("a.png", picture.getvalue()),
        "a program called a video": ("a.mp4", b"\x7fELF" + b"\0" * 5000),
        "a page called a video": ("a.mp4", b"<html><script>1</script></html>"),
        "a playlist of files": ("a.m3u8", b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n"),
        "a list of files": ("a.txt", b"ffconcat version 1.0\nfile /etc/passwd\n"),
        "half a video": ("a.mp4", long[: len(long) // 2]),
        "nothing": ("a.mp4", b""),
    }


def _video(path: Path, size: str, *, rate: int, seconds: float) -> bytes:
    source = ("-f", "lavfi", "-i", f"color=c=gray:size={size}:rate={rate}:duration={seconds}")
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", *source, "-preset", "ultrafast", str(path)]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    return path.read_bytes()


def on_disk(folder: Path) -> dict[str, int]:
    """Return the files of a server with their sizes in bytes, without its log."""
    found = {}
    for path in folder.rglob("*"):
        with suppress(OSError):
            if path.is_file() and path.name != "server.log":
                found[str(path.relative_to(folder))] = path.stat().st_size
    return found


def left_over(folder: Path, before: dict[str, int]) -> list[str]:
    """Return the new files since `before`; the server has some seconds to delete them."""
    end = time.monotonic() + _WAIT
    while (more := sorted(on_disk(folder).keys() - before.keys())) and time.monotonic() < end:
        time.sleep(0.1)
    return more


def measured(folder: Path) -> dict[str, Any]:
    """Start a server, send the uploads, and return a row for each."""
    home = folder / "server"
    home.mkdir()
    limits = ["--upload-mb", str(MOST / 2**20), "--upload-seconds", str(SECONDS)]
    rows = []
    with serving(["-m", "postgen", "demo", "--port", "0", *limits], home, seconds=600) as served:
        web = Web(url=served.url)
        for row in _uploaded(web, home, folder):
            rows.append(row)
            print(f"upload, {row['what']}: {row}", flush=True)
        before = on_disk(home)
        fine = _call(web, *_sent(web, _whole(part("fine.mp4", _video(folder / "x.mp4", "64x64", rate=8, seconds=1)))))
        alive = web.ask("GET", "/")[0]
    return {
        "uploads": len(rows),
        "got_through": [row["what"] for row in rows if not row["refused"]],
        "left_on_disk": [row["what"] for row in rows if row["left"]],
        "an_allowed_one": {
            "scored": fine[0],
            "said": fine[1][:200],
            "kept": len(on_disk(home).keys() - before.keys()),
        },
        "page_after_all": alive,
        "rows": rows,
    }


def _uploaded(web: Web, home: Path, folder: Path) -> Iterator[dict[str, Any]]:
    for what, send in stopped_uploads().items():
        before = on_disk(home)
        status, told = send(web)
        yield {
            "what": what,
            "status": status,
            "refused": status != 200 or told.strip() == "[]",  # "[]" is an answer without a file
            "left": left_over(home, before),
        }
    for what, (name, content) in refused_files(folder).items():
        before = on_disk(home)
        status, told = _sent(web, _whole(part(name, content)))
        scored, said = _call(web, status, told)
        left = left_over(home, before)
        yield {"what": what, "status": status, "refused": not scored, "said": said[:200], "left": left}


def _call(web: Web, status: int, told: str) -> tuple[bool, str]:
    """Score an upload on the server; return whether that succeeded, and the text of the answer."""
    if status != 200:
        return False, told
    clip = {"path": json.loads(told)[0], "meta": {"_type": "gradio.FileData"}}
    _, stream = web.call("score", [clip, "", "", ["brightness_band"]])
    text = stream.decode(errors="replace")
    return "event: error" not in text and '"done"' in text, text[-400:]


def stopped(found: dict[str, Any]) -> float:
    """Return 1 if all uploads were refused without leftover files, an allowed one was scored, and the server runs."""
    fine = found["an_allowed_one"]["scored"] and found["page_after_all"] == 200
    return float(fine and not found["got_through"] and not found["left_on_disk"])


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        result = measured(Path(name))
    print({key: value for key, value in result.items() if key != "rows"}, stopped(result))
