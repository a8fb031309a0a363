"""Versions of packages, as sidecars, result files and model cards keep them. Light to import."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import postgen


def version_of(package: str) -> str | None:
    """Return the version of an installed package; None where it is not."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def versions(*packages: str) -> dict[str, str]:
    """Return the versions of postgen, of Python and of packages; `missing` for one that is not installed."""
    own = {"postgen": postgen.__version__, "python": platform.python_version()}
    return own | {name: version_of(name) or "missing" for name in packages}
