"""Answering a message, with an error that says what went wrong and where if it cannot be."""

import importlib
from logging import ERROR

from flwr.app import Context, Error, Message
from flwr.common import log
from flwr.common.constant import ErrorCode

from pfedgpa_app.errors import described

_OWN = ("client_app", "pfedgpa_app")
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
            is_foreign = not _is_own(error) or error.__cause__ is not None
            log(ERROR, "A message cannot be answered: %s", reason, exc_info=is_foreign)
        return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)
    return reply


def reason_of(error: Exception) -> str:
    """Say what went wrong in a line; errors of the app itself say what would be right."""
    return " ".join(str(error).split()) if _is_own(error) else described(error)


def _is_own(error: Exception) -> bool:
    return type(error).__module__.partition(".")[0] in _OWN
