"""`python -m dplaunch` is the `dplaunch` command."""

from dplaunch.cli import entry

if __name__ == "__main__":
    entry()
