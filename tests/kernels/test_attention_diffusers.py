"""The attention backend "postgen" in diffusers: equal results, support of masks, and complete removal."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers.models import attention_dispatch as dispatch
from torch import Tensor

from postgen.errors import UserError
from postgen.families.attention.dispatch import register_attention_backend as register
from postgen.families.attention.dispatch import tap_dispatched
from postgen.fused import attention as fused
from postgen.fused.attention import backend_attention, register_attention_backend, routed_attention
from postgen.kernels import dispatch as kernel_dispatch
from tests.families.tiny_models import TinyModel, tiny_model
from tests.kernels.launches import relative_error

REGISTRY = dispatch._AttentionBackendRegistry
ROUTED = ["Wan", "LTX", "HunyuanVideo"]


@pytest.fixture(scope="module")
def models() -> dict[str, TinyModel]:
    return {name: tiny_model(name, batch=2) for name in [*ROUTED, "CogVideoX 1.0"]}


@pytest.fixture(autouse=True)
def diffusers_default() -> Iterator[None]:
    """Restore diffusers' default backend: `set_attention_backend` changes the default of all models."""
    before = REGISTRY._active_backend
    yield
    REGISTRY.set_active_backend(before)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Record the numbers of queries and keys of each call of our attention."""
    seen: list[tuple[int, int]] = []
    attention = fused.attention

    def watched(query: Tensor, key: Tensor, *rest: Any, **options: Any) -> Any:
        seen.append((query.shape[1], key.shape[1]))
        return attention(query, key, *rest, **options)

    monkeypatch.setattr(fused, "attention", watched)
    return seen


@pytest.mark.parametrize("name", [*ROUTED, "CogVideoX 1.0"])
def test_a_model_computes_the_same(models: dict[str, TinyModel], name: str, calls: list[tuple[int, int]]) -> None:
    model, transformer = models[name], models[name].transformer
    expected = model()
    register_attention_backend()
    transformer.set_attention_backend("postgen")
    found = model()
    transformer.reset_attention_backend()
    assert relative_error(found, expected) < 1e-5
    # CogVideoX calls torch's attention directly, so a backend of diffusers has no effect on it.
    assert len(calls) >= (0 if name == "CogVideoX 1.0" else model.attention_layers)
    assert all(queries == keys for queries, keys in calls)


@pytest.mark.parametrize("name", ROUTED)
def test_the_context_switches_self_attention_only(
    models: dict[str, TinyModel], name: str, calls: list[tuple[int, int]]
) -> None:
    model = models[name]
    processors = {id(module): module.processor for module in attentions(model)}
    before, default = {key: settings(each) for key, each in processors.items()}, REGISTRY._active_backend
    expected = model()
    with routed_attention(model.transformer):
        assert relative_error(model(), expected) < 1e-5
        assert REGISTRY._active_backend is default
        assert len(calls) == model.attention_layers
    assert torch.equal(model(), expected)
    assert len(calls) == model.attention_layers
    assert {id(module): module.processor for module in attentions(model)} == processors
    assert {key: settings(each) for key, each in processors.items()} == before


def settings(processor: Any) -> dict[str, Any]:
    return {"_attention_backend": None, **vars(processor)}  # None is the default of the class


def attentions(model: TinyModel) -> list[Any]:
    return [module for module in model.transformer.modules() if hasattr(module, "processor")]


def test_the_context_gives_back_what_was_there(models: dict[str, TinyModel]) -> None:
    transformer = models["Wan"].transformer
    transformer.set_attention_backend("_native_math")
    blocks = transformer.blocks

    def fail_inside() -> None:
        with routed_attention(transformer):
            assert blocks[0].attn1.processor._attention_backend.value == "postgen"
            assert blocks[0].attn2.processor._attention_backend.value == "_native_math"
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        fail_inside()
    assert blocks[0].attn1.processor._attention_backend.value == "_native_math"
    transformer.reset_attention_backend()


def test_the_context_of_diffusers(models: dict[str, TinyModel], calls: list[tuple[int, int]]) -> None:
    model = models["Wan"]
    expected, default = model(), REGISTRY._active_backend
    register_attention_backend()
    with dispatch.attention_backend("postgen"):
        assert relative_error(model(), expected) < 1e-5
    assert len(calls) == model.attention_layers
    assert REGISTRY._active_backend is default


def test_a_model_that_asks_diffusers_for_no_backend_is_refused(models: dict[str, TinyModel]) -> None:
    with (
        pytest.raises(UserError, match="CogVideoXTransformer3DModel calls torch's attention directly"),
        routed_attention(models["CogVideoX 1.0"].transformer),
    ):
        pass


def random_inputs(tokens: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, tokens, 2, 8).unbind(0)
    return query, key, value


def scattered(*shape: int) -> Tensor:
    """Return a mask that is True for every second key of the first sample and for all keys of the second."""
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, ::2] = False
    return mask.view(shape)


@pytest.mark.parametrize(
    "mask",
    [scattered(2, 9), scattered(2, 1, 1, 9), scattered(2, 9)[:1].view(1, 1, 1, 9)],
    ids=lambda mask: "x".join(map(str, mask.shape)),
)
@pytest.mark.parametrize("gradient", [False, True])
def test_masks_of_keys_are_computed(mask: Tensor, gradient: bool, calls: list[tuple[int, int]]) -> None:
    tensors = random_inputs()
    expected = dispatch.dispatch_attention_fn(*tensors, attn_mask=mask)
    tensors = tuple(x.requires_grad_(gradient) for x in tensors)
    found = dispatch.dispatch_attention_fn(*tensors, attn_mask=mask, backend=register_attention_backend())
    torch.testing.assert_close(found.detach(), expected)
    assert calls == [(9, 9)]
    assert found.requires_grad is gradient


def test_a_sample_whose_keys_are_all_masked_gives_zeros() -> None:
    mask = scattered(2, 9)
    mask[0] = False
    tensors = random_inputs()
    expected = dispatch.dispatch_attention_fn(*tensors, attn_mask=mask)
    found = backend_attention(*tensors, mask, None)
    assert found is not None
    torch.testing.assert_close(found, expected)
    assert not found[0].any()


@pytest.mark.parametrize(
    "mask",
    [torch.randn(2, 1, 1, 9), torch.rand(2, 1, 9, 9) > 0.3, torch.rand(2, 2, 9, 9) > 0.3, torch.eye(9).bool()],
    ids=lambda mask: f"{'x'.join(map(str, mask.shape))} {mask.dtype}",
)
def test_other_masks_are_left_to_diffusers_with_a_warning(
    mask: Tensor, calls: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_dispatch, "TOLD", set())
    tensors = random_inputs()
    with pytest.warns(UserWarning, match="is not one bool per key"):
        found = dispatch.dispatch_attention_fn(*tensors, attn_mask=mask, backend=register_attention_backend())
    assert torch.equal(found, dispatch.dispatch_attention_fn(*tensors, attn_mask=mask))
    assert not calls


def test_what_else_is_left_to_diffusers(calls: list[tuple[int, int]]) -> None:
    query, key, value = random_inputs()
    ours = register_attention_backend()
    for changes in ({"is_causal": True}, {"scale": 0.1, "key": key[:, :4], "value": value[:, :4]}):
        arguments: dict[str, Any] = {"query": query, "key": key, "value": value, **changes}
        found = dispatch.dispatch_attention_fn(**arguments, backend=ours)
        assert torch.equal(found, dispatch.dispatch_attention_fn(**arguments))
    dropped = dispatch.dispatch_attention_fn(query, key, value, dropout_p=1.0, backend=ours)
    assert not dropped.any()
    assert not calls


def test_scale_and_grouped_heads_reach_the_kernel(calls: list[tuple[int, int]]) -> None:
    query, key, value = random_inputs()
    arguments: dict[str, Any] = {
        "query": query, "key": key[:, :, :1], "value": value[:, :, :1], "scale": 0.7, "enable_gqa": True
    }  # fmt: skip
    found = dispatch.dispatch_attention_fn(**arguments, backend=register_attention_backend())
    torch.testing.assert_close(found, dispatch.dispatch_attention_fn(**arguments))
    assert calls == [(9, 9)]


@pytest.mark.parametrize("name", ["Wan", "HunyuanVideo"])
def test_compiles_whole(models: dict[str, TinyModel], name: str) -> None:
    model = models[name]
    expected = model()
    torch.compiler.reset()
    with routed_attention(model.transformer), torch.no_grad():
        compiled = torch.compile(model.transformer, fullgraph=True, backend="aot_eager")
        found = compiled(**model.arguments, return_dict=False)[0]
    assert relative_error(found, expected) < 1e-5


def test_enhance_a_video_sees_the_calls(models: dict[str, TinyModel]) -> None:
    from postgen.families.attention.dispatch import install_attention_tap

    install_attention_tap()
    seen: list[int] = []
    with (
        routed_attention(models["Wan"].transformer),
        tap_dispatched(lambda query, key, scale, parallel: seen.append(key.shape[1])),
    ):
        models["Wan"]()
    assert len(seen) == 2 * models["Wan"].attention_layers


def test_registering_twice_changes_nothing() -> None:
    member = register_attention_backend()
    names, backend = list(dispatch.AttentionBackendName), REGISTRY._backends[member]
    assert register_attention_backend() is member
    assert list(dispatch.AttentionBackendName) == names
    assert REGISTRY._backends[member] is backend
    assert names.count(member) == 1


def test_the_name_behaves_like_those_of_diffusers() -> None:
    member: Any = register_attention_backend()
    assert dispatch.AttentionBackendName("postgen") is member
    assert dispatch.AttentionBackendName["POSTGEN"] is member
    assert getattr(dispatch.AttentionBackendName, "POSTGEN") is member  # noqa: B009 - type checkers do not know the attribute
    assert member == "postgen"
    assert (member.name, member.value) == ("POSTGEN", "postgen")
    assert isinstance(member, dispatch.AttentionBackendName)
    assert copy.deepcopy(member) is member
    assert pickle.loads(pickle.dumps(member)) is member


def test_another_diffusers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    names = list(dispatch.AttentionBackendName)
    monkeypatch.delattr(dispatch, "_native_attention")
    with pytest.raises(UserError, match=r"dispatcher of diffusers [\d.]+ differs from that of 0\.42.*'other'"):
        register("other", backend_attention)
    assert list(dispatch.AttentionBackendName) == names


def test_an_unknown_name_is_still_refused(models: dict[str, TinyModel]) -> None:
    register_attention_backend()
    with pytest.raises(ValueError, match="postgen"):
        models["Wan"].transformer.set_attention_backend("postgen2")


def test_registering_is_not_part_of_importing() -> None:
    script = "import sys, postgen; print(sorted({'torch', 'diffusers'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_processors_without_a_backend_are_refused(models: dict[str, TinyModel]) -> None:
    from diffusers.models.attention_processor import AttnProcessor2_0

    transformer: Any = copy.deepcopy(models["Wan"].transformer)
    transformer.blocks[1].attn1.processor = AttnProcessor2_0()
    with (
        pytest.raises(
            UserError, match=r"AttnProcessor2_0 of blocks\.1\.attn1 does not use attention backends of diffusers"
        ),
        routed_attention(transformer),
    ):
        pass
    assert transformer.blocks[0].attn1.processor._attention_backend is None
