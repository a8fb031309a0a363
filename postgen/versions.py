"""Versions of packages, for sidecars, result files and model cards. Light to import."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import postgen


def version_of(package: str) -> str | None:
    """Return the version of a package; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def versions(*packages: str) -> dict[str, str]:
    """Return the versions of postgen, Python and the given packages; `missing` if a package is not installed."""
    own = {"postgen": postgen.__version__, "python": platform.python_version()}
    return own | {name: version_of(name) or "missing" for name in packages}
