"""The embedded model, and a table of optional offline files that tests and demos use.

The functions locate files of optional packages without importing the packages: some packages import unwanted
dependencies or fail with current versions of libraries.
"""

import hashlib
import json
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from postgen.errors import UserError

TINY_WAN = "tiny-wan"
WORLD_WEAVER = "world-weaver"
TINY_WAN_LIT = "tiny-wan-lit"

EMBEDDED = "embedded"
"""Name of the embedded model in recipes and exports."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Asset:
    """One file of an optional package."""

    package: str
    """Name of the package for pip."""
    version: str
    """The version that was checked."""
    module: str
    """Name of the top-level module (folder) that the package installs."""
    file: str
    """Path of the file inside that folder."""
    sha256: str
    """First 12 hexadecimal digits of the SHA-256 of the file."""
    licence: str
    """Licence of the file, which may differ from the licence of the package."""
    note: str
    """Description of the file and its permitted use."""


def _table() -> dict[str, Asset]:
    rows = json.loads(Path(__file__).with_name("table.json").read_text(encoding="utf-8"))
    return {row.pop("name"): Asset(**row) for row in rows}


ASSETS = _table()
"""Assets by name; `locate`, `verify` and `explain` accept these names."""


def embedded_model() -> Path:
    """Return the folder of the embedded text-to-video model, a plain diffusers `WanPipeline` folder.

    Raises:
        UserError: the folder does not exist.
    """
    folder = Path(__file__).resolve().parent / TINY_WAN
    if not (folder / "model_index.json").is_file():
        raise UserError(
            f"the embedded model is missing from {folder}: reinstall postgen, or train it with the recipes in recipes/"
        )
    return folder


def model_folder(named: str) -> Path:
    """Return the folder of a model that a recipe names.

    `embedded` is the embedded model, even if there is a folder with this name; any other name is a path.

    Raises:
        UserError: `embedded` is given and the embedded model does not exist.
    """
    return embedded_model() if named == EMBEDDED else Path(named)


def embedded_adapter() -> Path | None:
    """Return the folder of the embedded model's adapter for long videos; None if this version has none."""
    folder = Path(__file__).resolve().parent / WORLD_WEAVER
    return folder if folder.is_dir() else None


def embedded_lit() -> Path:
    """Return the file of the embedded model's adapter for hybrid linear attention, for `--lit embedded`.

    Raises:
        UserError: this version has no such adapter.
    """
    file = Path(__file__).resolve().parent / TINY_WAN_LIT / "adapter.safetensors"
    if not file.is_file():
        raise UserError(
            f"this version ships no linear-attention adapter for the embedded model (there is no {file}): train one"
            " with the recipe lit-tiny-wan and give the path of its file, OUT/export/adapter.safetensors"
        )
    return file


def locate(name: str) -> Path:
    """Return the path of an installed asset, without importing its package.

    Raises:
        UserError: the name is unknown, or the package is not installed (the message contains the pip command).
    """
    asset = _asset(name)
    # For a top-level name, find_spec executes no code of the package.
    spec = find_spec(asset.module)
    for root in (spec.submodule_search_locations or []) if spec else []:
        path = Path(root) / asset.file
        if path.is_file():
            return path
    raise UserError(f"{name} needs the package {asset.package}: {_install(asset)}")


def verify(name: str) -> Path:
    """Return the path of an asset after checking its bytes against the table.

    Raises:
        UserError: as `locate`, or the SHA-256 of the file differs from the table.
    """
    asset, path = _asset(name), locate(name)
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()[: len(asset.sha256)]
    if found != asset.sha256:
        raise UserError(
            f"{path} is not the expected file of {name}: its SHA-256 starts with {found}, expected {asset.sha256}; "
            f"reinstall it: {_install(asset)}"
        )
    return path


def explain(name: str) -> str:
    """Return a few lines with the description, the licence and the install command of an asset.

    Raises:
        UserError: the name is unknown.
    """
    asset = _asset(name)
    return (
        f"{name}: {asset.note}\n"
        f"file: {asset.file} of {asset.package} {asset.version}, sha256 {asset.sha256}...\n"
        f"licence: {asset.licence}\n"
        f"install: {_install(asset)}"
    )


def _asset(name: str) -> Asset:
    if name not in ASSETS:
        raise UserError(f"unknown asset {name!r}: known are {', '.join(sorted(ASSETS))}")
    return ASSETS[name]


def _install(asset: Asset) -> str:
    return f"pip install --no-deps {asset.package}=={asset.version}"
