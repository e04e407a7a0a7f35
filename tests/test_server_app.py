"""A whole run in one process, from the ServerApp to what is taken away from its folder."""

import json
from pathlib import Path

import pytest
from flwr.app import Context, Message, MessageType, RecordDict
from simulated_grid import Answer, SimulatedGrid
from typer.testing import CliRunner

from client_app.app import evaluate_message, train_message
from pfedgpa_app import cli
from pfedgpa_app.exported import ExportedModel
from server_app.app import main

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
