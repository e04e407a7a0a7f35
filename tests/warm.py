"""Start the processes of Flower's apps from one that has imported their packages.

Flower starts a process for every message, and most of its time goes into the import of torch.
Tests send a hundred messages. Here a process is forked off from one that has imported what comes
from elsewhere; it runs Flower's own command, which loads the app, as it would without.
"""

import atexit
import importlib
import importlib.metadata
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from functools import cache
from pathlib import Path

# Not flower-superexec: what it starts would not be below its SuperNode any more.
COMMANDS = ("flwr-clientapp", "flwr-serverapp")
PACKAGES = (
    "flwr.clientapp",
    "flwr.serverapp",
    "flwr.superlink.cli",
    "flwr.supernode.cli",
    "matplotlib.figure",
    "pydantic",
    "safetensors.torch",
    "scipy.optimize",
    "torch",
)
# What Flower starts in place of its command: it lives as long as the process that it asks for,
# which ends with it.
STUB = """#!{python} -IS
import json, os, socket, sys

with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
    connection.connect({address!r})
    request = {{"argv": sys.argv, "env": dict(os.environ), "cwd": os.getcwd()}}
    socket.send_fds(connection, [json.dumps(request).encode()], [1, 2])
    connection.recv(1)
"""


@cache
def commands() -> Path:
    """Return a folder for the beginning of PATH, whose commands run in processes forked off."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    address = folder / "socket"
    listener.bind(str(address))
    listener.listen()
    for command in COMMANDS:
        file = folder / command
        file.write_text(STUB.format(python=sys.executable, address=str(address)))
        file.chmod(0o755)
    # Ends with this process, whose end closes its standard input.
    subprocess.Popen(
        [sys.executable, "-P", __file__, str(listener.fileno())],
        stdin=subprocess.PIPE,
        pass_fds=[listener.fileno()],
    )
    listener.close()
    return folder


def serve(listener: socket.socket) -> None:
    """Fork off a process for each request; in it, return when it is to run its command."""
    for package in PACKAGES:
        importlib.import_module(package)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    while True:
        ready, _, _ = select.select([listener, sys.stdin], [], [])
        if sys.stdin in ready:
            os._exit(0)
        connection, _ = listener.accept()
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            listener.close()
            become(connection)
            return
        connection.close()


def become(connection: socket.socket) -> None:
    """Take over arguments, environment, folder and output of the one who asks, and end with it."""
    message, descriptors, _, _ = socket.recv_fds(connection, 2**20, 2)
    if len(descriptors) != 2:
        os._exit(1)  # it is gone already
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

    def end_with_it() -> None:
        connection.recv(1)
        os._exit(1)

    threading.Thread(target=end_with_it, daemon=True).start()


def leave() -> None:
    """Spare what Python tears down at the end, which touches all memory that is shared."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    atexit.register(leave)  # before the packages' own, and so called after them
    serve(socket.socket(fileno=int(sys.argv[1])))
    command = Path(sys.argv[0]).name
    (entry,) = importlib.metadata.entry_points(group="console_scripts", name=command)
    sys.exit(entry.load()())
