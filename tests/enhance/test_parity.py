"""Our output against the official formula, and the formula against what it should say."""

import pytest
import torch

import postgen
from postgen.enhance.layer import _times
from tests.enhance.official import MODELS, parity
from tests.families.tiny_models import tiny_model


@pytest.mark.filterwarnings("ignore:Enhance-A-Video.*is strong")
@pytest.mark.parametrize("name", MODELS)
def test_equals_the_official_formula(name: str) -> None:
    difference, effect = parity(name)
    assert effect > 1e-3
    assert difference <= 1e-5


def test_a_sample_does_not_depend_on_its_batch() -> None:
    tiny = tiny_model("Wan", batch=2)
    handle = postgen.apply_enhance_a_video(tiny.transformer, postgen.EnhanceAVideoConfig(relative_weight=0.3))
    both = tiny()
    alone = {name: value[1:] for name, value in tiny.arguments.items()}
    assert torch.allclose(tiny(**alone), both[1:], atol=1e-6)
    handle.update(reduction="batch")
    assert not torch.allclose(tiny(**alone), tiny()[1:], atol=1e-5)
    assert len({gain for gains in handle.stats().values() for gain in gains}) == len(handle.stats())


def test_small_gains_survive_bfloat16() -> None:
    """bfloat16 has nothing between 1 and 1.0078: a gain that is rounded itself would be lost or doubled."""
    output = torch.randn(100_000, generator=torch.Generator().manual_seed(0)).bfloat16()[None]
    gain = torch.tensor([[1.003]])
    reached = (_times(output, gain).double() * output).sum() / output.double().square().sum()
    assert reached == pytest.approx(1.003, abs=2e-4)
    assert torch.equal(output * gain.bfloat16(), output)
