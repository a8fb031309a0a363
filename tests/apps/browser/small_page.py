"""A small server for tests of the fixtures. Its page requests a font of another machine and raises an error on demand.

The server also has a child process. It starts much faster than the app, and the fixtures must work with any page.
"""

from __future__ import annotations

import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

FONT = "https://fonts.example/css?family=Nice"
PAGE = f"""<!doctype html><title>small</title><link rel="stylesheet" href="{FONT}">
<label>Name <input id="name"></label> <output></output>
<button onclick="document.querySelector('output').value = 'hello ' + localStorage.name">Greet</button>
<button onclick="setTimeout(() => {{ throw new Error('broken on purpose') }})">Break</button>
<script>document.querySelector('#name').oninput = (event) => {{ localStorage.name = event.target.value }}</script>"""


class Small(BaseHTTPRequestHandler):
    """Answers every request with the page."""

    def do_GET(self) -> None:
        """Send the page."""
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(PAGE.encode())


def main() -> None:
    """Serve the page on a free port."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    Path("child").write_text(str(child.pid))
    server = ThreadingHTTPServer(("127.0.0.1", 0), Small)
    print(f"serving at http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
