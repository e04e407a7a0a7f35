"""Text and names are UTF-8 whatever the locale says, and a terminal of ASCII shows them."""

import json
import os
import re
import subprocess
import sys
import tomllib
import unicodedata
from pathlib import Path
from typing import NamedTuple

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
# Each of its arguments is a command line of `pfedgpa`, or a file of Python.
COMMANDS = """
import runpy, sys
from server_app.cli import app
for line in sys.argv[1:]:
    code = 0
    sys.argv[1:] = line.split()
    try:
        runpy.run_path(line) if line.endswith(".py") else app()
    except SystemExit as end:
        code = end.code
    for stream in (sys.stdout, sys.stderr):
        print("exit", code, file=stream, flush=True)
"""


def test_one_thing_is_no_plural():
    # NumPy's numbers too, as in messages about partitions.
    found = [count_of(number, "client") for number in (0, 1, np.int64(1), np.int64(2))]
    assert found == ["0 clients", "1 client", "1 client", "2 clients"]


class Done(NamedTuple):
    """What a command wrote, and how it ended."""

    code: int
    stdout: bytes
    stderr: bytes


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


BENCH = "bench größe.toml --processes 0 --results ergebnis"
REPORT = "report ergebnis --output seite.html"
SITE = f"größe/{unicodedata.normalize('NFD', CLASSES[0])}"
LINES = {
    "row": f"{BENCH} --rows gem\u00e4",
    "row, decomposed": f"{BENCH} --rows gema\u0308 --json",
    "bench": BENCH,
    "report": REPORT,
    "second report": f"{REPORT} -o größe.html",
    "check": "config check läufe.toml",
    "wrong": 'config check -c data.class-names="ä,ö"',
    "no run": "runs show läufe",
    "no runs": "runs --output-dir läufe",
    "predict": f"predict model {SITE}",
    "predict --json": f"predict model {SITE} --json",
    "site": "site.py",
}
SITE_LABELS = """
from pathlib import Path
from pfedgpa_app.config import Config
from pfedgpa_app.data import site_data
from pfedgpa_app.files import home_path, read_toml
data = Config.from_flat({"data.class-names": read_toml(Path("a.toml"))["names"]}).data
print(site_data(home_path("gr\\u00f6\\u00dfe"), data, 0).train_labels.tolist())
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with a suite, settings, a site's images and a model."""
    folder, names = tmp_path_factory.mktemp("ascii"), ",".join(CLASSES)
    (folder / "größe.toml").write_bytes(BOM + SUITE.encode())
    text = f'output-dir = "läufe"\n[data]\nclass-names = "{names}"\n'
    (folder / "läufe.toml").write_bytes(BOM + text.encode())
    (folder / SITE).mkdir(parents=True)
    for number in range(3):
        pixels = np.full((8, 8), number, np.uint8)
        Image.fromarray(pixels).save(folder / SITE / f"ä{number}.png")
    state = build_model("cnn-8x8", Config().data.info, 0).state_dict()
    state["fc2.bias"][0] = 1e3
    stats = ImageStats(torch.ones(1), torch.ones(1))
    config = Config.from_flat({"data.class-names": names})
    ExportedModel(state, config, 0, 1, stats).save(folder / "model")
    (folder / "site.py").write_text(SITE_LABELS)
    (folder / "a.toml").write_text(f'names = "{names}"', encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def done(folder: Path) -> dict[str, Done]:
    """Type all commands where the locale knows nothing but ASCII, in one process."""
    env = {**os.environ, **ASCII, "PYTHONPATH": str(PROJECT), "HOME": str(folder)}
    command = (sys.executable, "-c", COMMANDS, *LINES.values())
    whole = subprocess.run(command, cwd=folder, env=env, capture_output=True, check=False)
    out, err = (
        re.findall(rb"(.*?)^exit (\d+)\n", each, flags=re.DOTALL | re.MULTILINE)
        for each in (whole.stdout, whole.stderr)
    )
    assert len(out) == len(err) == len(LINES), whole.stderr.decode()
    assert b"Traceback" not in whole.stderr
    pairs = zip(LINES, out, err, strict=True)
    return {name: Done(int(code), text, errors) for name, (text, code), (errors, _) in pairs}


def test_a_bench_runs_and_writes_where_the_locale_is_ascii(folder: Path, done: dict[str, Done]):
    names = ("row", "row, decomposed", "bench", "report", "second report")
    assert [done[name].code for name in names] == [0] * 5
    assert b"Gr??e +- ...: 2 runs, 1 finished before" in done["bench"].stdout
    for suffix in ("txt", "md", "tex", "csv", "svg"):
        written = (folder / "ergebnis" / f"größe.{suffix}").read_text(encoding="utf-8")
        assert "Größe" in written
        assert "gemäß" in written
    index = read_text(folder / "ergebnis" / "größe-gemä.json")
    assert json.loads(index)["title"] == "Größe ± …"
    assert "gemäß" in read_text(folder / "seite.html")
    assert (folder / "größe.html").exists()


def test_settings_are_checked_where_the_locale_is_ascii(done: dict[str, Done]):
    assert [done[name].code for name in ("check", "wrong", "no run", "no runs")] == [0, 1, 1, 0]
    assert b"data.class-names = 'na?ve,b," in done["check"].stdout
    assert b'"?,?": has 2 names for 10 classes' in done["wrong"].stderr
    assert b"no run" in done["no run"].stderr


def test_a_site_and_its_predictions_are_the_same_where_the_locale_is_ascii(done: dict[str, Done]):
    assert done["predict"].stderr == done["predict --json"].stderr == b""
    first = done["predict"].stdout.splitlines()[0].split(b"\t")
    assert first == [os.fsencode(f"{SITE}/ä0.png"), b"na?ve", b"1.0000"]
    result = json.loads(done["predict --json"].stdout.splitlines()[0])
    assert result["file"] == f"{SITE}/ä0.png"
    assert done["site"].stdout == b"[0, 0]\n", done["site"].stderr.decode()
