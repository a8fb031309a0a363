"""`postgen info`."""

import json as json_module
from typing import Annotated

import typer


def info(json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False) -> None:
    """Show versions and devices, and test which optional parts work on this machine."""
    from postgen.info import Finding, attention_backends, devices, optional_parts, versions

    packages, places, parts, attention = versions(), devices(), optional_parts(), attention_backends()
    if json:
        findings = {"versions": packages, "devices": places, "optional": parts, "attention": attention}
        rows = {key: _plain(value) for key, value in findings.items()}
        typer.echo(json_module.dumps(rows, indent=2))
        return
    for name, found in packages.items():
        typer.echo(f"{name:<24}{found}")

    def show(title: str, findings: list[Finding]) -> None:
        typer.echo(f"\n{title}")
        for name, usable, detail in findings:
            typer.echo(f"{name:<24}{'yes' if usable else 'no ':<5}{detail}")

    show("Devices", places)
    show("Optional parts", parts)
    show("Attention backends", attention)


def _plain(value: object) -> object:
    if isinstance(value, list):
        return {name: {"usable": usable, "detail": detail} for name, usable, detail in value}
    return value
