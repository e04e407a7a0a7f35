"""Text for people, text files and names in UTF-8 under any locale, and hidden files."""

import errno
import json
import os
import stat
import tomllib
import unicodedata
from pathlib import Path
from typing import Any, BinaryIO

MAX_BYTES = 2**24
"""Limit of a file that is read as a whole."""

# Files that systems and programs create in folders, in lower case. Names with a leading dot are
# hidden too, such as .ipynb_checkpoints, .DS_Store and macOS' ._1.png.
_LEFT_BY_SYSTEMS = (
    *("__macosx", "icon\r", "network trash folder", "temporary items"),  # macOS
    *("$recycle.bin", "recycler", "system volume information"),  # Windows
    *("desktop.ini", "thumbs.db", "ehthumbs.db", "ehthumbs_vista.db"),
    *("@eadir", "@recycle", "@recently-snapshot", "@sharebin", "@tmp"),  # network storage
    *("#recycle", "#snapshot", "~snapshot", "lost+found"),
)


def is_hidden(name: str) -> bool:
    """Return whether a file or folder of this name is created by a system, and no data."""
    return name.startswith(".") or name.casefold() in _LEFT_BY_SYSTEMS


def composed(name: str) -> str:
    """Return a name in Unicode's form NFC, so that equal names compare equal.

    macOS has NFD in file names, and keyboards type NFC. Under other locales than UTF-8, Python has
    surrogates for the bytes of a name, which are decoded as UTF-8.
    """
    read = name.encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape")
    return unicodedata.normalize("NFC", read)


def text_of(name: str) -> str:
    """Return a file name or argument as valid text, with bytes that are not UTF-8 replaced."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def native_path(path: str) -> str:
    """Return a path from a text file in the file system encoding of this locale."""
    return os.fsdecode(path.encode("utf-8", "surrogateescape"))


def count_of(number: float, noun: str) -> str:
    """Write a number of things, as ``1 client`` or ``2 clients``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def quoted(name: str) -> str:
    """Return a name in quotes, with unprintable characters escaped."""
    return '"' + "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name) + '"'


def printable(text: str) -> str:
    """Return a text with unprintable characters, such as terminal control codes, escaped.

    Surrogates, which stand for bytes that are not UTF-8, stay.
    """
    return "".join(c if "\udc80" <= c <= "\udcff" else quoted(c)[1:-1] for c in text)


def printable_lines(text: str) -> str:
    """Return a text with each line `printable`."""
    return "\n".join(map(printable, text.split("\n")))


def open_regular(file: Path) -> BinaryIO:
    """Open a regular file for reading; pipes and devices might never end.

    Raises `OSError` if it is not a regular file, or cannot be read.
    """
    # Non-blocking, since opening a pipe without a writer would block.
    descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "is no regular file; right would be one", str(file))
    return open(descriptor, "rb")


def read_bytes(file: Path, most: int, begin: int = 0) -> bytes:
    """Return a regular file from a byte on; `OSError` if it is none, or has more than ``most``."""
    with open_regular(file) as stream:
        stream.seek(begin)
        content = stream.read(most + 1)
    if len(content) > most:
        raise OSError(errno.EFBIG, f"has more than {most} bytes", str(file))
    return content


def read_text(file: Path) -> str:
    """Read a regular file of UTF-8, with or without a byte order mark.

    Raises `OSError` as `read_bytes` for `MAX_BYTES`, and `UnicodeDecodeError`.
    """
    return read_bytes(file, MAX_BYTES).decode("utf-8-sig")


def read_json(file: Path) -> Any:
    """Read a regular file of untrusted JSON, with the errors of `read_text` and `parse_json`."""
    return parse_json(read_text(file))


def parse_json(text: str | bytes) -> Any:
    """Parse untrusted JSON; raises `ValueError` if it is none, or nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("is nested too deeply") from error


def read_toml(file: Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises `OSError`, `UnicodeDecodeError`, or `tomllib.TOMLDecodeError`, also if it is nested too
    deeply.
    """
    # Pipes are allowed, as from process substitution in a shell.
    text = file.read_text(encoding="utf-8-sig")
    try:
        return tomllib.loads(text)
    except RecursionError as error:
        raise tomllib.TOMLDecodeError("nested too deeply") from error


def obstacle_to(file: Path) -> str:
    """Return why a file cannot be written, and what would be right; "" if nothing prevents it."""
    if file.is_dir():
        return "is a folder; right would be a file in it, such as model.safetensors"
    if not file.parent.is_dir():
        return "is in a folder that does not exist; right would be a file in one that does"
    if not os.access(file.parent, os.W_OK | os.X_OK):
        return "is in a read-only folder; right would be one that its user may write to"
    return ""


def home_path(path: str) -> Path:
    """Return an absolute path; relative ones are below the user's home.

    The working directory of a Flower app is that in which the SuperLink was started.
    """
    return Path.home() / os.path.expanduser(native_path(path))


def xdg_folder(variable: str, fallback: str) -> Path:
    """Return the folder ``pfedgpa`` of an XDG base directory; ``~/fallback`` by default.

    Relative values are ignored, by the XDG specification.
    """
    base = Path(os.environ.get(variable, ""))
    return (base if base.is_absolute() else Path.home() / fallback) / "pfedgpa"
