"""A server of a page that asks for a font of another machine and throws an error on demand, with a child process.

It begins in a moment, which the app does not, and what the fixtures promise holds for any page.
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
    """Answers the page to whatever is asked."""

    def do_GET(self) -> None:
        """Send it."""
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(PAGE.encode())


def main() -> None:
    """Serve it at a free port."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    Path("child").write_text(str(child.pid))
    server = ThreadingHTTPServer(("127.0.0.1", 0), Small)
    print(f"serving at http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
