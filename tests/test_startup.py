"""Commands that compute nothing import nothing that takes long."""

import subprocess
import sys
from pathlib import Path

TYPED = """
import sys
from importlib import import_module

from typer.testing import CliRunner

import_module("pfedgpa_app.cli")
app = import_module("server_app.cli").app
for words in {commands!r}:
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
shell = {{"_PFEDGPA_COMPLETE": "complete_bash", "COMP_WORDS": "pfedgpa ru", "COMP_CWORD": "1"}}
result = CliRunner().invoke(app, [], prog_name="pfedgpa", env=shell)
assert "runs" in result.stdout.split(), result.output
print(*sorted({{name.partition(".")[0] for name in sys.modules}}))
"""
COMMANDS = [
    ["--version"],
    ["--help"],
    ["bench", "--help"],
    ["runs"],
    ["runs", "--json"],
]
HEAVY = {"torch", "flwr", "ray", "numpy", "scipy", "sklearn", "matplotlib", "plotly", "torchvision"}


def test_commands_that_compute_nothing_import_nothing_heavy(tmp_path: Path):
    command = [sys.executable, "-c", TYPED.format(commands=COMMANDS)]
    imported = subprocess.check_output(command, text=True).split()
    assert {"pfedgpa_app", "server_app", "typer"} <= set(imported)
    assert not HEAVY & set(imported)
