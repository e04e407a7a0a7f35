"""The files of docker/: what they say, and their services as processes, up to a finished run.

No container engine is needed. The processes run the commands of the compose files; only the
addresses, the ports and the folders of the containers are replaced by ones of this machine.
"""

import ipaddress
import os
import re
import shutil
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest
from containers import DOCKER, Demo, Dockerfile, read_compose
from cryptography import x509

from benchmarks.network import BIN, PROJECT, read_lines

PLAIN, TLS = DOCKER / "compose.yaml", DOCKER / "compose.tls.yaml"
WAYS = {"plain": (PLAIN,), "tls": (PLAIN, TLS)}
SUPERNODES = [f"supernode-{number}" for number in range(3)]
ROUNDS = 1


@pytest.mark.processes
@pytest.mark.usefixtures("warm_processes")
@pytest.mark.parametrize("way", WAYS)
def test_the_services_bring_a_run_to_its_end(tmp_path: Path, way: str):
    compose = read_compose(*WAYS[way], ROUNDS=ROUNDS)
    with Demo(tmp_path, compose.services) as demo:
        demo.up()
        demo.wait_for("run", "service_completed_successfully")
        # Once more, as by a second `up`: what is there already is no failure.
        once = [name for name in demo.services if name.startswith(("certificates", "admit"))]
        for name in once:
            demo.start(name)
        for name in once:
            demo.wait_for(name, "service_completed_successfully")
    data = tmp_path / "volumes" / "data"
    assert (data / "state.db").exists()
    (run,) = (data / "pfedgpa" / "runs").iterdir()
    rows = read_lines(run)
    assert [(row["round"], row["num-clients"]) for row in rows] == [(ROUNDS, 3)]
    assert {file.name for file in (run / "models").iterdir()} == {
        f"client-{number}.safetensors" for number in range(3)
    }
    if way == "tls":
        registered = [(tmp_path / f"admit-{number}.log").read_text() for number in range(3)]
        assert all("registered successfully" in log for log in registered)
        assert all("already in use" in log for log in registered)


def validate(file: Path) -> subprocess.CompletedProcess[str]:
    """Hold a file against the schema of the Compose specification."""
    command = [BIN / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", file]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("file", [PLAIN, TLS], ids=lambda file: file.name)
def test_compose_files_obey_the_specification(file: Path):
    assert validate(file).returncode == 0, validate(file).stdout


def test_the_specification_knows_no_misspelt_key(tmp_path: Path):
    misspelt = tmp_path / "compose.yaml"
    misspelt.write_text(PLAIN.read_text().replace("healthcheck:", "healtcheck:"))
    result = validate(misspelt)
    assert result.returncode == 1
    assert "'healtcheck' was unexpected" in result.stdout


@pytest.mark.parametrize("way", WAYS)
def test_what_the_services_name_exists(way: str):
    compose = read_compose(*WAYS[way])
    built = [one.build for one in compose.services.values() if one.build]
    assert len(built) == 1  # once for all, under the name that all use
    assert {one.image for one in compose.services.values()} == {compose.name}
    assert (DOCKER / built[0].context).resolve() == PROJECT
    assert (PROJECT / built[0].dockerfile).exists()
    used = {source for one in compose.services.values() for source, _ in one.mounts.values()}
    files = {source for source in used if source.startswith(".")}
    assert all((DOCKER / source).is_file() for source in files)
    assert used - files == compose.volumes.keys()
    for one in compose.services.values():
        for name, dependency in one.depends_on.items():
            needed = compose.services[name]
            waits_for_health = dependency.condition == "service_healthy"
            assert waits_for_health == (needed.healthcheck is not None)
            assert waits_for_health == (needed.restart == "unless-stopped")


@pytest.mark.parametrize("way", WAYS)
def test_every_supernode_has_a_partition_and_the_run_waits_for_all(way: str):
    services = read_compose(*WAYS[way]).services
    partitions = {services[name].words[-1] for name in SUPERNODES}
    assert partitions == {f"partition-id={number} num-partitions=3" for number in range(3)}
    assert "server.min-available-nodes=3" in services["run"].words[-1]
    assert services["run"].depends_on.keys() == set(SUPERNODES)


def test_both_ways_run_with_the_same_settings():
    plain, tls = (read_compose(*files).services["run"].words for files in WAYS.values())
    assert [word if word != "plain" else "tls" for word in plain] == tls


@pytest.mark.parametrize("way", WAYS)
def test_no_service_may_more_than_it_needs(way: str):
    for one in read_compose(*WAYS[way]).services.values():  # which know no ports to publish
        assert one.read_only
        assert one.cap_drop == ["ALL"]
        assert one.security_opt == ["no-new-privileges:true"]
        assert one.mounts.keys() & {"/app", "/opt", "/tmp"} == set()
        assert "--insecure" not in one.words or way == "plain"


def test_a_private_key_is_seen_where_it_is_made_and_used_alone():
    services = read_compose(*WAYS["tls"]).services
    seen: dict[str, dict[str, str]] = {}
    for name, one in services.items():
        for source, is_read_only in one.mounts.values():
            seen.setdefault(source, {})[name] = "reads" if is_read_only else "writes"
    assert seen["superlink-key"] == {"certificates": "writes", "superlink": "reads"}
    for number in range(3):
        holders = {f"admit-{number}": "writes", f"supernode-{number}": "reads"}
        assert seen[f"supernode-{number}-key"] == holders
    assert [name for name, access in seen["authority"].items() if access == "writes"] == [
        "certificates"
    ]


def is_sent(path: str) -> bool:
    """Tell whether Dockerfile.dockerignore lets a file of the project into the build."""
    sent = True
    whole = [path, *map(str, Path(path).parents)]
    for line in (DOCKER / "Dockerfile.dockerignore").read_text().splitlines():
        if not line.startswith("#") and any(fnmatch(x, line.removeprefix("!")) for x in whole):
            sent = line.startswith("!")
    return sent


def test_what_the_image_copies_exists_and_is_sent_to_the_build():
    packages = {"pfedgpa_app", "client_app", "server_app"}
    copied = Dockerfile().copied
    programs = {"docker/certificates.py", "docker/health.py"}
    assert packages | programs | {"pyproject.toml", "README.md", "conf"} <= copied
    for source in copied:
        files = [PROJECT / source, *(PROJECT / source).rglob("*.py")]
        assert all(file.exists() for file in files)
        assert all(is_sent(str(file.relative_to(PROJECT))) for file in files)


def test_nothing_but_the_app_is_sent_to_the_build():
    sent = {path.name for path in PROJECT.iterdir() if is_sent(path.name)}
    assert sent == {source for source in Dockerfile().copied if "/" not in source}
    for secret in (".env", ".git/config", "docker/tls/superlink/key.pem", "docker/.env", "id_rsa"):
        assert not is_sent(secret)
    assert not is_sent("pfedgpa_app/__pycache__/config.cpython-311.pyc")


def test_the_image_runs_as_a_user_who_owns_the_volumes_alone():
    instructions = Dockerfile().last
    assert [name for name, _ in instructions].count("USER") == 1
    assert instructions[-1] == ("USER", "pfedgpa")
    (made,) = (rest for _, rest in instructions if "useradd" in rest)
    assert re.search(r"useradd --uid [1-9]\d+ .*pfedgpa ", made)
    assert "install --directory --mode=0700 --owner=pfedgpa " in made  # to nobody else's eyes
    folders = made.split("--owner=pfedgpa ")[1].split()
    mounts = (one.mounts for one in read_compose(*WAYS["tls"]).services.values())
    volumes = {target for one in mounts for target, (source, _) in one.items() if source[0] != "."}
    assert set(folders) == volumes | {"/flwr"}


def test_what_a_read_only_container_writes_to_is_a_volume_or_forgotten():
    environment = Dockerfile().environment
    services = read_compose(PLAIN).services
    for one in services.values():
        forgotten = {mount.split(":")[0] for mount in one.tmpfs}
        assert {environment["HOME"], environment["FLWR_HOME"]} == forgotten
    assert environment["XDG_DATA_HOME"] in services["superlink"].mounts


def test_a_change_of_the_app_installs_no_dependency_again():
    """What is copied from the project comes after the dependencies, but for their names."""
    instructions = Dockerfile().last
    installed = instructions.index(("RUN", "pip install --no-cache-dir -r /opt/requirements.txt"))
    before = [rest for name, rest in instructions[:installed] if name in ("COPY", "ADD")]
    assert before == ["--from=dependencies requirements.txt /opt/"]


def test_the_image_installs_the_dependencies_of_pyproject(tmp_path: Path):
    shutil.copy(PROJECT / "pyproject.toml", tmp_path)
    (stage,) = (x for x in Dockerfile().stages if x[0] == ("FROM", "base AS dependencies"))
    command = stage[-1][1]
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(["sh", "-c", command], cwd=tmp_path, env={"PATH": path}, check=True)
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    names = (tmp_path / "requirements.txt").read_text().splitlines()
    assert names == project["dependencies"]


def make(*arguments: str | Path) -> list[Path]:
    """Run certificates.py; return the files that it names."""
    command = [sys.executable, DOCKER / "certificates.py", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [Path(line) for line in done.stdout.splitlines()]


def test_the_certificate_names_the_superlink_and_its_own_machine(tmp_path: Path):
    _, file, _ = make("superlink", tmp_path, "superlink", "fl.example.org", "192.0.2.7")
    certificate = x509.load_pem_x509_certificate(file.read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["superlink", "fl.example.org", "localhost"]
    addresses = ["192.0.2.7", "127.0.0.1"]
    assert names.get_values_for_type(x509.IPAddress) == list(map(ipaddress.ip_address, addresses))


def test_private_keys_are_open_to_their_owner_alone_and_kept(tmp_path: Path):
    for command in (["superlink", tmp_path, "superlink"], ["supernode", tmp_path]):
        files = make(*command)
        private = [file for file in files if b"PRIVATE KEY" in file.read_bytes()]
        assert len(private) == 1
        assert private[0].stat().st_mode & 0o777 == 0o600
        before = [file.read_bytes() for file in files]
        assert make(*command) == files
        assert [file.read_bytes() for file in files] == before
    assert {file.parent.name for file in tmp_path.rglob("*") if file.is_file()} == {
        "authority",
        "superlink",
        "supernode",
    }
