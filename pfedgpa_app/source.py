"""Which version of the code a process runs, told by its content."""

import hashlib
from functools import cache
from pathlib import Path


@cache
def source_hash(client_app: Path) -> str:
    """Return a hash of all that decides what a client does, the same wherever it is installed.

    That is what is written in the ``.py`` files of this package, and of the package ``client_app``
    in a folder.
    """
    digest = hashlib.sha256()
    for package in (client_app, Path(__file__).parent):
        files = {file.relative_to(package).as_posix(): file for file in package.rglob("*.py")}
        for name, file in sorted(files.items()):
            content = file.read_bytes().replace(b"\r\n", b"\n")
            digest.update(f"{package.name}/{name} {len(content)}\n".encode() + content)
    return digest.hexdigest()
