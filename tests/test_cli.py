"""The command pfedgpa, but for its bench."""

import errno
import json
import re
import shutil
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save
from typer.testing import CliRunner

from pfedgpa_app import cli
from pfedgpa_app.config import Config
from pfedgpa_app.data import ImageStats, client_data, image_stats, load_dataset
from pfedgpa_app.evaluation import evaluate
from pfedgpa_app.exported import ExportedModel
from pfedgpa_app.models import build_model
from pfedgpa_app.report import RunFolder
from pfedgpa_app.state import WriteError
from server_app.cli import app


@pytest.fixture
def runner() -> CliRunner:
    return CliRunner()


def finish_run(path: Path, config: Config, accuracy: float, num_nodes: int = 10) -> None:
    folder = RunFolder(path, config)
    for number in range(1, config.num_server_rounds + 1):
        row: dict[str, Any] = {"round": number, "num-nodes": num_nodes}
        folder.add_round(
            row | {"personalized-accuracy": accuracy, "finetuned-accuracy": accuracy / 2}, []
        )


def test_right_settings_are_listed_where_they_differ_from_the_defaults(
    runner: CliRunner, tmp_path: Path
):
    file = tmp_path / "settings.toml"
    file.write_text('seed = 1\n[data]\ndataset = "digits"\n[diffusion]\nfidelity = 0.5\n')
    result = runner.invoke(app, ["config", "check", str(file)])
    assert result.exit_code == 0
    first, *rest = result.stdout.splitlines()
    assert first == "The configuration is right; different from the defaults: 2 settings."
    assert rest[:2] == ["  seed = 1", "  diffusion.fidelity = 0.5"]
    assert any(
        line.startswith(
            "server.min-available-nodes = 2: a run may start with so few. 2 clients share nothing"
        )
        for line in rest
    )


@pytest.mark.parametrize(
    "setting", ["server.min-available-nodes=3", "diffusion.min-contributors=2", 'strategy="fedavg"']
)
def test_settings_with_which_all_share_are_not_warned_of(runner: CliRunner, setting: str):
    result = runner.invoke(cli.app, ["config", "check", "-c", setting])
    assert result.exit_code == 0
    assert "nothing" not in result.stdout


def test_overrides_win_over_the_file(runner: CliRunner, tmp_path: Path):
    file = tmp_path / "settings.toml"
    file.write_text("seed = 1\n[client]\nlocal-epochs = 2\n")
    overrides = ["-c", "client.local-epochs=3", "--config", 'strategy="local"']
    result = runner.invoke(app, ["config", "check", str(file), *overrides])
    assert result.exit_code == 0
    assert result.stdout.splitlines()[1:4] == [
        "  strategy = 'local'",
        "  seed = 1",
        "  client.local-epochs = 3",
    ]


def test_wrong_settings_are_all_named(runner: CliRunner):
    result = runner.invoke(app, ["config", "check", "-c", "sed=1", "-c", "diffusion.start=0"])
    assert result.exit_code == 1
    assert result.stderr.splitlines() == [
        "The configuration has 2 problems:",
        "  - sed = 1: no such setting, did you mean seed?",
        "  - diffusion.start = 0: should be greater than or equal to 1 or 'auto'",
    ]


@pytest.mark.parametrize("override", ["", "# seed=1"])
def test_an_override_of_nothing_is_refused(runner: CliRunner, override: str):
    result = runner.invoke(app, ["config", "check", "-c", override])
    assert result.exit_code == 1
    assert result.stderr == f'--config "{override}": right would be, for example, seed=1\n'


@pytest.mark.parametrize("override", ["strategy=local", "seed", "seed=1 2"])
def test_an_override_that_is_not_toml_is_refused_with_an_example(runner: CliRunner, override: str):
    result = runner.invoke(app, ["config", "check", "-c", override])
    assert result.exit_code == 1
    assert result.stderr.startswith("not TOML: ")
    assert 'right would be, for example, strategy="local" or seed=1' in result.stderr


@pytest.mark.parametrize("content", [b"[data\n", b"strategy = 'caf\xe9'\n"], ids=["toml", "utf-8"])
def test_a_file_that_is_not_toml_is_refused(runner: CliRunner, tmp_path: Path, content: bytes):
    file = tmp_path / "settings.toml"
    file.write_bytes(content)
    result = runner.invoke(app, ["config", "check", str(file)])
    assert result.exit_code == 1
    assert result.stderr.startswith("not TOML: ")


def test_a_file_that_is_not_there_is_named(runner: CliRunner, tmp_path: Path):
    result = runner.invoke(app, ["config", "check", str(tmp_path / "none.toml")])
    assert result.exit_code == 1
    assert "none.toml" in result.stderr


def test_own_functions_are_found_in_the_current_folder(
    runner: CliRunner, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    (tmp_path / "folder_of_mine.py").write_text(
        "from torch import nn\n\ndef model(info):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, info.num_classes))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    result = runner.invoke(app, ["config", "check", "-c", 'model.name="folder_of_mine:model"'])
    assert result.exit_code == 0, result.stderr


def test_own_modules_win_over_installed_packages_of_their_name(
    runner: CliRunner, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """Opacus installs a package that is called benchmarks."""
    for folder, source in (("installed", ""), ("own", "from torch import nn\n")):
        (tmp_path / folder / "name_of_both").mkdir(parents=True)
        (tmp_path / folder / "name_of_both" / "__init__.py").write_text(source)
    with (tmp_path / "own" / "name_of_both" / "__init__.py").open("a") as file:
        file.write("def model(info): return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "installed"), *sys.path])
    monkeypatch.chdir(tmp_path / "own")
    result = runner.invoke(app, ["config", "check", "-c", 'model.name="name_of_both:model"'])
    assert result.exit_code == 0, result.output


def test_the_version_is_that_of_the_package(runner: CliRunner):
    result = runner.invoke(cli.app, ["--version"])
    assert result.exit_code == 0
    assert result.stdout == f"pfedgpa {version('pfedgpa')}\n"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(errno.ENOSPC, "No space left", "x/y"), "x/y: No space left; right would be free"),
        (PermissionError(errno.EACCES, "Permission denied", "x"), "x: Permission denied; right"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "x"), "x: Not a directory"),
        (WriteError("x cannot be written: why"), "x cannot be written: why"),
    ],
)
def test_what_the_system_refuses_is_said_in_a_line(
    runner: CliRunner, monkeypatch: pytest.MonkeyPatch, error: OSError, line: str
):
    def refuse(*arguments: object) -> None:
        raise error

    monkeypatch.setattr("pfedgpa_app.preflight.preflight", refuse)
    result = runner.invoke(app, ["config", "check"])
    assert result.exit_code == 1
    assert result.stderr.startswith(line)
    assert result.stderr.count("\n") == 1


DIGITS = load_dataset(Config().data, 0)


def finish_models(path: Path, clients: list[int], **settings: Any) -> None:
    """Leave a run of digits whose clients have models of their own."""
    config = Config.from_flat({"num-server-rounds": 2, **settings})
    finish_run(path, config, 0.5)
    folder = RunFolder(path.with_name(path.name + "-models"), config)
    stats = torch.stack(list(image_stats(DIGITS)))
    for client in clients:
        state = build_model(config.model.name, config.data.info, seed=client).state_dict()
        site = {"image-stats": stats, "partition": torch.tensor([client, 10])}
        folder.save_model(client, state, 2, site)
    (folder.path / "models").rename(path / "models")


@pytest.fixture
def model_file(runner: CliRunner, tmp_path: Path) -> Path:
    finish_models(tmp_path / "runs" / "111", [2, 3])
    file = tmp_path / "model.safetensors"
    command = ["export", "111", "--client", "3", "-o", str(file)]
    result = runner.invoke(cli.app, [*command, "--output-dir", str(tmp_path / "runs")])
    assert result.exit_code == 0, result.stderr
    assert result.stdout == f"{file}: client 3 after round 2 (pfedgpa, digits, cnn-8x8)\n"
    return file


def test_an_exported_model_is_that_of_the_client_with_the_settings_of_the_run(model_file: Path):
    expected = build_model("cnn-8x8", Config().data.info, seed=3).state_dict()
    state = load_file(model_file)
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    fields = json.loads(safe_open(model_file, "pt").metadata()["fields"])
    assert Config.from_flat(fields["config"]) == Config(num_server_rounds=2)
    assert fields["client"] == 3


def test_a_run_is_found_by_its_folder_too(
    runner: CliRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    finish_models(tmp_path / "runs" / "111", [0])
    monkeypatch.chdir(tmp_path)
    for number, run in enumerate([str(tmp_path / "runs" / "111"), "runs/111"]):
        command = ["export", run, "--client", "0", "-o", f"{number}.safetensors"]
        assert runner.invoke(cli.app, command).exit_code == 0
        assert (tmp_path / f"{number}.safetensors").exists()


def test_what_cannot_be_exported_leaves_no_file(runner: CliRunner, tmp_path: Path):
    finish_models(tmp_path / "111", [0, 1])
    RunFolder(tmp_path / "begun", Config())
    (tmp_path / "other").mkdir()
    (tmp_path / "old").write_text("precious")
    before = sorted(tmp_path.rglob("*"))
    for run, client, output, reason in (
        ("112", "0", "new", r"There is no run .*/112; pfedgpa runs lists"),
        ("other", "0", "new", "other is not the folder of a run"),
        ("begun", "0", "new", "begun has no models: .* 0 of 10 are complete"),
        ("111", "4", "new", "no model of client 4; there are those of 0, 1"),
        ("111", "0", "old", "old exists; --force"),
        ("111", "0", "none/new", "none is no folder"),
        ("111", "0", "other", "other is a folder"),
        ("111", "0", "/proc/new", "/proc/new cannot be written: .*No such file"),
    ):
        command = ["export", run, "--client", client, "-o", str(tmp_path / output)]
        result = runner.invoke(cli.app, [*command, "--output-dir", str(tmp_path)])
        assert result.exit_code == 1
        assert re.search(reason, result.stderr), result.stderr
        assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "old").read_text() == "precious"


def test_force_writes_in_place_of_a_file(runner: CliRunner, model_file: Path, tmp_path: Path):
    model_file.write_text("something else")
    command = ["export", "111", "--client", "3", "-o", str(model_file), "--force"]
    result = runner.invoke(cli.app, [*command, "--output-dir", str(tmp_path / "runs")])
    assert result.exit_code == 0
    expected = build_model("cnn-8x8", Config().data.info, seed=3).state_dict()
    state = load_file(model_file)
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


def test_class_counts_travel_from_export_to_predict(
    runner: CliRunner, tmp_path: Path, pictures: Path
):
    finish_models(tmp_path / "111", [0], **{"client.class-prior": True})
    file = tmp_path / "model.safetensors"
    export = ["export", "111", "--client", "0", "-o", str(file), "--output-dir", str(tmp_path)]
    assert runner.invoke(cli.app, export).exit_code == 0
    labels = client_data(Config().data, 0, 0, 10).train_labels
    fields = json.loads(safe_open(file, "pt").metadata()["fields"])
    assert fields["class-counts"] == torch.bincount(labels, minlength=10).tolist()
    predict = ["predict", str(file), str(pictures)]
    only_six = runner.invoke(cli.app, [*predict, "--class-counts", "0,0,0,0,0,0,999999999,0,0,0"])
    assert [line.split("\t")[1] for line in only_six.stdout.splitlines()] == ["6"] * 3
    for counts in ("", "a,b", "-1,2", "1,,2", "1.5", "1" * 16, "²"):
        wrong = runner.invoke(cli.app, [*predict, "--class-counts", counts])
        assert wrong.exit_code == 1
        assert wrong.stderr == (
            f'--class-counts "{counts}": right would be whole numbers from 0, of up to 15 digits, '
            'such as "12,0,30"\n'
        )
    twice = runner.invoke(
        cli.app, ["predict", str(file), "--test-set", "--class-counts", "1,1,1,1,1,1,1,1,1,1"]
    )
    assert twice.exit_code == 1
    assert "comes with its training set" in twice.stderr


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(3):
        Image.fromarray(DIGITS.images[number, 0].numpy()).save(folder / f"{number}.png")
    return folder


def probabilities_of_client_3() -> torch.Tensor:
    model = build_model("cnn-8x8", Config().data.info, seed=3).eval()
    mean, std = image_stats(DIGITS)
    with torch.no_grad():
        return model((DIGITS.images[:3] - mean) / std).softmax(1)


def test_predictions_have_a_line_an_image(runner: CliRunner, model_file: Path, pictures: Path):
    np.savez(pictures / "all.npz", x=DIGITS.images[:3].numpy())
    result = runner.invoke(
        cli.app, ["predict", str(model_file), str(pictures / "all.npz"), str(pictures)]
    )
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""
    best, classes = probabilities_of_client_3().max(1)
    names = [f"{pictures / 'all.npz'}[{row}]" for row in range(3)]
    names += [str(pictures / f"{number}.png") for number in range(3)]
    assert result.stdout.splitlines() == [
        f"{name}\t{classes[row % 3]}\t{best[row % 3]:.4f}" for row, name in enumerate(names)
    ]


def test_of_folders_named_after_classes_accuracy_and_confusions_are_printed(
    runner: CliRunner, model_file: Path, pictures: Path
):
    predicted = probabilities_of_client_3().argmax(1).tolist()
    true = [predicted[0], (predicted[1] + 1) % 10, predicted[2]]
    for number, label in enumerate(true):
        (pictures / str(label) / "left").mkdir(parents=True, exist_ok=True)
        (pictures / f"{number}.png").rename(pictures / str(label) / "left" / f"{number}.png")
    (pictures / "unknown").mkdir()
    result = runner.invoke(cli.app, ["predict", str(model_file), str(pictures)])
    assert result.exit_code == 0, result.stderr
    assert result.stderr == f"{pictures}: skipped: 1 folder\n"
    lines = result.stdout.splitlines()
    assert lines[3] == "accuracy 0.6667 on 3 examples"
    seen = sorted({*true, *predicted})
    assert lines[4].split()[-len(seen) :] == [str(label) for label in seen]
    row = next(line.split() for line in lines[5:] if line.split()[0] == str(true[1]))
    assert row[1 + seen.index(predicted[1])] == "1"
    as_json = runner.invoke(cli.app, ["predict", str(model_file), str(pictures), "--json"])
    fields = json.loads(as_json.stdout.splitlines()[-1])
    assert (fields["num-examples"], fields["accuracy"]) == (3, pytest.approx(2 / 3))
    assert fields["confusion"][true[1]][predicted[1]] == 1
    assert sum(map(sum, fields["confusion"])) == 3


def test_pictures_beside_floats_do_not_count_as_normalized(
    runner: CliRunner, tmp_path: Path, pictures: Path
):
    """Of a tensor of both, all would be floats."""
    file = tmp_path / "model.safetensors"
    state = build_model("cnn-8x8", Config().data.info, seed=3).state_dict()
    ExportedModel(state, Config(), 0, 1, ImageStats(torch.zeros(1), torch.ones(1))).save(file)
    np.savez(tmp_path / "a.npz", x=np.zeros((2, 1, 8, 8), np.float32))
    for given in ([tmp_path / "a.npz", pictures], [pictures, tmp_path / "a.npz"]):
        result = runner.invoke(cli.app, ["predict", str(file), *map(str, given)])
        assert result.exit_code == 1
        assert "examples of torch.uint8; right would be torch.float32" in result.stderr
        assert ".png" not in result.stdout


def test_pictures_of_sixteen_bits_are_seen_as_those_of_eight(
    runner: CliRunner, model_file: Path, pictures: Path
):
    """A level that only 16 bits have, a pixel each, changes little."""
    whole = runner.invoke(cli.app, ["predict", str(model_file), str(pictures), "--json"])
    for number in range(3):
        pixels = DIGITS.images[number, 0].numpy().astype(np.uint16) * 257
        pixels[0, 0] += 1
        Image.fromarray(pixels).save(pictures / f"{number}.png")
    finer = runner.invoke(cli.app, ["predict", str(model_file), str(pictures), "--json"])
    rows = [map(json.loads, result.stdout.splitlines()) for result in (whole, finer)]
    one, other = (torch.tensor([row["probabilities"] for row in each]) for each in rows)
    assert len(one) == 3
    assert not torch.equal(one, other)
    torch.testing.assert_close(one, other, rtol=0.01, atol=1e-4)


def test_what_predict_passes_over_is_said(runner: CliRunner, model_file: Path, pictures: Path):
    (pictures / "a.tif").touch()
    (pictures / "._0.png").touch()
    shutil.copytree(pictures, pictures / ".ipynb_checkpoints")
    result = runner.invoke(cli.app, ["predict", str(model_file), str(pictures)])
    assert result.stderr == f"{pictures}: skipped: 1 .tif\n"
    assert len(result.stdout.splitlines()) == 3


def test_predictions_in_json_have_all_probabilities(
    runner: CliRunner, model_file: Path, pictures: Path
):
    result = runner.invoke(cli.app, ["predict", str(model_file), str(pictures), "--json"])
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    expected = probabilities_of_client_3()
    assert [row["file"] for row in rows] == [str(pictures / f"{n}.png") for n in range(3)]
    assert [row["class"] for row in rows] == expected.argmax(1).tolist()
    torch.testing.assert_close(torch.tensor([row["probabilities"] for row in rows]), expected)
    assert all(row["probability"] == max(row["probabilities"]) for row in rows)


def test_more_images_than_one_batch_are_all_predicted(
    runner: CliRunner, model_file: Path, tmp_path: Path
):
    np.savez(tmp_path / "many.npz", x=DIGITS.images[:600].numpy())
    result = runner.invoke(cli.app, ["predict", str(model_file), str(tmp_path / "many.npz")])
    names = [line.split("\t")[0] for line in result.stdout.splitlines()]
    assert names == [f"{tmp_path / 'many.npz'}[{row}]" for row in range(600)]


def test_resizing_is_said_once(runner: CliRunner, model_file: Path, tmp_path: Path):
    np.savez(tmp_path / "large.npz", x=np.zeros((300, 1, 16, 9), np.uint8))
    result = runner.invoke(cli.app, ["predict", str(model_file), str(tmp_path / "large.npz")])
    note = f"{tmp_path / 'large.npz'}[0] is 16x9; images are resized to 8x8\n"
    assert result.stderr == note
    assert len(result.stdout.splitlines()) == 300


def test_the_clients_own_test_set_is_judged(runner: CliRunner, model_file: Path):
    data = client_data(Config().data, 0, 3, 10)
    model = build_model("cnn-8x8", Config().data.info, seed=3)
    accuracy, loss = evaluate(model, data.test_inputs, data.test_labels, data.stats)
    size = len(data.test_labels)
    result = runner.invoke(cli.app, ["predict", str(model_file), "--test-set"])
    assert result.stdout == f"accuracy {accuracy:.4f}, loss {loss:.4f} on {size} examples\n"
    result = runner.invoke(cli.app, ["predict", str(model_file), "--test-set", "--json"])
    assert json.loads(result.stdout) == {"num-examples": size, "accuracy": accuracy, "loss": loss}


def test_a_file_that_is_no_model_ends_with_its_name(runner: CliRunner, model_file: Path):
    whole = model_file.read_bytes()
    for content, reason in (
        (b"", "damaged"),
        (b"\x80\x04K\x01.", "damaged"),
        (whole[:-9], "damaged"),
        (save({"x": torch.ones(1)}), "right would be 'pfedgpa-model-2'"),
        (None, "missing"),
    ):
        model_file.unlink() if content is None else model_file.write_bytes(content)
        result = runner.invoke(cli.app, ["predict", str(model_file), "--test-set"])
        assert result.exit_code == 1
        assert isinstance(result.exception, SystemExit)
        assert re.search(f"model.safetensors.* {reason}", result.stderr), result.stderr


@pytest.mark.parametrize("options", [[], ["a.png", "--test-set"]])
def test_a_prediction_is_of_images_or_of_the_test_set(
    runner: CliRunner, model_file: Path, options: list[str]
):
    result = runner.invoke(cli.app, ["predict", str(model_file), *options])
    assert result.exit_code == 1
    assert "either images or --test-set" in result.stderr


def test_a_file_that_is_no_image_ends_with_its_name(
    runner: CliRunner, model_file: Path, pictures: Path
):
    (pictures / "1.png").write_text("no picture")
    result = runner.invoke(cli.app, ["predict", str(model_file), str(pictures)])
    assert result.exit_code == 1
    assert result.stderr.startswith(f"{pictures / '1.png'}: cannot be read")


def test_an_own_model_is_found_in_the_current_folder_if_it_is_trusted(
    runner: CliRunner, tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
):
    finish_models(tmp_path / "111", [0], **{"model.name": "own_models:linear"})
    code = (Path(__file__).parent / "own_models.py").read_text()
    file = tmp_path / "111" / "models" / "client-0.safetensors"
    content = file.read_bytes()
    # As long as the name in the file, which says how long its header is.
    (tmp_path / "here_model.py").write_text(code)
    file.write_bytes(content.replace(b"own_models:linear", b"here_model:linear"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    result = runner.invoke(cli.app, ["predict", str(file), str(pictures)])
    assert result.exit_code == 1
    assert "--trust" in result.stderr
    assert "here_model" not in sys.modules
    result = runner.invoke(cli.app, ["predict", str(file), str(pictures), "--trust"])
    assert result.exit_code == 0, result.stderr
    assert len(result.stdout.splitlines()) == 3
