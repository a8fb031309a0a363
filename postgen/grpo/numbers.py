"""Numbers that travel together and must not be mixed up: types of their own for the type checker, plain integers else.

A row of a tensor of this process, a step of the schedule and a position in the order of prompts stay plain integers:
they stand alone where they are used.
"""

from typing import NewType

RolloutNumber = NewType("RolloutNumber", int)
"""Of a rollout in the run."""

PromptNumber = NewType("PromptNumber", int)
"""Of a prompt in its rollout, over all processes."""

SampleNumber = NewType("SampleNumber", int)
"""Of a sample in its rollout, prompt by prompt, over all processes."""
