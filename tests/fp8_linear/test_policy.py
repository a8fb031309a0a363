"""Which layers become FP8, by family; layers that stay exact for their shape or by settings; refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import postgen
from postgen.errors import UserError
from postgen.families.linear import find_linears, replace_linears
from postgen.families.linear_parts import shares_input
from postgen.fp8_linear.config import PARTS, FP8LinearConfig, fp8_linears_setting
from postgen.fp8_linear.policy import plan_for
from tests.families.tiny_models import tiny_model
from tests.families.toy_linears import double

QKVO = ("to_q", "to_k", "to_v", "to_out.0")
CROSS = {
    **{f"attn1.{name}": "attention" for name in QKVO},
    **{f"attn2.{name}": "cross_attention" for name in ("to_q", "to_out.0")},
}
JOINT = {f"attn1.{name}": "attention" for name in QKVO}


def feed_forward(name: str) -> dict[str, str]:
    return {f"{name}.net.0.proj": "feed_forward", f"{name}.net.2": "feed_forward_out"}


FAMILIES: dict[str, dict[str, dict[str, str]]] = {
    "Wan": {"blocks": CROSS | feed_forward("ffn")},
    "Wan image-to-video": {"blocks": CROSS | feed_forward("ffn")},
    "LTX": {"transformer_blocks": CROSS | feed_forward("ff")},
    "CogVideoX 1.5": {"transformer_blocks": JOINT | feed_forward("ff")},
    "HunyuanVideo": {
        "transformer_blocks": {f"attn.{name}": "attention" for name in QKVO} | feed_forward("ff"),
        "single_transformer_blocks": {
            **{f"attn.{name}": "attention" for name in QKVO[:3]},
            "proj_mlp": "feed_forward",
            "proj_out": "feed_forward_out",
        },
    },
    "Latte": {
        "transformer_blocks": CROSS | feed_forward("ff"),
        "temporal_transformer_blocks": JOINT | feed_forward("ff"),
    },
}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_default_policy(name: str) -> None:
    model = tiny_model(name).transformer
    plan = plan_for(model, FP8LinearConfig())
    expected = {
        f"{group}.{i}.{layer}": part
        for group, layers in FAMILIES[name].items()
        for i in range(len(getattr(model, group)))
        for layer, part in layers.items()
    }
    assert plan.layers == expected
    assert not plan.left


def test_layers_of_few_tokens_of_sound() -> None:
    """Attention with queries of sound stays exact; attention with queries of video becomes FP8."""
    taken = plan_for(tiny_model("Kandinsky 6").transformer, FP8LinearConfig()).layers
    assert {f"visual_transformer_blocks.0.va_cross_attention.{name}" for name in ("to_query", "out_layer")} < set(
        taken
    )
    assert not any("av_cross_attention" in name for name in taken)


def test_layers_that_a_conversion_added() -> None:
    """Gates that a conversion added stay exact, and the other layers are chosen as without the conversion."""
    from postgen.lit import convert, revert

    model = tiny_model("Wan").transformer
    stock = plan_for(model, FP8LinearConfig()).layers
    known = set(find_linears(model))
    convert(model)
    assert any("postgen_lit" in name for name in set(find_linears(model)) - known)
    handle = postgen.apply_fp8_linears(model)
    assert plan_for(model, FP8LinearConfig()).layers == stock
    assert handle.stats() == {"": {"attention": 8, "cross_attention": 4, "feed_forward": 2, "feed_forward_out": 2}}
    revert(model)
    handle.remove()


def test_settings_spare_layers() -> None:
    model = tiny_model("Wan", layers=3).transformer
    every = plan_for(model, FP8LinearConfig()).layers
    for part in PARTS:
        taken = plan_for(model, FP8LinearConfig(**{part: False})).layers
        assert taken.keys() == {name for name, of in every.items() if of != part}
    middle = plan_for(model, FP8LinearConfig(first_exact_blocks=1, last_exact_blocks=1)).layers
    assert middle.keys() == {name for name in every if name.startswith("blocks.1.")}
    assert plan_for(model, FP8LinearConfig(last_exact_blocks=0)).layers == every
    named = plan_for(model, FP8LinearConfig(exact=r".*\.to_out\.0|blocks\.2\..*")).layers
    assert named.keys() == {n for n in every if not n.startswith("blocks.2") and "to_out" not in n}
    for nothing in (FP8LinearConfig(first_exact_blocks=9), FP8LinearConfig(exact=".*")):
        with pytest.raises(UserError, match="no layer for FP8 in this WanTransformer3DModel: the settings exclude"):
            plan_for(model, nothing)


def test_a_pattern_that_matches_nothing_is_refused() -> None:
    """A mistyped pattern would leave layers in FP8 that the user wants to stay exact."""
    model = tiny_model("Wan").transformer
    with pytest.raises(
        UserError, match=r"no layer matches the pattern exact='blocks.0'. Layers .*: blocks.0.attn1.to_q"
    ):
        postgen.apply_fp8_linears(model, FP8LinearConfig(exact="blocks.0"))
    handle = postgen.apply_fp8_linears(model, FP8LinearConfig(exact=r"blocks\.0\..*"))
    with pytest.raises(UserError, match="no layer matches"):
        handle.update(exact=r"block\.0\..*")
    assert handle.stats() == {"": {"attention": 4, "cross_attention": 2, "feed_forward": 1, "feed_forward_out": 1}}


def test_odd_channels_are_left_and_told_of() -> None:
    model = tiny_model("Mochi").transformer
    handle = postgen.apply_fp8_linears(model)
    assert handle.stats()[""]["left"] == 4
    text = "4 layers exact because 16 does not divide their channels (transformer_blocks.0.ff.net.0.proj: 32 x 170)"
    assert text in str(postgen.summary(model))
    handle.remove()
    with pytest.raises(UserError, match="4 layers have channels not divisible by 16"):
        postgen.apply_fp8_linears(model, FP8LinearConfig(attention=False))


def test_narrow_layers_are_left_where_they_would_be_no_faster() -> None:
    model = tiny_model("Wan").transformer
    widths = {name: min(each.in_features, each.out_features) for name, each in find_linears(model).items()}
    width = max(widths[name] for name in plan_for(model, FP8LinearConfig()).layers)
    assert {widths[name] for name in plan_for(model, FP8LinearConfig(), width).layers} == {width}
    with pytest.raises(UserError, match=f"fewer than {width + 1} inputs or outputs .* set min_features=0"):
        plan_for(model, FP8LinearConfig(), width + 1)


def test_who_shares_tokens() -> None:
    taken = plan_for(tiny_model("Wan").transformer, FP8LinearConfig()).layers
    sharing = [name for name, part in taken.items() if shares_input(name, part)]
    assert sharing == [f"blocks.{i}.attn1.{name}" for i in (0, 1) for name in QKVO[:3]]


def test_models_of_which_nothing_is_known_and_other_owners() -> None:
    with pytest.raises(UserError, match="Sequential"):
        postgen.apply_fp8_linears(nn.Sequential(nn.Linear(16, 16)))
    model = tiny_model("Wan").transformer
    other = replace_linears(model, double, owner="sparse", roles=["feed_forward"])
    with pytest.raises(UserError, match=r"blocks.0.ffn.net.0.proj is already replaced by sparse: remove sparse"):
        postgen.apply_fp8_linears(model)
    # Layers that the config does not select may belong to another plug-in.
    handle = postgen.apply_fp8_linears(model, FP8LinearConfig(feed_forward=False, feed_forward_out=False))
    handle.remove()
    other.remove()
    handle = postgen.apply_fp8_linears(model)
    with pytest.raises(UserError, match=r"blocks.0.attn1.to_q is already replaced by fp8_linears"):
        replace_linears(model, double, owner="sparse")
    handle.remove()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"attention": "yes"}, "attention must be True or False, got 'yes'"),
        ({"simulate": 1}, "simulate must be True or False"),
        ({"min_features": -1}, "min_features must be a whole number of at least 0"),
        ({"first_exact_blocks": -1}, "first_exact_blocks must be a whole number of at least 0"),
        ({"last_exact_blocks": 1.5}, "last_exact_blocks must be a whole number"),
        ({"first_exact_blocks": True}, "first_exact_blocks must be"),
        (dict.fromkeys(PARTS, False), "no layer is left for FP8: set at least one of attention, cross_attention"),
        ({"exact": "blocks.("}, r"exact must be a regular expression for layer names, got 'blocks.\('"),
        ({"exact": 3}, "exact must be a regular expression"),
        ({"exact": b"x"}, "exact must be a regular expression for layer names, got b'x': a text is needed"),
        ({"exact": "a{" + "9" * 30 + "}"}, "exact must be a regular .*: the repetition number is too large"),
    ],
)
def test_wrong_settings(words: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        FP8LinearConfig(**words)


def test_texts() -> None:
    assert fp8_linears_setting(None) is fp8_linears_setting("off") is False
    assert fp8_linears_setting("auto") == FP8LinearConfig()
    assert fp8_linears_setting("attention, feed_forward") == FP8LinearConfig(
        cross_attention=False, feed_forward_out=False
    )
    for text in ("", "qkv", "attention,,"):
        with pytest.raises(UserError, match="fp8_linears must be auto, off or some of attention, cross_attention"):
            fp8_linears_setting(text)


def test_a_gpu_without_fp8_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from postgen.fp8_linear import state

    monkeypatch.setattr(state, "why_not_fp8", lambda device: "A100 has compute capability 8.0, and FP8 needs 8.9 or")
    device = torch.device("cuda", 0)
    with pytest.raises(UserError, match=r"would be slower than exact layers: A100 has compute capability 8.0"):
        state._check_device(device, FP8LinearConfig())
    state._check_device(device, FP8LinearConfig(simulate=True))
