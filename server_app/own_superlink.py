"""A SuperLink with simulated clients that ends with the process that started it.

Run as a program, this file supervises a process: it ends it and its descendants when standard input
is closed, as when the parent is killed.
"""

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

NAME = "own"
"""Its name in flwr's configuration."""
PROGRAM = "flower-superlink"
_PATIENCE = 120.0
_GRACE = 5.0


class SuperLinkError(RuntimeError):
    """A SuperLink that does not start; the message has the end of its log."""


@contextlib.contextmanager
def own_superlink() -> Iterator[Mapping[str, str]]:
    """Start a SuperLink on a free local port, and yield the environment for `flwr`.

    Raises `SuperLinkError` if it does not start.
    """
    with tempfile.TemporaryDirectory(prefix="pfedgpa-", ignore_cleanup_errors=True) as home:
        log = Path(home) / "superlink.log"
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        (Path(home) / "config.toml").write_text(
            f'[superlink.{NAME}]\naddress = "127.0.0.1:{port}"\ninsecure = true\n',
            encoding="utf-8",
        )
        programs = str(Path(sys.executable).parent)  # also if it is not activated
        env = {
            **os.environ,
            "FLWR_HOME": home,
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "PATH": os.pathsep.join(filter(None, (programs, os.environ.get("PATH")))),
        }
        command = [PROGRAM, "--simulation", "--insecure", "--host", "127.0.0.1"]
        supervisor = [sys.executable, "-P", __file__, *command, "--port", str(port)]
        with (
            log.open("wb") as output,
            # In a new session, so that an interrupt reaches it only through this process.
            subprocess.Popen(
                supervisor,
                env=env,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            ) as process,
        ):
            try:
                _wait_for(port, process, log)
                yield env
            finally:
                process.communicate()  # closes its standard input, and waits


def _wait_for(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _PATIENCE
    while process.poll() is None and time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    output = log.read_text(encoding="utf-8", errors="replace")[-2000:].strip()
    raise SuperLinkError(f"Flower's SuperLink did not start: {output or 'it printed nothing'}")


def _supervise(command: list[str]) -> None:
    """Run a process, and end it and its descendants when standard input is closed."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    while process.poll() is None and not select.select([sys.stdin], [], [], 0.1)[0]:
        pass
    started = _descendants(process.pid)
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_GRACE)
    for each in (process.pid, *started):
        with contextlib.suppress(ProcessLookupError):
            os.kill(each, signal.SIGKILL)
    sys.exit(process.wait())


def _descendants(process: int) -> list[int]:
    """Return the ids of a process's descendants, from ``/proc`` if there is one."""
    parents = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            # The fields after the name, which may contain spaces: state, parent and others.
            fields = file.read_bytes().rpartition(b")")[2].split()
            parents[int(file.parent.name)] = int(fields[1])
    found = [process]
    for each in found:  # which grows during the loop
        found += [child for child, parent in parents.items() if parent == each]
    return found[1:]


if __name__ == "__main__":
    _supervise(sys.argv[1:])
