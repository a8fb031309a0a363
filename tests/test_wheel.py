"""What a pip user gets: the files of the wheel, and its commands in a fresh environment outside the checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LINKED = ("pipelines", "rewards", "kernels", "apps", "recipes")

pytestmark = pytest.mark.slow


def tracked() -> list[str]:
    """Files of the checkout; the links inside `postgen/` are among them."""
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("not a git checkout")
    return [name for name in listing.stdout.split("\0") if name and os.path.lexists(ROOT / name)]


def build(kind: str, source: Path, folder: Path) -> Path:
    """Build an sdist or a wheel, not packed, which takes most of the time."""
    pytest.importorskip("setuptools", minversion="77")
    settings = {"--build-option": ["--compression=stored"]} if kind == "wheel" else {}
    script = "import json, sys\nfrom setuptools import build_meta\n"
    script += f"print('MADE', build_meta.build_{kind}({str(folder)!r}, json.loads(sys.argv[1])))"
    folder.mkdir()
    words = [sys.executable, "-c", script, json.dumps(settings)]
    ended = subprocess.run(words, cwd=source, capture_output=True, text=True, env=clean())
    assert ended.returncode == 0, ended.stderr[-2000:]
    return folder / ended.stdout.rpartition("MADE ")[2].strip()


def clean() -> dict[str, str]:
    """The environment of a person who knows nothing of the checkout."""
    return {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "PYTEST", "COV"))}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout, so that building leaves nothing in it."""
    folder = tmp_path_factory.mktemp("source")
    for name in tracked():
        if not name.startswith(("tests/", "benchmarks/", "docs/")):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name, follow_symlinks=False)
    return folder


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the checkout."""
    return build("wheel", source, tmp_path_factory.mktemp("built") / "wheel")


def content(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as file:
        return {name for name in file.namelist() if ".dist-info/" not in name}


def test_the_wheel_has_every_file_of_the_package(wheel: Path) -> None:
    names = [name for name in tracked() if not (ROOT / name).is_symlink()]
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
    """The command in a fresh environment, which takes other libraries from that of the tests."""
    folder = tmp_path_factory.mktemp("installed") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    words = ["install", "--quiet", "--disable-pip-version-check", "--no-deps", "--no-index", str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", "--python", str(python), *words], check=True, env=clean())
    (places,) = folder.glob("lib/python*/site-packages")
    # A path in such a file adds a folder, and reads no such file in there: ours is not found by way of the tests'.
    libraries = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    (places / "libraries.pth").write_text("\n".join(libraries) + "\n")
    return folder / "bin" / "postgen"


def run(command: Path, *words: str, folder: Path) -> str:
    env = {**clean(), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HOME": str(folder)}
    ended = subprocess.run([str(command), *words], cwd=folder, capture_output=True, text=True, env=env)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return ended.stdout


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
    """A recipe by name finds its prompts; a run lands in the current folder."""
    assert "dancegrpo-tiny" in run(installed, "recipes", folder=tmp_path)
    small = {
        "max_steps": 2, "eval_steps": 0, "eval_on_start": "false", "num_generations": 2, "rollout_batch_size": 2,
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "num_inference_steps": 2, "height": 32,
        "width": 32, "num_frames": 5, "bf16": "false", "device": "cpu", "disable_tqdm": "true", "report_to": "none",
        "reward_funcs": "world",
    }  # fmt: skip
    words = [word for key, value in small.items() for word in (f"--{key}", str(value))]
    run(installed, "train", "dancegrpo-tiny", *words, folder=tmp_path)
    folder = tmp_path / "runs" / "dancegrpo-tiny"
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert max(steps) == 2
    assert (folder / "export").is_dir()


def test_demo_as_a_pip_user(installed: Path, tmp_path: Path) -> None:
    pytest.importorskip("gradio")
    assert "--port" in run(installed, "demo", "--help", folder=tmp_path)
