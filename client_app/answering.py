"""Answering a message, with an error that says what went wrong and where if it cannot be."""

import importlib
from logging import ERROR

from flwr.app import Context, Error, Message
from flwr.common import log
from flwr.common.constant import ErrorCode

from pfedgpa_app.errors import described

_OWN = ("client_app", "pfedgpa_app")
# What an error of the app is about, by the name of its class.
_ABOUT = {
    "ArrayError": "its data",
    "DataError": "its data",
    "FileError": "its data",
    "ConfigError": "its settings",
    "NodeError": "its settings",
    "ModelError": "its model's code",
}
_logged: set[str] = set()


def answer_by(function: str, message: Message, context: Context) -> Message:
    """Return what ``package.module:function`` replies, or an error with its `reason_of`.

    A site with data of its own (``data-path``) says no more to the server than `outline_of`. What
    went wrong may name its files, and files may be named after patients.

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
        told = outline_of(error) if "data-path" in context.node_config else reason
        return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, told), reply_to=message)
    return reply


def reason_of(error: Exception) -> str:
    """Say what went wrong in a line; errors of the app itself say what would be right."""
    return " ".join(str(error).split()) if _is_own(error) else described(error)


def outline_of(error: Exception) -> str:
    """Say what an error is about, in words that depend on nothing but its class."""
    about = _ABOUT.get(type(error).__name__, "its code") if _is_own(error) else "its code"
    return f"there is a problem with {about}; the log of the node's SuperNode says which"


def _is_own(error: Exception) -> bool:
    return type(error).__module__.partition(".")[0] in _OWN
