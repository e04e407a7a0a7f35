"""The cross-site matrix: each client's model evaluated at each site that consents."""

from logging import WARNING

from flwr.app import ConfigRecord, MessageType, RecordDict
from flwr.common import log
from flwr.serverapp import Grid

from pfedgpa_app.protocol import ACCURACY, CONFIG, CROSS_SITE
from pfedgpa_app.rounds import Row
from server_app.replies import ReplyError
from server_app.roster import query
from server_app.strategies import ClientwiseFedAvg


def evaluate_across(strategy: ClientwiseFedAvg, grid: Grid, timeout: float) -> list[Row]:
    """Evaluate the personalized model of each client that consents at all of these.

    Rows have the numbers of both clients, ``model`` and ``site``, ``accuracy`` and
    ``num-test-examples``. ``timeout`` is in seconds, for each model. Invalid replies are logged and
    left out.
    """
    roster = strategy.roster
    # A resumed run without further rounds does not know who is connected.
    roster.assemble(grid, strategy.min_available_nodes, strategy.join_timeout)
    config = ConfigRecord({CROSS_SITE: True})
    content = RecordDict({CONFIG: config})
    replies = query(grid, sorted(roster.connected), content, timeout)
    clients = sorted(
        roster.client(node_id)
        for node_id, reply in replies.items()
        if reply.has_content()
        and any(each.get(CROSS_SITE) == 1 for each in reply.content.metric_records.values())
    )
    rows = []
    for model, state in zip(clients, strategy.evaluation_states(clients), strict=True):
        states = [state] * len(clients)
        messages = strategy.messages(MessageType.EVALUATE, clients, states, config)
        for site, reply in strategy.by_client(grid.send_and_receive(messages, timeout=timeout)):
            try:
                metrics = strategy.read_metrics(reply)
                if ACCURACY not in metrics:
                    raise ReplyError("it reports no metrics")
            except ReplyError as error:
                called = roster.called(model)
                log(WARNING, "%s did not evaluate %s: %s", strategy.subject(site), called, error)
                continue
            num_examples = int(metrics[strategy.weighted_by_key])
            pair = {"model": model, "site": site}
            rows.append(pair | {"accuracy": metrics[ACCURACY], "num-test-examples": num_examples})
    return rows
