"""The files of docker/: what they say, and their services as processes, up to a finished run.

No container engine is needed. The processes run the commands of the compose files; only the
addresses, the ports and the folders of the containers are replaced by ones of this machine.
"""

import ipaddress
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from functools import reduce
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from cryptography import x509
from network import BIN, PROJECT, free_port, kill_with_descendants, read_lines, wait_until
from pydantic import BaseModel

DOCKER = PROJECT / "docker"
PLAIN, TLS = DOCKER / "compose.yaml", DOCKER / "compose.tls.yaml"
WAYS = {"plain": (PLAIN,), "tls": (PLAIN, TLS)}
SUPERNODES = [f"supernode-{number}" for number in range(3)]
ROUNDS = 1


class Strict(BaseModel, extra="forbid"):
    """A part of a compose file, of which everything is known."""


class Build(Strict):
    context: str
    dockerfile: str
    args: dict[str, str]


class Dependency(Strict):
    condition: Literal["service_healthy", "service_completed_successfully"]


class Healthcheck(Strict):
    test: list[str]
    interval: str
    timeout: str
    start_period: str


class Service(Strict):
    image: str
    build: Build | None = None
    command: str | list[str]
    environment: dict[str, str] = {}
    volumes: list[str] = []
    depends_on: dict[str, Dependency] = {}
    healthcheck: Healthcheck | None = None
    restart: Literal["no", "unless-stopped"] = "no"
    init: bool
    read_only: bool
    tmpfs: str
    cap_drop: list[str]
    security_opt: list[str]

    @property
    def words(self) -> list[str]:
        """The command as a program and its arguments."""
        return shlex.split(self.command) if isinstance(self.command, str) else self.command

    @property
    def port(self) -> str | None:
        """The port that this service listens on."""
        return self.words[self.words.index("--port") + 1] if "--port" in self.words else None

    @property
    def mounts(self) -> dict[str, tuple[str, bool]]:
        """What is mounted where, and whether it is read-only."""
        split = (volume.split(":") for volume in self.volumes)
        return {target: (source, mode == ["ro"]) for source, target, *mode in split}


class Compose(Strict):
    name: str
    services: dict[str, Service]
    volumes: dict[str, None]


def read_compose(*files: Path, **variables: object) -> Compose:
    """Return what compose files say together."""

    def value_of(match: re.Match[str]) -> str:
        return str(variables.get(match["name"], match["default"]))

    def read(file: Path) -> dict[str, Any]:
        text = re.sub(r"\$\{(?P<name>\w+):-(?P<default>\w*)\}", value_of, file.read_text())
        assert "$" not in text
        content: dict[str, Any] = yaml.safe_load(text)
        return {key: value for key, value in content.items() if not key.startswith("x-")}

    return Compose.model_validate(reduce(merge, map(read, files)))


def merge(first: Any, second: Any) -> Any:
    """Put the second file on the first, as far as these files need the rules of Compose."""
    if not (isinstance(first, dict) and isinstance(second, dict)):
        return second
    both = {key: merge(first[key], second[key]) for key in first.keys() & second.keys()}
    if isinstance(first.get("volumes"), list) and isinstance(second.get("volumes"), list):
        both["volumes"] = first["volumes"] + second["volumes"]
    return {**first, **second, **both}


class Dockerfile:
    """What the Dockerfile makes of its last stage, and of the one named ``dependencies``."""

    def __init__(self) -> None:
        text = re.sub(r"^#.*\n", "", (DOCKER / "Dockerfile").read_text(), flags=re.MULTILINE)
        lines = [line for line in text.replace("\\\n", " ").splitlines() if line]
        self.stages: list[list[tuple[str, str]]] = [[]]
        for instruction, _, rest in (line.partition(" ") for line in lines):
            if instruction == "FROM":
                self.stages.append([])
            self.stages[-1].append((instruction, rest.strip()))

    @property
    def last(self) -> list[tuple[str, str]]:
        return self.stages[-1]

    @property
    def environment(self) -> dict[str, str]:
        words = (word for name, rest in self.last if name == "ENV" for word in shlex.split(rest))
        return dict(word.split("=", 1) for word in words)

    @property
    def copied(self) -> set[str]:
        """What is copied from the project, into any stage."""
        copies = (shlex.split(rest) for x in self.stages for name, rest in x if name == "COPY")
        return {
            source for words in copies if not words[0].startswith("--") for source in words[:-1]
        }


class Demo:
    """The containers of compose files as processes on loopback, each below a folder of its own.

    Where a container has /data, its process has <folder>/<service>/data, which for a volume is a
    link to <folder>/volumes/<volume>.
    """

    def __init__(self, folder: Path, services: dict[str, Service]) -> None:
        self.folder, self.services = folder, services
        self.ports = {name: str(free_port()) for name, one in services.items() if one.port}
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        for name in services:
            self.lay_out(name)

    def lay_out(self, name: str) -> None:
        """Make a container's folders: the app, the volumes and what it may write to."""
        root = self.folder / name
        (root / "tmp").mkdir(parents=True)
        (root / "app").symlink_to(PROJECT)
        for target, (source, _) in self.services[name].mounts.items():
            place = root / target.lstrip("/")
            place.parent.mkdir(exist_ok=True)
            if source.startswith("."):
                place.write_text(self.here(name, (DOCKER / source).read_text()))
            else:
                volume = self.folder / "volumes" / source
                volume.mkdir(parents=True, exist_ok=True)
                place.symlink_to(volume)

    def here(self, name: str, text: str) -> str:
        """Return what a container's text is in its process."""
        for other, port in self.ports.items():
            text = text.replace(f"{other}:{self.services[other].port}", f"127.0.0.1:{port}")
        if own := self.services[name].port:
            text = re.sub(rf"\b{own}\b", self.ports[name], text)
        text = text.replace("0.0.0.0", "127.0.0.1")
        return re.sub(r"(?<![\w./])/(?=(app|data|flwr|tls|tmp)\b)", f"{self.folder / name}/", text)

    def environment(self, name: str) -> dict[str, str]:
        """Return the image's environment and the service's; only the programs are those here."""
        given = Dockerfile().environment | self.services[name].environment
        path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
        return {key: self.here(name, text) for key, text in given.items()} | {"PATH": path}

    def start(self, name: str) -> None:
        """Start a service's process; its output goes to <service>.log."""
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                [self.here(name, word) for word in self.services[name].words],
                env=self.environment(name),
                cwd=self.folder / name / "tmp",
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def is_healthy(self, name: str) -> bool:
        """Run a service's health check."""
        healthcheck = self.services[name].healthcheck
        assert healthcheck is not None
        assert healthcheck.test[0] == "CMD"
        words = [self.here(name, word) for word in healthcheck.test[1:]]
        done = subprocess.run(
            words, env=self.environment(name), capture_output=True, timeout=60, check=False
        )
        return done.returncode == 0

    def wait_for(self, name: str, condition: str) -> None:
        """Wait until a service is as others need it."""
        if condition == "service_healthy":
            wait_until(lambda: self.processes[name].poll() is not None or self.is_healthy(name))
            assert self.processes[name].poll() is None, f"{name} ended"
        else:
            assert self.processes[name].wait(timeout=480) == 0, f"{name} failed"

    def up(self) -> None:
        """Start all, each when what it depends on is as it should be."""
        needs = {name: one.depends_on for name, one in self.services.items()}
        for name in TopologicalSorter(needs).static_order():
            for other, dependency in needs[name].items():
                self.wait_for(other, dependency.condition)
            if self.services[name].healthcheck:
                assert not self.is_healthy(name), "healthy before it runs"
            self.start(name)

    def __enter__(self) -> "Demo":
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        kill_with_descendants(*(process.pid for process in self.processes.values()))
        for process in self.processes.values():
            process.wait()
        if error is not None:
            for file in sorted(self.folder.glob("*.log")):
                print(f"--- {file.name}\n{file.read_text(errors='replace')[-3000:]}")


@pytest.mark.processes
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
    assert packages | {"pyproject.toml", "README.md", "docker/certificates.py"} <= copied
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
    folders = made.split("--owner=pfedgpa ")[1].split()
    mounts = (one.mounts for one in read_compose(*WAYS["tls"]).services.values())
    volumes = {target for one in mounts for target, (source, _) in one.items() if source[0] != "."}
    assert set(folders) == volumes


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
