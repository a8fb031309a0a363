"""Merging of LoRA files."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from postgen.errors import UserError
from postgen.families.lora import load_loras
from postgen.families.lora_export import export_lora
from postgen.families.lora_sums import low_rank_of, low_rank_sum
from postgen.merging.lora import MERGERS, merge_loras
from postgen.merging.lora_report import write_lora
from tests.tiny_wan import wan_components

SHAPES = {"blocks.0.attn1.to_q": (24, 24), "blocks.0.attn1.to_k": (24, 24), "blocks.1.ffn.net.0.proj": (48, 24)}
SETTINGS = {"r": 4, "lora_alpha": 6, "alpha_pattern": {"to_k": 2}}
SCALES = {"blocks.0.attn1.to_k": 2 / 4}


def lora(folder, name, seed=0, rank=4, shapes=SHAPES, prefix="transformer.", settings=SETTINGS, **extra):
    """Write a LoRA with random values and return its path."""
    made = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer, (outs, ins, *kernel) in shapes.items():
        tensors[f"{prefix}{layer}.lora_A.weight"] = torch.randn(rank, ins, *kernel, generator=made)
        tensors[f"{prefix}{layer}.lora_B.weight"] = torch.randn(outs, rank, *(1 for _ in kernel), generator=made)
    said = {f"{prefix}{key}": value for key, value in (settings or {}).items()}
    metadata = {"lora_adapter_metadata": json.dumps(said)} if said else {}
    path = folder / f"{name}.safetensors"
    save_file({**tensors, **extra}, path, metadata=metadata)
    return path


def dense(path, scales=SCALES, usual=6 / 4):
    """Return the change of each weight, from the file alone."""
    tensors = load_file(path)
    return {
        key.removeprefix("transformer.").removesuffix(".lora_A.weight"): scales.get(
            key.removeprefix("transformer.").removesuffix(".lora_A.weight"), usual
        )
        * (tensors[key.replace("lora_A", "lora_B")].flatten(1).double() @ down.flatten(1).double())
        for key, down in tensors.items()
        if key.endswith("lora_A.weight")
    }


def product(tensors, layer):
    up, down = (tensors[f"transformer.{layer}.lora_{half}.weight"].flatten(1).double() for half in "BA")
    return up @ down


def error(found, wanted):
    return float((found - wanted).norm() / wanted.norm())


def wan():
    from diffusers import WanPipeline

    return WanPipeline(**wan_components())


def written(folder, tensors, report, name="merged.safetensors"):
    write_lora(folder / name, tensors, report)
    return folder / name


def test_the_merge_is_the_sum_of_the_changes(tmp_path):
    files = [lora(tmp_path, f"{n}", n) for n in range(3)]
    weights = [0.5, 0.7, -0.3]
    tensors, report = merge_loras(files, weights)
    parts = [dense(file) for file in files]
    for layer in SHAPES:
        wanted = sum(weight * part[layer] for weight, part in zip(weights, parts, strict=True))
        assert error(product(tensors, layer), wanted) < 1e-6
    assert report.rank == 12
    assert report.retained == 1
    assert report.layers == 3
    assert json.loads(json.dumps(report.to_dict()))["weights"] == weights


@pytest.mark.parametrize("rank", [1, 4, 7])
def test_a_truncation_is_that_of_the_dense_svd(tmp_path, rank):
    files = [lora(tmp_path, f"{n}", n) for n in range(3)]
    tensors, report = merge_loras(files, [1 / 3] * 3, rank=rank)
    kept = whole = 0.0
    for layer in SHAPES:
        mean = sum(dense(file)[layer] for file in files) / 3
        left, sigma, right = torch.linalg.svd(mean, full_matrices=False)
        assert error(product(tensors, layer), (left[:, :rank] * sigma[:rank]) @ right[:rank]) < 1e-5
        kept, whole = kept + float(sigma[:rank].square().sum()), whole + float(sigma.square().sum())
    assert report.retained == pytest.approx(kept / whole)
    assert report.weakest[1] <= report.retained
    assert report.rank == rank


def test_one_file_is_unchanged_and_equal_files_are_one(tmp_path):
    file = lora(tmp_path, "a")
    tensors, report = merge_loras([file], [1])
    assert all(torch.equal(value, load_file(file)[key]) for key, value in tensors.items())
    back = dense(written(tmp_path, tensors, report))
    assert all(torch.equal(back[layer], value) for layer, value in dense(file).items())
    again, report = merge_loras([file] * 5, [0.2] * 5)
    assert report.rank == 4  # zero singular values are dropped
    assert all(error(product(again, layer), dense(file)[layer]) < 1e-6 for layer in SHAPES)


def test_one_file_is_scaled_exactly(tmp_path):
    file = lora(tmp_path, "a")
    tensors, _ = merge_loras([file], [0.3])
    assert all(error(product(tensors, layer), 0.3 * dense(file)[layer]) < 1e-6 for layer in SHAPES)
    tensors, report = merge_loras([file], [0])
    assert all(not product(tensors, layer).any() for layer in SHAPES)
    assert all(value.any() for key, value in tensors.items() if "lora_A" in key)  # it can be trained further
    assert report.retained == 1


@pytest.mark.parametrize("count", [2, 4])
def test_the_factor_average_of_peft_is_too_strong(tmp_path, count):
    from peft import LoraConfig, get_peft_model
    from peft.utils import set_peft_model_state_dict

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(16, 12, bias=False)

    config = LoraConfig(r=3, lora_alpha=3, target_modules=["layer"])
    net = get_peft_model(Net(), config, adapter_name="0")
    one = lora(tmp_path, "x", shapes={"layer": (12, 16)}, rank=3, prefix="base_model.model.", settings=None)
    for number in range(count):
        if number:
            net.add_adapter(str(number), config)
        set_peft_model_state_dict(net, load_file(one), adapter_name=str(number))
    names = [str(number) for number in range(count)]
    net.add_weighted_adapter(names, [1 / count] * count, "averaged", combination_type="linear")
    theirs = net.base_model.model.layer.get_delta_weight("averaged").detach().double()
    once = net.base_model.model.layer.get_delta_weight("0").detach().double()
    assert error(theirs, count * once) < 1e-5  # N times too strong
    tensors, _ = merge_loras([one] * count, [1 / count] * count)
    assert error(product(tensors, "layer"), once) < 1e-6


def test_averaged_factors_are_another_change(tmp_path):
    files = [lora(tmp_path, f"{n}", n) for n in range(4)]
    tensors, _ = merge_loras(files, [0.25] * 4, rank=4)
    factors = {key: sum(load_file(file)[key] for file in files) / 4 for key in load_file(files[0])}
    for layer in SHAPES:
        mean = sum(dense(file)[layer] for file in files) / 4
        best, averaged = error(product(tensors, layer), mean), error(product(factors, layer), mean)
        assert best < averaged


def test_convolutions_and_ranks_of_their_own(tmp_path):
    shapes = {"conv": (8, 6, 3, 3), "point": (8, 6, 1, 1)}
    one = lora(tmp_path, "a", 1, shapes=shapes, rank=2, settings=None)
    two = lora(tmp_path, "b", 2, shapes=shapes, rank=5, settings=None)
    with pytest.raises(UserError, match="has the ranks 2 and 5"):
        merge_loras([one, two], [1, 1])
    tensors, _ = merge_loras([one, two], [1, 1], rank=7)
    assert tensors["transformer.conv.lora_A.weight"].shape == (7, 6, 3, 3)
    assert tensors["transformer.conv.lora_B.weight"].shape == (8, 7, 1, 1)
    for layer in shapes:
        wanted = dense(one, {}, 1)[layer] + dense(two, {}, 1)[layer]
        assert error(product(tensors, layer), wanted) < 1e-6


def test_a_merged_file_has_the_same_effect_in_a_pipeline(tmp_path):
    shapes = {"blocks.0.attn1.to_q": (24, 24), "blocks.1.attn2.to_v": (24, 24)}
    files = [lora(tmp_path, f"{n}", n, shapes=shapes, settings={"r": 4, "lora_alpha": 8}) for n in range(2)]
    changes = []
    for source in (files, [written(tmp_path, *merge_loras(files, [1, 1], rank=3), "m.safetensors")]):
        pipe = wan()
        load_loras(pipe, [str(file) for file in source])
        layer = pipe.transformer.get_submodule("blocks.0.attn1.to_q")
        changes.append(sum(layer.get_delta_weight(name).detach().double() for name in layer.active_adapters))
    low = low_rank_of(changes[0])
    up, down = low.factors(3)
    assert error(changes[1], up @ down) < 1e-5
    pipe = wan()
    write_lora(tmp_path / "folder", *merge_loras(files, [1, 1], rank=3))
    pipe.load_lora_weights(tmp_path / "folder")  # stock diffusers
    layer = pipe.transformer.get_submodule("blocks.0.attn1.to_q")
    assert error(layer.get_delta_weight(layer.active_adapters[0]).detach().double(), changes[1]) < 1e-6


def test_layers_of_different_rank_keep_their_scale(tmp_path):
    pipe = wan()
    shapes = {name: pipe.transformer.get_submodule(name).weight.shape for name in ("blocks.0.attn1.to_q", "proj_out")}
    assert shapes["proj_out"][0] < 17
    files = [lora(tmp_path, f"{n}", n, shapes=shapes, rank=17, settings=None) for n in range(2)]
    tensors, report = merge_loras(files, [0.5, 0.5])
    ranks = {len(value) for key, value in tensors.items() if "lora_A" in key}
    pipe.load_lora_weights(written(tmp_path, tensors, report))
    for name in shapes:
        layer = pipe.transformer.get_submodule(name)
        assert error(layer.get_delta_weight(layer.active_adapters[0]).detach().double(), product(tensors, name)) < 1e-6
    assert len(ranks) == 2  # no layer has a rank above its width


def test_files_of_comfyui_and_diffusers_merge(tmp_path):
    shapes = {"blocks.0.attn1.to_q": (24, 24), "blocks.0.ffn.net.2": (24, 48)}
    one = lora(tmp_path, "a", 1, shapes=shapes, settings=None)
    export_lora(lora(tmp_path, "b", 2, shapes=shapes, settings=None), tmp_path / "b2.safetensors", "comfyui", "wan")
    tensors, _ = merge_loras([one, tmp_path / "b2.safetensors"], [1, 1])
    for layer in shapes:
        wanted = dense(one, {}, 1)[layer] + dense(tmp_path / "b.safetensors", {}, 1)[layer]
        assert error(product(tensors, layer), wanted) < 1e-6


@pytest.mark.parametrize("method", MERGERS)
def test_equal_files_keep_their_strength(tmp_path, method):
    file = lora(tmp_path, "a")
    tensors, report = merge_loras([file] * 3, [1 / 3] * 3, method=method, density=1)
    assert report.rank == 4
    assert all(error(product(tensors, layer), dense(file)[layer]) < 1e-5 for layer in SHAPES)


def test_ties_is_that_of_peft_on_the_changes(tmp_path):
    from peft.utils.merge_utils import ties

    files = [lora(tmp_path, f"{n}", n) for n in range(3)]
    tensors, report = merge_loras(files, [1 / 3] * 3, method="ties", density=0.4, rank=24)
    for layer in SHAPES:
        wanted = ties([dense(file)[layer].float() for file in files], torch.ones(3), 0.4).double()
        assert error(product(tensors, layer), wanted) < 1e-5
    assert report.retained == pytest.approx(1)
    _, small = merge_loras(files, [1 / 3] * 3, method="ties", density=0.4)
    assert small.rank == 4
    assert small.retained < 1


def test_dare_is_reproducible_and_leaves_the_random_state(tmp_path):
    files = [lora(tmp_path, f"{n}", n) for n in range(2)]
    torch.manual_seed(7)
    before = torch.get_rng_state()
    runs = [merge_loras(files, [0.5, 0.5], method="dare_ties", seed=seed)[0] for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(value, runs[1][key]) for key, value in runs[0].items())
    assert any(not torch.equal(value, runs[2][key]) for key, value in runs[0].items())


def test_thin_factors_larger_than_the_matrix():
    made = torch.Generator().manual_seed(0)
    pairs = [(torch.randn(5, 4, generator=made), torch.randn(4, 7, generator=made)) for _ in range(4)]
    low = low_rank_sum(pairs, [1, -2, 0.5, 3])
    wanted = sum(w * (up.double() @ down.double()) for w, (up, down) in zip([1, -2, 0.5, 3], pairs, strict=True))
    up, down = low.factors(99)
    assert low.rank == 5
    assert error(up @ down, wanted) < 1e-12
    for matrix in (wanted, wanted.T):
        up, down = low_rank_of(matrix).factors(5)
        assert error(up @ down, matrix) < 1e-7


DORA = {f"transformer.{layer}.lora_magnitude_vector": torch.ones(shape[0]) for layer, shape in SHAPES.items()}


def test_dora_is_refused_unless_it_is_copied(tmp_path):
    file = lora(tmp_path, "a", **DORA)
    tensors, report = merge_loras([file], [1])
    assert sum("magnitude" in key for key in tensors) == 3
    assert json.loads(report.metadata["lora_adapter_metadata"])["transformer.use_dora"]
    for files, weights in (([file], [0.5]), ([file, file], [0.5, 0.5])):
        with pytest.raises(UserError, match="DoRA magnitudes"):
            merge_loras(files, weights)


def test_biases_are_summed(tmp_path):
    biases = {f"transformer.{layer}.lora_B.bias": torch.ones(shape[0]) for layer, shape in SHAPES.items()}
    files = [lora(tmp_path, f"{n}", n, **biases) for n in range(2)]
    tensors, report = merge_loras(files, [0.5, 0.25])
    assert json.loads(report.metadata["lora_adapter_metadata"])["transformer.lora_bias"]
    for layer in SHAPES:
        wanted = torch.full((SHAPES[layer][0],), 0.75 * SCALES.get(layer, 1.5))
        torch.testing.assert_close(tensors[f"transformer.{layer}.lora_B.bias"], wanted)


def test_files_that_do_not_fit_are_refused(tmp_path):
    base = lora(tmp_path, "a")
    few = lora(tmp_path, "few", shapes=dict(list(SHAPES.items())[:2]))
    wide = lora(tmp_path, "wide", shapes={**SHAPES, "blocks.0.attn1.to_q": (24, 32)})
    nan = lora(tmp_path, "nan", **{"transformer.x.lora_A.weight": torch.full((4, 24), torch.nan)})
    lokr = lora(tmp_path, "lokr", **{"transformer.x.lokr_w1": torch.ones(4, 24)})
    for other, text in (
        (few, "only one of the two changes these layers: transformer.blocks.1.ffn.net.0.proj"),
        (wide, "has the shapes"),
        (nan, "is damaged: NaN or infinity"),
        (lokr, "1 of 4 layers are unknown"),
        (tmp_path / "none.safetensors", "there is no LoRA file"),
    ):
        with pytest.raises(UserError, match=text) as caught:
            merge_loras([base, other], [0.5, 0.5])
        assert "\n" not in str(caught.value)


def test_other_bases_are_refused(tmp_path):
    files = []
    for kind in ("WanPipeline", "LTXPipeline"):
        folder = tmp_path / kind
        folder.mkdir()
        files.append(lora(folder, "a"))
        (folder / "lora.json").write_text(json.dumps({"pipeline": kind}))
    with pytest.raises(UserError, match=r"different base models \(pipeline 'WanPipeline' and 'LTXPipeline'\)"):
        merge_loras(files, [1, 1])
    tensors, report = merge_loras(files[:1], [1])
    write_lora(tmp_path / "out.safetensors", tensors, report)
    with safe_open(tmp_path / "out.safetensors", "pt") as content:
        assert json.loads(content.metadata()["postgen"]) == {"pipeline": "WanPipeline"}


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"weights": [1, 2]}, "1 LoRA files need 1 weights, got 2"),
        ({"weights": [float("nan")]}, "must be numbers"),
        ({"files": [], "weights": []}, "no LoRA to merge"),
        ({"method": "tie"}, "Did you mean"),
        ({"rank": 0}, "rank must be at least 1"),
        ({"density": 0}, "density must be above 0"),
    ],
)
def test_wrong_arguments(tmp_path, given, text):
    values = {"files": [tmp_path / "never read"], "weights": [1], **given}
    with pytest.raises(UserError, match=text):
        merge_loras(values.pop("files"), values.pop("weights"), **values)


def test_a_full_disk_leaves_nothing(tmp_path):
    tensors, report = merge_loras([lora(tmp_path, "a")], [1])
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        write_lora(tmp_path / "file" / "out.safetensors", tensors, report)
    assert [path.name for path in tmp_path.iterdir() if "part" in path.name] == []


@pytest.mark.parametrize(
    ("change", "options", "text"),
    [
        ({"rank": 2, "settings": None}, [], "has the ranks 4 and 2"),
        ({"shapes": {"blocks.0.attn1.to_q": (24, 24)}}, [], "only one of the two changes these layers"),
        ({"shapes": {**SHAPES, "blocks.0.attn1.to_k": (24, 32)}}, [], "has the shapes (24, 24) and (24, 32)"),
        (DORA, [], "has DoRA magnitudes"),
        ({"x.lora_A.weight": torch.full((4, 24), torch.nan)}, [], "NaN or infinity"),
        ({}, ["--rank", "0"], "rank"),
        ({}, ["--method", "ties", "--density", "2"], "density"),
    ],
)
def test_the_command_refuses_in_one_line(tmp_path, cli, change, options, text):
    files = [lora(tmp_path, "a"), lora(tmp_path, "b", **change)]
    done = cli("merge", *files, "-o", tmp_path / "out", *options)
    assert done.code == 2
    assert text in done.err
    assert len(done.err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()
