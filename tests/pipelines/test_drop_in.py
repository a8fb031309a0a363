"""Every drop-in pipeline: the diffusers class with a keyword for each plug-in, and one tiny call of it."""

from __future__ import annotations

import ast
import importlib
import inspect
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import postgen.pipelines as drop_ins
from postgen.enhance import handle_of
from postgen.families import registry
from postgen.pipelines.names import typed
from tests import children
from tests.pipelines import ltx2, more, others, wan_like  # noqa: F401 - they enter their builders into the table
from tests.pipelines.parts import TINY, wan_parts

pytestmark = pytest.mark.filterwarnings("ignore:Enhance-A-Video", "ignore:In CPU autocast")

IMAGES = {"Cosmos2TextToImagePipeline", "Kandinsky5I2IPipeline", "Kandinsky5T2IPipeline"}
"""They make one frame, so there is nothing to enhance."""

NOT_CALLED = {
    "Cosmos2_5_TransferPipeline": "needs torchvision and a control network",
    "LTX2DFRTemporalRefinePipeline": "takes the output of LTX2DFRPipeline and an upsampler",
    "MotifVideoImage2VideoPipeline": "its text encoder has a vision tower of its own",
}
"""Only built and their signature checked."""

BROKEN = {"EasyAnimateControlPipeline": "text_encoder_index"}
"""Cannot be called in diffusers either, which raises a TypeError with this word."""

UNTOLD = {"LTX2DFRPipeline"}
"""The call does not tell the frames: a warning says so, and nothing is enhanced."""


def transformer_classes(pipeline: type) -> set[str]:
    parameters = inspect.signature(pipeline.__init__).parameters.values()  # type: ignore[misc]
    known = [name for name, row in registry._layouts.items() if row.video is not None]
    return {name for name in known for one in parameters if name in str(one.annotation)}


def test_every_video_pipeline_of_a_known_transformer_is_there() -> None:
    known = set()
    for name in dir(diffusers):
        if name.endswith("Pipeline") and name != "DiffusionPipeline":
            kind = getattr(diffusers, name)
            if isinstance(kind, type) and transformer_classes(kind):
                known.add(name)
    assert known - IMAGES == set(drop_ins.__all__)
    assert known >= IMAGES


@pytest.mark.parametrize("name", drop_ins.__all__)
def test_class_and_signature(name: str) -> None:
    ours, theirs = getattr(drop_ins, name), getattr(diffusers, name)
    assert issubclass(ours, theirs)
    assert (ours.__name__, ours.__module__) == (name, f"postgen.pipelines.{drop_ins._HOMES[name]}")
    assert inspect.signature(ours.__init__) == inspect.signature(theirs.__init__)
    wanted, found = (dict(inspect.signature(kind.__call__).parameters) for kind in (theirs, ours))
    for keyword in ("enhance_a_video", "fp8_attention", "fp8_linears", "fused_ops", "prompt_enhancer"):
        setting = found.pop(keyword)
        assert setting.kind is setting.KEYWORD_ONLY
        assert setting.default is None
        assert f"{keyword} (" in ours.__call__.__doc__
    assert list(found.items()) == list(wanted.items())
    assert theirs.__call__.__doc__.strip() in ours.__call__.__doc__


def test_names_are_known_to_type_checkers() -> None:
    folder = Path(drop_ins.__file__).parent
    for text in ((folder / "__init__.py").read_text(), typed(folder)):
        block = next(node for node in ast.parse(text).body if isinstance(node, ast.If))
        found = {alias.asname: node.module for node in block.body for alias in node.names}  # type: ignore[attr-defined]
        wanted = {name: f"postgen.pipelines.{home}" for name, home in drop_ins._HOMES.items()}
        assert found == wanted, "run `make style`, which writes the imports for type checkers"
    with pytest.raises(AttributeError, match=r"no attribute 'FluxPipeline'\. It has: AllegroPipeline"):
        drop_ins.FluxPipeline  # noqa: B018


def test_a_family_is_imported_alone_and_late() -> None:
    script = "import sys, postgen.pipelines\nprint('torch' in sys.modules)"
    late = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert late.stdout == "False\n"
    script = (
        "import sys, postgen.pipelines as p\np.WanPipeline\n"
        "print(sorted(name for name in sys.modules if name.startswith('postgen.pipelines.')))"
    )
    code, said = children.run("tests.script", script)
    assert (code, said.splitlines()[-1]) == (
        0,
        "['postgen.pipelines.drop_in', 'postgen.pipelines.names', 'postgen.pipelines.wan']",
    )


def test_classes_can_be_pickled() -> None:
    for name in drop_ins.__all__:
        assert pickle.loads(pickle.dumps(getattr(drop_ins, name))) is getattr(drop_ins, name)


def run(pipe: Any, arguments: dict[str, Any], **settings: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    output = pipe(**arguments, **settings, generator=generator, return_dict=False)[0]
    return torch.stack(list(output)) if isinstance(output, list) else torch.as_tensor(output)


def test_every_pipeline_is_called_or_named() -> None:
    assert TINY.keys() | NOT_CALLED.keys() == set(drop_ins.__all__)
    assert not TINY.keys() & NOT_CALLED.keys()


@pytest.mark.parametrize("name", sorted(TINY.keys() - BROKEN.keys()))
def test_one_tiny_call(name: str) -> None:
    """Off is diffusers' own output to the bit; on differs; afterwards everything is as before."""
    components, arguments = TINY[name]()
    plain, ours = (getattr(place, name)(**components) for place in (diffusers, drop_ins))
    for pipe in (plain, ours):
        pipe.set_progress_bar_config(disable=True)
    expected = run(plain, arguments)
    assert torch.isfinite(expected).all()
    assert torch.equal(run(ours, arguments), expected)
    enhanced = run(ours, arguments, enhance_a_video=8.0)
    assert torch.equal(enhanced, expected) == (name in UNTOLD)
    assert handle_of(ours) is None
    assert torch.equal(run(ours, arguments, enhance_a_video=0), expected)


@pytest.mark.parametrize("name", sorted(BROKEN))
def test_what_diffusers_cannot_call_neither_can_we(name: str) -> None:
    components, arguments = TINY[name]()
    for place in (diffusers, drop_ins):
        with pytest.raises(TypeError, match=BROKEN[name]):
            run(getattr(place, name)(**components), arguments)


@pytest.mark.parametrize("name", sorted(NOT_CALLED))
def test_the_others_can_be_built(name: str) -> None:
    kind = getattr(drop_ins, name)
    parameters = inspect.signature(kind.__init__).parameters
    made = dict.fromkeys([one for one in parameters if one != "self"])
    model = more.transformer({"C": "Cosmos", "L": "LTX-2", "M": "Motif"}[name[0]])
    needed = {"safety_checker": others.LetsEverythingThrough(), "vae": wan_parts()["vae"]}
    needed = needed if name.startswith("Cosmos") else {}
    pipe = kind(**{**made, **needed, "transformer": model})
    assert pipe.components["transformer"] is model
    assert importlib.import_module(kind.__module__).DropIn in kind.__bases__
