"""Text files and names of files: UTF-8, whatever the locale says, and what is never data."""

import os
import tomllib
import unicodedata
from pathlib import Path
from typing import Any

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


def read_text(file: Path) -> str:
    """Read a text file of UTF-8, with a byte order mark at its beginning or without.

    Raises
    ------
    OSError
        If it cannot be read.
    UnicodeDecodeError
        If it is not UTF-8.
    """
    return file.read_text(encoding="utf-8-sig")


def read_toml(file: Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises
    ------
    OSError
        If it cannot be read.
    UnicodeDecodeError, tomllib.TOMLDecodeError
        If it is none.
    """
    return tomllib.loads(read_text(file))
