"""Whole runs of the app in this process or a pool of them, without network.

A run gives the digits of `flwr run` with the same settings, and starts in a second instead of
twenty. The ClientApp is loaded by the name that pyproject.toml has of it, as Flower loads it.
"""

import logging
import multiprocessing
import os
import secrets
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, ClassVar

from flwr.app import ArrayRecord, Context, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.logger import FLOWER_LOGGER
from flwr.proto.node_pb2 import NodeInfo
from flwr.supercore.task_identity import TaskIdentity

from pfedgpa_app.config import Config
from pfedgpa_app.data import client_data
from pfedgpa_app.model_spec import ModelSpec
from pfedgpa_app.preflight import preflight
from pfedgpa_app.rounds import RoundRecord, Row, summarize
from server_app.app import main, make_strategy
from server_app.roster import PartitionRoster, Roster
from server_app.strategies import ClientwiseFedAvg

CLIENT_APP: ClientApp = resolve_name("client_app.app:app")
# It imports all that clients need, before processes fork.
train_messages: Callable[[Sequence[Message], Sequence[Context]], list[Message]] = resolve_name(
    "client_app.batched:train_messages"
)


class ClientError(RuntimeError):
    """A client cannot answer; without a network, its settings or data must be wrong."""


class PoolGrid:
    """Flower's Grid, whose nodes 0 .. num_clients - 1 are served by a pool of processes.

    Without processes they are served by this one, where a debugger sees them, and so they are with
    ``client.engine = "vmap"``, which trains all of them at once.

    Attributes
    ----------
    absent
        The nodes that are not connected now.
    client_app
        The ClientApp of all nodes.
    states
        The clients' Flower state.
    """

    client_app: ClassVar[ClientApp] = CLIENT_APP

    def __init__(self, config: Config, num_clients: int, num_processes: int) -> None:
        self.run_config = config.to_flat()
        self.num_clients = num_clients
        self.absent: Collection[int] = ()
        self.states = {node: RecordDict() for node in range(num_clients)}
        self._num_sent = 0
        self._replies: dict[str, Message] = {}
        _identify()
        if config.data.dataset != "sites":  # once, before the processes fork
            client_data(config.data, config.seed, 0, num_clients)
        self._is_batched = config.client.engine == "vmap"
        if self._is_batched and self.client_app is not CLIENT_APP:
            raise ValueError(
                'client.engine = "vmap": any other ClientApp than that of this app trains one '
                'client after the other; right would be "loop"'
            )
        self._pool = None
        if num_processes and not self._is_batched:
            # Forked: a ClientApp needs no name by which processes could import it.
            context = multiprocessing.get_context("fork")
            # A process that has just been forked loses signals that Python handles, and `close`
            # would wait for it forever.
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
            try:
                self._pool = context.Pool(num_processes, _begin_worker, (self.client_app,))
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def get_node_ids(self) -> Iterable[int]:
        """Return the ids of the connected nodes, which are the numbers of their partitions."""
        return [node for node in range(self.num_clients) if node not in self.absent]

    def get_nodes(self) -> Iterable[NodeInfo]:
        """Return the connected nodes, which have no names."""
        return [NodeInfo(node_id=node) for node in self.get_node_ids()]

    def node_config(self, node: int) -> dict[str, Any]:
        """Return the node config of a SuperNode."""
        return {"partition-id": node, "num-partitions": self.num_clients}

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Let the nodes answer messages, which are all of one type."""
        messages, contexts = list(messages), []
        for message in messages:
            self._num_sent += 1
            message.metadata.__dict__["_message_id"] = str(self._num_sent)
            node = message.metadata.dst_node_id
            given = (self.node_config(node), self.states[node], self.run_config)
            contexts.append(Context(1, node, *given))
        is_training = any(each.metadata.message_type == MessageType.TRAIN for each in messages)
        if self._is_batched and is_training:
            answers = list(zip(train_messages(messages, contexts), contexts, strict=True))
        else:
            tasks = list(zip(messages, contexts, strict=True))
            if self._pool:
                answers = self._pool.starmap(_answer_in_worker, tasks, chunksize=1)
            else:
                answers = [_answer(self.client_app, *task) for task in tasks]
        self.states |= {context.node_id: context.state for _, context in answers}
        return [reply for reply, _ in answers]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Let the nodes answer messages, and keep the replies until they are pulled."""
        messages = list(messages)
        for reply in self.send_and_receive(messages):
            self._replies[reply.metadata.reply_to_message_id] = reply
        return [message.metadata.message_id for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Return the replies to messages, each once."""
        return [self._replies.pop(each) for each in message_ids if each in self._replies]

    def close(self) -> None:
        """End the processes."""
        if self._pool:
            self._pool.terminate()
            self._pool.join()


def simulate(
    config: Config,
    num_clients: int,
    *,
    num_rounds: int | None = None,
    evaluated_rounds: int | None = None,
    num_processes: int = 2,
    on_round: Callable[[RoundRecord], None] = lambda record: None,
    absent: Callable[[int], Collection[int]] = lambda server_round: (),
    make_strategy: Callable[[Config, ModelSpec], ClientwiseFedAvg] = make_strategy,
    make_grid: Callable[[Config, int, int], PoolGrid] = PoolGrid,
) -> tuple[ClientwiseFedAvg, list[Row]]:
    """Run the configured strategy and return it with a row a round.

    ``num_rounds`` ends the run earlier; ``evaluated_rounds`` evaluates personalized models in so
    many last rounds only; ``on_round`` is called after each round; ``absent`` returns the nodes
    that are not connected in a round. ``make_strategy`` and ``make_grid`` replace the configured
    strategy and `PoolGrid`.
    """
    num_rounds = num_rounds or config.num_server_rounds
    strategy = make_strategy(config, preflight(config, one_process=True))
    # A query for the partition begins a client's privacy ledger.
    strategy.roster = PartitionRoster() if config.privacy.is_on else Roster()
    fraction_evaluate = strategy.fraction_evaluate
    rows: list[Row] = []
    begins = [time.monotonic()]

    def end_round(server_round: int, arrays: ArrayRecord) -> None:
        is_evaluated = server_round >= num_rounds - (evaluated_rounds or num_rounds)
        strategy.fraction_evaluate = fraction_evaluate if is_evaluated else 0.0
        grid.absent = absent(server_round + 1)
        if server_round:
            begins.append(time.monotonic())
            seconds = begins[-1] - begins[-2]
            rows.append(summarize(strategy.record, config.strategy, seconds))
            on_round(strategy.record)

    grid: Any = make_grid(config, num_clients, num_processes)
    level = FLOWER_LOGGER.level
    FLOWER_LOGGER.setLevel(logging.WARNING)
    try:
        strategy.start(
            grid,
            initial_arrays=ArrayRecord(strategy.average),
            num_rounds=num_rounds,
            evaluate_fn=end_round,
        )
    finally:
        FLOWER_LOGGER.setLevel(level)
        grid.close()
    return strategy, rows


def run_app(config: Config, num_clients: int, num_processes: int) -> Path:
    """Do a run of the ServerApp, as `flwr run` does, and return its folder."""
    run_id = secrets.randbits(63)  # as long as those of Flower, and no other's
    grid: Any = PoolGrid(config, num_clients, num_processes)
    try:
        main(grid, Context(run_id, 1, {}, RecordDict(), config.to_flat()))
    finally:
        grid.close()
    return config.output_path / str(run_id)


def _identify() -> None:
    """Set what Flower's processes set before an app starts."""
    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1


def _answer(app: ClientApp, message: Message, context: Context) -> tuple[Message, Context]:
    """Return a node's reply, and its context with the state for its next message."""
    reply = app(message, context)
    if reply.has_error():
        raise ClientError(f"client {context.node_id} failed: {reply.error.reason}")
    return reply, context


_apps_of_worker: list[ClientApp] = []


def _answer_in_worker(message: Message, context: Context) -> tuple[Message, Context]:
    return _answer(_apps_of_worker[0], message, context)


def _begin_worker(app: ClientApp) -> None:
    """Prepare a process of the pool, which only its parent ends."""
    _apps_of_worker[:] = [app]
    _identify()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    end_with_parent()


def end_with_parent() -> None:
    """End this process when its parent ends, even if that is killed."""

    def end(parent: Any) -> None:
        wait([parent.sentinel])
        os._exit(1)

    if parent := multiprocessing.parent_process():
        threading.Thread(target=end, args=(parent,), daemon=True).start()
