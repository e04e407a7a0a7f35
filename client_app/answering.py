"""Replies to messages; a failure becomes an error reply with its cause and place."""

from logging import ERROR
from pkgutil import resolve_name

from flwr.app import Context, Error, Message
from flwr.common import log
from flwr.common.constant import ErrorCode

from pfedgpa_app.errors import is_own, reason_of

# What each error class of the app concerns.
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
    """Return the reply of ``package.module:function``, or an error reply with its `reason_of`.

    A site with its own data (``data-path``) sends only `outline_of`, since errors may name files,
    and files may be named after patients. The traceback is logged here, at the node, once per
    process; Flower's own error replies are pages of Ray's frames in a simulation.
    """
    try:
        reply: Message = resolve_name(function)(message, context)
    except Exception as error:  # user code may raise anything
        reason = reason_of(error)
        if reason not in _logged:
            _logged.add(reason)
            is_foreign = not is_own(error) or error.__cause__ is not None
            log(ERROR, "A message cannot be answered: %s", reason, exc_info=is_foreign)
        sent = outline_of(error) if "data-path" in context.node_config else reason
        return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, sent), reply_to=message)
    return reply


def outline_of(error: Exception) -> str:
    """Return a message that depends only on the error's class."""
    about = _ABOUT.get(type(error).__name__, "its code") if is_own(error) else "its code"
    return f"there is a problem with {about}; the log of the node's SuperNode says which"
