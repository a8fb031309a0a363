"""Models with missing weights are refused, or a warning names the weights that were initialised at random."""

import shutil

import pytest
from safetensors.torch import load_file, save_file

from postgen.errors import UserError
from postgen.families.loading import inspect_model, load_pipeline
from tests.families.lora_cases import wan

FILES = {"transformer": "diffusion_pytorch_model.safetensors", "text_encoder": "model.safetensors"}
LOST = {"transformer": "blocks.0.attn1.to_q.bias", "text_encoder": "encoder.block.0.layer.0.SelfAttention.k.weight"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    wan().save_pretrained(folder)
    return folder


def without(saved, tmp_path, part):
    folder = tmp_path / "model"
    shutil.copytree(saved, folder)
    tensors = load_file(folder / part / FILES[part])
    del tensors[LOST[part]]
    save_file(tensors, folder / part / FILES[part], metadata={"format": "pt"})
    return folder


def test_a_network_that_lacks_weights_is_refused(saved, tmp_path):
    folder = without(saved, tmp_path, "transformer")
    with pytest.raises(UserError, match=rf"not complete: transformer lacks 1 weights, {LOST['transformer']}: "):
        load_pipeline(inspect_model(folder), device="cpu")


def test_random_weights_of_a_text_encoder_are_told(saved, tmp_path, recwarn):
    load_pipeline(inspect_model(saved), device="cpu")
    assert not [each for each in recwarn if "random" in str(each.message)]
    folder = without(saved, tmp_path, "text_encoder")
    with pytest.warns(UserWarning, match=rf"lacks 1 weights .* are random: {LOST['text_encoder']}\."):
        load_pipeline(inspect_model(folder), device="cpu")
