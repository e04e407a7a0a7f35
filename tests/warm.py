"""Start Flower's processes from one that has imported their packages.

Flower starts a process for every message, and most of its time goes into the import of torch; a
SuperNode is two processes, each with seconds of imports. Tests send a hundred messages. Here a
process is forked off from one that has imported what comes from elsewhere; it runs Flower's own
command, which loads the app, as it would without.
"""

import atexit
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
from contextlib import suppress
from functools import cache
from pathlib import Path
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

    process: subprocess.Popen[bytes]
    folder: Path
    """For the beginning of PATH: has the commands that ask for a process."""

    def parents(self, listed: dict[int, int]) -> dict[int, int]:
        """Return the parent of every process; of one forked off, the one that asked for it."""
        found = dict(listed)
        for process, parent in listed.items():
            if parent == self.process.pid:
                with suppress(OSError, ValueError):  # ended, or only just forked off
                    found[process] = int(Path(f"/proc/{process}/comm").read_text())
        return found


@cache
def start() -> Warm:
    """Start the process that others are forked off from; it ends with this one."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    address = folder / "socket"
    listener.bind(str(address))
    listener.listen(100)
    for command in COMMANDS:
        file = folder / command
        file.write_text(STUB.format(python=sys.executable, address=str(address)))
        file.chmod(0o755)
    # Flower reads the first when it is imported; without bytecode each message compiles the app.
    env = os.environ | {"FLWR_TELEMETRY_ENABLED": "0", "PYTHONDONTWRITEBYTECODE": ""}
    # Ends when this process has, which closes its standard input.
    process = subprocess.Popen(
        [sys.executable, "-P", "-u", __file__, str(listener.fileno())],
        stdin=subprocess.PIPE,
        pass_fds=[listener.fileno()],
        env=env,
    )
    listener.close()
    return Warm(process, folder)


def serve(listener: socket.socket) -> None:
    """Fork off a process for each request; in it, return when it is to run its command."""
    for package in PACKAGES:
        importlib.import_module(package)
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
    os.environ.update(request["env"])
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
