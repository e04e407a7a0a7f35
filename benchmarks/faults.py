"""A federation of processes on loopback with fault injection."""

import contextlib
import ipaddress
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from benchmarks.network import (
    PATIENCE,
    PROJECT,
    Network,
    configure_connection,
    read_lines,
    wait_until,
    with_descendants,
)

PAUSE = 5.0
"""Seconds between polls that start processes."""
FAULTY_CLIENT = "benchmarks.faulty_client:app"


class Federation(Network):
    """A network with SuperNodes ``client-0``, ``client-1``, … with one partition each.

    With a folder of sites, client i has ``<i>.npz`` there instead.
    """

    def __init__(
        self, folder: Path, num_partitions: int, app: Path = PROJECT, sites: Path | None = None
    ) -> None:
        super().__init__(folder, app)
        self.num_partitions, self.sites = num_partitions, sites
        self._earlier: set[Path] = set()

    def start_run(self, name: str = "run", **settings: object) -> subprocess.Popen[bytes]:
        """Start `flwr run`; from then on the latest run is this one."""
        self._earlier = set(self.output.glob("*"))
        return super().start_run(name, **settings)

    def run_folder(self) -> Path | None:
        """Return the folder of the latest run, once it has one."""
        return next(iter({*self.output.glob("*")} - self._earlier), None)

    def start_client(self, client: int, more: str = "") -> None:
        """Start the SuperNode of a partition, or start it again; ``more`` is node config."""
        self.start_supernode(f"client-{client}", self.node_config(client, more))

    def restart_client(self, client: int) -> float:
        """Start a SuperNode until it is accepted; return the seconds that this took.

        The SuperLink refuses a node that it takes to be connected still.
        """
        name, begin = f"client-{client}", time.monotonic()
        connected = len(self.node_ids(name))

        def is_in() -> bool:
            if name not in self.processes or self.processes[name].poll() is not None:
                self.start_client(client)
            return len(self.node_ids(name)) > connected

        wait_until(is_in, PATIENCE, PAUSE)
        return time.monotonic() - begin

    def node_config(self, client: int, more: str = "") -> str:
        """Return the node config of a client."""
        data = f'data-path="{self.sites / f"{client}.npz"}"' if self.sites else ""
        return f"partition-id={client} num-partitions={self.num_partitions} {data} {more}"

    def start_clients(self, *clients: int) -> None:
        """Start SuperNodes and wait until they are connected."""
        for client in clients:
            self.start_client(client)
        for client in clients:
            wait_until(lambda name=f"client-{client}": bool(self.node_ids(name)), PATIENCE)

    def node_ids(self, name: str) -> list[str]:
        """Return the node ids of a SuperNode, one per start."""
        return re.findall(r"SuperNode ID: (\d+)", self.log(name))

    def rows(self, name: str = "metrics.jsonl") -> list[dict]:
        """Return what the latest run has written so far."""
        return read_lines(self.run_folder(), name)

    def wait_for_rounds(self, rounds: int, name: str = "run") -> None:
        """Wait until a run has completed rounds."""

        def are_complete() -> bool:
            assert self.processes[name].poll() is None or len(self.rows()) >= rounds
            return len(self.rows()) >= rounds

        wait_until(are_complete, PATIENCE)

    def wait_for_training(self, *clients: int) -> None:
        """Wait until SuperNodes have a training message and a process that works on it."""

        def trains(client: int) -> bool:
            name = f"client-{client}"
            traffic = re.findall(r"(Receiving|Sending): (\w+) message", self.log(name))
            return traffic[-1:] == [("Receiving", "train")] and bool(
                self.descendants(name, "flwr-clientapp")
            )

        wait_until(lambda: all(map(trains, clients)), PATIENCE)

    def wait_for_end(self, name: str = "run") -> Path:
        """Wait until a run is over and return its folder."""
        self.processes.pop(name).wait(PATIENCE)
        folder = self.run_folder()
        assert folder is not None
        return folder

    def descendants(self, name: str, program: str) -> list[int]:
        """Return the ids of descendants of a process that run a program."""
        found = []
        for process in with_descendants(self.processes[name].pid)[1:]:
            with contextlib.suppress(OSError):
                if f"/{program}\0" in Path(f"/proc/{process}/cmdline").read_text(
                    encoding="utf-8", errors="replace"
                ):
                    found.append(process)
        return found

    def kill_below(self, name: str, program: str) -> None:
        """Send SIGKILL to descendants of a process that run a program."""
        processes = self.descendants(name, program)
        assert processes, f"no {program} below {name}"
        for process in processes:
            os.kill(process, signal.SIGKILL)

    def status(self, folder: Path) -> str:
        """Return the SuperLink's status of the run in a folder, as in `flwr list`."""
        said = json.loads(self.flwr("list", "test", "--run-id", folder.name, "--format", "json"))
        status: str = said["runs"][0]["status"]
        return status

    def flwr(self, *arguments: str | Path) -> str:
        """Return the output of a `flwr` command."""
        command = ["flwr", *arguments]
        done = subprocess.run(
            command, env=self.env, capture_output=True, text=True, encoding="utf-8", check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    @contextlib.contextmanager
    def frozen(self, name: str) -> Iterator[None]:
        """Freeze a process and its descendants in the block."""
        processes = with_descendants(self.processes[name].pid)
        for process in processes:
            os.kill(process, signal.SIGSTOP)
        try:
            yield
        finally:
            for process in processes:
                os.kill(process, signal.SIGCONT)


class SecureFederation(Federation):
    """A federation with TLS whose SuperLink accepts only registered SuperNodes."""

    def __init__(
        self, folder: Path, num_partitions: int, app: Path = PROJECT, sites: Path | None = None
    ) -> None:
        super().__init__(folder, num_partitions, app, sites)
        self.security = ()
        self.certificate = write_certificate(folder)
        configure_connection(folder, self.port, f'root-certificates = "{self.certificate}"')

    def start_superlink(self, *options: str | Path) -> subprocess.Popen[bytes]:
        """Start the SuperLink, or start it again."""
        tls = ("--ssl-ca-certfile", self.certificate, "--ssl-certfile", self.certificate)
        tls += ("--ssl-keyfile", self.certificate.with_suffix(".key"))
        return super().start_superlink(*tls, "--enable-supernode-auth", *options)

    def register(self, name: str) -> Path:
        """Register a new key with the SuperLink and return its file."""
        key = write_key(self.folder / f"{name}.key")
        self.flwr("supernode", "register", key.with_suffix(".pub"), "test", "--name", name)
        return key

    def start_client(self, client: int, more: str = "") -> None:
        """Start the SuperNode of a partition with its key, or start it again."""
        name = f"client-{client}"
        key = self.folder / f"{name}.key"
        if not key.exists():
            self.register(name)
        options = ("--root-certificates", self.certificate, "--auth-supernode-private-key", key)
        self.start_supernode(name, self.node_config(client, more), *options)


def write_key(file: Path) -> Path:
    """Write a SuperNode's private and public (``.pub``) key."""
    key = ec.generate_private_key(ec.SECP384R1())
    file.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.OpenSSH,
            serialization.NoEncryption(),
        )
    )
    public = key.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    file.with_suffix(".pub").write_bytes(public)
    return file


def write_certificate(folder: Path) -> Path:
    """Write a self-signed certificate for this machine, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    loopback = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([loopback]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    file = folder / "superlink.pem"
    file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    file.with_suffix(".key").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return file


def connect_unregistered(federation: SecureFederation) -> None:
    """Start SuperNodes without a key, with an unregistered key, and without TLS."""
    config = federation.node_config(0)
    tls = ("--root-certificates", federation.certificate)
    key = ("--auth-supernode-private-key", write_key(federation.folder / "unregistered.key"))
    federation.start_supernode("no-key", config, *tls)
    federation.start_supernode("unknown-key", config, *tls, *key)
    federation.start_supernode("no-tls", config, "--insecure")


def copy_app(folder: Path, client_app: str) -> Path:
    """Copy the files of the app's FAB, with another ClientApp (``package.module:app``)."""
    folder.mkdir()
    for package in ("pfedgpa_app", "client_app", "server_app", "benchmarks"):
        shutil.copytree(
            PROJECT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__")
        )
    settings = (PROJECT / "pyproject.toml").read_text(encoding="utf-8")
    falsified = settings.replace('clientapp = "client_app.app:app"', f'clientapp = "{client_app}"')
    assert falsified != settings
    (folder / "pyproject.toml").write_text(falsified, encoding="utf-8")
    for name in ("README.md", "LICENSE"):
        shutil.copy(PROJECT / name, folder)
    return folder
