"""What the commands say on stderr."""

from __future__ import annotations

import sys


def one_line(error: BaseException, limit: int = 500) -> str:
    """An error's message without line breaks, cut where it runs on for pages."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else f"{text[:limit]} [...]"


def progress(message: str) -> None:
    """What is being done, on a terminal's stderr."""
    if sys.stderr.isatty():
        print(f"... {message}", file=sys.stderr, flush=True)
