"""LoRA of a network and a pipeline that diffusers does not have, so that no loader of diffusers belongs to them."""

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.loaders import PeftAdapterMixin
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from postgen.errors import UserError
from postgen.families.lora import load_loras, save_lora
from postgen.families.lora_file import WEIGHTS
from postgen.training.card import Card, _use
from tests.tiny_wan import LATENT_CHANNELS, TEXT_DIM
from tests.toy_diffusers import ToyTransformer3DModel


class OwnTransformer(ToyTransformer3DModel, PeftAdapterMixin):
    pass


class OwnPipeline(DiffusionPipeline):
    def __init__(self, transformer):
        super().__init__()
        self.register_modules(transformer=transformer)


def pipeline():
    torch.manual_seed(0)
    return OwnPipeline(OwnTransformer(in_channels=LATENT_CHANNELS, text_dim=TEXT_DIM).eval())


@torch.no_grad()
def output(pipe):
    rng = torch.Generator().manual_seed(0)
    x, text = (torch.randn(shape, generator=rng) for shape in ((1, LATENT_CHANNELS, 1, 4, 4), (1, 5, TEXT_DIM)))
    return pipe.transformer(x, torch.ones(1), text, return_dict=False)[0]


@pytest.fixture
def trained(tmp_path):
    """Return a pipeline with an adapter, and the folder of its LoRA."""
    pipe = pipeline()
    assert not hasattr(pipe, "save_lora_weights")
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["to_q", "to_v"], init_lora_weights=False)
    pipe.transformer.add_adapter(config, adapter_name="default")
    save_lora(pipe, tmp_path, "transformer", pipe.transformer, "default")
    return pipe, tmp_path


def test_the_network_reads_the_lora(trained):
    pipe, folder = trained
    fresh = pipeline()
    assert not torch.equal(output(fresh), output(pipe))
    fresh.transformer.load_lora_adapter(str(folder), prefix="transformer", weight_name=WEIGHTS)
    assert torch.equal(output(fresh), output(pipe))


def test_training_can_continue_from_the_lora(trained):
    pipe, folder = trained
    fresh = pipeline()
    load_loras(fresh, [str(folder)], adapters_only=True)
    assert torch.equal(output(fresh), output(pipe))


def test_tensors_that_fit_no_layer_are_refused(trained):
    _, folder = trained
    file = folder / WEIGHTS
    save_file({**load_file(file), "transformer.strange": torch.ones(1)}, file)
    with pytest.raises(UserError, match=r"cannot be applied to OwnPipeline: transformer\.strange"):
        load_loras(pipeline(), [str(folder)])


def card(lora):
    return Card(
        source=None, pipeline="OwnPipeline", trainer="", method="", step=1, lora=lora, data=[],
        modules={"transformer": pipeline().transformer}, settings={},
    )  # fmt: skip


def test_the_card_shows_how_to_load_the_export():
    lora, whole = "\n".join(_use(card(lora=True))), "\n".join(_use(card(lora=False)))
    assert f'load_lora_adapter("THIS_FOLDER", prefix="transformer", weight_name="{WEIGHTS}")' in lora
    assert f"from {__name__} import OwnTransformer\n" in whole
    assert "postgen generate" not in lora + whole
