"""A network whose sites are registered with names, as a user sees it."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from digit_sites import CLIENTS, QUICK, write_sites
from typer.testing import CliRunner, Result

from benchmarks.faults import SecureFederation
from benchmarks.network import PATIENCE, PROJECT, read_lines, wait_until
from pfedgpa_app.cross_site import read_matrix
from pfedgpa_app.rounds import BELOW_FLOOR
from server_app import cli, superlink

pytestmark = [pytest.mark.processes, pytest.mark.usefixtures("warm_processes")]


def test_registered_sites_are_known_by_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "network"
    folder.mkdir()
    given = {
        **QUICK,
        "output-dir": str(folder / "runs"),
        "client.device": "cpu",
        "num-server-rounds": 1,
        "server.fraction-evaluate": 1.0,
        "server.include": "client-*",
        "server.exclude": "client-2",
        "server.required": "client-1",
        "server.cross-site": True,
    }

    def pfedgpa(*arguments: str | Path, **settings: Any) -> Result:
        pairs = [word for key in settings for word in ("-c", f"{key}={json.dumps(settings[key])}")]
        return CliRunner().invoke(cli.app, [*map(str, arguments), *pairs])

    monkeypatch.chdir(PROJECT)
    monkeypatch.setattr(superlink, "PROGRAM", "flwr")  # the one that is forked off
    (tmp_path / "sites").mkdir()
    sites = write_sites(tmp_path / "sites")
    with SecureFederation(folder, CLIENTS, sites=sites) as federation:
        for name in federation.env.keys() - os.environ.keys() | {"HOME"}:
            monkeypatch.setenv(name, federation.env[name])
        federation.start_superlink("--database", ":flwr-in-memory:")
        node_configs = ("cross-site=true", 'cross-site=true privacy-floor="example epsilon=3"', "")
        for client, more in enumerate(node_configs):
            federation.start_client(client, more)
        wait_until(lambda: all(federation.node_ids(f"client-{n}") for n in range(3)), PATIENCE)
        done = pfedgpa("run", "--superlink", "test", **given)
        assert done.exit_code == 0, done.stderr
        absent = {"server.required": "client-1,mercy", "server.join-timeout": 1.0}
        missing = pfedgpa("run", "--superlink", "test", **given | absent)

    assert missing.exit_code == 1
    assert 'of server.required, "mercy" is not connected; right would be' in missing.stderr
    path = Path(done.stdout.split()[-1]).parent
    rows = read_lines(path, "clients.jsonl")
    assert [(row["name"], row.get("status")) for row in rows] == [
        ("client-0", "ok"),
        ("client-1", f"{BELOW_FLOOR}: example epsilon=3 delta=1e-05"),
        ("client-2", None),  # excluded
    ]
    assert all("personalized-accuracy" in row for row in rows)
    assert read_matrix(path).keys() == {(0, 0), (0, 1), (1, 0), (1, 1)}  # those that consent
    page = (path / "report.html").read_text()
    assert all(f"{client} client-{client}" in page for client in range(3))
    exported = pfedgpa("export", path, "--client", "client-2", "-o", tmp_path / "m.safetensors")
    assert exported.exit_code == 0, exported.stderr
    assert "client client-2 after round 1" in exported.stdout
