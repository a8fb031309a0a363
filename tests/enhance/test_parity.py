"""Our output against the official formula, and the formula against what it should say."""

import pytest
import torch

import postgen
from tests.enhance.official import official
from tests.families.tiny_models import tiny_model

WEIGHT = 4.0
# Where the 4 * 6 video tokens stand among 5 text tokens.
FIRST, ALONE, LAST = slice(None, 24), slice(None), slice(5, None)
MODELS = {
    "CogVideoX 1.0": LAST,
    "CogVideoX 1.5": LAST,
    "HunyuanVideo": FIRST,
    "LTX": ALONE,
    "Wan": ALONE,
}


@pytest.mark.filterwarnings("ignore:Enhance-A-Video.*is strong")
@pytest.mark.parametrize("name", MODELS)
def test_equals_the_official_formula(name: str) -> None:
    tiny = tiny_model(name, batch=2)
    plain = tiny()
    config = postgen.EnhanceAVideoConfig(weight=WEIGHT, reduction="batch")
    handle = postgen.apply_enhance_a_video(tiny.transformer, config)
    ours = tiny()
    layers = list(handle.stats())
    handle.remove()
    with official(tiny.transformer, layers, MODELS[name], tiny.frames, WEIGHT):
        theirs = tiny()
    assert (theirs - plain).abs().max() > 1e-3
    assert (ours - theirs).abs().max() <= 1e-5


def test_a_sample_does_not_depend_on_its_batch() -> None:
    tiny = tiny_model("Wan", batch=2)
    handle = postgen.apply_enhance_a_video(tiny.transformer, postgen.EnhanceAVideoConfig(relative_weight=0.3))
    both = tiny()
    alone = {name: value[1:] for name, value in tiny.arguments.items()}
    assert torch.allclose(tiny(**alone), both[1:], atol=1e-6)
    handle.update(reduction="batch")
    assert not torch.allclose(tiny(**alone), tiny()[1:], atol=1e-5)
    assert len({gain for gains in handle.stats().values() for gain in gains}) == len(handle.stats())
