"""Changes that `tests.doc_blocks` makes to the blocks of pages before it runs them.

They avoid downloads, and reduce sizes so that a command takes seconds instead of minutes.
"""

from __future__ import annotations

MODEL = "postgen/assets/tiny-wan"

SERVERS = {"demo": "7860", "serve-reward": "8765"}
"""Commands that serve until they are stopped -> their port. They are stopped at the end of the page."""

_LORA = """
from diffusers import WanPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

def lora(folder):
    transformer = WanPipeline.from_pretrained("postgen/assets/tiny-wan").transformer
    layers = ["to_q", "to_v", "ffn.net.0.proj", "ffn.net.2"]
    transformer.add_adapter(LoraConfig(r=2, target_modules=layers, init_lora_weights=False))
    WanPipeline.save_lora_weights(folder, transformer_lora_layers=get_peft_model_state_dict(transformer))
"""
_PROMPTS = """
import pathlib

for name in ("PROMPTS.jsonl", "HELD_OUT.jsonl"):
    pathlib.Path(name).write_text('{"prompt": "a red ball rolls left"}')
"""
_CLIP = """
import postgen
from postgen import world

def clip(path, frames=9):
    scene = world.render([world.parse("a red ball rolls left")], num_frames=frames, size=64)
    postgen.write_video(path, scene.rgb_BF3HW[0], fps=8)
"""

BEFORE = {
    "README.md": _LORA + "lora('style')",
    "quickstart.md": _CLIP
    + """
from tests.doc_blocks import run_command

clip("a.mp4", 33)
words = "--size 64x64 --frames 5 --steps 2 -o out/ball.mp4".split()
run_command(["generate", "a red ball rolls left", *words], "what make generate does")
""",
    "rewards.md": _CLIP
    + """
import pathlib

for name in ("out", "runs/before", "runs/after"):
    pathlib.Path(name).mkdir(parents=True)
    clip(f"{name}/ball.mp4")
    pathlib.Path(f"{name}/ball.json").write_text('{"prompt": "a red ball rolls left"}')
pathlib.Path("prompts.csv").write_text("prompt,file\\na red ball rolls left,ball.mp4\\n")

from transformers import CLIPModel
from postgen.rewards.clip import clip_config
from tests.rewards import open_clip

pathlib.Path("my-clip").mkdir()
open_clip.save_tokenizer(pathlib.Path("my-clip"))
CLIPModel(clip_config(open_clip.TINY)).save_pretrained("my-clip")

def my_image_reward(completions, **columns):
    return [float(clip.mean()) for clip in completions]
""",
    "sft.md": """
import runpy
import sys

from benchmarks.docs_blocks import ROOT

sys.argv = ["world_clips.py", "--count", "4", "--size", "96", "--num-frames", "17"]
runpy.run_path(str(ROOT / "examples" / "world_clips.py"), run_name="__main__")
""",
    "lora.md": _LORA + _PROMPTS + "lora('runs/my-run')\nlora('style')",
    "merging.md": """
from tests.doc_blocks import run_command
from tests.doc_swaps import _REWARD

for name, peft in (("my-run", "true"), ("full", "false")):
    words = f"train fast-tiny {_REWARD} --use_peft {peft} --output_dir runs/{name} --sde_window_range 0 2"
    run_command([*words.split(), "--max_steps", "3", "--save_steps", "1", "--save_total_limit", "3"], "two runs")
""",
    "own_model.md": _PROMPTS
    + """
from benchmarks.docs_blocks import ROOT

text = (ROOT / "docs" / "own_model.md").read_text(encoding="utf-8")
for name, language in (("own_model.py", "python"), ("own.yaml", "yaml")):
    pathlib.Path(name).write_text(text.partition(f"```{language}\\n")[2].partition("```")[0])
""",
    "dancegrpo.md": _LORA + _PROMPTS + "lora('runs/my-run/export')\nlora('FOLDER')",
    "lit_video.md": """
import pathlib
from diffusers import WanPipeline
from postgen.lit import LitConfig, convert, save_adapter

transformer = WanPipeline.from_pretrained("postgen/assets/tiny-wan").transformer
convert(transformer, LitConfig(layers="3:window_delta"))
pathlib.Path("OUT/export").mkdir(parents=True)
save_adapter(transformer, "OUT/export/adapter.safetensors")
""",
    "quantization_recipes.md": """
import pathlib

pathlib.Path("few.jsonl").write_text('{"prompt": "a red ball rolls left"}\\n{"prompt": "a blue cube falls"}\\n')
""",
    "worldweaver_pipeline.md": """
from PIL import Image

Image.new("RGB", (64, 64), "grey").save("FIRST.png")
""",
    "worldweaver_depth.md": """
import pathlib
from PIL import Image

pathlib.Path("FOLDER").mkdir()
Image.effect_noise((64, 64), 50).convert("RGB").save("FOLDER/photo.png")
""",
}
"""Page -> code that creates the files that the page needs."""

SWAPS: dict[str, tuple[tuple[str, str], ...]] = {
    "README.md": (
        ("FOLDER_OR_HUB_ID", MODEL),
        ("style.safetensors", "style"),
        ("postgen demo ", "postgen demo --help "),  # docs/app.md starts this server
        ('"height": 128, "width": 128, "num_frames": 33', '"height": 64, "width": 64, "num_frames": 5'),
        ('"num_inference_steps": 20', '"num_inference_steps": 2'),
    ),
    "lit.md": (("FOLDER_OR_HUB_ID", MODEL),),
    "pipelines.md": (
        ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", MODEL),
        ('rolls left", ', 'rolls left", height=64, width=64, num_frames=5, num_inference_steps=2, '),
    ),
    "embedded_model.md": (
        ("height=128, width=128, num_frames=33", "height=64, width=64, num_frames=5"),
        ("num_inference_steps=20", "num_inference_steps=2"),
        ("num_frames=33, size=128", "num_frames=5, size=64"),
    ),
    "enhance_a_video.md": (
        ('"height": 128, "width": 128, "num_frames": 33', '"height": 64, "width": 64, "num_frames": 5'),
        ('"num_inference_steps": 20', '"num_inference_steps": 2'),
    ),
    "lora.md": (
        ("--model FOLDER", f"--model {MODEL}"),
        ("style.safetensors", "style"),
        ("fast-video", "fast-tiny --use_peft true"),
    ),
    "dancegrpo.md": (
        ("num_inference_steps=8,", "num_inference_steps=4, height=64, width=64, num_frames=5,"),
        ("fast-video --lora_path", "fast-tiny --use_peft true --output_dir runs/lora --lora_path"),
        ("--model runs/my-run/export", "--model runs/fast-tiny/export"),
    ),
    # One process, a local model, and only the estimate.
    "several_gpus.md": (("recipes/fast-video.yaml", "fast-tiny --dry-run"),),
    # Rewards whose weights are available.
    "rewards.md": (("hps_v2_1", "world_clip"), ("clip_score(frames=8)", "world_clip")),
    "worldweaver_pipeline.md": (
        ("--stream", "--long 20"),  # the command would not end
        ("80:a blue", "4:a blue"),
        ("--adapter runs/x/export", "--adapter postgen/assets/world-weaver"),
    ),
    "worldweaver_training.md": (
        # The recipe needs videos of the user and eight GPUs, so it is only read.
        (
            "accelerate launch --num_processes 8 -m postgen train worldweaver-wan --train_dataset CLIPS.jsonl",
            "postgen recipes show worldweaver-wan",
        ),
    ),
}
"""Page -> pairs of a printed text and the text that runs instead."""

_CLIPS = ["--size", "64x64", "--frames", "5", "--steps", "2"]
_POINTS = ["--frames", "5", "--height", "64", "--width", "64", "--steps", "3", "--points", "3", "--train-steps", "1"]
_LONG = ["--size", "64x64", "--steps", "3"]
_REWARD = (
    "--max_steps 1 --height 64 --width 64 --num_frames 5 --num_inference_steps 4 --num_generations 2"
    " --per_device_train_batch_size 2 --rollout_batch_size 2 --gradient_accumulation_steps 1 --reward_funcs world"
    " --eval_num_inference_steps 2 --eval_prompts 1 --eval_steps 0 --eval_on_start false --bf16 false"
)
_SMALL_TRAIN = {
    "dancegrpo-tiny": _REWARD,
    "fast-tiny": f"{_REWARD} --sde_window_range 0 2",
    "worldweaver-tiny": "--pool_dir null --num_frames 33 --height 32 --pool_clips 2 --eval_clips 2"
    " --per_device_train_batch_size 2 --max_steps 1 --bf16 false",
    "lit-tiny-wan": "--num_frames 5 --height 64 --width 64 --bf16 false",
    "quant-tiny": "--num_frames 5 --height 64 --width 64 --bf16 false",
    "sft-tiny": "--num_frames 5 --height 64 --width 64 --bf16 false",
    "own.yaml": "",  # tiny as it is
    "world-depth": "--sizes 32 --pool_size 32 --pool_clips 2 --room_clips 2 --textures 2 --reconstructions 0"
    " --eval_clips 1 --max_steps 1 --per_device_train_batch_size 2 --bf16 false",
}
"""Recipe -> settings with which it takes seconds; the model learns nothing."""


def smaller(words: list[str]) -> list[str]:
    """Return a command with appended options for small sizes; if an option is repeated, the last value counts."""
    command = words[0]
    if command == "generate" and ("--long" in words or "--continue" in words):
        place = words.index("--long") + 1
        words = [*words[:place], f"{float(words[place]) / 20:g}", *words[place + 1 :]]  # 1 s instead of 20 s
        return words if "--continue" in words else [*words, *_LONG]
    if command in ("generate", "compare"):
        return [*words, *_CLIPS]
    if words[:2] == ["convert", "lit"]:
        # The size stays, because linear attention costs more in a smaller clip.
        return [*words, "--steps", "1", "--prompt", "a red ball"] if "--budget" in words else words
    if words[:2] == ["convert", "quant"] and "--prompts" in words:
        return [*words, *_POINTS]
    if command == "train" and "--dry-run" not in words:
        return [*words, *_SMALL_TRAIN[words[1]].split()]
    return words
