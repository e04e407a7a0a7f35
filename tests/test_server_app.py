"""A whole run in one process, from the ServerApp to what is taken away from its folder."""

import json
from html import escape
from pathlib import Path

import pytest
from flwr.app import (
    ConfigRecord,
    Context,
    Error,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from flwr.common.constant import ErrorCode
from simulated_grid import Answer, SimulatedGrid, learning_grid, learning_site, weights
from typer.testing import CliRunner

from client_app.messages import evaluate_message, train_message
from pfedgpa_app import cli
from pfedgpa_app.config import Config
from pfedgpa_app.exported import ExportedModel
from pfedgpa_app.model_spec import ModelSpec
from pfedgpa_app.page import runs as pages
from pfedgpa_app.report import Run
from pfedgpa_app.source import source_hash
from pfedgpa_app.state import WriteError
from server_app import app
from server_app.app import RunError, main, make_strategy
from server_app.roster import PartitionRoster, SourceError

NUM_CLIENTS = 4


def client(partition: int, settings: dict[str, bool | int | float | str]) -> Answer:
    node = {"partition-id": partition, "num-partitions": NUM_CLIENTS}
    context = Context(1, partition, node, RecordDict(), settings)

    def answer(message: Message) -> RecordDict:
        is_train = message.metadata.message_type == MessageType.TRAIN
        return (train_message if is_train else evaluate_message)(message, context).content

    return answer


@pytest.mark.parametrize("strategy", ["pfedgpa", "fedavg-ft"])
def test_a_model_that_is_taken_away_is_as_good_as_it_was_in_the_run(tmp_path: Path, strategy: str):
    settings = {
        "strategy": strategy,
        "num-server-rounds": 2,
        "output-dir": str(tmp_path),
        "client.device": "cpu",
        "diffusion.train-steps": 20,
    }
    # One client leaves before the end: how many are connected then tells nothing about its data.
    nodes = {10 + number: client(number, settings) for number in range(NUM_CLIENTS)}
    grid = SimulatedGrid(nodes, {node: node - 10 for node in nodes})
    last_client = grid.nodes[13]

    def leave(message: Message) -> RecordDict:
        if message.metadata.message_type == MessageType.EVALUATE:
            del grid.nodes[13]
        return last_client(message)

    grid.nodes[13] = leave
    main(grid, Context(111, 1, {}, RecordDict(), settings))

    rows = map(json.loads, (tmp_path / "111" / "clients.jsonl").read_text().splitlines())
    last = {row["client"]: row for row in rows if row["round"] == 2}
    for number in range(3):
        file = tmp_path / f"{number}.safetensors"
        command = ["export", "111", "--client", str(number), "-o", str(file)]
        exported = CliRunner().invoke(cli.app, [*command, "--output-dir", str(tmp_path)])
        assert exported.exit_code == 0, exported.stderr
        model = ExportedModel.load(file)
        assert (model.server_round, model.partition) == (2, (number, NUM_CLIENTS))
        accuracy, loss = model.evaluate()[0]
        assert accuracy == last[number]["personalized-accuracy"]
        assert loss == pytest.approx(last[number]["personalized-loss"], rel=1e-4)
    assert last.keys() == {0, 1, 2}


def test_a_run_leaves_a_page_and_what_the_server_learned(tmp_path: Path):
    settings = {"num-server-rounds": 2, "output-dir": str(tmp_path), "diffusion.train-steps": 5}
    nodes = {number: client(number, settings) for number in range(NUM_CLIENTS)}
    grid = SimulatedGrid(nodes, {node: node for node in nodes})
    main(grid, Context(5, 1, {}, RecordDict(), settings))
    run = Run.read(tmp_path / "5")
    assert [row["round"] for row in run.method] == [1, 2]
    assert all(row["clients"] == [0, 1, 2, 3] for row in run.method)
    page = (tmp_path / "5" / "report.html").read_text()
    for title in (
        "Accuracy over rounds",
        "Classes of each client",
        "Mixing weights: whose uploads a model",
    ):
        assert f"<h3>{title}" in page


def run_with_errors_first(path: Path, monkeypatch: pytest.MonkeyPatch, error: Error) -> list[dict]:
    """Run the ServerApp among sites of which nobody trains in the first round; return the rows."""
    grid = learning_grid(first_id=10)
    for node, answer in grid.nodes.items():
        replies = iter([error])
        grid.nodes[node] = lambda message, answer=answer, replies=replies: (
            next(replies, None) or answer(message)
        )
    monkeypatch.setattr(app, "preflight", lambda config: ModelSpec.of_state(weights(0.0)))
    settings = {"output-dir": str(path), "num-server-rounds": 2, "diffusion.train-steps": 5}
    main(grid, Context(1, 1, {}, RecordDict(), settings))
    return [json.loads(line) for line in (path / "1" / "metrics.jsonl").read_text().splitlines()]


def test_a_run_whose_clients_all_fail_in_the_first_round_ends_with_what_they_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    error = Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "KeyError: 'label' in load (a.py, line 3)")
    with pytest.raises(RunError) as caught:
        run_with_errors_first(tmp_path, monkeypatch, error)
    said = "6 clients: KeyError: 'label' in load (a.py, line 3)"
    assert str(caught.value) == f"No client trained in the first round:\n  {said}"
    # The folder has it too, and to whoever looks at it in whichever way.
    run = Run.read(tmp_path / "1")
    assert (run.name, run.error, run.state) == ("digits-pfedgpa-1", str(caught.value), "stopped")
    assert [(row["client"], row["round"]) for row in run.clients] == [(n, 1) for n in range(6)]
    assert run.metrics == []
    shown = CliRunner().invoke(cli.app, ["runs", "show", "1", "--output-dir", str(tmp_path)])
    assert shown.stdout.count("KeyError") == 2
    assert f"No client trained in the first round:\n  {said}\n" in shown.stdout
    assert "6 clients: 1 round, the last 1: the client failed: KeyError" in shown.stdout
    watched = CliRunner().invoke(cli.app, ["watch", "1", "--output-dir", str(tmp_path)])
    assert watched.exit_code == 1
    assert said in watched.stderr
    page = (tmp_path / "1" / "report.html").read_text()
    assert escape(said) in page
    assert "<dt>failures</dt><dd>6</dd>" in page  # also of a round that is not complete
    assert "<td>0-5</td><td>1</td><td>the client failed: KeyError" in page


def test_a_run_of_one_good_site_says_in_each_round_and_at_its_end_that_nothing_was_shared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    grid = learning_grid(first_id=10)
    error = Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "its data")
    for node in list(grid.nodes)[1:]:
        grid.nodes[node] = lambda message: error
    monkeypatch.setattr(app, "preflight", lambda config: ModelSpec.of_state(weights(0.0)))
    settings = {"output-dir": str(tmp_path), "num-server-rounds": 2, "strategy": "fedavg"}
    main(grid, Context(1, 1, {}, RecordDict(), settings))
    failed = "; ".join(f"client {number}: the client failed: its data" for number in range(1, 6))
    lines = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    for server_round in (1, 2):
        who = f"in round {server_round}: only client 0 trained. Failed: {failed}"
        assert f"Nothing was shared {who}" in lines
    whole = "In 2 of 2 rounds nothing was shared: at most one client trained, and others failed. "
    assert lines[-1].startswith(whole)
    shown = CliRunner().invoke(cli.app, ["runs", "show", "1", "--output-dir", str(tmp_path)])
    watched = CliRunner().invoke(cli.app, ["watch", "1", "--output-dir", str(tmp_path)])
    assert whole in shown.stdout
    assert whole in watched.stdout
    assert "; 5 failed\n" in watched.stdout
    assert whole in (tmp_path / "1" / "report.html").read_text()


def test_flowers_log_names_classes():
    settings = {"data.dataset": "breast-cancer", "data.partition": "iid", "model.name": "mlp"}
    config = Config.from_flat(settings)
    spec = ModelSpec.of_state(weights(0.0))
    metrics = MetricRecord({"num-examples": 4, "accuracy": 0.5, "recall-1": 0.25})
    average = make_strategy(config, spec).evaluate_metrics_aggr_fn
    found = average([RecordDict({"metrics": metrics})], "num-examples")
    assert found == {"accuracy": 0.5, "recall of benign": 0.25}


def test_causes_are_told_once_and_the_most_frequent_one_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    grid = learning_grid(first_id=10)
    for number, node in enumerate(grid.nodes):
        reason = "\x1b[31mgone\n" + "x" * 1000 if number == 5 else f"cause {number // 3}"
        error = Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason)
        grid.nodes[node] = lambda message, error=error: error
    monkeypatch.setattr(app, "preflight", lambda config: ModelSpec.of_state(weights(0.0)))
    settings = {"output-dir": str(tmp_path)}
    with pytest.raises(RunError) as caught:
        main(grid, Context(1, 1, {}, RecordDict(), settings))
    causes = str(caught.value).splitlines()[1:]
    assert causes[1:] == ["  2 clients: cause 1", "  3 clients: cause 0"]
    assert causes[0].startswith("  1 client: [31mgone xxx")
    assert len(causes[0]) < 350


def test_why_a_run_ended_is_in_its_folder_and_the_name_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(app, "preflight", lambda config: ModelSpec.of_state(weights(0.0)))

    def fail(*arguments: object, **options: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(app.ClientwiseFedAvg, "start", fail)
    settings = {"output-dir": str(tmp_path)}
    with pytest.raises(RuntimeError, match="out of memory"):
        main(learning_grid(first_id=10), Context(1, 1, {}, RecordDict(), settings))
    assert Run.read(tmp_path / "1").name == "digits-pfedgpa-1"
    assert Run.read(tmp_path / "1").error == "RuntimeError: out of memory"
    assert (tmp_path / "1" / "report.html").exists()


def coded_grid(**codes: str | None) -> SimulatedGrid:
    """Return clients that say which code they run; None says nothing."""
    grid = SimulatedGrid({number: learning_site(2.0) for number in range(len(codes))})
    plain = grid._answer

    def answer(message: Message) -> RecordDict | Error | None:
        if message.metadata.message_type != MessageType.QUERY:
            return plain(message)
        node = message.metadata.dst_node_id
        content = RecordDict({"m": MetricRecord({"partition-id": node})})
        if (code := list(codes.values())[node]) is not None:
            content["source"] = ConfigRecord({"source": code})
        return content

    grid._answer = answer
    return grid


OURS = source_hash(Path(app.__file__).parents[1] / "client_app")


def run_coded(path: Path, monkeypatch: pytest.MonkeyPatch, grid: SimulatedGrid) -> Run:
    monkeypatch.setattr(app, "preflight", lambda config: ModelSpec.of_state(weights(0.0)))
    settings = {"output-dir": str(path), "num-server-rounds": 2, "diffusion.train-steps": 5}
    main(grid, Context(1, 1, {}, RecordDict(), settings))
    return Run.read(path / "1")


def test_a_site_with_other_code_is_named_and_costs_nobody_else_a_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    grid = coded_grid(a=OURS, b="1234" + "\n" * 20, c=None, d=OURS)
    run = run_coded(tmp_path, monkeypatch, grid)
    assert [(row["num-nodes"], row["num-clients"]) for row in run.metrics] == [(3, 3)] * 2
    assert {row["node-id"] for row in run.clients} == {"0", "2", "3"}
    assert "Node 1 is out of the round: it runs another version" in caplog.text
    assert f"(1234) than the server ({OURS[:12]})" in caplog.text


@pytest.mark.parametrize("is_simulation", [False, True])
def test_a_run_among_clients_with_other_code_ends_with_what_would_be_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_simulation: bool
):
    if is_simulation:
        monkeypatch.setattr(app, "InMemoryGrid", SimulatedGrid)
    with pytest.raises(SourceError, match="another version of client_app") as caught:
        run_coded(tmp_path, monkeypatch, coded_grid(a="1", b="2", c="2"))
    assert ("pkill -f" in str(caught.value)) == is_simulation
    assert Run.read(tmp_path / "1").error == str(caught.value)


def test_a_site_that_was_updated_takes_part_from_the_next_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    codes = {"a": OURS, "b": OURS, "c": OURS, "d": "1"}
    grid = coded_grid(**codes)
    other, ours = grid._answer, coded_grid(**codes | {"d": OURS})._answer
    replies = iter([other] * 5)  # the five of the first round, and of its evaluation one again
    grid._answer = lambda message: (
        next(replies, ours) if message.metadata.message_type == MessageType.QUERY else other
    )(message)
    run = run_coded(tmp_path, monkeypatch, grid)
    assert [row["num-clients"] for row in run.metrics] == [3, 4]


def test_a_run_that_goes_on_asks_known_sites_once_for_their_code(caplog: pytest.LogCaptureFixture):
    roster, claims = PartitionRoster(), {0: 2, 1: 1, 2: 0}
    roster.clients = claims
    roster.admit(coded_grid(a=OURS, b="1234", c=OURS), [0, 1, 2])  # type: ignore[arg-type]
    assert roster.connected == {0, 2}
    assert "Node 1 is out of the round: it runs another version" in caplog.text
    roster.admit(coded_grid(a="1234", b=OURS, c=OURS), [0, 1, 2])  # type: ignore[arg-type]
    assert roster.connected == {0, 1, 2}
    assert roster.clients == claims


@pytest.mark.parametrize("error", [RuntimeError("no plotly"), WriteError("no space")])
def test_a_page_that_cannot_be_made_costs_a_run_nothing_else(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
):
    def fail(runs: list[Run]) -> str:
        raise error

    monkeypatch.setattr(pages, "page_of", fail)
    rows = run_with_errors_first(tmp_path, monkeypatch, Error(ErrorCode.NODE_UNAVAILABLE, "gone"))
    assert len(rows) == 2
    assert (tmp_path / "1" / "models").is_dir()
    assert not (tmp_path / "1" / "report.html").exists()
    assert f"There is no report.html: {error}" in caplog.text


def test_a_client_with_impossible_metrics_is_out_of_the_round_and_of_the_mean(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    grid = learning_grid(first_id=10)
    liar = grid.nodes[10]

    def answer(message: Message) -> RecordDict:
        content = liar(message)
        is_train = message.metadata.message_type == MessageType.TRAIN
        now = message.content["config"]["server-round"]
        (record,) = content.metric_records.values()
        if is_train == (now == 1):
            record["seconds" if is_train else "accuracy"] = -9e11
        return content

    grid.nodes[10] = answer
    monkeypatch.setattr(app, "preflight", lambda config: ModelSpec.of_state(weights(0.0)))
    settings = {"output-dir": str(tmp_path), "num-server-rounds": 2, "diffusion.train-steps": 5}
    main(grid, Context(1, 1, {}, RecordDict(), settings))
    run = Run.read(tmp_path / "1")
    assert [row["num-clients"] for row in run.metrics] == [5, 6]
    assert all(0 <= row["personalized-accuracy"] <= 1 for row in run.metrics)
    first, second = [row for row in run.clients if row["client"] == 0]
    assert first["status"].startswith('the metric "seconds" is -9e+11')
    assert second["not-evaluated"].startswith('the metric "accuracy" is -9e+11')


def test_a_run_whose_clients_are_all_gone_in_the_first_round_waits_for_their_return(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    error = Error(ErrorCode.NODE_UNAVAILABLE, "Node Unavailable")
    first, second = run_with_errors_first(tmp_path, monkeypatch, error)
    assert (first["num-clients"], first["num-failures"]) == (0, 6)
    assert (second["num-clients"], second["num-failures"]) == (6, 0)


@pytest.mark.parametrize("is_network", [False, True])
def test_who_takes_part_follows_from_the_seed_unless_clients_could_use_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_network: bool
):
    if is_network:
        monkeypatch.setattr(app, "HttpGrid", SimulatedGrid)
    monkeypatch.setattr(app, "preflight", lambda config: ModelSpec.of_state(weights(0.0)))
    drawn = set()
    for run_id in range(1, 3):
        settings = {
            "output-dir": str(tmp_path),
            "num-server-rounds": 8,
            "server.fraction-train": 0.5,
            "server.fraction-evaluate": 0.0,
            "strategy": "fedavg",
        }
        main(learning_grid(first_id=10), Context(run_id, 1, {}, RecordDict(), settings))
        rows = Run.read(tmp_path / str(run_id)).clients
        drawn.add(tuple((row["round"], row["client"]) for row in rows))
    assert len(drawn) == (2 if is_network else 1)


def test_seeded_noise_is_warned_of_and_private_runs_leave_nothing_to_go_on_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(app, "preflight", lambda config: ModelSpec.of_state(weights(0.0)))
    settings = {
        "output-dir": str(tmp_path),
        "num-server-rounds": 1,
        "diffusion.train-steps": 5,
        "privacy.mode": "update",
        "privacy.epsilon": 300.0,
        "privacy.seeded-noise": True,
    }
    main(learning_grid(first_id=10), Context(1, 1, {}, RecordDict(), settings))
    assert "the noise follows from the seed and protects nobody" in caplog.text
    assert not list((tmp_path / "1").rglob("checkpoint*"))
