"""Optional media and weights for tests. A missing package skips the test; a wrong name or a broken file fails it."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from postgen.assets import ASSETS, locate


def installed(name: str) -> Path:
    """Return the path of an asset, or skip the test if its package is not installed."""
    if find_spec(ASSETS[name].module) is None:
        pytest.skip(f"{name}: {ASSETS[name].package} is not installed (requirements-assets.txt)")
    return locate(name)
