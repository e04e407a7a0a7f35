"""The ClientApp, whose parts are imported when they are needed.

Flower starts a process for every message of a SuperNode, and a query needs no torch.
"""

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import ClientAppCallable


def _answered_by(function: str) -> ClientAppCallable:
    """Return a handler that answers by a ``package.module:function``."""

    def answer(message: Message, context: Context) -> Message:
        from client_app.answering import answer_by

        return answer_by(function, message, context)

    return answer


app = ClientApp()
app.query()(_answered_by("client_app.query:query"))
app.train()(_answered_by("client_app.messages:train_message"))
app.evaluate()(_answered_by("client_app.messages:evaluate_message"))
