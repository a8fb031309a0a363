"""Compute with models that another process has pickled: `python -m tests.families.unpickled FILE`.

The file has, by name, a model, the arguments of its forward, and its output. The exit code is 1 if an output differs.
"""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

import torch


def main() -> int:
    """Compare the outputs."""
    different = []
    for name, (model, arguments, wanted) in pickle.loads(Path(sys.argv[1]).read_bytes()).items():
        with torch.no_grad():
            found = model(**arguments, return_dict=False)[0]
        if not torch.equal(found, wanted):
            different.append(name)
    print(different)
    return int(bool(different))


if __name__ == "__main__":
    sys.exit(main())
