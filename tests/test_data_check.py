"""What `pfedgpa data check` says of a site's data, which is what the site would load."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from server_app.cli import app

SETTINGS = ("-c", 'data.shape="1x6x4"', "-c", 'data.class-names="normal,benign,malignant"')


def check(path: Path, *words: str) -> Result:
    return CliRunner().invoke(app, ["data", "check", str(path), *words])


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder with 10 pictures of a class and 5 of another, and what is nothing to read."""
    for name, number in (("benign", 10), ("malignant", 5)):
        (tmp_path / name).mkdir()
        for grey in range(number):
            Image.new("L", (4, 6), 100 + grey).save(tmp_path / name / f"{grey:03}.png")
    (tmp_path / "benign" / "notes.txt").touch()
    (tmp_path / "benign" / ".DS_Store").touch()
    (tmp_path / ".thumbnails").mkdir()
    return tmp_path


def test_a_folder_is_counted_by_class_and_split(site: Path):
    result = check(site, *SETTINGS, "-c", "data.test-fraction=0.4")
    assert result.exit_code == 0, result.stderr
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert lines == [
        f"{site} can be used: 9 examples for training, 6 for testing.",
        "Each is 1x6x4, uint8 from 100 to 109; 360 bytes in memory.",
        "class training testing",
        "benign 6 4",
        "malignant 3 2",
        "Classes without examples, 1 of 3: normal",
        f"Not read: {site}/benign: skipped: 1 .txt",
        f"Not read: {site}: 1 hidden folder, 1 hidden file, skipped",
    ]


def test_the_file_of_the_model_is_checked_as_its_node_does(site: Path):
    def checked(path: str) -> Result:
        return check(site, *SETTINGS, "--model-path", path)

    new = checked(f"{site.parent}/model.safetensors")
    line = f"The site's model will be written to {site.parent}/model.safetensors"
    assert new.exit_code == 0
    assert new.stdout.splitlines()[-1] == f"{line}."
    (site.parent / "model.safetensors").touch()
    again = checked(f"{site.parent}/model.safetensors")
    assert again.stdout.splitlines()[-1] == f"{line}, in place of the file that is there."
    gone = checked("no-such-folder/model.safetensors")
    assert gone.exit_code == 1
    # Like the node, it takes relative paths from the home folder.
    home = Path.home() / "no-such-folder" / "model.safetensors"
    assert gone.stderr.startswith(f"model-path {home} is in a folder that does not exist; right")


def test_a_file_is_described_with_settings_of_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    np.savez(tmp_path / "site.npz", x=np.ones((8, 3)) / 4, y=np.arange(8) % 2, years=np.ones(8))
    settings = '[data]\nshape = "3"\nnum-classes = 2\n[model]\nname = "mlp"\n'
    (tmp_path / "run.toml").write_text(settings)
    monkeypatch.chdir(tmp_path)
    result = check(Path("site.npz"), "run.toml")
    assert result.exit_code == 0, result.stderr
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert lines == [
        f"{tmp_path / 'site.npz'} can be used: 6 examples for training, 2 for testing.",
        "Each is 3, float32 from 0.25 to 0.25; 96 bytes in memory.",
        "class training testing",
        "0 3 1",
        "1 3 1",
        f"Not read: {tmp_path / 'site.npz'}: arrays other than x and y: years",
    ]


def test_data_that_cannot_be_used_are_an_error_in_a_line(site: Path):
    Image.new("L", (5, 6)).save(site / "benign" / "000.png")
    for path, problem in ((site, "000.png: "), (site / "none", "none: no such folder of images")):
        result = check(path, *SETTINGS)
        assert result.exit_code == 1
        assert not result.stdout
        (line,) = result.stderr.splitlines()
        assert problem in line


def test_settings_without_a_shape_are_refused(site: Path):
    result = check(site)
    assert result.exit_code == 1
    assert 'data.shape = ""' in result.stderr
