"""Settings, data and models whose authors mean harm, or have names that nobody thought of."""

import csv
import io
import json
import os
from pathlib import Path

import pytest
import torch
from digits_client import context, message
from flwr.app import Context, Message
from PIL import Image
from simulated_grid import weights
from typer.testing import CliRunner, Result

from client_app.app import app as client_app
from pfedgpa_app import cli, section
from pfedgpa_app.config import Config, ConfigError, DataConfig
from pfedgpa_app.data.sites import site_data
from pfedgpa_app.exported import MODEL_KIND, ExportedModel, ExportError
from pfedgpa_app.model_spec import ModelSpec
from pfedgpa_app.models import build_model
from pfedgpa_app.report import RunFolder
from pfedgpa_app.runs import CHECKPOINT
from pfedgpa_app.state import load_state, save_state
from pfedgpa_app.tables import Cell, Table
from pfedgpa_app.vault import DiskVault
from server_app.app import make_strategy
from server_app.checkpoint import CHECKPOINT_KIND, ResumeError, resume, write_checkpoint

ESCAPE = "\x1b[2Jroot"
MANY = 60_000


# Class names


def test_many_class_names_are_split_once(monkeypatch: pytest.MonkeyPatch):
    calls = []
    monkeypatch.setattr(section, "composed", lambda name: calls.append(name) or name)
    section.listed.cache_clear()
    names = ",".join(map(str, range(MANY)))
    config = Config.from_flat(
        {"data.dataset": "sites", "data.shape": "1x8x8", "data.class-names": names}
    )
    assert config.data.info.num_classes == len(config.data.classes) == MANY
    assert len(calls) == MANY


def test_many_repeated_class_names_are_one_problem_of_a_few_words():
    names = ",".join(map(str, range(MANY))) * 2
    with pytest.raises(ConfigError) as caught:
        Config.from_flat(
            {"data.dataset": "sites", "data.shape": "1x8x8", "data.class-names": names}
        )
    (problem,) = caught.value.problems
    assert '"0", "1"' not in problem  # as 599990, the last and the first in one
    assert "more than once; right would be each once" in problem
    assert len(problem) < 500


def test_class_folders_are_looked_up_by_name_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    names = [f"class {number}" for number in range(20)]
    for name in names:
        (tmp_path / name).mkdir()
        for number in range(2):
            Image.new("L", (8, 8), 10).save(tmp_path / name / f"{number}.png")
    calls = []
    classes = DataConfig.classes.fget
    monkeypatch.setattr(DataConfig, "classes", property(lambda c: calls.append(1) or classes(c)))
    config = DataConfig(dataset="sites", shape="1x8x8", class_names=",".join(names))
    data = site_data(tmp_path, config, seed=0)
    assert sorted(data.train_labels.tolist()) == list(range(20))
    assert len(calls) <= 3


def test_names_of_classes_and_folders_do_not_steer_a_terminal(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    folder = tmp_path / ESCAPE
    for name in ("a", f"b{ESCAPE}"):
        (folder / name).mkdir(parents=True)
    (folder / f"b{ESCAPE}" / f"{ESCAPE}.png").write_bytes(b"no picture")
    site = context(**{"data.dataset": "sites", "data.shape": "1x8x8"})
    site.run_config["data.class-names"] = f"a,b{ESCAPE}"
    site.node_config["data-path"] = str(folder)
    reply = client_app(message("train"), site)
    assert reply.has_error()
    said = [record.getMessage() for record in caplog.records if "cannot take part" in record.msg]
    assert len(said) == 1
    assert "\\x1b[2Jroot.png: cannot be read" in said[0]
    assert "\x1b" not in said[0]


# Models


def model_file(file: Path, state: dict[str, torch.Tensor], **settings: object) -> Path:
    """Write a file with these settings, whatever its tensors are."""
    fields = {"client": 0, "round": 1, "config": Config().to_flat() | settings}
    missing = ("partition-id", "num-partitions", "image-mean", "image-std")
    save_state(file, MODEL_KIND, state, **fields, **dict.fromkeys(missing))
    return file


MLP = {"model.name": "mlp", "data.dataset": "sites", "data.class-names": "a,b"}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        # The first layer of either would have 51 GB, or the last.
        ({**MLP, "data.shape": "200000000"}, r"200000000.* right would be 150,000,000"),
        (
            {**MLP, "data.shape": "100000000"},
            r"fc1\.bias has the shape None, and with its settings",
        ),
        (
            {"data.dataset": "sites", "data.shape": "1x8x8", "data.num-classes": 200_000_000},
            r"with its settings model\.name = .cnn-8x8. has ",
        ),
        (
            {"data.dataset": "sites", "data.shape": "3x99999x99999", "data.num-classes": 2}
            | {"model.name": "resnet18"},
            "right would be 150,000,000 numbers or less",
        ),
    ],
)
def test_a_model_that_its_file_does_not_have_is_not_allocated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, object], said: str
):
    file = model_file(tmp_path / "m", {"fc1.weight": torch.ones(2, 2)}, **settings)
    monkeypatch.setattr("pfedgpa_app.exported.build_model", None)
    with pytest.raises(ExportError, match=said):
        ExportedModel.load(file)


def test_a_layer_that_only_its_file_has_is_not_read(tmp_path: Path):
    """The file is sparse: it has 51 GB without a byte of them on the disk."""
    size = 51 * 10**9 // 4
    header = json.dumps(
        {
            "__metadata__": {
                "kind": MODEL_KIND,
                "fields": json.dumps(
                    {"client": 0, "round": 1, "partition-id": None, "num-partitions": None}
                    | {"image-mean": None, "image-std": None, "config": Config().to_flat()}
                ),
            },
            "fc9.weight": {"dtype": "F32", "shape": [size], "data_offsets": [0, 4 * size]},
        }
    ).encode()
    with (tmp_path / "m").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 4 * size)
    with pytest.raises(ExportError, match=r"conv1\.bias has the shape None"):
        ExportedModel.load(tmp_path / "m")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 100,
        (2**40).to_bytes(8, "little"),
        (100_000).to_bytes(8, "little") + b"[" * 100_000,
        (2).to_bytes(8, "little") + b"[]",
        (20).to_bytes(8, "little") + b'{"a":{"shape":[1e9]}',
        (15).to_bytes(8, "little") + b'{"a":{"b":"c"}}',
    ],
)
def test_an_odd_header_is_a_damaged_file(tmp_path: Path, content: bytes):
    (tmp_path / "m").write_bytes(content)
    with pytest.raises(ValueError, match=r"missing or damaged|of no kind"):
        load_state(tmp_path / "m", MODEL_KIND)


def test_a_pipe_is_no_model_and_no_checkpoint(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match=r"missing or damaged: .*is no regular file"):
        load_state(tmp_path / "pipe", MODEL_KIND)


def test_a_model_with_nan_classifies_nothing(tmp_path: Path):
    config = Config()
    state = build_model("cnn-8x8", config.data.info, 0).state_dict()
    state["fc1.bias"][3] = float("nan")
    model_file(tmp_path / "m", state)
    with pytest.raises(ValueError, match=r"fc1\.bias has values that are not finite"):
        ExportedModel.load(tmp_path / "m").module  # noqa: B018, it is built there


def test_names_in_a_models_file_do_not_steer_a_terminal(tmp_path: Path):
    settings = {"data.dataset": "sites", "data.shape": "1x8x8"}
    settings["data.class-names"] = f"{ESCAPE},b{ESCAPE}\t1"
    config = Config.from_flat(settings)
    state = build_model("cnn-8x8", config.data.info, 0).state_dict()
    fields = {"client": 0, "round": 1, "config": config.to_flat(), "partition-id": None}
    fields |= {"num-partitions": None, "image-mean": [0.5], "image-std": [1.0]}
    save_state(tmp_path / "m", MODEL_KIND, state, **fields)
    picture = tmp_path / f"{ESCAPE}.png"
    Image.new("L", (8, 8), 10).save(picture)

    def predict(*paths: Path) -> Result:
        return CliRunner().invoke(cli.app, ["predict", str(tmp_path / "m"), *map(str, paths)])

    done = predict(picture)
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith(f"{tmp_path}/\\x1b[2Jroot.png\t")
    assert done.stdout.count("\t") == 2
    assert "\x1b" not in done.output
    failed = predict(tmp_path / f"{ESCAPE}2.png")
    assert failed.exit_code == 1
    assert "\x1b" not in failed.output


# Checkpoints


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_checkpoint_with_values_that_are_not_finite_is_refused(tmp_path: Path, value: float):
    config = Config(output_dir=str(tmp_path), strategy="fedavg")
    spec = ModelSpec.of_state(weights(0.0))
    strategy = make_strategy(config, spec)
    with RunFolder(tmp_path / "1", config):
        write_checkpoint(tmp_path / "1", strategy)
    again = config.model_copy(update={"resume_from": "1"})
    resume(again, make_strategy(again, spec))
    tensors, fields = load_state(tmp_path / "1" / CHECKPOINT, CHECKPOINT_KIND)
    (name,) = [name for name in tensors if name.endswith("layer.bias")][:1]
    tensors[name][0] = value
    save_state(tmp_path / "1" / CHECKPOINT, CHECKPOINT_KIND, tensors, **fields)
    with pytest.raises(ResumeError, match=r"layer\.bias has values that are not finite"):
        resume(again, make_strategy(again, spec))


def test_a_vector_with_nan_on_disk_is_refused(tmp_path: Path):
    vault = DiskVault(tmp_path)
    vault[3] = torch.tensor([1.0, float("nan")])
    with pytest.raises(ValueError, match="not finite"):
        DiskVault(tmp_path).restore(vault.state())


# Tables


def table(name: str) -> Table:
    return Table(name, [name], {name: [Cell("-")]}, name)


@pytest.mark.parametrize("name", ["=1+1", "+cmd", "-cmd", "@SUM(A1)", "\t=1"])
def test_no_text_of_a_table_is_a_formula_in_a_spreadsheet(name: str):
    (row,) = csv.reader(io.StringIO(table(name).csv()))
    assert row[:3] == [f"'{name}"] * 3
    assert row[3] == "-"  # of a cell: it has numbers and dashes alone


@pytest.mark.parametrize("name", ["a|b", "a\nb", "a\\|b", "a\r\n\r\n| b"])
def test_a_name_in_a_markdown_table_stays_in_its_cell(name: str):
    lines = table(name).markdown().splitlines()
    assert len(lines) == 7
    for line in lines[2:5]:
        # As Markdown reads it: a backslash takes the next letter along.
        plain = line.replace("\\\\", "").replace("\\|", "")
        assert plain.count("|") == 3


# A file that two runs share


def test_a_site_whose_runs_share_a_file_is_told_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    def site(run_id: int) -> Context:
        node = {"partition-id": 0, "num-partitions": 4, "model-path": str(tmp_path / "m")}
        plain = context()
        return Context(run_id, 0, node, plain.state, plain.run_config)

    def train(site: Context, server_round: int) -> Message:
        return client_app(message("train", server_round), site)

    one, other = site(11), site(22)
    train(one, 2)
    assert ExportedModel.load(tmp_path / "m").run == "11"
    train(one, 3)
    train(other, 2)  # a later run takes the place of an earlier one, as it should
    assert "another run" not in caplog.text
    assert ExportedModel.load(tmp_path / "m").run == "22"
    train(one, 4)
    assert f"{tmp_path / 'm'} has a model of another run (22), which is replaced" in caplog.text
    assert "that of this run (11)" in caplog.text
