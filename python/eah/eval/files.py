"""Files that others wrote, read with one clear error each, and our own, written whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path


def read_text(path: str | Path) -> str:
    """A text file's content in UTF-8, with or without a byte order mark; line ends become "\\n"."""
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError as missing:
        raise ValueError(f"there is no file {path}") from missing
    except IsADirectoryError as folder:
        raise ValueError(f"{path} is a folder, a file is wanted") from folder
    try:
        return content.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: byte {error.start}") from error


def read_json(path: str | Path):
    return parse_json(read_text(path), f"{path} is no JSON")


def parse_json(text: str, otherwise: str):
    """Raises ValueError, `otherwise` and why, for what is no JSON, is nested too deeply or has too long a number."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{otherwise}: {error}") from error


def read_records(path: str | Path) -> list[dict]:
    """The objects of a JSON list, or of a file with one a line, in order; at least one.

    Raises:
        ValueError: anything else, a torn line included; the message has the line.
    """
    text = read_text(path)
    if text.lstrip().startswith("["):
        records = read_json(path)
        if any(not isinstance(record, dict) for record in records):
            raise ValueError(f"{path} must be a list of objects")
    else:
        records = [_record(path, number, line) for number, line in _lines(text)]
    if not records:
        raise ValueError(f"{path} is empty")
    return records


def _lines(text: str) -> Iterator[tuple[int, str]]:
    # At "\n" alone: a string in JSON may hold the other line ends that str.splitlines knows.
    return ((number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip())


def _record(path, number: int, line: str) -> dict:
    record = parse_json(line, f"{path}, line {number} is no JSON, or torn")
    if not isinstance(record, dict):
        raise ValueError(f"{path}, line {number} must be an object, got {line.strip()[:40]!r}")
    return record


def objects(content, name: str, path: str | Path) -> list[dict]:
    """The objects that an object's `name` lists."""
    found = content.get(name) if isinstance(content, dict) else None
    if not isinstance(found, list) or any(not isinstance(record, dict) for record in found):
        raise ValueError(f"{path} must be an object with a list of objects {name!r}")
    return found


def field(record: dict, name: str, path, number: int, kinds: type | tuple[type, ...] = str):
    """A record's value of a kind; a bool is no int. number: the record's, from 1."""
    value = record.get(name)
    if not isinstance(value, kinds) or isinstance(value, bool):
        wanted = " or ".join(kind.__name__ for kind in (kinds if isinstance(kinds, tuple) else (kinds,)))
        raise ValueError(f"{path}, record {number}: {name!r} must be {wanted}, got {value!r}")
    return value


def by_key(pairs, path, what: str) -> dict:
    """A dict of pairs whose keys have to be distinct."""
    found = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{path} has {what} {key!r} twice")
        found[key] = value
    return found


def sha256(path: str | Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to; it becomes `path` when all is on the disk, and after an error `path` is what it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.stem}.part{path.suffix}")
    try:
        yield beside
        with open(beside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException as error:
        beside.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error  # a write's own names no file
        raise


def write_text(path: Path, text: str) -> None:
    with replacing(path) as beside:
        # A file's name that is no UTF-8 has half characters; escaped, JSON reads them back as they were.
        beside.write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")


def write_json(path: Path, value) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_records(path: Path, records) -> None:
    write_text(path, "".join(line(record) for record in records))


def line(record: dict) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"
