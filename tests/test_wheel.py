"""The package that a pip user installs: the files of the wheel, and its commands in a fresh environment."""

from __future__ import annotations

import json
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.wheels import ROOT, build, copied, install, run, tracked, training_words

LINKED = ("pipelines", "rewards", "kernels", "apps", "recipes")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy of the checkout."""
    pytest.importorskip("setuptools", minversion="77")
    if tracked() is None:
        pytest.skip("not a git checkout")
    return copied(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wheel that was built from the checkout."""
    return build("wheel", source, tmp_path_factory.mktemp("built") / "wheel")


def content(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as file:
        return {name for name in file.namelist() if ".dist-info/" not in name}


def test_the_wheel_has_every_file_of_the_package(wheel: Path) -> None:
    names = [name for name in tracked() or () if not (ROOT / name).is_symlink()]
    expected = {name for name in names if name.startswith("postgen/")}
    expected |= {f"postgen/{name}" for name in names if name.partition("/")[0] in LINKED}
    found = content(wheel)
    assert found == expected
    needed = ("apps/__init__.py", "assets/tiny-wan/model_index.json", "recipes/dancegrpo-tiny.yaml", "py.typed")
    needed += ("recipes/prompts/two-bodies.jsonl", "recipes/accelerate/ddp.yaml", "kernels/adaln/naive.py")
    assert {f"postgen/{name}" for name in needed} <= found


def test_a_wheel_of_the_sdist_is_the_same(source: Path, wheel: Path, tmp_path: Path) -> None:
    packed = build("sdist", source, tmp_path / "sdist")
    with tarfile.open(packed) as file:
        file.extractall(tmp_path, filter="data")
    again = build("wheel", tmp_path / packed.name.removesuffix(".tar.gz"), tmp_path / "wheel")
    assert content(again) == content(wheel)


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Command of the wheel in a fresh environment."""
    return install(wheel, tmp_path_factory.mktemp("installed") / "venv")


def test_the_installed_package_is_that_of_the_wheel(installed: Path, tmp_path: Path) -> None:
    script = "import postgen, postgen.apps, postgen.recipes as r\nprint(postgen.__file__, *r.__path__)"
    places = run(installed.with_name("python"), "-c", script, folder=tmp_path).split()
    assert [Path(place).is_relative_to(installed.parents[1]) for place in places] == [True, True]


def test_generate_as_a_pip_user(installed: Path, tmp_path: Path) -> None:
    words = ("generate", "a red ball rolls left", "-o", "ball.mp4", "--frames", "5", "--size", "32x32", "--steps", "2")
    run(installed, *words, folder=tmp_path)
    assert {path.name for path in tmp_path.glob("ball*")} >= {"ball.mp4", "ball.json"}
    assert json.loads((tmp_path / "ball.json").read_text())["prompt"] == "a red ball rolls left"


def test_train_as_a_pip_user(installed: Path, tmp_path: Path) -> None:
    """A recipe that is given by name finds its prompts; the run is written to the current folder."""
    assert "dancegrpo-tiny" in run(installed, "recipes", folder=tmp_path)
    run(installed, "train", "dancegrpo-tiny", *training_words(), folder=tmp_path)
    folder = tmp_path / "runs" / "dancegrpo-tiny"
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert max(steps) == 2
    assert (folder / "export").is_dir()


def test_demo_as_a_pip_user(installed: Path, tmp_path: Path) -> None:
    pytest.importorskip("gradio")
    assert "--port" in run(installed, "demo", "--help", folder=tmp_path)
