"""`postgen demo`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from postgen.commands.errors import when_stopped
from postgen.commands.options import FILES, MODEL, Device, Dtype, Offload
from postgen.errors import UserError, check_number
from postgen.interrupts import held

SERVER, LIMITS = "Server", "Limits"
"""Panels of `--help`."""

Models = Annotated[
    list[str] | None,
    typer.Option(
        "--model",
        help="Local diffusers folder or Hub id of a model to offer; can be repeated. The page always offers the"
        " embedded model.",
        rich_help_panel=MODEL,
    ),
]
AnyModel = Annotated[
    bool,
    typer.Option(
        "--any-model",
        help="Let users of the page enter any folder or Hub id. Everyone who can open the page can then load every"
        " model folder that this user can read, and download models.",
        rich_help_panel=MODEL,
    ),
]
Loras = Annotated[
    list[str] | None,
    typer.Option("--lora", help="LoRA file or folder to offer; can be repeated.", rich_help_panel=MODEL),
]
Outputs = Annotated[
    Path | None,
    typer.Option(
        "--outputs", help="Folder for the generated files. \\[default: postgen-videos]", rich_help_panel=FILES
    ),
]
Runs = Annotated[
    Path | None,
    typer.Option(
        "--runs",
        help="Folder of training runs, to show their progress and to offer their LoRAs.",
        rich_help_panel=FILES,
    ),
]
Port = Annotated[
    int | None,
    typer.Option("--port", help="Port; 0 lets the system choose one. \\[default: 7860]", rich_help_panel=SERVER),
]
Host = Annotated[
    str | None,
    typer.Option(
        "--host",
        help="Address to listen on; an address that other machines can reach needs --auth. \\[default: 127.0.0.1]",
        rich_help_panel=SERVER,
    ),
]
AllowHosts = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-host",
        metavar="NAME",
        help="Another host name of the app, such as the name of a reverse proxy; can be repeated. * allows all"
        " names, so that web pages of others can reach the app through a browser on this machine.",
        rich_help_panel=SERVER,
    ),
]
Auth = Annotated[
    str | None,
    typer.Option(
        "--auth",
        metavar="USER:PASSWORD|FILE",
        help="Allowed users: USER:PASSWORD, or a file with one pair per line. Other users of this machine can see"
        " options in the list of processes; a file avoids this.",
        rich_help_panel=SERVER,
    ),
]
Theme = Annotated[
    str | None, typer.Option("--theme", help="system, light or dark. \\[default: system]", rich_help_panel=SERVER)
]
UploadMb = Annotated[
    float | None, typer.Option("--upload-mb", help="Largest upload in MiB. \\[default: 64]", rich_help_panel=LIMITS)
]
UploadSeconds = Annotated[
    float | None,
    typer.Option(
        "--upload-seconds", help="Longest uploaded video in seconds. \\[default: 60]", rich_help_panel=LIMITS
    ),
]
LongSeconds = Annotated[
    float | None,
    typer.Option("--long-seconds", help="Longest long video in seconds. \\[default: 120]", rich_help_panel=LIMITS),
]
Waiting = Annotated[
    int | None,
    typer.Option("--waiting", help="Largest number of waiting jobs. \\[default: 50]", rich_help_panel=LIMITS),
]


def demo(
    model: Models = None,
    any_model: AnyModel = False,
    lora: Loras = None,
    outputs: Outputs = None,
    runs: Runs = None,
    port: Port = None,
    host: Host = None,
    allow_host: AllowHosts = None,
    auth: Auth = None,
    theme: Theme = None,
    upload_mb: UploadMb = None,
    upload_seconds: UploadSeconds = None,
    long_seconds: LongSeconds = None,
    waiting: Waiting = None,
    dtype: Dtype = None,
    device: Device = None,
    offload: Offload = None,
) -> None:
    """Serve the app, a web page that generates videos. By default only this machine can reach it."""
    from postgen.apps.demo import launch
    from postgen.apps.settings import AppSettings, read_auth

    if long_seconds is not None and offload not in (None, "none"):
        raise UserError("--long-seconds cannot be used with --offload: the app then makes no long videos, omit one")
    names = model or []
    given: dict[str, Any] = {
        **{"model": names[0] if names else None, "outputs": outputs, "runs": runs, "port": port, "host": host},
        **{"theme": theme, "upload_seconds": upload_seconds, "long_seconds": long_seconds, "waiting": waiting},
        **{"dtype": dtype, "device": device, "offload": offload},
        "auth": None if auth is None else read_auth(auth),
        "upload_bytes": None if upload_mb is None else _bytes(upload_mb),
    }
    said = {name: value for name, value in given.items() if value is not None}
    settings = AppSettings(
        models=tuple(names[1:]),
        any_model=any_model,
        loras=tuple(lora or ()),
        allow_hosts=tuple(allow_host or ()),
        **said,
    )
    served = launch(settings)
    typer.echo(f"App at {served.url} (stop with Ctrl-C), videos in {served.app.history.folder}")
    try:
        with when_stopped(lambda: "the app is closed; its files are kept"):
            served.wait()
    finally:
        with held():  # a second Ctrl-C waits until all files are written
            served.close()


def _bytes(mebibytes: float) -> int:
    check_number("--upload-mb", mebibytes, 0.001, 2**16)
    return int(mebibytes * 2**20)
