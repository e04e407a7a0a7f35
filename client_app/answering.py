"""Answering a message, with an error that says what went wrong and where if it cannot be."""

import importlib
import sysconfig
import traceback
from logging import ERROR
from pathlib import Path

from flwr.app import Context, Error, Message
from flwr.common import log
from flwr.common.constant import ErrorCode

_OWN = ("client_app", "pfedgpa_app")
# What a server takes of it is not much longer.
_MAX_MESSAGE = 200
_logged: set[str] = set()


def answer_by(function: str, message: Message, context: Context) -> Message:
    """Return what ``package.module:function`` replies, or an error with its `reason_of`.

    Flower would make an error of an exception too, which in a simulation begins with pages of Ray's
    own frames. Where it came from is logged here, at the node, once for a process.
    """
    module, _, name = function.partition(":")
    try:
        reply: Message = getattr(importlib.import_module(module), name)(message, context)
    except Exception as error:  # a user's own data set or model raises whatever it likes
        reason = reason_of(error)
        if reason not in _logged:
            _logged.add(reason)
            log(ERROR, "A message cannot be answered: %s", reason, exc_info=not _is_own(error))
        return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)
    return reply


def reason_of(error: Exception) -> str:
    """Say what went wrong in a line: ``KeyError: 'label' in load (scans.py, line 12)``.

    Errors of the app itself say what would be right, and no place. A place is a file's name without
    its folders, the last one that is no installed package's: folders are nothing for the server.
    """
    message = " ".join(str(error).split())
    if _is_own(error):
        return message
    message = message if len(message) <= _MAX_MESSAGE else f"{message[:_MAX_MESSAGE]}…"
    frames = traceback.extract_tb(error.__traceback__)
    place = next((frame for frame in reversed(frames) if _is_code(frame.filename)), frames[-1])
    what = f"{type(error).__name__}: {message}" if message else type(error).__name__
    return f"{what} in {place.name} ({Path(place.filename).name}, line {place.lineno})"


def _is_own(error: Exception) -> bool:
    return type(error).__module__.partition(".")[0] in _OWN


def _is_code(file: str) -> bool:
    """Tell whether a file is neither Python's own nor of an installed package."""
    installed = {
        sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")
    }
    return not file.startswith(("<", *(f"{folder}/" for folder in installed)))
