"""The ClientApp, whose parts are imported when they are needed.

Flower starts a process for every message of a SuperNode, and a query needs no torch.
"""

import sys
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import ClientAppCallable

_FOLDER = str(Path(__file__).parents[1])


def _answered_by(function: str, folder: str = _FOLDER) -> ClientAppCallable:
    """Return a handler that answers by a ``package.module:function`` of the app's own folder.

    Flower's simulation sends the app to processes that would import the app from the working
    directory of whoever started the SuperLink, which may have another version of it. What is sent
    of a function in a function is what it does, and not where it is: it needs no import, and brings
    the folder along.
    """

    def answer(message: Message, context: Context) -> Message:
        if "client_app" not in sys.modules:
            sys.path.insert(0, folder)
        from client_app.answering import answer_by

        return answer_by(function, message, context)

    return answer


app = ClientApp()
app.query()(_answered_by("client_app.query:query"))
app.train()(_answered_by("client_app.messages:train_message"))
app.evaluate()(_answered_by("client_app.messages:evaluate_message"))
