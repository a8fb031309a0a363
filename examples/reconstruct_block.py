"""Train a student for one block of a transformer to give what the block gives: here, a feed-forward layer of low rank.

    python examples/reconstruct_block.py

The teacher's calls are recorded once, then each student is trained alone. Writes the records to `out/records`, and the
run with its trained weights to `out/low-rank`.
"""

import torch
from diffusers import WanPipeline
from torch import Tensor, nn

import postgen
from postgen.families import blocks_of, denoiser_for
from postgen.reconstruct import ReconstructConfig, RecordsConfig, block_task, collect, reconstruct

PROMPTS = ["a red ball rolls left", "a blue cube falls", "a green cone turns"]  # the last one is held out
STEPS, RANK = 20, 64


class LowRank(nn.Module):
    """A linear layer as a product of two thin matrices, from its largest singular values."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        u, s, v = torch.linalg.svd(linear.weight.detach(), full_matrices=False)
        self.up, self.down = nn.Parameter(u[:, :RANK] * s[:RANK]), nn.Parameter(v[:RANK].clone())
        self.bias = nn.Parameter(linear.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """Compute the layer."""
        return x @ self.down.T @ self.up.T + self.bias


def change(block: nn.Module) -> nn.Module:
    """Make the student of a copy of the teacher's block."""
    block.requires_grad_(False)
    block.ffn.net[0].proj = LowRank(block.ffn.net[0].proj)
    return block


def main() -> None:
    """Record block 3, train its student, and put it into the model."""
    pipe = WanPipeline.from_pretrained(postgen.embedded_model())
    block = blocks_of(pipe.transformer)[3]
    size = RecordsConfig(num_frames=5, height=64, width=64, num_inference_steps=4)
    records = collect(denoiser_for(pipe), [block], PROMPTS, size, where="out/records")
    task = block_task(block, change, is_new=lambda name: name.endswith((".up", ".down")), settings={"rank": RANK})
    train = ReconstructConfig(output_dir="out/low-rank", max_steps=STEPS, learning_rate_new=1e-3)
    report = reconstruct([task], records, train)  # prints errors on the held-out prompt before and after
    student = task.build()
    student.load_state_dict(report.weights(task.name))
    pipe.transformer.set_submodule(block.name, student)


if __name__ == "__main__":
    main()
