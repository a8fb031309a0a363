import math

import pytest
import torch

from postgen.sampling.forward import noised, wanted_of
from postgen.sampling.schedule import Levels


def test_what_a_network_should_predict():
    """Clean latents of 2 and noise of 3, at alpha-bar 3/4 and at the noise level 1/2 of a flow model."""
    clean, noise = torch.tensor([[2.0]]).double(), torch.tensor([[3.0]]).double()
    half = torch.tensor([0.5]).double()
    flow = Levels(s=half, after=half, second=half[0])
    assert noised(clean, noise, flow).item() == 2.5
    assert wanted_of(clean, noise, flow, "flow").item() == 1
    mixed = Levels(s=half, after=half, second=half[0], alpha_bar=half + 0.25, alpha_bar_after=half + 0.25)
    x, a = noised(clean, noise, mixed), math.sqrt(0.75)
    assert x.item() == pytest.approx(2 * a + 1.5)
    assert wanted_of(clean, noise, mixed, "epsilon").item() == 3
    assert wanted_of(clean, noise, mixed, "sample").item() == 2
    v = wanted_of(clean, noise, mixed, "v_prediction").item()
    assert a * x.item() - 0.5 * v == pytest.approx(2)
