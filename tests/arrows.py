"""The import rules inside postgen, and the function that finds violations in the source of a module."""

import ast
from collections.abc import Iterator

from tests.parsed import tree_of
from tests.private_names import MODEL_LIBRARIES

METHODS = {
    *("enhance", "fused", "lit", "sparse", "tokens", "sparsity", "quant", "grpo", "worldweaver", "distill", "causal"),
    *("fp8_linear", "merging", "prompt", "sft", "judges", "experimental"),
}
"""Rooms (top-level modules and folders) of one method each. No method imports another."""
GROUND = {
    *("errors", "files", "interrupts", "locks", "own_code", "prompt_rows", "reading", "settings", "shipped"),
    "tensor_files",
    "versions",
}
LOWER = {
    *(*GROUND, "assets", "families", "kernels", "metrics", "reconstruct", "rewards", "sampling", "training"),
    *("video", "world"),
}
"""Rooms that a method may import. A method uses `families` instead of `compat`."""
TOP = {"", "__main__", "apps", "cli", "commands", "compare", "generate", "info", "optimize", "plug_ins", "posttrain"}
TOP |= {"enhancing", "generate_long", "long_files", "request", "running", "train"}
"""Rooms that may import any room."""

ALLOWED = {
    "errors": set(),
    "files": {"errors", "interrupts"},
    "interrupts": set(),
    "locks": {"errors"},
    "own_code": {"errors"},
    "prompt_rows": {"errors", "reading"},
    "reading": {"errors"},
    "settings": {"errors"},
    "shipped": {"errors"},
    "tensor_files": {"errors", "reading"},
    "versions": set(),
    "assets": GROUND,
    "compat": GROUND,
    "kernels": {"files"},
    "video": GROUND,
    "world": GROUND,
    "metrics": {*GROUND, "assets", "video", "world"},
    "rewards": {*GROUND, "assets", "metrics", "video", "world"},
    "families": {*GROUND, "assets", "compat"},
    "sampling": {*GROUND, "assets", "compat", "families", "video"},
    "training": {*GROUND, "assets", "compat", "families", "sampling", "video"},
    "reconstruct": {*GROUND, "assets", "compat", "families", "sampling", "training"},
    # The table of plug-ins names modules as texts and does not import them.
    "pipelines": {*GROUND, "families", "plug_ins", *METHODS},
    **dict.fromkeys(METHODS, LOWER),
    # Few-step distillation of a block-causal model is a further stage of the conversion.
    "distill": {*LOWER, "causal"},
    # The recipe of the embedded model builds one model, so it may import the classes of this model.
    "pretrain": LOWER,
}
"""Room -> other rooms that it may import."""

VIDEO_LIBRARIES = {"av", "decord", "imageio", "imageio_ffmpeg", "moviepy", "torchcodec"}
VIDEO_NAMES = {
    "export_to_video",
    "export_to_gif",
    "load_video",
    "read_video",
    "write_video",
    "VideoCapture",
    "VideoWriter",
}
MODEL_FREE = {"kernels", "video", "world", "metrics", *GROUND, "assets"}
CLASS_FREE = {*METHODS, "reconstruct", "sampling", "training"}
GENERIC_CLASSES = {"AutoModelForCausalLM", "DiffusionPipeline", "EMAModel"}


def room(module: str) -> str:
    """Return the room of a dotted module name: "" for `postgen` itself."""
    return [*module.split("."), ""][1]


def imports(tree: ast.AST, package: str) -> Iterator[tuple[int, str, str]]:
    """Yield (line, module, name) of every import, at any depth; name is "" for a plain `import module`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*base, *filter(None, [node.module])])
            yield from ((node.lineno, module, alias.name) for alias in node.names)


def offences(module: str, source: str, *, is_package: bool = False) -> list[str]:
    """Return the imports of a module that violate the rules, one line each."""
    tree = tree_of(source)
    package = module if is_package else module.rpartition(".")[0]
    return [
        f"{module}:{line}: {problem}"
        for line, target, name in imports(tree, package)
        for problem in (_inside(module, target, name), *_outside(module, target, name))
        if problem
    ]


def _inside(module: str, target: str, name: str) -> str:
    if target.split(".")[0] != "postgen":
        return ""
    here, there = room(module), room(target) or name
    if here in TOP or there in ("", here, "__version__"):
        return ""
    if here not in ALLOWED:
        return f"{here} is a new room: give it a row in tests/arrows.py"
    return "" if there in ALLOWED[here] else f"{here} must not import {there}"


def _outside(module: str, target: str, name: str) -> Iterator[str]:
    here, library = room(module), target.split(".")[0]
    if here in MODEL_FREE and library in MODEL_LIBRARIES:
        yield f"{here} knows no model, it must not import {library}"
    opens = library in VIDEO_LIBRARIES or (library != "postgen" and name in VIDEO_NAMES)
    # postgen.info reads the versions of the libraries.
    if opens and here not in ("video", "info"):
        yield f"only postgen.video opens videos, not {here}: {target} {name}"
    if library == "safetensors" and name in ("safe_open", "load_file") and here != "tensor_files":
        yield f"only postgen.tensor_files opens safetensors, not {here}"
    if library not in MODEL_LIBRARIES:
        return
    if here in CLASS_FREE and library in ("diffusers", "transformers") and _is_concrete(name):
        yield f"{here} knows no concrete model class: {name}"
    if library == "trl" and name != "TrlParser":
        yield f"TrlParser is the only name taken from trl, not {name or target}"


def _is_concrete(name: str) -> bool:
    endings = ("Model", "Pipeline", "ForCausalLM", "ForConditionalGeneration")
    return name not in GENERIC_CLASSES and (name.endswith(endings) or name.startswith("AutoencoderKL"))
