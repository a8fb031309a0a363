"""Train a prompt enhancer with TRL: fine-tuning on pairs of prompts, then GRPO with the videos of a frozen generator.

    python examples/train_prompt_enhancer.py

Needs `pip install 'postgen[train]'`. The language model is tiny and random, so that this takes seconds on a CPU; a
real run begins with a chat model. Writes the model to `out/enhancer/` and its rewrites to `out/enhancer.json`.
"""

import json
from pathlib import Path

import datasets
from transformers import LlamaConfig, LlamaForCausalLM
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

import postgen
from postgen.pipelines import WanPipeline
from postgen.prompt import ChatRewriter, PromptEnhancer, target_of
from postgen.prompt.training import SimilarityReward, StructureReward, VideoGenerationReward, to_rl_rows, to_sft_pairs
from postgen.training.tokenizers import train_tokenizer

PROMPTS = [f"{colour} {shape}" for colour in ("red", "blue", "green", "yellow") for shape in ("ball", "cube")]
# A real chat model also reads the instructions, which this template leaves out to keep the texts short.
TEMPLATE = (
    "{% for m in messages if m.role != 'system' %}{{ m.role }}: {{ m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
QUICK = {"report_to": [], "use_cpu": True, "bf16": False, "save_strategy": "no", "disable_tqdm": True}


def main() -> None:
    """Train both stages, and print what the model makes of the prompts."""
    pipe = WanPipeline.from_pretrained(postgen.embedded_model())
    target = target_of(pipe)
    teacher = PromptEnhancer(target=target)  # its template needs no model; a large chat model writes better pairs
    tokenizer = train_tokenizer([*PROMPTS, *teacher(PROMPTS), "user: assistant:"], 320)
    tokenizer.chat_template = TEMPLATE
    size = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), eos_token_id=1, pad_token_id=0, **size))
    stage = SFTConfig("out/sft", max_steps=60, learning_rate=3e-3, per_device_train_batch_size=8, **QUICK)
    rows = datasets.Dataset.from_list(to_sft_pairs(PROMPTS, teacher).rows)
    SFTTrainer(model, args=stage, train_dataset=rows, processing_class=tokenizer).train()
    preview = {"num_inference_steps": 2, "num_frames": 5, "height": 64, "width": 64}
    video = VideoGenerationReward(pipe, ["world", "motion_floor"], **preview)  # the rewards see the original prompt
    rewards = [video, StructureReward(target, least_words=4), SimilarityReward()]
    stage = GRPOConfig("out/grpo_enhancer", max_steps=2, learning_rate=1e-5, num_generations=4, **QUICK)
    stage.per_device_train_batch_size, stage.max_completion_length = 4, 24
    rows = datasets.Dataset.from_list(to_rl_rows(PROMPTS, target=target))
    GRPOTrainer(model, reward_funcs=rewards, args=stage, train_dataset=rows, processing_class=tokenizer).train()
    model.save_pretrained("out/enhancer")
    tokenizer.save_pretrained("out/enhancer")
    writer = ChatRewriter("out/enhancer", device="cpu", max_new_tokens=24, examples=False)
    made = dict(zip(PROMPTS, PromptEnhancer(writer, target=target)(PROMPTS), strict=True))
    Path("out/enhancer.json").write_text(json.dumps(made, indent=2), encoding="utf-8")
    print(made, video.counts)


if __name__ == "__main__":
    main()
