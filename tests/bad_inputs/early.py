"""What is wrong with a call is found before the model is: there is none here, and the option is named first."""

from __future__ import annotations

from collections.abc import Iterator

from tests.bad_inputs.numbers_options import FILES
from tests.bad_inputs.row import Row

OPTIONS: dict[tuple[str, ...], str] = {
    ("--fps", "0"): "fps",
    ("--fps", "nan"): "fps",
    ("--fps", "1e-30"): "fps",
    ("--steps", "0"): "num_inference_steps",
    ("--width", "0"): "width",
    ("--height", "99999"): "height",
    ("--frames", "-1"): "num_frames",
    ("--size", "32"): "--size",
    ("--size", "32x"): "--size",
    ("--size", "0x32"): "width",
    ("--size", "-32x32"): "--size",
    ("--size", "1600000x1600000"): "width",
    ("--size", "32x32x32"): "--size",
    ("--size", "nanxnan"): "--size",
    ("--size", "\u0663\u0662x32"): "--size",
    ("--size", f"{'9' * 5000}x32"): "--size|width",
    ("--size", "16384x16384", "--frames", "99999"): "pixels",
    ("--size", "32x32", "--width", "32"): "say the same",
    ("--guidance", "-1"): "guidance_scale",
    ("--guidance", "1e38"): "guidance_scale",
    ("--seed", "-1"): "seed",
    ("--seed", str(2**63)): "seed",
    ("--dtype", "float8"): "dtype",
    ("--dtype", ""): "dtype",
    ("--device", "tpu"): "device",
    ("--device", ""): "device",
    ("--device", "cpu:"): "device",
    ("--device", "cpu:1"): "device",
    ("--device", "cuda:-1"): "device",
    ("--device", "cuda:x"): "device",
    ("--device", f"cuda:{'9' * 5000}"): "device|cuda",
    ("--device", "cuda:\u0661"): "device|cuda",
    ("--offload", "disk"): "offload",
    ("--format", "mov"): "unknown video format",
    ("--format", ""): "format",
    ("--format", "gif"): "named like mp4",
    ("--lora", "l:nan"): "scale of the LoRA",
    ("--lora", "l:1e30"): "scale of the LoRA",
    ("--lora", ""): "LoRA",
    ("--enhance", "many"): "enhance",
    ("--enhance", "nan"): "enhance",
    ("--enhance", "1e30"): "enhance",
    ("--enhance", ""): "enhance",
    ("--fused", "everything"): "fused",
    ("--fused", ""): "fused",
    ("--fused", "adaln,,"): "fused",
    ("--negative-prompt", "b", "--guidance", "1"): "negative prompt",
    ("--frobnicate", "1"): "No such option",
    ("--steps",): "--steps",
}
"""Words after `generate a -o x.mp4 --model ./absent` -> what must be said."""

GENERATE: dict[tuple[str, ...], str] = {
    ("generate",): "there is no prompt",
    ("generate", ""): "the prompt is empty",
    ("generate", "a", "b", "c"): "c|argument",
    ("generate", "a", "-o", "x.mov"): "unknown video format",
    ("generate", "a", "-o", "x.gif", "--fps", "60", "--model", "{wan}"): "at most 50",
    ("generate", "a", "-o", "x", "--format", "gif", "--fps", "60", "--model", "{wan}"): "at most 50",
    ("generate", "a", "--count", "0"): "--count",
    ("generate", "a", "--count", "10001"): "--count",
    ("generate", "a", "--model", ""): "model",
    ("generate", "a", "--model", "a\0b"): "model",
    ("generate", "a", "--model", "a" * 5000): "model",
    ("generate", "a", "--model", "./absent"): "there is no model folder",
    ("generate", "a", "--model", "absent"): "there is no model folder",
    ("generate", "a", "--model", "a/b/c"): "there is no model folder",
    ("generate", "a", "--model", "/dev/null"): "is a file|folder",
    ("generate", "a", "--model", "{wan}", "--true-cfg", "3"): "true_cfg_scale",
    ("generate", "a", "--model", "{wan}", "--frames", "6"): "the number of frames",
    ("generate", "a", "--model", "{wan}", "--width", "33"): "width must be a multiple",
    ("generate", "a", "--model", "{wan}", "--offload", "model", "--device", "cpu"): "offload",
    ("generate", "a", "--model", "{hunyuan}", "--negative-prompt", "b"): "true_cfg_scale",
    ("compare", "a"): "say the same",
    ("compare", "a", "--a", "steps"): "key=value",
    ("compare", "a", "--a", "stepz=1"): "names no setting",
    ("compare", "a", "--a", "step=1"): "Did you mean 'steps'",
    ("compare", "a", "--b", "guidence=1"): "Did you mean 'guidance'",
    ("compare", "a", "--a", "=1"): "names no setting",
    ("compare", "a", "--a", "seed=1"): "one seed",
    ("compare", "a", "--a", "fps=8"): "one fps",
    ("compare", "a", "--a", "steps=1", "--a", "steps=2"): "twice",
    ("compare", "a", "--a", "steps=0", "--model", "{wan}"): "num_inference_steps",
    ("compare", "a", "--a", "enhance=nan", "--model", "{wan}"): "enhance",
    ("compare", "a", "--a", "lora=l:nan", "--model", "{wan}"): "scale of the LoRA",
    ("compare", "a", "--a", "model=./absent"): "there is no model folder",
    ("compare", "a", "--a", "prompt="): "the prompt is empty",
    ("compare", "a", "--a", "dtype=float8"): "dtype",
    ("compare", "a", "--a", "steps=2", "-o", "x.gif", "--fps", "60", "--model", "{wan}"): "at most 50",
    ("compare", "a", "--a", "steps=2", "-o", "x.mov", "--model", "{wan}"): "unknown video format",
    ("compare",): "PROMPT|prompt",
    ("paint",): "paint",
    ("convert", "colour"): "colour",
    ("convert", "lora"): "argument|PATH|path",
    ("export-lora", "a"): "option|--output",
    ("info", "--frobnicate"): "frobnicate",
    ("info", "a"): "a|argument",
    ("score",): "PATHS|paths",
    ("serve-reward",): "REWARD|reward",
    ("serve-reward", "wrld"): "Did you mean 'world'",
    ("serve-reward", "world(worker=1)"): "it has workers. Did you mean 'workers'",
    ("serve-reward", "world(prompts=1)"): "no option 'prompts': it has workers$",
    ("serve-reward", "motion_floor(completions=1)"): "it has floor$",
    ("serve-reward", "depth_consistency(log_metric=1)"): "it has none$",
    ("serve-reward", "http://127.0.0.1:9(retries=0)"): "nobody listens there: start `postgen serve-reward",
    ("serve-reward", "clip_score(frames=0)"): "frames",
    ("serve-reward", "world", "--device", "tpu"): "device",
    ("score", "frames", "--prompt", "a", "--reward", "wrld"): "Did you mean 'world'",
    ("score", "frames", "--prompt", "a", "--reward", "clip_score(frames=0)"): "frames",
    ("score", "frames", "--prompt", "a", "--reward", "clip_score(frames=8"): "brackets|options",
    ("score", "frames", "--prompt", "a", "--reward", ""): "reward",
    ("score", "frames", "--prompt", "a", "--weights", "many"): "--weights",
    ("score", "frames", "--prompt", "a", "--weights", "nan"): "weights",
    ("score", "frames", "--prompt", "a", "--weights", "1e30"): "weights",
    ("score", "frames", "--prompt", "a", "--weights", "1,2"): "weights",
    ("score", "frames", "--prompt", "a", "--weights", ""): "weights",
    ("score", "frames", "--prompt", "a", "--device", "tpu"): "device",
    ("score", "frames", "--prompt", "a", "--prompts", "p.txt"): "not both",
    ("score", "frames", "--prompt", "a", "-o", "x.xlsx"): "must end in",
    ("score", "absent.mp4", "--prompt", "a"): "absent.mp4",
}

RIGHT: tuple[tuple[str, ...], ...] = (
    ("generate", "a", "-o", "x.gif", "--fps", "50", "--model", "{wan}"),
    ("generate", "a", "-o", "x.mp4", "--fps", "60", "--model", "{wan}"),
    ("generate", "a", "--model", "{wan}", "--size", "32x48", "--guidance", "1000", "--fps", "0.01"),
    ("generate", "a", "--model", "{wan}", "--guidance", "-0"),
    ("generate", "a", "--model", "{wan}", "--device", "cpu", "--dtype", "bfloat16"),
    ("generate", "a", "--model", "{wan}", "--enhance", "2.5", "--fused", "norm_rope, adaln"),
    ("generate", "a", "--model", "{wan}", "--enhance", "-0", "--fused", "off"),
    ("generate", "a", "--model", "{hunyuan}", "--negative-prompt", "b", "--true-cfg", "4"),
    ("generate", "--model", "{wan}", "--", "-a red ball"),
    ("compare", "a", "--a", "guidance=1", "--b", "guidance=5", "--model", "{wan}"),
    ("compare", "a", "--a", "enhance=auto", "--model", "{wan}", "-o", "x.webm", "--fps", "12.5"),
    ("--version",),
    ("generate", "--help"),
)


def rows() -> Iterator[Row]:
    """Yield all rows."""
    for words, says in OPTIONS.items():
        base = ("generate", "a", "-o", "x.mp4", "--model", "./absent")
        # What only a model can tell is told of one that is there.
        if words[0] in ("--negative-prompt", "--lora", "--enhance", "--fused") or words[1:2] == ("cuda:\u0661",):
            base = (*base[:-1], "{wan}")
        yield Row(name=f"early {' '.join(words)[:40]}", words=(*base, *words), says=says)
    for words, says in GENERATE.items():
        yield Row(name=" ".join(words)[:60], words=words, files=FILES, says=says)
    for words in RIGHT:
        yield Row(name=f"{' '.join(words)[:60]} right", words=words, wrong=False)
