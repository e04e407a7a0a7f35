"""Text and names are UTF-8 whatever the locale says, and a terminal of ASCII shows them."""

import json
import os
import subprocess
import sys
import tomllib
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pfedgpa_app.config import Config
from pfedgpa_app.data import ImageStats
from pfedgpa_app.exported import ExportedModel
from pfedgpa_app.files import composed, count_of, is_hidden, quoted, read_text, read_toml
from pfedgpa_app.models import build_model

PROJECT = Path(__file__).parents[1]
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
BOM = b"\xef\xbb\xbf"
CLASSES = ["na\u00efve", *"bcdefghij"]
# Each of its arguments is a command line.
COMMANDS = """
import sys
from server_app.cli import app
for line in sys.argv[1:]:
    sys.argv[1:] = line.split()
    try:
        app()
    except SystemExit as end:
        print("exit", end.code, flush=True)
"""


def test_one_thing_is_no_plural():
    # NumPy's numbers too, as in messages about partitions.
    found = [count_of(number, "client") for number in (0, 1, np.int64(1), np.int64(2))]
    assert found == ["0 clients", "1 client", "1 client", "2 clients"]


def in_ascii(*command: str | Path, folder: Path) -> subprocess.CompletedProcess[bytes]:
    """Run Python where the locale knows nothing but ASCII."""
    env = {**os.environ, **ASCII, "PYTHONPATH": str(PROJECT), "HOME": str(folder)}
    command = (sys.executable, "-c", *command)
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, check=False)


@pytest.mark.parametrize("before", [b"", BOM])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_toml_is_utf_8_with_or_without_a_byte_order_mark(tmp_path: Path, before: bytes, end: bytes):
    file = tmp_path / "a.toml"
    file.write_bytes(before + "title = 'Größe'".encode() + end + b"seeds = [0]" + end)
    assert read_toml(file) == {"title": "Größe", "seeds": [0]}


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_toml_of_another_encoding_is_none(tmp_path: Path, encoding: str):
    (tmp_path / "a.toml").write_bytes("title = 'Größe'".encode(encoding))
    with pytest.raises((UnicodeDecodeError, tomllib.TOMLDecodeError)):
        read_toml(tmp_path / "a.toml")


def test_names_that_look_alike_are_composed_alike():
    for form in ("NFC", "NFD"):
        assert composed(unicodedata.normalize(form, "naïve Größe")) == "naïve Größe"
    assert composed(os.fsencode("naïve").decode("ascii", "surrogateescape")) == "naïve"
    latin = b"na\xefve".decode("utf-8", "surrogateescape")
    assert composed(latin) == latin  # such a name is no UTF-8, and stays what it is


def test_names_are_quoted_with_what_cannot_be_seen_escaped():
    assert quoted("a b ") == '"a b "'
    assert quoted("naïve\n\udcff") == '"naïve\\n\\udcff"'


@pytest.mark.parametrize("name", ["a.png", "1", "thumbs", "@home", "data.ini", "_a", "~a", "#1"])
def test_what_people_call_their_data_is_not_hidden(name: str):
    assert not is_hidden(name)


@pytest.mark.parametrize(
    "name", [".a", "._a.png", "THUMBS.DB", "Desktop.ini", "@eaDir", "__MACOSX"]
)
def test_what_systems_leave_is_hidden(name: str):
    assert is_hidden(name)


SUITE = """title = "Größe ± …"
clients = 2
seeds = [0]
curve = true
[settings]
num-server-rounds = 1
client.local-epochs = 1
data.train-samples = 10
[rows."gemäß"]
strategy = "fedavg"
[rows.anders]
strategy = "local"
"""


def test_a_bench_runs_and_writes_where_the_locale_is_ascii(tmp_path: Path):
    (tmp_path / "größe.toml").write_bytes(BOM + SUITE.encode())
    bench = "bench größe.toml --processes 0 --results ergebnis"
    lines = [f"{bench} --rows gem\u00e4", f"{bench} --rows gema\u0308 --json", bench]
    report = "report ergebnis --output seite.html"
    done = in_ascii(COMMANDS, *lines, report, f"{report} -o größe.html", folder=tmp_path)
    assert done.stdout.count(b"exit 0") == 5, done.stderr.decode()
    assert b"Gr??e +- ...: 2 runs, 1 finished before" in done.stdout
    for suffix in ("txt", "md", "tex", "csv", "svg"):
        written = (tmp_path / "ergebnis" / f"größe.{suffix}").read_text(encoding="utf-8")
        assert "Größe" in written
        assert "gemäß" in written
    index = read_text(tmp_path / "ergebnis" / "größe-gemä.json")
    assert json.loads(index)["title"] == "Größe ± …"
    assert "gemäß" in read_text(tmp_path / "seite.html")
    assert (tmp_path / "größe.html").exists()


def test_settings_are_checked_where_the_locale_is_ascii(tmp_path: Path):
    names = ",".join(CLASSES)
    text = f'output-dir = "läufe"\n[data]\nclass-names = "{names}"\n'
    (tmp_path / "größe.toml").write_bytes(BOM + text.encode())
    lines = ["config check größe.toml", 'config check -c data.class-names="ä,ö"', "runs show läufe"]
    done = in_ascii(COMMANDS, *lines, "runs --output-dir läufe", folder=tmp_path)
    assert b"data.class-names = 'na?ve,b," in done.stdout
    assert b'"?,?": has 2 names for 10 classes' in done.stderr
    assert "no run" in done.stderr.decode()
    assert [line for line in done.stdout.splitlines() if b"exit" in line] == [
        *(b"exit 0", b"exit 1", b"exit 1", b"exit 0")
    ]
    assert b"Traceback" not in done.stderr


def test_a_site_and_its_predictions_are_the_same_where_the_locale_is_ascii(tmp_path: Path):
    folder = tmp_path / "größe" / unicodedata.normalize("NFD", CLASSES[0])
    folder.mkdir(parents=True)
    for number in range(3):
        pixels = np.full((8, 8), number, np.uint8)
        Image.fromarray(pixels).save(folder / f"ä{number}.png")
    flat = {"data.class-names": ",".join(CLASSES)}
    state = build_model("cnn-8x8", Config().data.info, 0).state_dict()
    state["fc2.bias"][0] = 1e3
    stats = ImageStats(torch.ones(1), torch.ones(1))
    ExportedModel(state, Config.from_flat(flat), 0, 1, stats).save(tmp_path / "model")
    line = f"predict model {folder.relative_to(tmp_path)}"
    done = in_ascii(COMMANDS, line, f"{line} --json", folder=tmp_path)
    assert done.stderr == b""
    lines = done.stdout.splitlines()
    assert lines[0].split(b"\t") == [
        os.fsencode(folder.relative_to(tmp_path) / "ä0.png"),
        b"na?ve",
        b"1.0000",
    ]
    result = json.loads(lines[4])
    assert result["file"] == str(folder.relative_to(tmp_path) / "ä0.png")
    script = """
from pathlib import Path
from pfedgpa_app.config import Config
from pfedgpa_app.data import site_data
from pfedgpa_app.files import read_toml
from pfedgpa_app.files import home_path
data = Config.from_flat({"data.class-names": read_toml(Path("a.toml"))["names"]}).data
print(site_data(home_path("gr\\u00f6\\u00dfe"), data, 0).train_labels.tolist())
"""
    (tmp_path / "a.toml").write_text(f'names = "{",".join(CLASSES)}"', encoding="utf-8")
    done = in_ascii(script, folder=tmp_path)
    assert done.stdout == b"[0, 0]\n", done.stderr.decode()
