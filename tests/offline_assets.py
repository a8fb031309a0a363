"""Optional media and weights for tests: what is not installed skips, what is misnamed or broken fails."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from postgen.assets import ASSETS, locate


def installed(name: str) -> Path:
    """Return the path of an asset, or skip the test where its package is not installed."""
    if find_spec(ASSETS[name].module) is None:
        pytest.skip(f"{name}: {ASSETS[name].package} is not installed (requirements-assets.txt)")
    return locate(name)
