"""The hook of mkdocs.yml that adds the API reference and linked files of the repository to the site.

The links of the pages work on GitHub. For the site, linked files outside docs/ become pages (sources, recipes) or
copies (results, pictures), and a link to the folder of a package leads to its page of the API reference.
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
_STATES = re.compile(r"(<table>\s*<thead>(?:(?!</thead>).)*<th>State</th>)", re.DOTALL)
_WIDE = ("paper_index.md",)
"""Pages with wide tables. They have no table of contents, and on telephones the cells of a row are stacked."""
_HIDDEN = "---\nsearch:\n  exclude: true\nhide: [toc]\n---\n\n"
_parsed: list[tempfile.TemporaryDirectory[str]] = []


@event_priority(100)
def on_config(config: Any) -> Any:
    """Give mkdocstrings a copy in which every folder is a package, and add the API reference to the navigation."""
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
    """Copy the Python files of a folder and add `__init__.py`, without which mkdocstrings would skip `kernels`.

    Examples in docstrings get fences, because Markdown needs them.
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
    """Add the generated pages and the linked files of the repository."""
    for uri, text in reference():
        files.append(File.generated(config, uri, content=text))
    pages = [file.src_uri for file in files.documentation_pages() if file.generated_by is None]
    waiting = ["CONTRIBUTING.md", "CHANGELOG.md", *(place for uri in pages for place in outside(f"docs/{uri}"))]
    while waiting:
        place = waiting.pop(0)
        if files.get_file_from_path(uri := site_uri(place)) is None:
            files.append(_file(uri, place, config))
            # A Markdown file outside docs/, such as examples/README.md, may link to other files.
            waiting += outside(place) if place.endswith(".md") else ()
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Change links to files outside docs/ to links to their pages or copies on the site."""
    place = page.file.src_uri
    if place in _WIDE:
        page.meta["hide"] = ["toc"]
    if place.startswith(f"{_FOLDER}/") and not place.endswith(".py.md"):
        return _relinked(markdown, place, ROOT / PurePosixPath(place).relative_to(_FOLDER).parent)
    return _relinked(markdown, place, ROOT / "docs" / PurePosixPath(place).parent)


def on_page_content(html: str, page: Any, **_: Any) -> str:
    """Mark the tables of wide pages for the style sheet, and those with a column "State" for its labels."""
    if page.file.src_uri not in _WIDE:
        return html
    html = _STATES.sub('<div class="stacked states">\\1', html)
    html = re.sub(r'(?<!states">)<table>', '<div class="stacked"><table>', html)
    return html.replace("</table>", "</table></div>")


def on_post_build(**_: Any) -> None:
    """Remove the copy of the sources for mkdocstrings."""
    while _parsed:
        _parsed.pop().cleanup()


def reference() -> Iterator[tuple[str, str]]:
    """Yield the path and text of each page of the API reference."""
    names = public_names()
    yield "api/index.md", _index(names)
    for package in packages():
        here = [each for each in names if each.package == package]
        if here or package == "postgen":
            yield api_uri(package), _package_page(package, here, names)


def api_uri(package: str) -> str:
    """Return the path of the API page of a package."""
    return f"api/{package.replace('.', '_')}.md"


def outside(page: str) -> Iterator[str]:
    """Yield the files outside docs/ that a Markdown file links to; all paths are relative to the repository."""
    base = ROOT / PurePosixPath(page).parent
    for _, target, _ in _LINK.findall((ROOT / page).read_text(encoding="utf-8")):
        place = _place(target, base)
        if place is not None and (ROOT / place).is_file() and not place.startswith("docs/"):
            yield place


def site_uri(place: str) -> str:
    """Return the site path of a file or folder of the repository: a page, a copy, or the API page of a package.

    The folder `postgen` itself leads to the overview of the API reference.
    """
    if place.startswith("docs/"):
        return place.removeprefix("docs/")
    if (ROOT / place).is_dir():
        parts = PurePosixPath(place).parts
        if place == "postgen":
            return "api/index.md"
        return api_uri(".".join(parts[:2]) if parts[0] == "postgen" else f"postgen.{parts[0]}")
    return f"{_FOLDER}/{place}.md" if Path(place).suffix in _LANGUAGES else f"{_FOLDER}/{place}"


def _place(target: str, base: Path) -> str | None:
    """Return the target of a link relative to the repository; None for a URL and for a missing file."""
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
    "This reference is generated from the docstrings. It contains the names that packages export, the trainers with "
    "their settings, and all other names that this documentation uses. Other names may change without notice."
)


_NO_DOCSTRING = {"postgen.kernels": "GPU operations, each in a folder with its reference in plain torch, `naive.py`."}
"""Texts for folders without `__init__.py`, which have no docstring."""


def _package_page(package: str, here: list[Public], names: list[Public]) -> str:
    lines = [f"# {package}", "", docstring_of(package) or _NO_DOCSTRING[package], ""]
    methods = configurations()
    if known := [method for home, method in methods.items() if any(each.home == home for each in here)]:
        links = ", ".join(f"[`{method}`](../configuration.md#method-{method})" for method in known)
        lines += [f"All settings of recipes, including those of shared parts: {links}.", ""]
    if package == "postgen":
        pages = {each.name: each for each in names}
        lines += ["| Import | Described in |", "|---|---|"]
        for name in (f"postgen.{each}" for each in exported("postgen")):
            if name in pages and (at := pages[name]).package != package:
                lines.append(f"| `{name}` | [{at.package}]({api_uri(at.package).removeprefix('api/')}#{at.home}) |")
    for each in here:
        lines += ["", f"::: {each.home}", "    options:", f"      heading: {each.name}"]
        lines.append(f"      toc_label: {each.name.rpartition('.')[2]}")
        if each.name.rpartition(".")[2].isupper():  # constants are often long tables
            lines.append("      show_attribute_values: false")
        if each.home in methods:  # the signature would have about a hundred fields, most of them of shared parts
            lines.append("      show_signature: false")
    return "\n".join(lines) + "\n"
