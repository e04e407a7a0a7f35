"""The version of the code that a process runs."""

import hashlib
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


@cache
def commit() -> str:
    """Return the git commit of this code, or its version where it is installed without git.

    ``-dirty`` follows if files differ from it.
    """
    here = Path(__file__)
    git = ["git", "-C", str(here.parent)]
    try:  # only of this file's own repository, not of one that its environment lies in
        subprocess.run(
            [*git, "ls-files", "--error-unmatch", here.name],
            check=True,
            capture_output=True,
        )
        described = subprocess.run(
            [*git, "describe", "--always", "--dirty", "--exclude=*", "--abbrev=12"],
            check=True,
            capture_output=True,
            encoding="utf-8",
        )
        return described.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        try:
            return version("pfedgpa")
        except PackageNotFoundError:
            return ""


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
