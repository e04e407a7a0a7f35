"""The folder of a run: its lines, models and figure, and what is read back from it."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from pfedgpa_app.config import Config
from pfedgpa_app.report import Run, RunFolder, read_runs
from pfedgpa_app.rounds import RoundRecord, mean_and_spread, summarize
from pfedgpa_app.state import WriteError


def make_run(
    path: Path, accuracies: list[float | None], num_nodes: int = 4, **settings: Any
) -> Run:
    folder = RunFolder(path, Config(**settings))
    for server_round, accuracy in enumerate(accuracies, start=1):
        row = {
            "round": server_round,
            "num-nodes": num_nodes,
            "personalized-accuracy": accuracy,
            "finetuned-accuracy": 0.25,
        }
        folder.add_round(row, [])
    return Run.read(path)


def hand_made_record() -> RoundRecord:
    """Clients 0 and 2 train and are evaluated, 1 sends NaN, 3 never replies, 4 only evaluates."""
    record = RoundRecord(
        2,
        seconds_waiting=0.25,
        seconds_clients=1.23456,
        seconds_diffusion=0.5,
        num_nodes=6,
        bytes_down=400,
    )
    for client in (3, 2, 1, 0):
        record.note(client, node_id=f"3{client}", status="no reply")
    metrics = {"accuracy-before": 0.5, "accuracy-after": 0.75, "loss-after": 1.0}
    record.trained(2, {**metrics, "num-examples": 9}, 100)
    metrics = {"accuracy-before": 0.2, "accuracy-after": 0.25, "loss-after": 2.0}
    record.trained(0, {**metrics, "num-examples": 8}, 110)
    record.note(1, status="0.weight has values that are not finite")
    scores = {"auroc": 0.25, "recall-0": 0.5, "recall-10": 1.0, "calibration-error": 0.5}
    record.evaluated(0, {"accuracy": 0.5, "loss": 0.7, "num-examples": 4, **scores})
    record.evaluated(2, {"accuracy": 1.0, "loss": 0.1, "num-examples": 4, "recall-0": 1.0})
    record.evaluated(4, {"accuracy": 0.6, "loss": 0.4})
    return record


def test_a_round_is_summarized_over_its_clients():
    summary = summarize(hand_made_record(), "pfedgpa", seconds_round=3.14159)
    assert summary == {
        "round": 2,
        "strategy": "pfedgpa",
        "personalized-accuracy": pytest.approx((0.5 + 1.0 + 0.6) / 3),
        "personalized-loss": pytest.approx((0.7 + 0.1 + 0.4) / 3),
        "personalized-balanced-accuracy": None,
        "personalized-macro-f1": None,
        "personalized-auroc": 0.25,
        "personalized-calibration-error": 0.5,
        # Over the clients whose test sets have the class.
        "personalized-recall-0": 0.75,
        "personalized-recall-10": 1.0,
        "personalized-accuracy-worst": 0.5,
        # mean 0.7, deviations -0.2, 0.3 and -0.1
        "personalized-accuracy-std": pytest.approx(math.sqrt((0.04 + 0.09 + 0.01) / 3)),
        "received-accuracy": pytest.approx(0.35),
        "finetuned-accuracy": 0.5,
        "finetuned-loss": 1.5,
        "num-nodes": 6,
        "num-clients": 2,
        "num-failures": 2,
        # of test sets of 4, 4 and an unknown number, and 3 of 6 clients
        "personalized-accuracy-error": pytest.approx(
            math.sqrt((0.25 / 4 + 0.24) / 9 + 0.5 * (0.14 / 3) / 3)
        ),
        "num-evaluated": 3,
        "num-alone": 0,
        "num-not-finite": 0,
        "epsilon": None,
        "seconds-waiting": 0.25,
        "seconds-clients": 1.235,
        "seconds-diffusion": 0.5,
        "seconds-round": 3.142,
        "bytes-down": 400,
        "bytes-up": 210,
    }


def test_local_training_is_charged_no_traffic():
    summary = summarize(hand_made_record(), "local", seconds_round=1.0)
    assert summary["bytes-up"] == summary["bytes-down"] == 0


def test_a_round_without_clients_has_no_means():
    summary = summarize(RoundRecord(1), "local", 0.0)
    assert {name for name, value in summary.items() if value is None} == {
        "personalized-accuracy",
        "personalized-loss",
        "personalized-balanced-accuracy",
        "personalized-macro-f1",
        "personalized-auroc",
        "personalized-calibration-error",
        "personalized-accuracy-worst",
        "personalized-accuracy-std",
        "personalized-accuracy-error",
        "received-accuracy",
        "finetuned-accuracy",
        "finetuned-loss",
        "epsilon",
    }
    assert summary["num-clients"] == summary["num-failures"] == summary["bytes-up"] == 0


def test_a_client_has_a_row_with_all_that_is_known_of_it():
    rows = hand_made_record().clients
    assert rows[2] == {
        "round": 2,
        "client": 2,
        "node-id": "32",
        "status": "ok",
        "accuracy-before": 0.5,
        "accuracy-after": 0.75,
        "loss-after": 1.0,
        "num-examples": 9,
        "personalized-accuracy": 1.0,
        "personalized-loss": 0.1,
        "personalized-recall-0": 1.0,
        "num-test-examples": 4,
    }
    assert rows[1]["status"] == "0.weight has values that are not finite"
    assert rows[3]["status"] == "no reply"
    assert "status" not in rows[4]


def test_a_column_is_ordered_by_client():
    assert hand_made_record().column("personalized-accuracy") == [0.5, 1.0, 0.6]


def test_a_run_folder_holds_the_settings_and_a_json_line_a_round(tmp_path: Path):
    config = Config(seed=3, strategy="local")
    folder = RunFolder(tmp_path / "some" / "run", config)
    record = hand_made_record()
    summary = summarize(record, "local", 1.0)
    folder.add_round(summarize(RoundRecord(1), "local", 1.0), [])
    folder.add_round(summary, record.clients.values())
    path = tmp_path / "some" / "run"
    assert Config.from_flat(json.loads((path / "config.json").read_text())) == config
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == [1, 2]
    assert lines[0]["personalized-accuracy"] is None
    assert lines[1] == summary
    clients = [json.loads(line) for line in (path / "clients.jsonl").read_text().splitlines()]
    assert clients == list(record.clients.values())


def test_what_the_server_learned_is_a_line_of_its_own_where_there_is_something(tmp_path: Path):
    folder = RunFolder(tmp_path / "run", Config())
    folder.add_round({"round": 1}, [])
    assert not (tmp_path / "run" / "method.jsonl").exists()
    folder.add_round({"round": 2}, [], {"members": 4})
    assert Run.read(tmp_path / "run").method == [{"round": 2, "members": 4}]


def test_an_existing_folder_is_refused_and_left_alone(tmp_path: Path):
    RunFolder(tmp_path / "run", Config(seed=1))
    with pytest.raises(WriteError, match=r"run cannot be written: .*exists"):
        RunFolder(tmp_path / "run", Config(seed=2))
    assert Run.read(tmp_path / "run").config.seed == 1


def test_a_saved_model_is_loaded_with_equal_tensors(tmp_path: Path):
    weight = torch.arange(6.0).reshape(2, 3)
    state = {
        "weight": weight,
        "transposed": weight.T,
        "shared": weight[1:],
        "half": torch.tensor([0.1]).bfloat16(),
        "num_batches_tracked": torch.tensor(5),
    }
    folder = RunFolder(tmp_path / "run", Config())
    folder.save_model(0, {"weight": torch.zeros(1)}, 3, {})
    folder.save_model(12, state, 3, {})
    loaded = load_file(tmp_path / "run" / "models" / "client-12.safetensors")
    assert loaded.keys() == state.keys()
    for name, tensor in state.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)


def test_a_saved_model_says_how_to_use_it(tmp_path: Path):
    folder = RunFolder(tmp_path / "run", Config(seed=4))
    stats = torch.tensor([[72.1], [90.3]])
    site = {"image-stats": stats, "partition": torch.tensor([2, 5])}
    folder.save_model(1, {"weight": torch.zeros(1)}, 7, site)
    file = tmp_path / "run" / "models" / "client-1.safetensors"
    fields = json.loads(safe_open(file, "pt").metadata()["fields"])
    assert Config.from_flat(fields.pop("config")) == Config(seed=4)
    assert torch.equal(torch.tensor([fields.pop("image-mean"), fields.pop("image-std")]), stats)
    assert fields == {
        "client": 1,
        "round": 7,
        "run": "run",
        "partition-id": 2,
        "num-partitions": 5,
        "model": "cnn-8x8",
        "shape": [1, 8, 8],
        "num-classes": 10,
        "class-counts": None,
    }


def test_the_model_of_a_client_is_found_and_those_there_are_named(tmp_path: Path):
    folder = RunFolder(tmp_path / "run", Config(num_server_rounds=3))
    folder.add_round({"round": 1}, [])
    with pytest.raises(ValueError, match=r"no models.*1 of 3 are complete"):
        Run.read(tmp_path / "run").model_file(0)
    for client in (10, 2):
        folder.save_model(client, {"weight": torch.zeros(1)}, 3, {})
    (tmp_path / "run" / "models" / "client-x.safetensors").touch()
    run = Run.read(tmp_path / "run")
    assert run.model_file(10) == tmp_path / "run" / "models" / "client-10.safetensors"
    with pytest.raises(ValueError, match="no model of client 1; there are those of 2, 10"):
        run.model_file(1)


def test_a_run_that_has_just_begun_has_no_metrics(tmp_path: Path):
    RunFolder(tmp_path / "run", Config())
    run = Run.read(tmp_path / "run")
    assert run.metrics == []
    assert run.last("personalized-accuracy") is None
    assert run.num_nodes == 0
    assert not run.is_complete


@pytest.mark.parametrize("content", [None, "", "{", "[]", "{}", '{"model_type": "bert"}'])
def test_a_foreign_folder_is_refused_with_its_name(tmp_path: Path, content: str | None):
    """A config.json alone makes no run: other programs write files of that name."""
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=f"{tmp_path} is not the folder of a run"):
        Run.read(tmp_path)


def test_runs_are_read_oldest_first_and_other_folders_passed_over(tmp_path: Path):
    for number, name in enumerate(["c", "a", "b"]):
        make_run(tmp_path / name, [0.5])
        fields = {"name": name, "began": f"2026-11-30T11:00:0{number}+00:00"}
        (tmp_path / name / "run.json").write_text(json.dumps(fields))
    (tmp_path / "figures").mkdir()
    (tmp_path / "notes.txt").touch()
    assert [run.path.name for run in read_runs(tmp_path)[0]] == ["c", "a", "b"]
    assert read_runs(tmp_path / "no such folder")[0] == []


def test_folders_of_other_programs_are_passed_over(tmp_path: Path):
    make_run(tmp_path / "run", [0.5])
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    assert [run.path.name for run in read_runs(tmp_path)[0]] == ["run"]


def test_a_run_is_complete_with_its_last_round(tmp_path: Path):
    assert not make_run(tmp_path / "a", [0.5], num_server_rounds=2).is_complete
    assert make_run(tmp_path / "b", [0.5, 0.6], num_server_rounds=2).is_complete


def test_a_run_is_of_its_settings_wherever_it_was_written_to(tmp_path: Path):
    run = make_run(tmp_path / "a", [0.5], seed=1, output_dir="/somewhere")
    assert run.is_of(Config(seed=1))
    assert run.is_of(Config(seed=1, output_dir=str(tmp_path)))
    assert not run.is_of(Config(seed=2, output_dir="/somewhere"))


def test_mean_and_spread_of_few_values():
    assert mean_and_spread([0.2, 0.4, 0.9]) == "0.5000 ± 0.3606"
    assert mean_and_spread([0.2]) == "0.2000"
    assert mean_and_spread([]) == "-"
    assert mean_and_spread([10.0, 20.0], digits=0) == "15 ± 7"


def test_the_last_reason_for_the_end_of_a_run_is_read_and_its_lock_stays(tmp_path: Path):
    with RunFolder(tmp_path / "1", Config()) as folder:
        for reason in ("a long reason, with \u2026 and \n lines", "short"):
            folder.note("error", reason)
            run = Run.read(tmp_path / "1")
            assert (run.error, run.name, run.state) == (reason, folder.name, "running")
    assert run.state == "stopped"
    assert Run.read(tmp_path / "1").error == "short"
