"""Finds broken links on the built site and between the Markdown files of the repository."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from benchmarks.docs_names import ROOT

_FENCE = re.compile(r"^ *(`{3,}).*?^ *\1`*$", re.DOTALL | re.MULTILINE)
_CODE = re.compile(r"`[^`\n]*`")
_LINK = re.compile(r"(?<!\\)\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#{1,6} +(.+?) *$", re.MULTILINE)


class _Page(HTMLParser):
    """The links and anchors of an HTML page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Collect the links and anchors of a tag."""
        for name, value in attrs:
            if name in ("href", "src") and value:
                self.links.append(value)
            elif name in ("id", "name") and value:
                self.anchors.add(value)


def broken_on_site(folder: Path) -> list[str]:
    """Return the links of a built site whose file or anchor does not exist, as `page: link`.

    Args:
        folder: the folder of the site. 404.html is skipped, because its links are absolute.
    """
    pages = {path: _Page(path.read_text(encoding="utf-8")) for path in sorted(folder.rglob("*.html"))}
    found = []
    for path, page in pages.items():
        for link in page.links if path.name != "404.html" else ():
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            there = target in pages and (not parts.fragment or unquote(parts.fragment) in pages[target].anchors)
            if not (there or (target not in pages and target.is_file())):
                found.append(f"{path.relative_to(folder)}: {link}")
    return found


def broken_in_repository() -> list[str]:
    """Return the links of tracked Markdown files whose file or heading does not exist, as `file: link`."""
    listing = subprocess.run(["git", "ls-files", "-z", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True)
    found = []
    for path in (ROOT / name for name in listing.stdout.split("\0") if name):
        for link in _links(path):
            place, _, anchor = link.partition("#")
            target = (path.parent / place).resolve() if place else path
            if not target.exists() or (anchor and target.suffix == ".md" and anchor not in headings(target)):
                found.append(f"{path.relative_to(ROOT)}: {link}")
    return found


def _links(path: Path) -> Iterator[str]:
    text = _CODE.sub("", _FENCE.sub("", path.read_text(encoding="utf-8")))
    for link in _LINK.findall(text):
        if not urlsplit(link).scheme:
            yield link


@cache
def headings(path: Path) -> frozenset[str]:
    """Return the anchors that GitHub generates for the headings of a Markdown file."""
    found: dict[str, int] = {}
    for text in _HEADING.findall(_FENCE.sub("", path.read_text(encoding="utf-8"))):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", text)
        anchor = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        count = found.get(anchor, 0)
        found[anchor] = count + 1
        if count:
            found[f"{anchor}-{count}"] = 1
    return frozenset(found)
