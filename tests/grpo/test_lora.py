"""A tiny video pipeline: LoRA and full weights, the reference, images, files that plain diffusers loads."""

import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file

from postgen.errors import UserError
from postgen.grpo.nft import DiffusionNFTConfig, DiffusionNFTTrainer
from postgen.grpo.trainer import DanceGRPOConfig, DanceGRPOTrainer
from tests.grpo.toy import lines, near

TEXTS = ({"prompt": "a ball"}, {"prompt": "a cube"})


def video_run(model, folder, kind=DanceGRPOTrainer, rows=TEXTS, **changes):
    config = DiffusionNFTConfig if kind is DiffusionNFTTrainer else DanceGRPOConfig
    values = {"height": 16, "width": 16, "num_frames": 5, "num_generations": 2, "per_device_train_batch_size": 2}
    values |= {"num_inference_steps": 4, "lora_r": 2, "learning_rate": 1e-2, "max_steps": 2, "logging_steps": 1}
    values |= {"device": "cpu", "disable_tqdm": True, "report_to": [], "max_sequence_length": 16, **changes}
    values |= {} if kind is DiffusionNFTTrainer else {"check_on_policy_ratio": "raise", "max_ratio_error": 1e-5}
    return kind(str(model), near, config(output_dir=str(folder / "run"), **values), rows, rows)


def test_grpo_lora_loads_with_plain_diffusers(tiny_wan, tmp_path, monkeypatch):
    from diffusers import DiffusionPipeline
    from peft import LoraConfig

    run = video_run(tiny_wan, tmp_path, eval_steps=2, gradient_checkpointing=True, guidance_scale=3.0, beta=0.1)
    run._peft_config = LoraConfig(r=4, lora_alpha=16, target_modules=["to_q", "to_v"])
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None, raising=False)
    monkeypatch.setattr(sys, "argv", ["/some/where/postgen", "train", "my recipe.yaml"])
    run.train()
    export = tmp_path / "run" / "export"
    assert {path.name for path in export.iterdir()} >= {"pytorch_lora_weights.safetensors", "README.md"}
    call = {"height": 16, "width": 16, "num_frames": 5, "num_inference_steps": 2, "output_type": "latent"}
    call |= {"max_sequence_length": 16}
    stock = DiffusionPipeline.from_pretrained(tiny_wan)

    def sample(pipe):
        return pipe("a ball", generator=torch.Generator().manual_seed(0), **call).frames

    before = sample(stock)
    stock.load_lora_weights(export)
    after = sample(stock)
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, sample(run.policy.pipe))
    card = (export / "README.md").read_text()
    assert "lora" in card
    assert "near (weight 1)" in card
    assert "- Command: `postgen train 'my recipe.yaml'`" in card
    assert (tmp_path / "run" / "samples" / "step-000002.mp4").is_file()
    again = video_run(tiny_wan, tmp_path / "again", lora_path=str(export), max_steps=1, beta=0.1)
    again.train()
    assert lines(again)[0]["kl"] == 0
    assert len(again.trained()) == len(run.trained())


def test_grpo_export_of_a_run_becomes_a_lora_for_comfyui(tiny_wan, tmp_path, cli):
    run = video_run(tiny_wan, tmp_path, max_steps=1)
    run.train()
    told = cli("export-lora", tmp_path / "run", "-o", tmp_path / "comfy.safetensors", "--format", "comfyui")
    assert told.code == 0, told.err
    assert "16 layers, blocks.0.self_attn.k to blocks.1.cross_attn.v" in told.out
    x, index = torch.randn(1, 4, 2, 2, 2), torch.tensor([1])
    sigma, condition = run.sampler.schedule.sigmas[index].float(), run.conditions(0)([0])
    with torch.no_grad():
        expected = run.policy.denoiser.predict(x, sigma, condition)
    from postgen.families import denoiser_for
    from tests.families.test_wan import load

    stock = load(tiny_wan)
    stock.load_lora_weights(tmp_path / "comfy.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(denoiser_for(stock).predict(x, sigma, condition), expected)


def test_grpo_generate_takes_the_lora(tiny_wan, tmp_path, cli):
    video_run(tiny_wan, tmp_path).train()
    lora = tmp_path / "run" / "export" / "pytorch_lora_weights.safetensors"
    words = ("generate", "a ball", "--model", tiny_wan, "--lora", lora, "-o", tmp_path / "a.mp4", "--frames", "5")
    told = cli(*words, "--height", "16", "--width", "16", "--steps", "2")
    assert told.code == 0, told.err


def test_grpo_full_fine_tuning_writes_a_model(tiny_wan, tmp_path):
    from types import SimpleNamespace

    run = video_run(tiny_wan, tmp_path, kind=DiffusionNFTTrainer, use_peft=False, learning_rate=1e-4)
    run.train()
    # Load the export with the code of the model card.
    export = tmp_path / "run" / "export"
    lines_of_card = (export / "README.md").read_text().split("```python\n")[1].split("```")[0]
    pipe = SimpleNamespace()
    exec(lines_of_card.replace("THIS_FOLDER", str(export)), {"pipe": pipe})
    trained = run.policy.modules["transformer"]
    assert type(pipe.transformer) is type(trained)
    assert all(torch.equal(a, b) for a, b in zip(pipe.transformer.parameters(), trained.parameters(), strict=True))


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (
            "LoraConfig",
            {"bias": "all"},
            "bias 'all', which trains biases of the model, and a LoRA file cannot hold them",
        ),
        (
            "LoraConfig",
            {"modules_to_save": ["proj_out"]},
            r"modules_to_save \['proj_out'\], which is not part of a LoRA",
        ),
        ("LoraConfig", {"target_parameters": ["x"]}, "target_parameters"),
        ("LoraConfig", {"init_lora_weights": "pissa"}, "init_lora_weights pissa, which also changes"),
        ("LoHaConfig", {}, "peft_config is a LoHaConfig, it must be a peft.LoraConfig"),
    ],
)
def test_adapters_that_the_export_could_not_hold_are_refused_before_training(
    tiny_wan, tmp_path, kind, settings, message
):
    import peft

    run = video_run(tiny_wan, tmp_path)
    run._peft_config = getattr(peft, kind)(r=2, target_modules=["to_q"], **settings)
    with pytest.raises(UserError, match=message) as caught:
        run.train()
    assert "\n" not in str(caught.value)
    assert run.global_step == 0


def test_dropout_of_adapters_ends_with_the_training(tiny_wan, tmp_path):
    from diffusers import WanPipeline
    from peft import LoraConfig

    from postgen.families.lora import load_loras

    run = video_run(tiny_wan, tmp_path, max_steps=1, check_on_policy_ratio="off")
    run._peft_config = LoraConfig(r=2, target_modules=["to_q", "to_v"], lora_dropout=0.5)
    run.train()
    export = tmp_path / "run" / "export"
    again = video_run(tiny_wan, tmp_path / "again", max_steps=1, check_on_policy_ratio="off", lora_path=str(export))
    again.train()
    pipes = [WanPipeline.from_pretrained(tiny_wan) for _ in range(2)]
    pipes[0].load_lora_weights(export)
    load_loras(pipes[1], [str(export)])
    assert not any(
        module.training for module in [*pipes[1].transformer.modules(), *again.policy.pipe.transformer.modules()]
    )
    call = {"height": 16, "width": 16, "num_frames": 5, "num_inference_steps": 2, "output_type": "latent"}
    call |= {"max_sequence_length": 16}
    found = [
        pipe("a ball", generator=torch.Generator().manual_seed(0), **call).frames for pipe in (run.policy.pipe, *pipes)
    ]
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[0], found[2])


def test_a_pipeline_with_adapters_is_not_trained_again_before_they_are_unloaded(tiny_wan, tmp_path):
    from diffusers import WanPipeline

    first = video_run(tiny_wan, tmp_path / "first", max_steps=1)
    first.train()
    pipe, export = first.policy.pipe, tmp_path / "first" / "run" / "export"
    again = ({}, {"use_peft": False}, {"lora_path": str(export)})
    for number, changes in enumerate(again):
        run = video_run(tiny_wan, tmp_path / str(number), max_steps=1, **changes)
        run.source = pipe
        with pytest.raises(UserError, match="WanTransformer3DModel already has the LoRA default") as told:
            run.train()
        assert "\n" not in str(told.value)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    for number, changes in enumerate(again):
        run = video_run(tiny_wan, tmp_path / str(number), max_steps=1, **changes)
        run.source = pipe
        run.train()
        if changes.get("use_peft", True):
            pipe.unload_lora_weights()
    pipe = WanPipeline.from_pretrained(tiny_wan)
    pipe.load_lora_weights(export, adapter_name="style")
    pipe.delete_adapters("style")
    run.source = pipe
    with pytest.raises(UserError, match="already has layers for adapters"):
        run.build()


@pytest.mark.parametrize("use_peft", [True, False])
def test_grpo_card_of_two_experts_loads_both_in_plain_diffusers(tiny_wan, tmp_path, use_peft):
    """`lora_path` takes the same two sub-folders, here copied from files of other names."""
    from diffusers import DiffusionPipeline, WanTransformer3DModel

    def two():
        pipe = DiffusionPipeline.from_pretrained(tiny_wan, boundary_ratio=0.5)
        torch.manual_seed(1)
        pipe.register_modules(transformer_2=WanTransformer3DModel.from_config(pipe.transformer.config).eval())
        return pipe

    two().save_pretrained(tmp_path / "two")
    run = video_run(tmp_path / "two", tmp_path, use_peft=use_peft)
    run.train()
    export = tmp_path / "run" / "export"
    pipe, call = two(), {"height": 16, "width": 16, "num_frames": 5, "num_inference_steps": 4}
    call |= {"output_type": "latent", "max_sequence_length": 16, "guidance_scale": 1.0}
    first = sample(pipe, call)
    lines_of_card = (export / "README.md").read_text().split("```python\n")[1].split("```")[0]
    exec(lines_of_card.replace("THIS_FOLDER", str(export)), {"pipe": pipe})
    assert not torch.equal(sample(pipe, call), first)
    torch.testing.assert_close(sample(pipe, call), sample(run.policy.pipe, call))
    if use_peft:
        for name in ("transformer", "transformer_2"):
            (tmp_path / "mine" / name).mkdir(parents=True)
            file = "pytorch_lora_weights.safetensors"
            shutil.copyfile(export / name / file, tmp_path / "mine" / name / file)
        again = video_run(tmp_path / "two", tmp_path / "again", lora_path=str(tmp_path / "mine"), max_steps=1)
        again.train()
        assert len(again.trained()) == len(run.trained())


def sample(pipe, call):
    return pipe("a ball", generator=torch.Generator().manual_seed(0), **call).frames


@pytest.mark.parametrize("use_peft", [True, False])
def test_grpo_trains_float32_weights_of_a_model_in_half_precision(tiny_wan, tmp_path, use_peft):
    """Trained weights are float32, because rounding to bfloat16 would remove most updates at a rate of 1e-5."""
    run = video_run(tiny_wan, tmp_path, dtype="bfloat16", use_peft=use_peft, learning_rate=1e-5, max_steps=1)
    run.train()
    assert {value.dtype for value in run.trained().values()} == {torch.float32}
    frozen = {value.dtype for value in run.policy.modules["transformer"].parameters() if not value.requires_grad}
    assert frozen == ({torch.bfloat16, torch.float32} if use_peft else set())
    assert lines(run)[0]["logp_diff/max"] <= 1e-5


def test_grpo_lora_targets_that_match_nothing(tiny_wan, tmp_path):
    with pytest.raises(UserError, match=r"'to_x' matches no layer of WanTransformer3DModel. Its layers end in .*to_q"):
        video_run(tiny_wan, tmp_path, lora_target_modules=["to_q", "to_x"]).train()


def test_grpo_image_to_video(tiny_wan_image, tmp_path):
    run = video_run(tiny_wan_image, tmp_path, rows=[{"prompt": "a", "image": torch.rand(3, 16, 16)}])
    run.eval_prompts = None
    run.train()
    assert lines(run)[-1]["step"] == 2


def test_grpo_pictures_that_print_alike_are_told_apart(tiny_wan_image, tmp_path):
    run = video_run(tiny_wan_image, tmp_path, rows=[{"prompt": "a", "image": torch.rand(3, 16, 16)}])
    run.build()
    black = torch.zeros(3, 40, 40)
    dotted = black.clone()
    dotted[:, 20, 20] = 1
    assert str(black) == str(dotted)
    one, other = (run.embeddings.of({"prompt": "a", "image": picture}) for picture in (black, dotted))
    assert any(not torch.equal(one[name], other[name]) for name in one)
    # Pictures are resized to the size of the clip, like files.
    same = run.embeddings.of({"prompt": "a", "image": torch.zeros(3, 16, 16)})
    assert all(torch.equal(one[name], same[name]) for name in one)


def test_grpo_lora_has_one_source(tiny_wan, tmp_path):
    from peft import LoraConfig

    video_run(tiny_wan, tmp_path, max_steps=1).train()
    run = video_run(tiny_wan, tmp_path / "again", lora_path=str(tmp_path / "run" / "export"))
    run._peft_config = LoraConfig(r=4, target_modules=["to_q"])
    with pytest.raises(UserError, match="peft_config with lora_path"):
        run.train()


def test_grpo_reference_of_lora_is_the_model_without_it(tiny_wan, tmp_path):
    run = video_run(tiny_wan, tmp_path)
    run.train()
    x, index = torch.randn(1, 4, 2, 2, 2), torch.tensor([1])
    with torch.no_grad():
        condition = run.conditions(0)([0])
        trained = run.sampler.predict(x, index, condition)
        with run.policy.reference():
            reference = run.sampler.predict(x, index, condition)
        assert torch.equal(trained, run.sampler.predict(x, index, condition))
    from postgen.families import denoiser_for
    from tests.families.test_wan import load

    denoiser = denoiser_for(load(tiny_wan))
    with torch.no_grad():
        stock = denoiser.predict(x, run.sampler.schedule.sigmas[index].float(), condition)
    assert torch.equal(reference, stock)
    assert not torch.equal(trained, stock)


def test_grpo_merges_its_last_checkpoints(tiny_wan, tmp_path):
    """The exported LoRA is the mean of the changes of the checkpoints, and the pictures are those of the last step."""
    settings = {"max_steps": 3, "save_steps": 1, "learning_rate": 3e-2, "eval_steps": 3}
    run = video_run(tiny_wan, tmp_path, merge_last=3, merge_metric="eval_reward", merge_keep="always", **settings)
    run.train()
    export = load_file(tmp_path / "run" / "export" / "pytorch_lora_weights.safetensors")
    files = [load_file(tmp_path / "run" / f"checkpoint-{step}" / "weights.safetensors") for step in (1, 2, 3)]
    name = "transformer.blocks.1.attn1.to_q"
    changes = [file[f"{name}.lora_B.default.weight"] @ file[f"{name}.lora_A.default.weight"] for file in files]
    left, sigma, right = torch.linalg.svd(sum(changes).double() / 3)
    best = (left[:, :2] * sigma[:2]) @ right[:2]
    found = export[f"{name}.lora_B.weight"].double() @ export[f"{name}.lora_A.weight"].double()
    assert (found - best).norm() < 1e-5 * best.norm()
    row = lines(run)[-1]
    assert row["merge/exported"] == 1
    assert 0.9 < row["merge/retained"] <= 1
    measured = {line["step"]: line["eval_reward"] for line in lines(run) if "eval_reward" in line}
    assert list(measured) == [0, 3]  # the first tells that the metric is there
    assert row["merge/last"] == measured[3]
    card = (tmp_path / "run" / "export" / "README.md").read_text()
    assert "- Merge: the weights are the merge of the checkpoints of steps 1, 2, 3 (sma), eval_reward " in card
    pictures = (tmp_path / "run" / "samples" / "step-000003.mp4").read_bytes()
    video_run(tiny_wan, tmp_path / "plain", **settings).train()
    assert "- Merge" not in (tmp_path / "plain" / "run" / "export" / "README.md").read_text()
    assert (tmp_path / "plain" / "run" / "samples" / "step-000003.mp4").read_bytes() == pictures
