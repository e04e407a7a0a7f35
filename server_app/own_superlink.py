"""A SuperLink with simulated clients that lasts as long as whoever started it, and no longer.

As a program this file keeps a process: it ends it, and all that it started, when its own standard
input is closed, which the system does too when whoever has the other end is killed.
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
"""What `flwr` calls it."""
PROGRAM = "flower-superlink"
_PATIENCE = 120.0
_GRACE = 5.0


class SuperLinkError(RuntimeError):
    """A SuperLink that does not start; the message has the end of its log."""


@contextlib.contextmanager
def own_superlink() -> Iterator[Mapping[str, str]]:
    """Start one on a free port of this machine, and yield the environment in which `flwr` knows it.

    Raises
    ------
    SuperLinkError
        If it does not start.
    """
    with tempfile.TemporaryDirectory(prefix="pfedgpa-", ignore_cleanup_errors=True) as home:
        port, log = _free_port(), Path(home) / "superlink.log"
        (Path(home) / "config.toml").write_text(
            f'[superlink.{NAME}]\naddress = "127.0.0.1:{port}"\ninsecure = true\n',
            encoding="utf-8",
        )
        programs = str(Path(sys.executable).parent)  # also where it is not activated
        env = {
            **os.environ,
            "FLWR_HOME": home,
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "PATH": os.pathsep.join(filter(None, (programs, os.environ.get("PATH")))),
        }
        command = [PROGRAM, "--simulation", "--insecure", "--host", "127.0.0.1"]
        keeper = [sys.executable, "-P", __file__, *command, "--port", str(port)]
        with (
            log.open("wb") as output,
            # In a session of its own, an interrupt reaches it by this process alone.
            subprocess.Popen(
                keeper,
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
                assert process.stdin is not None
                process.stdin.close()
                process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _wait_for(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until somebody listens on a port."""
    deadline = time.monotonic() + _PATIENCE
    while process.poll() is None and time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    said = log.read_text(encoding="utf-8", errors="replace")[-2000:].strip()
    raise SuperLinkError(f"Flower's SuperLink did not start: {said or 'it said nothing'}")


def _keep(command: list[str]) -> None:
    """Start a process and end it, with all that it started, when nobody holds standard input."""
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
    """Return the ids of what a process started, and of what they did, where the system tells."""
    parents = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            # Behind the name, which may hold anything: state, parent and more.
            fields = file.read_bytes().rpartition(b")")[2].split()
            parents[int(file.parent.name)] = int(fields[1])
    found = [process]
    for each in found:  # which grows on the way
        found += [child for child, parent in parents.items() if parent == each]
    return found[1:]


if __name__ == "__main__":
    _keep(sys.argv[1:])
