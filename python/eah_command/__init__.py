"""The `eah` command's first step, outside the package `eah`: importing that loads torch, which takes seconds."""

import sys


def main() -> int:
    """Runs `eah.cli.main`; Ctrl-C while it is still loading ends in one line, too."""
    try:
        from eah import cli
    except KeyboardInterrupt:
        print("eah: interrupted", file=sys.stderr)
        return 130
    return cli.main()
