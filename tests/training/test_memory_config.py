"""Offloaded and quantised frozen weights in runs: equal results, one-line refusals, files that load."""

import dataclasses
import gc
from weakref import ref

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import nn

import postgen  # noqa: F401 - registers the quantised layers
from postgen.errors import UserError
from postgen.grpo.nft import DiffusionNFTTrainer
from postgen.tensor_files import read_tensors
from postgen.training.base_quant import quantization_of
from postgen.training.block_offload import offload_in
from postgen.training.memory_config import MemoryConfig, place_frozen
from postgen.training.parking import Parking, parking_of
from postgen.training.policy import frozen, load_policy
from tests.families.tiny_pipelines import tiny_pipeline
from tests.grpo.test_lora import video_run

CPU = torch.device("cpu")
OFFLOADED = {"offload_blocks": 2, "offload_frozen": True, "gradient_checkpointing": True}


def weights(run):
    return {name: value.detach().clone() for name, value in run.trained().items()}


def test_a_run_with_offloaded_weights_is_the_run_without(tiny_wan, tmp_path):
    plain = video_run(tiny_wan, tmp_path / "plain", gradient_checkpointing=True, eval_steps=2)
    moved = video_run(tiny_wan, tmp_path / "moved", **OFFLOADED, eval_steps=2)
    for run in (plain, moved):
        run.train()
    assert offload_in(moved.unwrap("transformer")) is not None
    assert all(torch.equal(value, weights(moved)[name]) for name, value in weights(plain).items())
    assert moved.log.newest["eval_reward"] == plain.log.newest["eval_reward"]
    # The order of the metadata in a safetensors file is random, so bytes cannot be compared.
    files = [tmp_path / name / "run" / "export" / "pytorch_lora_weights.safetensors" for name in ("plain", "moved")]
    exported, wanted = (read_tensors(file) for file in files)
    assert exported.keys() == wanted.keys()
    assert all(torch.equal(value, wanted[name]) for name, value in exported.items())


def test_a_pipeline_can_be_trained_again(tiny_wan, tmp_path):
    pipe = DiffusionPipeline.from_pretrained(tiny_wan)
    memory = MemoryConfig(**OFFLOADED)
    for count in (2, 1):
        place_frozen(pipe, dataclasses.replace(memory, offload_blocks=count), CPU)
    assert len(offload_in(pipe.transformer)._homes) == 1
    pipe.vae.to(torch.float64)
    assert pipe.vae.dtype == torch.float32
    parking_of(pipe.vae).remove()
    pipe.vae.to(torch.float64)
    assert pipe.vae.dtype == torch.float64
    assert parking_of(pipe.vae) is None


def test_several_processes_refuse_offloaded_blocks_before_anything_is_loaded(tiny_wan, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="offload_blocks works in one process only"):
        video_run(tiny_wan, tmp_path, **OFFLOADED)


def test_it_resumes_exactly_and_offload_may_change(tiny_wan, tmp_path):
    straight = video_run(tiny_wan, tmp_path / "straight", gradient_checkpointing=True, save_steps=1)
    straight.train()
    source = str(tmp_path / "straight" / "run" / "checkpoint-1")
    resumed = video_run(tiny_wan, tmp_path / "resumed", **OFFLOADED, resume_from_checkpoint=source)
    resumed.train()
    assert all(torch.equal(value, weights(resumed)[name]) for name, value in weights(straight).items())


@pytest.mark.parametrize("kind", ["int8", "fp8", "int4"])
def test_adapters_learn_on_quantised_weights(kind, tmp_path, quantisable_wan):
    run = video_run(quantisable_wan, tmp_path, DiffusionNFTTrainer, base_quant=kind, max_steps=1, **OFFLOADED)
    run.train()
    network = run.unwrap("transformer")
    coded = [part for part in network.modules() if isinstance(part, nn.Linear) and not part.weight.is_floating_point()]
    assert len(coded) >= 8
    assert all(each.grad is None for each in network.parameters() if not each.requires_grad)
    second = [value for name, value in run.trained().items() if "lora_B" in name]
    assert second
    assert all(bool(value.any()) for value in second)  # they start at 0
    stock = DiffusionPipeline.from_pretrained(quantisable_wan)
    stock.load_lora_weights(tmp_path / "run" / "export")
    kept = read_tensors(tmp_path / "run" / "checkpoint-1" / "weights.safetensors")
    assert {name for name in kept if "lora_" not in name} <= {
        "transformer.rope.freqs_cos",
        "transformer.rope.freqs_sin",
    }


def test_gradients_of_adapters_are_those_of_the_numbers_that_the_codes_represent(quantisable_wan):
    memory = MemoryConfig(base_quant="int8", lora_r=2)
    policy = load_policy(str(quantisable_wan), memory, memory, CPU, memory=memory)
    network = policy.denoiser.transformers["transformer"]
    exact = load_policy(str(quantisable_wan), MemoryConfig(lora_r=2), MemoryConfig(lora_r=2), CPU)
    plain = exact.denoiser.transformers["transformer"]
    adapted = {name for name, _ in network.named_parameters() if "lora_" in name}
    plain.load_state_dict({name: network.state_dict()[name] for name in adapted}, strict=False)
    with torch.no_grad():
        for name, part in network.named_modules():
            if isinstance(part, nn.Linear) and not part.weight.is_floating_point():
                plain.get_submodule(name).weight.copy_(part.effective_weight())
    found = []
    for model in (network, plain):
        x, text = torch.ones(1, 4, 2, 4, 4), torch.ones(1, 3, 16)
        model(x, torch.tensor([10.0]), text, return_dict=False)[0].square().mean().backward()
        found.append({name: each.grad for name, each in model.named_parameters() if each.grad is not None})
    assert found[0].keys() == found[1].keys() == adapted
    for name in adapted:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-4, atol=1e-7)


def test_nf4_needs_a_gpu(quantisable_wan):
    pytest.importorskip("bitsandbytes")
    memory = MemoryConfig(base_quant="nf4")
    with pytest.raises(UserError, match="base_quant nf4 needs a GPU, but the device is cpu: use int4, int8 or fp8"):
        load_policy(str(quantisable_wan), memory, memory, CPU, memory=memory)


@pytest.mark.parametrize("name", ["LTX", "Stable Diffusion XL", "HunyuanVideo", "FLUX"])
def test_parked_components_give_the_same_results(name):
    pipe, size = tiny_pipeline(name)
    denoiser = frozen(pipe, MemoryConfig())
    latents = denoiser.initial_latents(1, **size, generator=torch.Generator().manual_seed(0))

    def results():
        condition = denoiser.encode_prompt(["a ball"], guidance=False)
        with torch.no_grad():
            return [condition["prompt"], denoiser.decode(latents)]

    wanted = results()
    place_frozen(pipe, MemoryConfig(offload_frozen=True), CPU)
    assert all(torch.equal(a, b) for a, b in zip(results(), wanted, strict=True))


def test_one_parked_component_is_on_the_device_at_a_time():
    first, second, network = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)
    # The "device" is the CPU; a copy shows in the address of the data.
    parking = Parking([first, second], [network], CPU)
    network.to(torch.float64)
    nn.Sequential(first, second).to(torch.float64)
    assert first.weight.dtype == torch.float32
    parking.bring(first)
    assert parking._here is first
    second(torch.zeros(1, 2))
    assert parking._here is second
    network(torch.zeros(1, 2, dtype=torch.float64))
    assert parking._here is None
    parking.remove()
    assert not vars(first).keys() & {"forward", "_apply"}
    assert not network._forward_pre_hooks


def test_a_component_that_is_too_large_runs_in_main_memory(monkeypatch):
    part, network = nn.Linear(2, 2), nn.Linear(2, 2)
    x = torch.ones(1, 2)
    wanted = part(x)
    parking = Parking([part], [network], CPU)

    def full(data):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(parking, "_moved", full)
    with pytest.warns(UserWarning, match=r"the Linear needs 0\.0 GiB, more than the device has free: it runs in main"):
        assert torch.equal(part(x), wanted)
    assert torch.equal(part(x), wanted)  # without a second warning
    assert parking._here is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"offload_blocks": -1}, "offload_blocks is -1, it must be at least 0"),
        ({"offload_blocks": 2}, "gradient_checkpointing is False, it must be true with offload_blocks"),
        ({"offload_blocks": 2, "use_peft": False}, "offload_blocks is 2, it must be 0 with use_peft: false"),
        ({"base_quant": "int8", "use_peft": False}, "base_quant is 'int8', it must be none with use_peft: false"),
        ({**OFFLOADED, "torch_compile": True}, "torch_compile is True, it must be false with offload_blocks"),
        ({**OFFLOADED, "fully_shard": True}, "fully_shard is True, it must be false with offload_blocks"),
        ({"base_quant": "int3"}, "base_quant is 'int3'"),
        ({"base_quant": "nf4", **OFFLOADED}, "offload_blocks is 2, it must be 0 with base_quant: nf4"),
    ],
)
def test_settings_that_exclude_each_other_are_one_line(tiny_wan, tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        video_run(tiny_wan, tmp_path, **settings)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--offload_blocks", "2", "--use_peft", "true"), "gradient_checkpointing is False, it must be true with"),
        (("--base_quant", "int3"), "base_quant"),
        (("--optim", "adamw_4bit"), "optim"),
        (("--optim", "adafactor", "--adam_beta1", "0.5"), "adam_beta1 is 0.5, it must be left out with optim"),
        (("--base_quant", "nf4", "--use_peft", "false"), "base_quant is 'nf4', it must be none with use_peft: false"),
    ],
)
def test_on_the_command_line_wrong_settings_are_one_line(cli, tmp_path, words, message):
    told = cli("train", "nft-tiny", "--output_dir", tmp_path / "run", *words)
    assert told.code == 2
    assert told.err.count("\n") == 1
    assert message in told.err
    assert not (tmp_path / "run").exists()


def test_what_the_model_does_not_allow_is_one_line(tiny_wan, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="offload_blocks is 3, but the network has 2 blocks"):
        video_run(tiny_wan, tmp_path, **{**OFFLOADED, "offload_blocks": 3}).train()
    pipe, _ = tiny_pipeline("LTX")
    memory = MemoryConfig(base_quant="fp8")
    with pytest.raises(UserError, match="base_quant fp8 quantises a model when it is loaded, but model is a pipeline"):
        load_policy(pipe, memory, memory, CPU, memory=memory)
    monkeypatch.setattr("postgen.training.base_quant.find_spec", lambda name: None)
    with pytest.raises(UserError, match="base_quant nf4 needs bitsandbytes, which is not installed: pip install"):
        MemoryConfig(base_quant="nf4")
    assert quantization_of("none", ["transformer"], CPU) is None


@pytest.fixture(scope="module")
def quantisable_wan(tmp_path_factory):
    """Folder of a tiny Wan whose layers have enough channels for groups of 64."""
    from diffusers import WanPipeline, WanTransformer3DModel

    from tests.tiny_wan import wan_components

    folder = tmp_path_factory.mktemp("models") / "wan"
    parts = wan_components()
    config = {**parts["transformer"].config, "attention_head_dim": 32, "ffn_dim": 64}
    WanPipeline(**{**parts, "transformer": WanTransformer3DModel.from_config(config)}).save_pretrained(folder)
    return folder


def test_dropped_components_free_their_memory():
    part, network = nn.Linear(4, 4), nn.Linear(4, 4)
    Parking([part], [network], CPU)
    part(torch.ones(1, 4))
    assert parking_of(part) is not None
    component, weight = ref(part), ref(part.weight)
    del part
    network_alone = ref(network)
    del network
    gc.collect()
    assert component() is None
    assert weight() is None
    assert network_alone() is None
