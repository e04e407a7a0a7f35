"""Who takes part: names of sites, who trains and who has to be there, and when a run ends."""

from pathlib import Path

import pytest
from flwr.app import ArrayRecord, Context, Message, MessageType, MetricRecord, RecordDict
from simulated_grid import SimulatedGrid, received, site, start, upload, weights
from typer.testing import CliRunner

from pfedgpa_app import cli
from pfedgpa_app.config import Config, ConfigError
from pfedgpa_app.files import printable
from pfedgpa_app.model_spec import ModelSpec
from pfedgpa_app.report import Run
from server_app import app
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


def test_a_run_that_goes_on_knows_the_names_of_old_clients():
    roster, grid = Roster(), named_grid("mercy", "st. james")
    roster.clients = {10: 0, 11: 1}
    roster.assemble(grid, 2, 0.0, required=["mercy"])  # type: ignore[arg-type]
    assert roster.client_names() == {0: "mercy", 1: "st. james"}


def test_an_excluded_name_that_two_share_excludes_both():
    grid = named_grid("mercy", "mercy", "st. james")
    start(ClientwiseFedAvg(exclude=["mercy"]), grid, num_rounds=1)
    assert [set(each) for each in received(grid, MessageType.TRAIN)] == [{12}]


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
    monkeypatch.setattr(roster_module, "PAUSE", 0.0)
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


def scored(path: Path, monkeypatch: pytest.MonkeyPatch, run_id: int, *scores: float, **settings):
    """Run the ServerApp with three clients that have these accuracies in rounds 1, 2, ..."""
    monkeypatch.setattr(app, "preflight", lambda config: ModelSpec.of_state(weights(0.0)))

    def answer(message: Message) -> RecordDict:
        if message.metadata.message_type == MessageType.TRAIN:
            return upload(weights(1.0))
        score = scores[message.content["config"]["server-round"] - 1]
        return RecordDict({"m": MetricRecord({"num-examples": 4, "accuracy": score})})

    given = {"strategy": "fedavg", "output-dir": str(path), "num-server-rounds": len(scores)}
    given |= {key.replace("__", ".").replace("_", "-"): value for key, value in settings.items()}
    grid = SimulatedGrid(dict.fromkeys(range(3), answer), {0: 0, 1: 1, 2: 2})
    grid.names = {0: "mercy", 2: "<b>st. james"}
    app.main(grid, Context(run_id, 1, {}, RecordDict(), given))
    return Run.read(path / str(run_id))


def test_a_run_ends_properly_at_an_accuracy_and_can_go_on(tmp_path: Path, monkeypatch):
    scores = (0.5, 0.75, 0.8, 0.9)
    run = scored(tmp_path, monkeypatch, 1, *scores, server__stop_at=0.75, checkpoint__every=3)
    assert [row["personalized-accuracy"] for row in run.metrics] == [0.5, 0.75]
    assert (run.state, run.error) == ("complete", "")
    why = "Ended after round 2, with a personalized accuracy of 0.7500: server.stop-at = 0.75"
    assert run.ended == why
    assert why in (run.path / "report.html").read_text()
    assert all(run.model_file(client).exists() for client in range(3))
    watched = CliRunner().invoke(cli.app, ["watch", "1", "--output-dir", str(tmp_path)])
    assert watched.exit_code == 0
    assert f"{why}\ndigits-fedavg-1 is complete, 2 of 4 rounds" in watched.stdout
    on = {"resume_from": "1", "server__stop_at": 0.0, "server__exclude": "2"}
    resumed = scored(tmp_path, monkeypatch, 2, *scores, **on)
    assert [row["round"] for row in resumed.metrics] == [1, 2, 3, 4]
    assert resumed.ended == ""


def test_a_run_without_progress_ends_with_its_names_and_goes_on_for_as_long_again(
    tmp_path: Path, monkeypatch
):
    scores = (0.5, 0.75, 0.75, 0.5, 0.5, 0.5, 0.5)
    run = scored(tmp_path, monkeypatch, 1, *scores, server__patience=2)
    assert [run.client_called(each) for each in ("mercy", "1", "<b>st. james")] == [0, 1, 2]
    with pytest.raises(ValueError, match=r"no client called 'x'; right would be a number, or a"):
        run.client_called("x")
    page = (run.path / "report.html").read_text()
    assert "0 mercy" in page
    assert "<b>st. james" not in page
    assert len(run.metrics) == 4
    assert run.ended == (
        "Ended after round 4, since the best personalized accuracy is that of round 2, 0.7500: "
        "server.patience = 2"
    )
    again = scored(tmp_path, monkeypatch, 2, *scores, server__patience=2, resume_from="1")
    assert len(again.metrics) == 6


def test_what_needs_evaluations_is_refused_without():
    flat = {"server.stop-at": 0.9, "server.patience": 2, "server.evaluate-every": 0}
    with pytest.raises(ConfigError) as caught:
        Config.from_flat(flat)
    assert [each.partition(":")[0] for each in caught.value.problems] == [
        "server.stop-at = 0.9",
        "server.patience = 2",
    ]
