"""The cross-site matrix: every model of those who consent, at each of them."""

from pathlib import Path

import pytest
from digits_client import context, message
from flwr.app import ConfigRecord, MessageType

from client_app.messages import evaluate_message
from client_app.node import NodeError, consents_to_cross_site, query
from pfedgpa_app.config import Config, ConfigError
from pfedgpa_app.cross_site import CROSS_SITE_FILE, read_matrix, write_matrix
from pfedgpa_app.report import Run
from server_app.app import make_strategy
from server_app.simulation import PoolGrid, run_app

REQUEST = ConfigRecord({"cross-site": True, "server-round": 3})


def test_a_site_with_own_data_takes_part_where_its_node_config_says_so(tmp_path: Path):
    own, model = context(), tmp_path / "model.safetensors"
    own.node_config["data-path"] = "scans"
    assert not consents_to_cross_site(own)
    asking = message(MessageType.QUERY)
    assert "cross-site" not in query(asking, own).content["metrics"]
    asking.content["config"] = REQUEST
    assert query(asking, own).content["metrics"]["cross-site"] == 0
    evaluating = message(MessageType.EVALUATE)
    evaluating.content["config"] = REQUEST
    with pytest.raises(NodeError, match="does not consent; right would be cross-site=true"):
        evaluate_message(evaluating, own)
    own.node_config["cross-site"] = "yes"
    with pytest.raises(NodeError, match="cross-site 'yes': right would be true or false"):
        consents_to_cross_site(own)
    own.node_config["cross-site"] = True
    assert query(asking, own).content["metrics"]["cross-site"] == 1
    shared = context()
    shared.node_config["model-path"] = str(model)
    assert 0 <= evaluate_message(evaluating, shared).content["metrics"]["accuracy"] <= 1
    assert not model.exists()  # it is anybody's


def test_a_run_ends_with_the_matrix_of_those_who_consent(tmp_path: Path, monkeypatch):
    def node_config(self: PoolGrid, node: int) -> dict:
        return {"partition-id": node, "num-partitions": 4, "cross-site": node != 1}

    monkeypatch.setattr(PoolGrid, "node_config", node_config)
    flat = {
        "output-dir": str(tmp_path),
        "num-server-rounds": 1,
        "client.local-epochs": 1,
        "client.device": "cpu",
        "diffusion.train-steps": 5,
        "server.cross-site": True,
    }
    folder = run_app(Config.from_flat(flat), 4, 0)
    matrix = read_matrix(folder)
    assert matrix.keys() == {(model, site) for model in (0, 2, 3) for site in (0, 2, 3)}
    last = {row["client"]: row["personalized-accuracy"] for row in Run.read(folder).clients}
    assert {each: matrix[each, each] for each in (0, 2, 3)} == {
        each: last[each] for each in (0, 2, 3)
    }
    assert "<h3>Each model at each site" in (folder / "report.html").read_text()


def test_a_matrix_is_read_as_it_was_written_and_names_are_no_formulas(tmp_path: Path):
    row = {"model": 0, "site": 1, "accuracy": 0.5, "num-test-examples": 4}
    write_matrix(tmp_path, [row], {0: "=1+1", 1: "a,b"})
    assert read_matrix(tmp_path) == {(0, 1): 0.5}
    text = (tmp_path / CROSS_SITE_FILE).read_text()
    assert text.splitlines()[1] == '0,\'=1+1,1,"a,b",0.5,4'
    (tmp_path / CROSS_SITE_FILE).write_text("model,site,accuracy\n0,1,nan\n")
    with pytest.raises(ValueError, match="is damaged; right would be accuracies"):
        read_matrix(tmp_path)


def test_models_that_the_server_does_not_know_are_no_rows_of_it():
    config = Config.from_flat({"strategy": "fedper", "server.cross-site": True})
    with pytest.raises(ConfigError, match="clients keep parts of their models"):
        make_strategy(config, spec=None)  # type: ignore[arg-type]
