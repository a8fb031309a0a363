"""The gates of the documentation: broken links, docstrings of public names, indexed papers, tested code blocks.

python -m benchmarks.docs  # a minute on a CPU; builds the site in a temporary folder and writes docs.json

`code_blocks_run` is the share of code blocks that the tests run (`benchmarks.docs_blocks`).
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.docs_blocks import code_blocks_run
from benchmarks.docs_links import broken_in_repository, broken_on_site
from benchmarks.docs_names import ROOT, public_names
from benchmarks.gates import gate, write_result

PAPERS = tuple(line.split()[0] for line in (Path(__file__).parent / "data" / "papers.txt").read_text().splitlines())
"""The arXiv ids of the papers that the paper index must have."""
_ROW = re.compile(r"^\| \[(\d{4}\.\d{5})\]", re.MULTILINE)


def main() -> None:
    """Measure and write the result."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        warnings = build(Path(folder))
        seconds = time.monotonic() - began
        links = [*broken_on_site(Path(folder)), *broken_in_repository()]
        pages = len(list(Path(folder).rglob("*.html")))
    names = public_names()
    bare = [each.name for each in names if not each.documented]
    rows = set(_ROW.findall((ROOT / "docs" / "paper_index.md").read_text(encoding="utf-8")))
    payload = {
        "site": {"pages": pages, "seconds": round(seconds, 1), "warnings": warnings},
        "broken": links,
        "public_names": {"count": len(names), "without_docstring": bare},
        "papers": {"missing": [number for number in PAPERS if number not in rows]},
        "gates": [
            gate("code_blocks_run", code_blocks_run(), ">=", 0.8),
            gate("broken_links", len(links) + len(warnings), "==", 0),
            gate("public_names_documented", 1 - len(bare) / len(names), "==", 1.0),
            gate("papers_in_index", sum(number in rows for number in PAPERS), "==", 22),
        ],
    }
    print(write_result("docs", payload))


def build(folder: Path) -> list[str]:
    """Build the site and return the warnings.

    Args:
        folder: the folder for the site.

    Raises:
        RuntimeError: the build fails.
    """
    command = [sys.executable, "-m", "mkdocs", "build", "--no-strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the site cannot be built: {done.stderr[-2000:]}")
    return [line for line in done.stderr.splitlines() if line.startswith("WARNING")]


if __name__ == "__main__":
    main()
