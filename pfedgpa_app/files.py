"""Text files and names of files: UTF-8, whatever the locale says, and what is never data."""

import errno
import json
import os
import stat
import tomllib
import unicodedata
from pathlib import Path
from typing import Any, BinaryIO

MAX_BYTES = 2**24
"""Of a file that is read whole and is no list of rows."""

# What systems and programs leave beside what people put into a folder, in lower case. Whatever
# begins with a dot is theirs too, such as .ipynb_checkpoints, .DS_Store and macOS' ._1.png.
_LEFT_BY_SYSTEMS = frozenset(
    (
        "__macosx",
        "icon\r",
        "network trash folder",
        "temporary items",
        "$recycle.bin",
        "recycler",
        "system volume information",
        "desktop.ini",
        "thumbs.db",
        "ehthumbs.db",
        "ehthumbs_vista.db",
        "@eadir",
        "@recycle",
        "@recently-snapshot",
        "@sharebin",
        "@tmp",
        "#recycle",
        "#snapshot",
        "~snapshot",
        "lost+found",
    )
)


def is_hidden(name: str) -> bool:
    """Tell whether a file or folder of this name is none that somebody brought as data."""
    return name.startswith(".") or name.casefold() in _LEFT_BY_SYSTEMS


def composed(name: str) -> str:
    """Return a name in Unicode's form NFC, so that names that look alike are alike.

    macOS hands names of files out in NFD, and most keyboards type NFC. Where the locale is not of
    UTF-8, Python has the bytes of a name as surrogates, which are read as the UTF-8 that they are.
    """
    read = name.encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape")
    return unicodedata.normalize("NFC", read)


def text_of(name: str) -> str:
    """Return a name or argument of the system's as text that any file can have.

    What is not UTF-8 in it is replaced.
    """
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def native_path(path: str) -> str:
    """Return a path from a text file as the system's calls take it in this locale."""
    return os.fsdecode(path.encode("utf-8", "surrogateescape"))


def quoted(name: str) -> str:
    """Return a name for a message, in quotes, what cannot be printed escaped."""
    return '"' + "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name) + '"'


def printable(text: str) -> str:
    """Return a text with what cannot be printed, such as what steers a terminal, escaped.

    The bytes of a name that is not UTF-8, which Python has as surrogates, stay.
    """
    return "".join(
        c if c.isprintable() or "\udc80" <= c <= "\udcff" else ascii(c)[1:-1] for c in text
    )


def printable_lines(text: str) -> str:
    """Return a text of several lines, each of them `printable`."""
    return "\n".join(map(printable, text.split("\n")))


def open_regular(file: Path) -> BinaryIO:
    """Open a file to read from it, unless it is a pipe or device, which might never end.

    Raises
    ------
    OSError
        If it is none, or cannot be read.
    """
    # A pipe without a writer would hold the call up.
    descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "is no regular file", str(file))
    return open(descriptor, "rb")


def read_bytes(file: Path, most: int) -> bytes:
    """Read a regular file of at most so many bytes.

    Raises
    ------
    OSError
        If it is none, has more, or cannot be read.
    """
    with open_regular(file) as stream:
        content = stream.read(most + 1)
    if len(content) > most:
        raise OSError(errno.EFBIG, f"has more than {most} bytes", str(file))
    return content


def read_text(file: Path) -> str:
    """Read a regular file of UTF-8, with a byte order mark at its beginning or without.

    Raises
    ------
    OSError
        If it cannot be read, or has more than `MAX_BYTES`.
    UnicodeDecodeError
        If it is not UTF-8.
    """
    return read_bytes(file, MAX_BYTES).decode("utf-8-sig")


def read_json(file: Path) -> Any:
    """Read a regular file of JSON, whoever wrote it.

    Raises
    ------
    OSError
        If it cannot be read, or has more than `MAX_BYTES`.
    ValueError
        If it is not JSON, or nested too deeply.
    """
    return parse_json(read_text(file))


def parse_json(text: str | bytes) -> Any:
    """Parse JSON, whoever wrote it.

    Raises
    ------
    ValueError
        If it is none, or nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("is nested too deeply") from error


def read_toml(file: Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises
    ------
    OSError
        If it cannot be read.
    UnicodeDecodeError, tomllib.TOMLDecodeError
        If it is none, or nested too deeply.
    """
    # Who names the file may name a pipe.
    text = file.read_text(encoding="utf-8-sig")
    try:
        return tomllib.loads(text)
    except RecursionError as error:
        raise tomllib.TOMLDecodeError("nested too deeply") from error


def below_home(path: str) -> Path:
    """Return a path in full, relative ones seen from the user's home.

    The working directory of a Flower app is that of whoever started the SuperLink, so nothing may
    depend on it.
    """
    return Path.home() / os.path.expanduser(native_path(path))


def xdg_folder(variable: str, fallback: str) -> Path:
    """Return ``pfedgpa`` below an XDG base directory, ``fallback`` where the variable has none.

    The XDG specification has relative values ignored.
    """
    base = Path(os.environ.get(variable, ""))
    return (base if base.is_absolute() else Path.home() / fallback) / "pfedgpa"
