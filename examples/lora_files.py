"""LoRA files: export a LoRA with the keys of ComfyUI and of kohya's tools, and load it into a stock pipeline.

    python examples/lora_files.py

The LoRA of this example has random weights; use the folder of a training run instead. Writes
`out/lora-comfyui.safetensors`, `out/lora-kohya.safetensors` and `out/lora.mp4` (without the LoRA on the left, with it
on the right).
"""

from pathlib import Path

import torch
from diffusers import WanPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

import postgen
from postgen.families.lora import load_loras
from postgen.families.lora_export import export_lora

LAYERS = ["to_q", "to_v", "ffn.net.0.proj", "ffn.net.2"]
CALL = {"height": 96, "width": 96, "num_frames": 9, "num_inference_steps": 6, "guidance_scale": 3.0}


def write_random_lora(folder: Path) -> None:
    """Write a LoRA in the format of a training run."""
    transformer = WanPipeline.from_pretrained(postgen.embedded_model()).transformer
    torch.manual_seed(0)
    transformer.add_adapter(LoraConfig(r=4, target_modules=LAYERS, init_lora_weights=False))
    WanPipeline.save_lora_weights(folder, transformer_lora_layers=get_peft_model_state_dict(transformer))


def main() -> None:
    """Export a LoRA for two other programs, load one of the files, and compare the clips."""
    write_random_lora(Path("out/lora"))
    for program in ("comfyui", "kohya"):
        export_lora("out/lora", f"out/lora-{program}.safetensors", program, "wan")

    pipe = WanPipeline.from_pretrained(postgen.embedded_model())

    def make() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return pipe("a red ball rolls left", **CALL, generator=generator, output_type="pt").frames[0]

    before = make()
    load_loras(pipe, ["out/lora-kohya.safetensors:0.8"])  # pipe.load_lora_weights works too
    print(pipe.get_list_adapters())
    postgen.write_video("out/lora.mp4", postgen.side_by_side(before, make()), fps=8)


if __name__ == "__main__":
    main()
