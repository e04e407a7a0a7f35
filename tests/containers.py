"""The containers of docker/ read from its files, and as processes on loopback."""

import re
import shlex
import subprocess
from functools import reduce
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel

from benchmarks.network import PATIENCE, PROJECT, end_all, flower_environment, free_port, wait_until

DOCKER = PROJECT / "docker"


class Strict(BaseModel, extra="forbid"):
    """A part of a compose file, of which everything is known."""


class Build(Strict):
    context: str
    dockerfile: str
    args: dict[str, str]


class Dependency(Strict):
    condition: Literal["service_healthy", "service_completed_successfully"]


class Logging(Strict):
    driver: Literal["json-file"]
    options: dict[str, str]


class Healthcheck(Strict):
    test: list[str]
    interval: str
    timeout: str
    start_period: str


class Service(Strict):
    image: str
    build: Build | None = None
    profiles: list[str] = []
    entrypoint: list[str] = []
    command: str | list[str]
    volumes: list[str] = []
    depends_on: dict[str, Dependency] = {}
    healthcheck: Healthcheck | None = None
    restart: Literal["no", "unless-stopped"] = "no"
    init: bool
    read_only: bool
    tmpfs: list[str]
    cap_drop: list[str]
    security_opt: list[str]
    ports: list[str] = []
    mem_limit: str | None = None
    logging: Logging | None = None
    deploy: dict[str, Any] = {}

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
        value = variables.get(match["name"], match["default"])
        assert value is not None, f"{match['name']} must be given"
        return str(value)

    def read(file: Path) -> dict[str, Any]:
        variable = r"\$\{(?P<name>\w+):(-(?P<default>[^}]*)|\?)\}"
        lines = [line for line in file.read_text().splitlines() if not line.startswith("#")]
        text = re.sub(variable, value_of, "\n".join(lines))
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
    """What the Dockerfile makes of its last stage, and of those before."""

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
        for mount in self.services[name].tmpfs:
            (root / mount.split(":")[0].lstrip("/")).mkdir(parents=True)
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
        """Return the image's environment; only the programs are those here."""
        given = Dockerfile().environment
        path = flower_environment(self.folder)["PATH"]
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
            words, env=self.environment(name), capture_output=True, timeout=PATIENCE, check=False
        )
        return done.returncode == 0

    def wait_for(self, name: str, condition: str) -> None:
        """Wait until a service is as others need it."""
        process = self.processes[name]
        if condition == "service_healthy":
            # A health check is a process, so that there are not many of them.
            wait_until(lambda: process.poll() is not None or self.is_healthy(name), pause=0.5)
            assert process.poll() is None, f"{name} ended"
        else:
            assert process.wait(timeout=PATIENCE) == 0, f"{name} failed"

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
        end_all(self.processes.values(), self.folder, show_logs=error is not None)
