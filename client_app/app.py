"""The ClientApp; its handlers are imported on first use.

A SuperNode starts a process for every message, and a query needs no torch.
"""

import sys
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import ClientAppCallable

_FOLDER = str(Path(__file__).parents[1])


def _handler(function: str, folder: str = _FOLDER) -> ClientAppCallable:
    """Return a handler that calls ``package.module:function`` of this app's folder.

    Flower's simulation pickles the app for its workers, which would import it from the SuperLink's
    working directory, possibly in another version. A nested function is pickled by value, so that
    it needs no import and carries the folder along.
    """

    def answer(message: Message, context: Context) -> Message:
        if "client_app" not in sys.modules:
            sys.path.insert(0, folder)
        from client_app.answering import answer_by

        return answer_by(function, message, context)

    return answer


app = ClientApp()
app.query()(_handler("client_app.node:query"))
app.train()(_handler("client_app.messages:train_message"))
app.evaluate()(_handler("client_app.messages:evaluate_message"))
