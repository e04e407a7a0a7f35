"""The version of the code that a process runs."""

import hashlib
import os
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def version_of(package: str = "pfedgpa") -> str:
    """Return the version of an installed package; "" if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


@cache
def commit() -> str:
    """Return the git commit of this code, or its version where it is installed without git.

    ``-dirty`` follows if files differ from it.
    """
    here = Path(__file__).resolve()
    # Only of this project, not of a repository that its environment lies in.
    env = {**os.environ, "GIT_CEILING_DIRECTORIES": str(here.parents[2])}
    git = ["git", "describe", "--always", "--dirty", "--exclude=*", "--abbrev=12"]
    try:
        described = subprocess.run(
            git, cwd=here.parent, env=env, check=True, capture_output=True, encoding="utf-8"
        )
    except (OSError, subprocess.CalledProcessError):
        return version_of()
    return described.stdout.strip()


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
