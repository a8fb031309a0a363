"""The folder of the Hugging Face Space: its header, its requirements, and its page."""

from __future__ import annotations

import re
import urllib.request
from pathlib import Path

import pytest
import yaml

from tests.apps.served import ROOT, serving

SPACE = ROOT / "examples" / "space"


def test_the_header_names_what_is_tested() -> None:
    _, header, text = (SPACE / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    facts = yaml.safe_load(header)
    pinned = re.search(r"^gradio==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    assert (facts["sdk"], facts["sdk_version"]) == ("gradio", pinned[1])
    assert facts["python_version"] == "3.11"
    assert (SPACE / facts["app_file"]).is_file()
    assert len(facts["short_description"]) <= 60
    assert text.lstrip().startswith("# postgen")
    assert re.search(r"^postgen\[demo\]", (SPACE / "requirements.txt").read_text(), re.MULTILINE)


@pytest.mark.slow
def test_the_space_serves_its_page(tmp_path: Path) -> None:
    pytest.importorskip("gradio")
    with serving([SPACE / "app.py"], tmp_path) as space:
        asking = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        named = {"Host": "owner-postgen.hf.space", "Origin": "https://owner-postgen.hf.space"}
        for headers in ({}, named):
            request = urllib.request.Request(space.url, headers=headers)
            page = asking.open(request, timeout=30).read().decode()
            assert re.search(r"\"title\": *\"postgen\"", page)
        assert (tmp_path / "videos").is_dir()
