"""The skip connection of depth: the best linear guess of its velocity."""

import pytest
import torch

from postgen.errors import UserError
from postgen.families import denoiser_for
from postgen.worldweaver.adapter import load_adapter, save_adapter
from postgen.worldweaver.embedding import LevelEmbedder
from postgen.worldweaver.levels import FrameLevels, Role
from postgen.worldweaver.model import WorldWeaverModel
from postgen.worldweaver.skip import with_skip
from postgen.worldweaver.widen import widen_transformer
from tests.families.test_frame_levels import MAKERS
from tests.families.tiny_pipelines import tiny_pipeline


@pytest.mark.parametrize("s", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_of_gaussian_data_nothing_is_left_to_find_linearly(s):
    """The residual of the guess is uncorrelated with z, and its standard deviation scales the network's output."""
    # Vectors hold the coefficients of x and e, which are independent with variance 1, so covariances are exact.
    z, v = torch.tensor([1 - s, s], dtype=torch.float64), torch.tensor([-1.0, 1.0], dtype=torch.float64)

    def guess(added):
        given = (torch.full((1, 1, 1, 1, 2), added, dtype=torch.float64), z.view(1, 1, 1, 1, 2))
        return with_skip(*given, torch.tensor([[s]])).flatten()

    residual = v - guess(0.0)
    assert abs(float(residual @ z)) < 1e-7
    torch.testing.assert_close(guess(1.0) - guess(0.0), residual.norm().expand(2), rtol=1e-6, atol=1e-9)


def test_noise_alone_is_its_own_velocity():
    e = torch.randn(2, 3, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(with_skip(torch.zeros_like(e), e, torch.ones(2, 4)), e)


@pytest.fixture
def pipe():
    made = MAKERS["Wan"]()
    widen_transformer(made, ("depth",), "zero")
    return made


def model_of(pipe, embedder):
    return WorldWeaverModel(denoiser_for(pipe), embedder)


def test_depth_starts_as_the_guess_and_rgb_as_it_was(pipe, tmp_path):
    plain = LevelEmbedder.for_transformer(pipe)
    embedder = LevelEmbedder.for_transformer(pipe, skip=True)
    embedder.load_state_dict(plain.state_dict())
    z = torch.randn(2, 8, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    sigma = torch.rand(2, 3, 2, generator=torch.Generator().manual_seed(2))
    levels = FrameLevels(sigma=sigma, role=torch.full((3,), int(Role.PREDICT)))
    condition = model_of(pipe, plain).denoiser.encode_prompt(["a", "b"], guidance=True)
    with torch.no_grad():
        before = model_of(pipe, plain).predict(z, levels, condition, 3.0)
        after = model_of(pipe, embedder).predict(z, levels, condition, 3.0)
    assert torch.equal(after[:, :4], before[:, :4])
    assert torch.equal(after[:, 4:], with_skip(before[:, 4:], z[:, 4:], sigma[:, :, 1]))
    save_adapter(pipe, tmp_path / "out", embedder)
    assert load_adapter(pipe, tmp_path / "out").embedder.config["skip"]


def test_only_flows_have_it():
    pipe = tiny_pipeline("CogVideoX")[0]
    widen_transformer(pipe, ("depth",))
    with pytest.raises(UserError, match="level embedder has skip=True, which needs a flow model"):
        WorldWeaverModel(denoiser_for(pipe), LevelEmbedder.for_transformer(pipe, skip=True), mean_level=True)
