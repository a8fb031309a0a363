"""The modules at which weights are sharded. For sharding in two processes see test_pair.py."""

import pytest
from torch import nn

from postgen.errors import UserError
from postgen.families import blocks_of
from postgen.pretrain.text import new_text_encoder
from postgen.training.sharding import repeated_blocks
from tests.families.tiny_models import tiny_model
from tests.training.distill import Distillation
from tests.training.tiny import TinyConfig, TinyTrainer


def test_a_wrapper_is_cut_at_the_blocks_of_the_networks_inside():
    one, other = tiny_model("Wan").transformer, tiny_model("LTX").transformer
    inside = [block.module for network in (one, other) for block in blocks_of(network)]
    assert repeated_blocks(nn.Sequential(nn.Linear(2, 2), Distillation(one, other)), "net") == inside
    assert len(inside) == 4


def test_a_network_without_a_row_is_cut_at_what_its_class_keeps_whole():
    encoder = new_text_encoder(40, 16, 2, 4)
    blocks = repeated_blocks(nn.ModuleDict({"text": encoder}), "net")
    assert [type(block).__name__ for block in blocks] == ["UMT5Block"] * 2


def test_a_model_without_known_blocks_is_refused(tmp_path):
    with pytest.raises(UserError, match="net, a Sequential, cannot be sharded: no repeated blocks"):
        repeated_blocks(nn.Sequential(nn.Linear(2, 2)), "net")
    with pytest.raises(UserError, match="fully_shard shards the model over processes, but there is only one"):
        TinyTrainer(TinyConfig(output_dir=str(tmp_path), device="cpu", fully_shard=True, report_to=[])).train()


def test_the_row_goes_before_the_class():
    """`_no_split_modules` of CogVideoX also names its patch embedding, which is not a repeated block."""
    network = tiny_model("CogVideoX 1.0").transformer
    assert repeated_blocks(network, "net") == list(network.transformer_blocks)
