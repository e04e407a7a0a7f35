"""Who takes part: names of sites, who trains and who has to be there, and when a run ends."""

import pytest
from flwr.app import ArrayRecord, MessageType, RecordDict
from simulated_grid import SimulatedGrid, received, site, start, weights

from pfedgpa_app.files import printable
from server_app import roster as roster_module
from server_app.roster import JoinTimeoutError, Roster
from server_app.strategies import ClientwiseFedAvg, PFedGPA


def named_grid(*names: str) -> SimulatedGrid:
    """Return sites with the node ids 10, 11, ..., of which those have a name that is not empty."""
    grid = SimulatedGrid({10 + number: site(float(number)) for number in range(len(names))})
    grid.names = {10 + number: name for number, name in enumerate(names)}
    return grid


def admitted(*names: str) -> Roster:
    roster, grid = Roster(), named_grid(*names)
    roster.admit(grid, list(grid.nodes))  # type: ignore[arg-type]
    return roster


def test_clients_are_called_by_number_and_name():
    roster = admitted("mercy", "", "7", "\x1b[31mred" + 50 * "x")
    assert [roster.called(client) for client in range(3)] == [
        "client 0 (mercy)",
        "client 1",
        "client 2",  # a name that reads as a number could be another client's
    ]
    shown = roster.client_names()[3]
    assert shown.startswith("\\x1b[31mredxx")
    assert shown == printable(shown)
    assert len(shown) == 40


def test_a_name_that_two_nodes_share_names_neither(caplog):
    roster = admitted("mercy", "mercy", "st. james")
    assert roster.client_names() == {2: "st. james"}
    assert 'Nodes 10, 11 are all called "mercy", so the name is of none of them' in caplog.text


def test_rows_and_log_have_the_names(caplog):
    grid = named_grid("mercy", "", "broken")
    grid.nodes[12] = lambda message: RecordDict()
    strategy = ClientwiseFedAvg()
    start(strategy, grid, num_rounds=1)
    rows = strategy.record.clients
    assert [row.get("name") for row in rows.values()] == ["mercy", None, "broken"]
    assert "Client 2 (broken) (node 12) is out of the round" in caplog.text


@pytest.mark.parametrize("make", [ClientwiseFedAvg, PFedGPA])
def test_who_is_left_out_does_not_train_and_is_served(make):
    grid = named_grid("st-a", "st-b", "mercy", "", "st-c")
    strategy = make(include=["st-*", "3"], exclude=["st-b"])
    start(strategy, grid)
    assert [set(each) for each in received(grid, MessageType.TRAIN)] == 2 * [{10, 13, 14}]
    assert [set(each) for each in received(grid, MessageType.EVALUATE)] == 2 * [set(grid.nodes)]
    assert strategy.record.clients[2] == {
        "round": 2,
        "client": 2,
        "name": "mercy",
        "personalized-accuracy": 0.5,
        "personalized-loss": 1.0,
        "num-test-examples": 4,
    }


def test_names_that_nobody_has_are_said_and_nobody_at_all_is_an_error(caplog):
    start(ClientwiseFedAvg(exclude=["mrcy"]), named_grid("mercy", ""), num_rounds=1)
    assert (
        'server.exclude: no client that is connected is called "mrcy"; here are client 0 (mercy), '
        "client 1" in caplog.text
    )
    with pytest.raises(ValueError, match="let no connected client train; right would be"):
        start(ClientwiseFedAvg(include=["mrcy"]), named_grid("mercy", ""))


def test_a_round_waits_for_the_sites_that_are_required(monkeypatch, caplog):
    monkeypatch.setattr(roster_module, "_PAUSE", 0.0)
    caplog.set_level("INFO")
    grid = named_grid("a", "b", "mercy")
    late = grid.nodes.pop(12)

    class Filling(SimulatedGrid):
        num_asked = 0

        def get_node_ids(self):
            self.num_asked += 1
            if self.num_asked == 4:
                grid.nodes[12] = late
            return list(grid.nodes)

    filling = Filling(grid.nodes)
    filling.names = grid.names
    strategy = ClientwiseFedAvg(required=["mer*", "0"])
    strategy.start(filling, ArrayRecord(weights(0.0)), num_rounds=1)  # type: ignore[arg-type]
    assert strategy.record.clients.keys() == {0, 1, 2}
    assert caplog.text.count('Waiting for nodes: of server.required, "mer*" is not connected') == 1
    with pytest.raises(JoinTimeoutError, match=r'of server.required, "x" is not connected; right'):
        start(ClientwiseFedAvg(required=["x"], join_timeout=0.0), named_grid("a", "b"))
