"""ClientApps with falsified training."""

from collections.abc import Callable

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from client_app.app import app as honest

__all__ = ["honest", "training_by"]


def training_by(train: Callable[[Message, Context], Message]) -> ClientApp:
    """Return a ClientApp with another training handler, otherwise the app's own."""

    def answer(message: Message, context: Context) -> Message:
        return honest(message, context)

    app = ClientApp()
    app.train()(train)
    app.evaluate()(answer)
    app.query()(answer)
    return app
