"""Build the wheel of this checkout, install it in a fresh environment, and run it like a user."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def tracked() -> list[str] | None:
    """Return the files of the checkout, including the links inside `postgen/`; None if this is not a checkout."""
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode:
        return None
    return [name for name in listing.stdout.split("\0") if name and os.path.lexists(ROOT / name)]


def copied(folder: Path) -> Path:
    """Copy the sources of the package to a folder, so that the build leaves no files in the checkout.

    Raises:
        FileNotFoundError: this is not a checkout.
    """
    if (names := tracked()) is None:
        raise FileNotFoundError(f"{ROOT} is no git checkout")
    for name in names:
        if not name.startswith(("tests/", "benchmarks/", "docs/")):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name, follow_symlinks=False)
    return folder


def build(kind: str, source: Path, folder: Path) -> Path:
    """Build an unpacked sdist or wheel; packing would take most of the time.

    Raises:
        AssertionError: the build failed; the message contains its output.
    """
    settings = {"--build-option": ["--compression=stored"]} if kind == "wheel" else {}
    script = "import json, sys\nfrom setuptools import build_meta\n"
    script += f"print('MADE', build_meta.build_{kind}({str(folder)!r}, json.loads(sys.argv[1])))"
    folder.mkdir()
    words = [sys.executable, "-c", script, json.dumps(settings)]
    ended = subprocess.run(words, cwd=source, capture_output=True, text=True, env=clean())
    assert ended.returncode == 0, ended.stderr[-2000:]
    return folder / ended.stdout.rpartition("MADE ")[2].strip()


def clean() -> dict[str, str]:
    """Return environment variables that do not refer to the checkout."""
    return {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "PYTEST", "COV"))}


def install(wheel: Path, folder: Path) -> Path:
    """Install a wheel in a fresh environment that uses the libraries of this one; return the command."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    words = ["install", "--quiet", "--disable-pip-version-check", "--no-deps", "--no-index", str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", "--python", str(python), *words], check=True, env=clean())
    (places,) = folder.glob("lib/python*/site-packages")
    # A .pth file adds a folder but does not read the .pth files in it, so the editable install of this environment is
    # not found.
    libraries = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    (places / "libraries.pth").write_text("\n".join(libraries) + "\n")
    return folder / "bin" / "postgen"


def run(command: Path, *words: str, folder: Path) -> str:
    """Run an installed command in a folder, and return its output.

    Raises:
        AssertionError: the command failed; the message contains its errors.
    """
    env = {**clean(), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HOME": str(folder)}
    ended = subprocess.run([str(command), *words], cwd=folder, capture_output=True, text=True, env=env)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return ended.stdout


def training_words(steps: int = 2) -> list[str]:
    """Return options with which `dancegrpo-tiny` takes seconds on a CPU."""
    small = {
        "max_steps": steps, "eval_steps": 0, "eval_on_start": "false", "num_generations": 2, "rollout_batch_size": 2,
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "num_inference_steps": 2, "height": 32,
        "width": 32, "num_frames": 5, "bf16": "false", "device": "cpu", "disable_tqdm": "true", "report_to": "none",
        "reward_funcs": "world",
    }  # fmt: skip
    return [word for key, value in small.items() for word in (f"--{key}", str(value))]
