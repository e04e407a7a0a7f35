"""Errors of code that nobody here wrote, in a line."""

import sysconfig
import traceback
from pathlib import Path

INSTALLED = tuple(map(sysconfig.get_path, ("stdlib", "platstdlib", "purelib", "platlib")))
"""The folders of Python and of installed packages."""
# An error may say what it failed on, such as all the numbers of a tensor.
_MAX_LENGTH = 200
_OWN = ("client_app", "pfedgpa_app", "server_app")


def reason_of(error: Exception) -> str:
    """Return a one-line error message; only foreign errors get class and location."""
    return " ".join(str(error).split()) if is_own(error) else described(error)


def is_own(error: Exception) -> bool:
    """Return whether an error's class is one of this app, whose messages need no place."""
    return type(error).__module__.partition(".")[0] in _OWN


def described(error: BaseException) -> str:
    """Say what was raised in a line, and where: ``KeyError: 'label' in load (scans.py, line 12)``.

    That is the innermost one of neither Python nor an installed package, if there is any: it is
    the one that its author can mend. The file is named without its folders, since what clients say
    of their errors is sent to the server.
    """
    text = " ".join(str(error).split())
    short = text if len(text) <= _MAX_LENGTH else f"{text[:_MAX_LENGTH]}…"
    what = f"{type(error).__name__}: {short}" if short else type(error).__name__
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return what
    installed = tuple(f"{folder}/" for folder in INSTALLED)
    own = [frame for frame in frames if not frame.filename.startswith((*installed, "<"))]
    frame = (own or frames)[-1]
    return f"{what} in {frame.name} ({Path(frame.filename).name}, line {frame.lineno})"
