"""Answers on the disk while they are made: what a batch gave is there for good before the next one begins."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from eah.eval.files import line, replacing


class Journal:
    """One object a line, in the order in which they came; `records` holds them by id.

    Opening drops what is no whole record (a line that was torn) and all but the first with an id; they are made again.
    """

    def __init__(self, path: Path):
        self.path = path
        self.records: dict[int | str, dict] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        content = path.read_bytes() if path.exists() else b""
        kept = b"".join(text for text in content.splitlines(keepends=True) if self._keep(text))
        if kept != content:
            with replacing(path) as beside:
                beside.write_bytes(kept)

    def _keep(self, text: bytes) -> bool:
        try:
            record = json.loads(text.decode()) if text.endswith(b"\n") else None
        except ValueError:
            return False
        if not isinstance(record, dict) or not isinstance(record.get("answer"), str) or "id" not in record:
            return False
        if record["id"] in self.records:
            return False
        self.records[record["id"]] = record
        return True

    def append(self, records: list[dict]) -> None:
        """Returns when they are on the disk. After an error, no space left for instance, none of them is."""
        new = not self.path.exists()
        file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            length = os.fstat(file).st_size
            try:
                _write(file, "".join(map(line, records)).encode())
                os.fsync(file)
            except OSError as error:
                os.ftruncate(file, length)
                raise OSError(error.errno, error.strerror, str(self.path)) from error
        finally:
            os.close(file)
        if new:
            _sync_folder(self.path.parent)
        self.records |= {record["id"]: record for record in records}


def _write(file: int, content: bytes) -> None:
    while content:
        content = content[os.write(file, content) :]


def _sync_folder(folder: Path) -> None:
    file = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Holds the folder for this process, until the end of the `with` or of the process, however it ends.

    Raises:
        ValueError: another process holds it, or it is a file.
    """
    import fcntl

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as file:
        raise ValueError(f"--out must be a folder, and {folder} is a file or below one") from file
    with open(folder / ".lock", "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as held:
            raise ValueError(f"another process is writing to {folder}: wait for it, or name another --out") from held
        yield
