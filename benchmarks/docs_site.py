"""What `mkdocs build` adds to the pages of docs/: the API reference, and files of the repository that pages link to.

A hook of mkdocs.yml. On GitHub the links work as they stand; on the site, files outside docs/ become pages (sources,
recipes) or copies (results, pictures), and a folder of a package becomes its page of the API reference.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files

from benchmarks.docs_names import ROOT, Public, configurations, docstring_of, exported, packages, public_names

_LINK = re.compile(r"(\]\()([^)\s#]+)([^)\s]*\))")
_DOCTEST = re.compile(r'^( +)>>> .*\n(?:\1(?!""")\S.*\n)*', re.MULTILINE)
_LANGUAGES = {".py": "python", ".yaml": "yaml", ".txt": "text"}
_FOLDER = "repository"
_WIDE = ("paper_index.md",)
"""Pages of one wide table, which gets the place of the table of contents."""
_HIDDEN = "---\nsearch:\n  exclude: true\nhide: [toc]\n---\n\n"
_parsed: list[tempfile.TemporaryDirectory[str]] = []


@event_priority(100)
def on_config(config: Any) -> Any:
    """Show mkdocstrings a tree in which every folder is a package, and put the API reference into the navigation."""
    folder = tempfile.TemporaryDirectory()
    _parsed.append(folder)
    _packages_of(ROOT / "postgen", Path(folder.name) / "postgen")
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [folder.name]
    pages = {"Overview": "api/index.md"} | {_title(page): uri for uri, page in reference() if uri != "api/index.md"}
    for section in config.nav:
        for name, entries in section.items():
            if "api/index.md" in entries:
                section[name] = [each for each in entries if each != "api/index.md"]
                section[name].append({"API reference": [{title: uri} for title, uri in pages.items()]})
    return config


def _title(page: str) -> str:
    return page.partition("\n")[0].removeprefix("# ")


def _packages_of(source: Path, target: Path) -> None:
    """Copy the Python files of a folder, with fences around the examples of docstrings, which Markdown needs.

    `kernels` has no `__init__.py`, and would be left out otherwise.
    """
    target.mkdir(parents=True)
    (target / "__init__.py").touch()
    for path in sorted(source.iterdir()):
        if path.suffix == ".py":
            text = _DOCTEST.sub(_fenced, path.read_text(encoding="utf-8"))
            (target / path.name).write_text(text, encoding="utf-8")
        elif path.is_dir() and any(path.rglob("*.py")):
            _packages_of(path, target / path.name)


def _fenced(match: re.Match[str]) -> str:
    return f"{match[1]}```pycon\n{match[0]}{match[1]}```\n"


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are made here."""
    for uri, text in reference():
        files.append(File.generated(config, uri, content=text))
    pages = [file.src_uri for file in files.documentation_pages() if file.generated_by is None]
    waiting = ["CONTRIBUTING.md", "CHANGELOG.md", *(place for uri in pages for place in outside(f"docs/{uri}"))]
    while waiting:
        place = waiting.pop(0)
        if files.get_file_from_path(uri := site_uri(place)) is None:
            files.append(_file(uri, place, config))
            # A Markdown file outside docs/, such as examples/README.md, has links of its own.
            waiting += outside(place) if place.endswith(".md") else ()
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links to files outside docs/ into links to what stands for them on the site."""
    place = page.file.src_uri
    if place in _WIDE:
        page.meta["hide"] = ["toc"]
    if place.startswith(f"{_FOLDER}/") and not place.endswith(".py.md"):
        return _relinked(markdown, place, ROOT / PurePosixPath(place).relative_to(_FOLDER).parent)
    return _relinked(markdown, place, ROOT / "docs" / PurePosixPath(place).parent)


def on_post_build(**_: Any) -> None:
    """Remove the tree that mkdocstrings read."""
    while _parsed:
        _parsed.pop().cleanup()


def reference() -> Iterator[tuple[str, str]]:
    """Yield the pages of the API reference: where, and their text."""
    names = public_names()
    yield "api/index.md", _index(names)
    for package in packages():
        here = [each for each in names if each.package == package]
        if here or package == "postgen":
            yield api_uri(package), _package_page(package, here, names)


def api_uri(package: str) -> str:
    """Return the page of a package."""
    return f"api/{package.replace('.', '_')}.md"


def outside(page: str) -> Iterator[str]:
    """Yield the files outside docs/ that a Markdown file links to; both are paths from the root of the repository."""
    base = ROOT / PurePosixPath(page).parent
    for _, target, _ in _LINK.findall((ROOT / page).read_text(encoding="utf-8")):
        place = _place(target, base)
        if place is not None and (ROOT / place).is_file() and not place.startswith("docs/"):
            yield place


def site_uri(place: str) -> str:
    """Return the page or the copy of a file outside docs/, the page of a package for its folder."""
    if place.startswith("docs/"):
        return place.removeprefix("docs/")
    if (ROOT / place).is_dir():
        parts = PurePosixPath(place).parts
        return api_uri(".".join(parts[:2]) if parts[0] == "postgen" else f"postgen.{parts[0]}")
    return f"{_FOLDER}/{place}.md" if Path(place).suffix in _LANGUAGES else f"{_FOLDER}/{place}"


def _place(target: str, base: Path) -> str | None:
    """Return a link's file or folder from the root on; None for an address, and for what is not there."""
    if ":" in target or target.startswith("/"):
        return None
    path = Path(os.path.normpath(base / target))
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) and path.exists() else None


def _relinked(text: str, uri: str, base: Path) -> str:
    def made(match: re.Match[str]) -> str:
        place = _place(match[2], base)
        if place is None or (place.startswith("docs/") and not uri.startswith(_FOLDER)):
            return match[0]
        return f"{match[1]}{os.path.relpath(site_uri(place), str(PurePosixPath(uri).parent))}{match[3]}"

    return _LINK.sub(made, text)


def _file(uri: str, place: str, config: Any) -> File:
    path = ROOT / place
    language = _LANGUAGES.get(path.suffix)
    if language:
        text = f"{_HIDDEN}# {path.name}\n\n`{place}`\n\n````{language}\n{path.read_text(encoding='utf-8')}````\n"
        return File.generated(config, uri, content=text)
    return File.generated(config, uri, abs_src_path=str(path))


def _index(names: list[Public]) -> str:
    rows = []
    for package in packages():
        count = sum(each.package == package for each in names)
        if count or package == "postgen":
            told = (
                (docstring_of(package) or _NO_DOCSTRING[package])
                .partition("\n\n")[0]
                .replace("\n", " ")
                .replace("|", "\\|")
            )
            rows.append(f"| [`{package}`]({api_uri(package).removeprefix('api/')}) | {told} |")
    return "\n".join(("# API reference", "", _INTRODUCTION, "", "| Package | |", "|---|---|", *rows, ""))


_INTRODUCTION = (
    "Made of the docstrings when the site is built. It has the names that a package exports, the trainers with their "
    "settings, and whatever else a page of this documentation names. All else may change without notice."
)


_NO_DOCSTRING = {"postgen.kernels": "Operations of the GPU, each in a folder with its plain version, `naive.py`."}
"""What stands for the docstring of a folder that is no package."""


def _package_page(package: str, here: list[Public], names: list[Public]) -> str:
    lines = [f"# {package}", "", docstring_of(package) or _NO_DOCSTRING[package], ""]
    methods = configurations()
    if known := [method for home, method in methods.items() if any(each.home == home for each in here)]:
        links = ", ".join(f"[`{method}`](../configuration.md#method-{method})" for method in known)
        lines += [f"All settings of recipes, those of shared parts too: {links}.", ""]
    if package == "postgen":
        pages = {each.name: each for each in names}
        lines += ["| Import | Described in |", "|---|---|"]
        for name in (f"postgen.{each}" for each in exported("postgen")):
            if name in pages and (at := pages[name]).package != package:
                lines.append(f"| `{name}` | [{at.package}]({api_uri(at.package).removeprefix('api/')}#{at.home}) |")
    for each in here:
        lines += ["", f"::: {each.home}", "    options:", f"      heading: {each.name}"]
        lines.append(f"      toc_label: {each.name.rpartition('.')[2]}")
        if each.name.rpartition(".")[2].isupper():  # a table, often of pages
            lines.append("      show_attribute_values: false")
        if each.home in methods:  # a hundred fields, most of them of its parts
            lines.append("      show_signature: false")
    return "\n".join(lines) + "\n"
