"""The house rules: imports between rooms, places of files, sizes, and the import time."""

import ast
import doctest
import importlib
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import postgen
from tests.arrows import offences
from tests.parsed import tree_of

ROOT = Path(__file__).resolve().parents[1]
LINKED = ("pipelines", "rewards", "kernels", "apps", "recipes")
MEBIBYTE = 2**20


def tracked(pattern="*"):
    """Return the files of the commit without symbolic links."""
    listing = subprocess.run(["git", "ls-files", "-z", pattern], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("not a git checkout")
    paths = [ROOT / name for name in listing.stdout.split("\0") if name]
    return [path for path in paths if path.is_file() and not path.is_symlink()]


def library():
    """Yield (import name, path) of every module; linked folders are read at the root."""
    for folder in ("postgen", *LINKED):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            if not any(parent.is_symlink() for parent in path.parents):
                yield ".".join(parts if folder == "postgen" else ("postgen", *parts)).removesuffix(".__init__"), path


def run(script, **options):
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, **options).stdout


def test_import_arrows():
    found = [
        offence
        for module, path in library()
        for offence in offences(module, path.read_text(encoding="utf-8"), is_package=path.name == "__init__.py")
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("module", "source", "message"),
    [
        ("postgen.kernels.gain.naive", "from postgen.errors import UserError", "kernels must not import errors"),
        ("postgen.world.render", "import diffusers", "world knows no model"),
        ("postgen.metrics.flow", "def f():\n    from transformers import AutoModel", "metrics knows no model"),
        ("postgen.families.wan", "from postgen.enhance import gain", "families must not import enhance"),
        ("postgen.families.wan", "from postgen import enhance", "families must not import enhance"),
        ("postgen.families.wan", "from ..grpo import trainer", "families must not import grpo"),
        ("postgen.lit.layer", "import postgen.fused.apply", "lit must not import fused"),
        ("postgen.lit.layer", "from postgen.pretrain import x", "lit must not import pretrain"),
        ("postgen.judges.world_clip", "from postgen.pretrain import pool", "judges must not import pretrain"),
        ("postgen.pretrain.latents", "from postgen import judges", "pretrain must not import judges"),
        ("postgen.judges.world_judge", "from diffusers import WanPipeline", "no concrete model class: WanPipeline"),
        ("postgen.enhance.apply", "from diffusers import WanPipeline", "no concrete model class: WanPipeline"),
        ("postgen.grpo.group", "from postgen.apps.demo import x", "grpo must not import apps"),
        ("postgen.rewards.colour", "from postgen.families import layout", "rewards must not import families"),
        ("postgen.training.loop", "from postgen.grpo import x", "training must not import grpo"),
        ("postgen.training.loop", "from postgen.reconstruct import x", "training must not import reconstruct"),
        ("postgen.sampling.sampler", "from postgen.training import x", "sampling must not import training"),
        ("postgen.sampling.sampler", "from postgen import reconstruct", "sampling must not import reconstruct"),
        ("postgen.sampling.sampler", "from diffusers import WanPipeline", "no concrete model class: WanPipeline"),
        ("postgen.families.blocks", "from postgen.sampling import x", "families must not import sampling"),
        ("postgen.reconstruct.engine", "from postgen.lit import x", "reconstruct must not import lit"),
        ("postgen.reconstruct.engine", "from postgen.kernels.adaln import ops", "reconstruct must not import kernels"),
        ("postgen.quant.layers", "from postgen import sparsity", "quant must not import sparsity"),
        ("postgen.sft.trainer", "from postgen.grpo.loss import x", "sft must not import grpo"),
        ("postgen.causal.cache", "from postgen.distill import x", "causal must not import distill"),
        ("postgen.distill.step", "from postgen.optimize import x", "distill must not import optimize"),
        ("postgen.training.loop", "from trl import DPOTrainer", "only name taken from trl, not DPOTrainer"),
        ("postgen.lit.layer", "from postgen.compat import unwrap", "lit must not import compat"),
        ("postgen.pipelines.wan", "from postgen import compat", "pipelines must not import compat"),
        ("postgen.training.ema", "from safetensors.torch import load_file", "only postgen.tensor_files opens"),
        ("postgen.generate", "import imageio", "only postgen.video opens videos"),
        ("postgen.generate", "from diffusers.utils import export_to_video", "only postgen.video opens videos"),
        ("postgen.quantum", "from postgen.errors import UserError", "quantum is a new room"),
    ],
)
def test_an_offence_is_found(module, source, message):
    assert [offence for offence in offences(module, source) if message in offence]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("postgen.video.read", "import imageio_ffmpeg\nfrom postgen.errors import UserError"),
        ("postgen.pretrain.text_to_video", "from diffusers import WanPipeline\nfrom postgen import training, world"),
        ("postgen.grpo.group", "from diffusers import DiffusionPipeline\nfrom .trainer import x"),
        ("postgen.cli", "from postgen import apps, grpo, lit"),
        ("postgen.training.recipe", "from trl import TrlParser"),
        (
            "postgen.training.policy",
            "from postgen.sampling.schedule import shifted\nfrom postgen.families import lora",
        ),
        ("postgen.sampling.sampler", "from postgen import assets, compat, errors, families, files"),
        ("postgen.reconstruct.engine", "from postgen import families, sampling, training"),
        ("postgen.distill.step", "from postgen import causal, sampling, training"),
        ("postgen.quant.apply", "from postgen import families, kernels, reconstruct"),
        ("postgen.optimize.search", "from postgen import fused, quant, tokens"),
        ("postgen.posttrain.stages", "from postgen import grpo, sft"),
        ("postgen.judges.world_clip", "from postgen import rewards, training, world"),
    ],
)
def test_the_rules_leave_room(module, source):
    assert offences(module, source) == []


def test_linked_folders_are_relative_links():
    for name in LINKED:
        link = ROOT / "postgen" / name
        assert link.is_symlink(), name
        assert os.readlink(link) == f"../{name}"
        assert (ROOT / name).is_dir()
        assert not (ROOT / name).is_symlink()
    modes = subprocess.run(
        ["git", "ls-files", "-s", *(f"postgen/{name}" for name in LINKED)], cwd=ROOT, capture_output=True, text=True
    )
    if modes.returncode == 0:
        assert [line.split()[0] for line in modes.stdout.splitlines()] == ["120000"] * len(LINKED)


def test_kernels_is_a_namespace_folder():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert importlib.util.find_spec("postgen.kernels").origin is None


def test_no_folder_of_the_root_is_a_package_of_the_hub():
    """Gradio imports a module `spaces` if there is one, even an empty folder, and calls its functions in a Space."""
    assert not (ROOT / "spaces").exists()


@pytest.mark.slow
def test_hub_kernels_package_works_from_the_repository_root():
    spec = importlib.util.find_spec("kernels")
    # If the Hub's package is absent, our own folder at the root is found as a namespace package, which has no origin.
    if spec is None or spec.origin is None:
        pytest.skip("needs the package kernels")
    script = (
        "import diffusers.models.attention_dispatch as dispatch, kernels\n"
        "print(callable(kernels.get_kernel), len(dispatch.AttentionBackendName) > 5)"
    )
    assert run(script, cwd=ROOT).split() == ["True", "True"]


def test_file_and_function_lengths():
    found = []
    for path in tracked("*.py"):
        text = path.read_text(encoding="utf-8")
        if len(text.splitlines()) > 400:
            found.append(f"{path.name}: {len(text.splitlines())} lines, at most 400")
        for node in ast.walk(tree_of(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and code_lines(node) > 50:
                found.append(f"{path.name}:{node.lineno}: {node.name} has {code_lines(node)} lines, at most 50")
    assert not found, "\n".join(found)


def code_lines(function):
    """Return the number of lines of a function without its docstring."""
    first = function.body[0]
    docstring = ast.get_docstring(function) is not None
    return function.end_lineno - function.lineno + 1 - (first.end_lineno - first.lineno + 1 if docstring else 0)


def test_code_lines_leaves_the_docstring_out():
    source = 'def f():\n    """One.\n\n    Two.\n    """\n    x = 1\n    return x\n'
    assert code_lines(ast.parse(source).body[0]) == 3


def test_no_module_is_called_utils():
    assert not [str(path) for path in tracked("*.py") if path.name == "utils.py"]


def test_tracked_files_are_small():
    sizes = {path: path.stat().st_size for path in tracked()}
    # The rest of the limit is for adapters of methods.
    assert sum(sizes.values()) <= 52 * MEBIBYTE
    model = ROOT / "postgen" / "assets" / "tiny-wan"
    assert sum(size for path, size in sizes.items() if model in path.parents) <= 24_000_000


def test_no_path_of_a_machine_is_tracked():
    # The patterns are composed of parts, so that this file does not match itself.
    roots = "|".join(("home", "root", "Users", "mnt", "wo" + "rk"))
    pattern = re.compile(rf"(?<![\w.~>-])/(?:{roots})/\w".encode())
    assert pattern.search(b"see /" + b"home/ann/x")
    found = []
    for path in tracked():
        data = path.read_bytes()
        if b"\0" not in data[:4096] and (match := pattern.search(data)):
            found.append(f"{path.relative_to(ROOT)}: {match.group().decode()}")
    assert not found, "\n".join(found)


def test_import_is_light():
    heavy = "{'torch', 'diffusers', 'transformers', 'numpy', 'typer'}"
    assert run(f"import sys, postgen; print(sorted({heavy} & set(sys.modules)))").strip() == "[]"


def test_a_converted_model_is_loaded_without_training():
    training = "{'accelerate', 'postgen.training', 'postgen.reconstruct'}"
    assert run(f"import sys, postgen.lit; print(sorted({training} & set(sys.modules)))").strip() == "[]"


def test_the_page_of_the_app_is_built_without_the_libraries_of_models(tmp_path):
    pytest.importorskip("gradio")
    libraries = "{'accelerate', 'diffusers', 'peft', 'transformers'}"
    script = "import sys\nfrom postgen.apps.demo import build\nbuild()\n"
    assert run(f"{script}print(sorted({libraries} & set(sys.modules)))", cwd=tmp_path).strip() == "[]"


def test_help_is_light():
    script = (
        "import sys\nfrom postgen.cli import main\nsys.argv = ['postgen', '--help']\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "print('HEAVY', sorted({'torch', 'diffusers', 'transformers'} & set(sys.modules)))"
    )
    output = run(script)
    assert "generate" in output
    assert output.rstrip().endswith("HEAVY []")


@pytest.mark.parametrize("module", [name for name, path in library() if ">>> " in path.read_text(encoding="utf-8")])
def test_examples_of_docstrings(module):
    failed, tried = doctest.testmod(importlib.import_module(module))
    assert tried
    assert not failed


def test_public_names_are_few_and_real():
    assert len(postgen.__all__) <= 32
    for name in postgen.__all__:
        assert getattr(postgen, name) is not None
        assert name in dir(postgen)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        postgen.nothing  # noqa: B018


def test_public_names_are_known_to_type_checkers():
    tree = ast.parse((ROOT / "postgen" / "__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    typed = {alias.asname: node.module for node in block.body for alias in node.names}
    assert typed == postgen._HOMES
