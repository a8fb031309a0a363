"""Run Python code from an argument, in a fork of `tests.children`."""

import sys

exec(compile(sys.argv[1], "<script>", "exec"), {"__name__": "__main__"})
