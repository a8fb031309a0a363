"""The documentation site: generated files are up to date, every public name is described, all links work."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from benchmarks import docs_keys, docs_site
from benchmarks.docs import PAPERS
from benchmarks.docs_links import broken_in_repository, broken_on_site, headings
from benchmarks.docs_names import configurations, docstring_of, exported, packages, public_names, trainers
from postgen.training.recipe import METHODS, find_method
from tests.test_paper_index import PLANNED, USED

ROOT = Path(__file__).parents[1]
NAMES = public_names()


def test_the_page_of_settings_is_up_to_date():
    assert docs_keys.PAGE.read_text(encoding="utf-8") == docs_keys.page(), "run python -m benchmarks.docs_keys"


def test_every_setting_has_a_meaning():
    rows = re.findall(r"^\| `(\w+)`.* \| (.*) \|$", docs_keys.page(), re.MULTILINE)
    assert len(rows) > 250
    assert not [name for name, told in rows if not told]


def test_public_names_are_described():
    assert len(NAMES) > 400
    assert not [each.name for each in NAMES if not each.documented]
    assert not [name for name in packages() if name != "postgen.kernels" and not docstring_of(name)]


def test_public_names_are_found_without_importing_them():
    import postgen.lit
    import postgen.training

    by_name = {each.name: each.home for each in NAMES}
    assert by_name["postgen.lit.convert"] == "postgen.lit.convert.convert"
    assert by_name["postgen.DanceGRPOConfig"] == "postgen.grpo.config.DanceGRPOConfig"
    for package in (postgen, postgen.lit, postgen.training):
        assert {*exported(package.__name__)} >= {*package.__all__}
    assert not [name for name in ("postgen.lit.transfer", "postgen.pipelines.WanPipeline") if name not in by_name]


def test_trainers_and_their_settings_are_public():
    homes = {each.home for each in NAMES}
    assert {*trainers().values()} == {*METHODS} == {*configurations().values()}
    assert homes >= {*trainers(), *configurations()}
    assert configurations().keys() == {
        f"{kind.__module__}.{kind.__qualname__}" for kind in (find_method(name).config_class for name in METHODS)
    }


def test_links_of_the_repository_lead_somewhere():
    assert not broken_in_repository()


def test_headings_are_anchors_as_on_github(tmp_path):
    page = tmp_path / "a.md"
    page.write_text("# `--long`, and [more](b.md)\n\n```bash\n# no heading\n```\n\n## Two words\n## Two words\n")
    assert headings(page) == {"--long-and-more", "two-words", "two-words-1"}


def test_broken_links_of_a_site_are_found(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.html").write_text('<h1 id="top">b</h1><a href="../a.html#here">a</a>')
    (tmp_path / "a.html").write_text(
        '<p id="here"><a href="sub/b.html#top"></a><a href="sub/b.html#none"></a><a href="c.html"></a>'
        '<img src="d.png"><a href="https://example.org/x"></a><a href="#there"></a></p>'
    )
    assert broken_on_site(tmp_path) == [f"a.html: {link}" for link in ("sub/b.html#none", "c.html", "d.png", "#there")]


def test_the_papers_of_the_project_are_in_the_index():
    assert len({*PAPERS}) == 22
    assert not {*PAPERS} - {*USED} - {*PLANNED}


def test_every_metric_of_the_log_is_in_the_glossary():
    """Keys with a slash, for which the code can be searched. Keys without a slash were collected by hand."""
    glossary = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    files = [path for part in ("grpo", "training") for path in (ROOT / "postgen" / part).glob("*.py")]
    found = {key for path in files for key in re.findall(r'"([a-z_]+/[a-z_]+)"', path.read_text(encoding="utf-8"))}
    keys = found - {"s/step", "runs/grpo"}
    assert len(keys) > 20
    assert not [key for key in sorted(keys) if key not in glossary]


class _Loader(yaml.SafeLoader):
    """Loader for mkdocs.yml, which names a Python function."""


_Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: suffix)


def test_every_page_is_in_the_navigation():
    settings = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), _Loader)

    def pages(entries):
        for entry in entries:
            values = entry.values() if isinstance(entry, dict) else [entry]
            for value in values:
                yield from pages(value) if isinstance(value, list) else [value]

    there = [*pages(settings["nav"])]
    assert not [path.name for path in (ROOT / "docs").glob("*.md") if path.name not in there]
    assert len(there) == len({*there})


def test_folders_of_packages_lead_to_the_api_reference() -> None:
    assert docs_site.site_uri("postgen") == "api/index.md"
    assert docs_site.site_uri("postgen/metrics") == docs_site.api_uri("postgen.metrics")
    assert docs_site.site_uri("apps") == docs_site.api_uri("postgen.apps")


@pytest.mark.slow
def test_the_api_reference_has_every_public_name():
    pytest.importorskip("mkdocs")
    from benchmarks.docs_site import reference

    text = "".join(page for _, page in reference())
    assert not [each.home for each in NAMES if f"::: {each.home}\n" not in text]


@pytest.mark.parametrize(("name", "marked"), [("paper_index.md", True), ("cost.md", False)])
def test_tables_of_wide_pages_are_marked_for_the_style_sheet(name: str, marked: bool) -> None:
    page = SimpleNamespace(file=SimpleNamespace(src_uri=name))
    table = "<table><tr></tr></table>"
    found = docs_site.on_page_content(f"<p>a</p>{table}", page)
    assert found == (f'<p>a</p><div class="stacked">{table}</div>' if marked else f"<p>a</p>{table}")
    states = "<table>\n<thead>\n<tr><th>a</th><th>State</th></tr></thead></table>"
    found = docs_site.on_page_content(f"{states}{table}", page)
    both = f'<div class="stacked states">{states}</div><div class="stacked">{table}</div>'
    assert found == (both if marked else f"{states}{table}")
