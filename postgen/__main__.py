"""`python -m postgen` is the same as the `postgen` command."""

from postgen.cli import main

if __name__ == "__main__":
    main()
