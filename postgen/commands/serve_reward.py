"""`postgen serve-reward`."""

from typing import Annotated

import typer

from postgen.commands.errors import when_stopped
from postgen.commands.score import Device, Timeout, reward_device
from postgen.errors import UserError

Reward = Annotated[
    str, typer.Argument(help="Name of a reward, pkg.mod.fn or file.py:fn; for example 'clip_score(frames=8)'.")
]
Port = Annotated[int, typer.Option("--port", help="Port on 127.0.0.1; 0 lets the system choose one.")]
MaxMb = Annotated[float, typer.Option("--max-mb", help="Largest request in MiB.")]

_MOST_MB = 2**20
"""One TiB, more memory than any machine has for one request."""


def serve_reward(
    reward: Reward, port: Port = 8765, max_mb: MaxMb = 256.0, device: Device = "auto", timeout: Timeout = None
) -> None:
    """Serve a reward to training runs on this machine. A recipe names the reward by its http:// address.

    The server listens on 127.0.0.1 only. To reach it from another machine, use a tunnel:
    ssh -L 8765:127.0.0.1:8765 HOST.
    """
    if not 0 < max_mb <= _MOST_MB:
        raise UserError(f"--max-mb must be above 0 and at most {_MOST_MB:,}, got {max_mb}")
    place = reward_device(device)

    from postgen.rewards.serve import RewardServer

    with RewardServer(reward, port=port, max_bytes=int(max_mb * 2**20), device=place, timeout=timeout) as server:
        server.runner.load()
        typer.echo(f"{server.reward.name} at {server.url} (stop with Ctrl-C)")
        with when_stopped(lambda: f"requests scored: {server.scored}"):
            server.serve_forever()
