"""Start Flower's processes from one that has imported their packages.

Flower starts a process for every message, and most of its time goes into the import of torch; a
SuperNode is two processes, each with seconds of imports. Tests send a hundred messages. Here a
process is forked off from one that has imported what comes from elsewhere; it runs Flower's own
command, which loads the app, as it would without. Intervals of polls and heartbeats are shorter
than Flower's, which are made for networks.
"""

import atexit
import fcntl
import gc
import importlib
import importlib.metadata
import json
import os
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

COMMANDS = (
    "flower-superexec",
    "flower-superlink",
    "flower-supernode",
    "flwr",
    "flwr-clientapp",
    "flwr-serverapp",
    "flwr-simulation",
)
PACKAGES = (
    "datasets.arrow_dataset",
    "flwr.cli.app",
    "flwr.clientapp",
    "flwr.serverapp",
    "flwr.supercore.cli",
    "flwr.superlink.cli",
    "flwr.supernode.cli",
    "flwr_datasets.partitioner",
    "matplotlib.figure",
    "pydantic",
    "safetensors.torch",
    "scipy.optimize",
    "sklearn.datasets",
    "torch",
)
# Seconds. The SuperLink gives up a SuperNode after twice this time without a heartbeat.
HEARTBEAT = 15
# How much shorter a SuperNode's pauses are: 3 s between polls for a message, 0.5 s for a reply.
HASTE = 3
TASK_POLL = {"FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.4"}
# What is started in place of a command: it lives as long as the process that it asks for, which
# ends with it, passes SIGTERM on and ends as that does.
STUB = """#!{python} -IS
import json, os, signal, socket, sys

with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
    connection.connect({address!r})
    request = {{"argv": sys.argv, "env": dict(os.environ), "cwd": os.getcwd()}}
    socket.send_fds(connection, [json.dumps(request).encode()], [1, 2])
    signal.signal(signal.SIGTERM, lambda *_: connection.send(b"SIGTERM"))
    status = connection.recv(1)
sys.exit(status[0] if status else 1)
"""


class Warm(NamedTuple):
    """A process that others are forked off from."""

    process: int
    folder: Path
    """For the beginning of PATH: has the commands that ask for a process."""

    def parents(self, listed: dict[int, int]) -> dict[int, int]:
        """Return the parent of every process; of one forked off, the one that asked for it."""
        found = dict(listed)
        for process, parent in listed.items():
            if parent == self.process:
                with suppress(OSError, ValueError):  # ended, or only just forked off
                    found[process] = int(Path(f"/proc/{process}/comm").read_text())
        return found


@cache
def start(common: Path) -> Warm:
    """Return the process that others are forked off from, one for all that have a folder in common.

    It ends with the last process that has called this.
    """
    with (common / "warm").open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        if known := file.read().split():
            started = Warm(int(known[0]), Path(known[1]))
            with suppress(OSError):  # it has ended
                os.open(started.folder / "users", os.O_WRONLY | os.O_NONBLOCK)
                return started
        started = begin(Path(tempfile.mkdtemp()))
        file.truncate(0)
        file.write(f"{started.process} {started.folder}")
    return started


def begin(folder: Path) -> Warm:
    """Start the process; it removes its folder when it ends."""
    address = folder / "socket"
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(address))
    listener.listen(100)
    for command in COMMANDS:
        file = folder / command
        file.write_text(STUB.format(python=sys.executable, address=str(address)))
        file.chmod(0o755)
    # Everyone who uses the process holds an end of this pipe open.
    os.mkfifo(folder / "users")
    users = os.open(folder / "users", os.O_RDONLY | os.O_NONBLOCK)
    os.open(folder / "users", os.O_WRONLY)
    # Flower reads the first when it is imported; without bytecode each message compiles the app.
    env = os.environ | {"FLWR_TELEMETRY_ENABLED": "0", "PYTHONDONTWRITEBYTECODE": ""}
    process = subprocess.Popen(
        [sys.executable, "-P", "-u", __file__, str(listener.fileno()), str(folder)],
        stdin=users,
        pass_fds=[listener.fileno()],
        env=env,
    )
    os.close(users)
    listener.close()
    return Warm(process.pid, folder)


def serve(listener: socket.socket) -> None:
    """Fork off a process for each request; in it, return when it is to run its command."""
    for package in PACKAGES:
        importlib.import_module(package)
    shorten_intervals()
    gc.freeze()  # no collection in a process forked off touches what is shared
    ended, wake_up = socket.socketpair()
    for end in (ended, wake_up):
        end.setblocking(False)
    signal.set_wakeup_fd(wake_up.fileno())
    signal.signal(signal.SIGCHLD, lambda *_: None)
    asking: dict[int, socket.socket] = {}
    while True:
        ready, _, _ = select.select([listener, ended, sys.stdin], [], [])
        if sys.stdin in ready:
            shutil.rmtree(sys.argv[2])
            os._exit(0)
        if ended in ready:
            ended.recv(1024)
            tell(asking)
        if listener not in ready:
            continue
        connection, _ = listener.accept()
        if process := os.fork():
            asking[process] = connection
            continue
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for other in (listener, ended, wake_up, *asking.values()):
            other.close()
        become(connection)
        return


def shorten_intervals() -> None:
    """Replace constants of Flower for which it has no options."""
    for name in ("supercore.heartbeat", "supernode.fleet_http_connection"):
        module = importlib.import_module(f"flwr.{name}")
        assert module.HEARTBEAT_DEFAULT_INTERVAL > HEARTBEAT
        module.HEARTBEAT_DEFAULT_INTERVAL = HEARTBEAT
    module = importlib.import_module("flwr.supernode.start_client_internal")
    assert module.time is time
    module.time = SimpleNamespace(sleep=lambda seconds: time.sleep(seconds / HASTE))


def tell(asking: dict[int, socket.socket]) -> None:
    """Tell those that asked for a process with which status it has ended."""
    while asking:
        process, status = os.waitpid(-1, os.WNOHANG)
        if not process:
            return
        with asking.pop(process) as connection, suppress(OSError):  # it may be gone
            connection.send(bytes([os.waitstatus_to_exitcode(status) & 255]))


def become(connection: socket.socket) -> None:
    """Take over arguments, environment, folder and output of the one who asks, and end with it."""
    message, descriptors, _, _ = socket.recv_fds(connection, 2**20, 2)
    if len(descriptors) != 2:
        os._exit(1)  # it is gone already
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    asking, _, _ = struct.unpack("3i", credentials)
    Path("/proc/self/comm").write_text(str(asking))  # for Warm.parents
    request = json.loads(message)
    sys.argv = request["argv"]
    os.environ.clear()
    os.environ.update(TASK_POLL | request["env"])
    os.chdir(request["cwd"])
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    for descriptor, its_number in zip(descriptors, (1, 2), strict=True):
        os.dup2(descriptor, its_number)
        os.close(descriptor)

    def follow() -> None:
        while name := connection.recv(16):
            os.kill(os.getpid(), signal.Signals[name.decode()])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


class Exit:
    """How a process forked off ends."""

    status: int | str | None = 1

    def leave(self) -> None:
        """Spare what Python tears down at the end, which touches all memory that is shared."""
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(self.status if isinstance(self.status, int) else self.status is not None)


if __name__ == "__main__":
    end = Exit()
    atexit.register(end.leave)  # before the packages' own, and so called after them
    serve(socket.socket(fileno=int(sys.argv[1])))
    command = Path(sys.argv[0]).name
    (entry,) = importlib.metadata.entry_points(group="console_scripts", name=command)
    try:
        end.status = entry.load()()
    except SystemExit as error:
        end.status = error.code
