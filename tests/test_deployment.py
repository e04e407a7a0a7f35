"""Every command of docs/deployment.md is run on loopback, as its readers would type it."""

import json
import os
import re
import shlex
import signal
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.network import (
    PATIENCE,
    PROJECT,
    Network,
    free_port,
    read_lines,
    wait_for_port,
    wait_until,
    with_descendants,
)

pytestmark = [
    pytest.mark.processes,
    pytest.mark.openssl,
    pytest.mark.usefixtures("warm_processes"),
]

GUIDE = (PROJECT / "docs" / "deployment.md").read_text()
BLOCKS = re.findall(r"```bash\n(.+?)```", GUIDE, flags=re.DOTALL)
UNITS = re.findall(r"```ini\n(.+?)```", GUIDE, flags=re.DOTALL)
SITES = ("site-1", "site-2", "site-3")
# What the guide's readers replace by a run id and a node id of theirs.
RUN, NODE = "1234567890", "9876543210"


def block_with(text: str) -> str:
    """Return the one block that has a text."""
    (block,) = [block for block in BLOCKS if text in block]
    return block


class Reader(Network):
    """Someone who follows the guide, at all its machines at once.

    They are this machine: addresses become localhost, ports become free ones, and the home folder
    is a temporary one. Everything else is typed as it stands there.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.output = folder / ".local" / "share" / "pfedgpa" / "runs"
        # The guide has options and files for what these say.
        for name in ("FLWR_HOME", "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION", "XDG_DATA_HOME"):
            self.env.pop(name, None)
        self.ports: defaultdict[str, str] = defaultdict(lambda: str(free_port()))
        self.ids: dict[str, str] = {}
        self.typed: set[str] = set()
        self.seen = SimpleNamespace()

    def adapt(self, block: str, site: str) -> str:
        """Return a block as it is typed here, at a site if it is of one."""
        replaced = {"superlink.example.org": "localhost", "0.0.0.0": "127.0.0.1", **self.ids}
        if SITES[0] in block:
            number = SITES.index(site)
            replaced |= {
                SITES[0]: site,
                "--port 19094": f"--port {19094 + number}",
                "partition-id=0": f"partition-id={number}",
            }
        for text, by in replaced.items():
            block = block.replace(text, by)
        return re.sub(r"\b(18000|1909\d)\b", lambda port: self.ports[port[0]], block)

    def type(self, text: str, site: str = SITES[0]) -> str:
        """Run the block that has a text to its end, and return what it wrote."""
        block = block_with(text)
        done = subprocess.run(
            ["bash", "-ec", self.adapt(block, site)],
            cwd=self.app,
            env=self.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        assert done.returncode == 0, f"{block}\n{done.stdout}"
        self.typed.add(block)
        return done.stdout

    def open_terminal(self, name: str, text: str, site: str = SITES[0]) -> None:
        """Leave the block that has a text running, and wait until its servers serve."""
        block = block_with(text)
        script = self.adapt(block, site)
        process = self.start(name, "/bin/bash", "-ec", f"{script}\nwait")
        for port in re.findall(r"--port (\d+)", script):
            wait_for_port(int(port), process)
        self.wait_for_nodes(name, script.count("flower-supernode "))
        self.typed.add(block)

    def restart_until_welcome(self, name: str, text: str) -> None:
        """Begin to start the block that has a text again and again, as a service manager does."""
        script = self.adapt(block_with(text), name)
        self.start(name, "/bin/bash", "-c", f"until\n{script}\ndo sleep 1; done")

    def wait_for_nodes(self, name: str, count: int) -> None:
        """Wait until a terminal's SuperNodes have been connected so many times."""
        wait_until(lambda: len(self.node_ids(name)) == count)

    def close_terminal(self, name: str) -> None:
        """End the servers of a terminal by SIGTERM, and wait for them."""
        terminal = self.processes[name]
        for process in children(terminal.pid):
            os.kill(process, signal.SIGTERM)
        self.wait_for(name)

    def wait_for(self, name: str) -> int:
        """Wait until the servers of a terminal have ended by themselves; return its exit code."""
        code = self.processes[name].wait(timeout=PATIENCE)
        del self.processes[name]
        return code

    def node_ids(self, name: str) -> list[str]:
        """Return the node ids that a terminal's SuperNodes wrote."""
        return re.findall(r"SuperNode ID: (\d+)", self.log(name))

    def status(self, run: str) -> str:
        """Return what the SuperLink says about a run."""
        command = ["flwr", "list", "hospitals", "--run-id", run, "--format", "json"]
        output = subprocess.check_output(command, env=self.env, text=True, timeout=PATIENCE)
        (found,) = json.loads(output[output.index("{") :])["runs"]
        return str(found["status"])

    def listening(self) -> list[str]:
        """Return the addresses on which the processes of all terminals listen."""
        servers = with_descendants(*(process.pid for process in self.processes.values()))
        return sorted(listening_addresses(servers))

    def addresses(self, *ports: str) -> list[str]:
        """Return the loopback addresses of ports of the guide."""
        return sorted(f"127.0.0.1:{self.ports[port]}" for port in ports)

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        # A SuperNode that was turned away may leave the process of its last message behind.
        for process in processes_at_home(self.folder):
            os.kill(process, signal.SIGKILL)


def run_id(output: str) -> str:
    """Return the id of the run that a command started."""
    (found,) = re.findall(r"Successfully started run (\d+)", output)
    return str(found)


def children(process: int) -> list[int]:
    """Return the processes that a process started itself."""
    listing = subprocess.check_output(["ps", "-e", "-o", "pid=,ppid="], text=True)
    pairs = [tuple(map(int, line.split())) for line in listing.splitlines()]
    return [pid for pid, parent in pairs if parent == process]


def processes_at_home(home: Path) -> list[int]:
    """Return the processes that have a home folder."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment = (folder / "environ").read_bytes().split(b"\0")
        except OSError:  # ended meanwhile, or someone else's
            continue
        if f"HOME={home}".encode() in environment:
            found.append(int(folder.name))
    return found


def listening_addresses(processes: list[int]) -> Iterator[str]:
    """Yield where processes listen for TCP connections; IPv6 addresses as the kernel has them."""
    sockets = set()
    for process in processes:
        for descriptor in Path(f"/proc/{process}/fd").glob("*"):
            if descriptor.is_symlink():
                sockets.add(os.readlink(descriptor))
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            if state == "0A" and f"socket:[{inode}]" in sockets:
                address, port = local.split(":")
                if len(address) == 8:
                    address = ".".join(str(byte) for byte in bytes.fromhex(address)[::-1])
                yield f"{address}:{int(port, 16)}"


@pytest.fixture(scope="module")
def smallest(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    """Someone who has followed section 1 to its end."""
    with Reader(tmp_path_factory.mktemp("smallest")) as reader:
        reader.open_terminal("terminal-1", "flower-superlink --insecure")
        reader.type("[superlink.here]")
        reader.seen.run = run_id(reader.type("flwr run . here"))
        reader.seen.listening = reader.listening()
    return reader


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    """Someone who has followed all sections from 3; the SuperLink and the first site are up."""
    with Reader(tmp_path_factory.mktemp("deployed")) as reader:
        seen = reader.seen
        seen.nodes = {}
        reader.type("openssl req")
        reader.open_terminal("superlink", "flower-superlink --host")
        reader.type("[superlink.hospitals]")
        for site in SITES:
            reader.type("ssh-keygen", site)
            registered = reader.type("flwr supernode register", site)
            (seen.nodes[site],) = re.findall(r"SuperNode (\d+) registered", registered)
            reader.open_terminal(site, "--auth-supernode-private-key", site)
        seen.listing = reader.type("flwr supernode list")
        seen.interrupted = run_id(seen.listing)
        wait_until(lambda: read_lines(reader.output / seen.interrupted) != [])

        # All but one SuperNode restart while the second round is in progress. The other cannot
        # sign off, so it is turned away at first.
        reader.close_terminal("superlink")
        reader.close_terminal(SITES[0])
        reader.open_terminal("superlink", "flower-superlink --host")
        reader.restart_until_welcome(SITES[0], "--auth-supernode-private-key")
        wait_until(lambda: reader.status(seen.interrupted).startswith("finished"))
        seen.status = reader.status(seen.interrupted)
        reader.ids[RUN] = seen.interrupted
        seen.log = reader.type("flwr log")

        seen.stopped = reader.ids[RUN] = run_id(reader.type("flwr supernode list"))
        wait_until(lambda: reader.status(seen.stopped) == "running")
        reader.type("flwr stop")
        reader.wait_for_nodes(SITES[0], 2)
        seen.listening = reader.listening()

        reader.ids[RUN] = seen.interrupted
        seen.resumed = run_id(reader.type("resume-from"))

        reader.ids[NODE] = seen.nodes[SITES[1]]
        reader.type("flwr supernode unregister")
        reader.wait_for(SITES[1])
        yield reader


def test_the_smallest_network_finishes_a_run(smallest: Reader):
    rows = read_lines(smallest.output / smallest.seen.run)
    assert [row["round"] for row in rows] == [1, 2]
    assert all(row["num-clients"] == 3 and row["num-failures"] == 0 for row in rows)
    # The connection is added to what `flwr` had written itself.
    assert "[superlink.local]" in (smallest.folder / ".flwr" / "config.toml").read_text()


def test_the_smallest_network_listens_on_the_ports_it_is_given(smallest: Reader):
    assert smallest.seen.listening == smallest.addresses("18000", "19094", "19095", "19096")


def test_registered_sites_are_listed_under_the_ids_they_keep(deployed: Reader):
    seen = deployed.seen
    assert len(set(seen.nodes.values())) == len(SITES)
    for site in SITES:
        assert seen.nodes[site] in seen.listing
        assert set(deployed.node_ids(site)) == {seen.nodes[site]}
    assert len(deployed.node_ids(SITES[0])) == 2  # before and after it was restarted


def test_a_run_in_progress_fails_when_the_superlink_restarts_and_is_resumed(deployed: Reader):
    seen = deployed.seen
    assert seen.status == "finished:failed"
    before, after = (read_lines(deployed.output / run) for run in (seen.interrupted, seen.resumed))
    assert [row["round"] for row in before] == [1], "the run was over before the restart"
    assert [row["round"] for row in after] == [1, 2]
    assert after[0] == before[0]
    trained = read_lines(deployed.output / seen.resumed, "clients.jsonl")
    assert {row["node-id"] for row in trained if row["round"] == 2} == set(seen.nodes.values())
    assert all(row["status"] == "ok" for row in trained)


def test_a_restarted_superlink_has_the_logs_of_earlier_runs(deployed: Reader):
    seen = deployed.seen
    listing, *logs = seen.log.split("logstream for run_id")
    assert seen.interrupted in listing
    assert len(logs) == 2  # one that ends at once, and one that ends with the run
    assert all("[ROUND 1/2]" in log for log in logs)


def test_a_stopped_run_is_over(deployed: Reader):
    assert deployed.status(deployed.seen.stopped) == "finished:stopped"


def test_nothing_listens_but_what_the_table_of_ports_has(deployed: Reader):
    assert deployed.seen.listening == deployed.addresses("18000", "19094", "19095", "19096")


def test_the_log_file_has_what_the_guide_says(deployed: Reader):
    log = (deployed.folder / "pfedgpa" / "superlink.log").read_text()
    for event in ("RegisterNode", "Started task", "Push replies from node_id", "Finished task"):
        assert event in log
    assert "ROUND" not in log
    assert "uvicorn.access" not in log
    assert "uvicorn.access" in deployed.log("superlink")


# Messages of the guide's table, and what leads to them if it is left out where the SuperNode was
# unregistered.
TURNED_AWAY = {
    "Failed to activate SuperNode": "",
    "All SuperNodes must be registered via the CLI": "--auth-supernode-private-key site-2",
    "CERTIFICATE_VERIFY_FAILED": "--root-certificates ca.crt",
}


@pytest.mark.parametrize("message", TURNED_AWAY)
def test_a_supernode_that_is_not_let_in_says_so(deployed: Reader, message: str):
    assert f"| `{message}` |" in GUIDE
    script = deployed.adapt(block_with("--auth-supernode-private-key"), SITES[1])
    left_out = TURNED_AWAY[message]
    assert left_out in script
    script = re.sub(r"--port \d+", f"--port {free_port()}", script.replace(left_out, ""))
    deployed.start(message, "/bin/bash", "-ec", script)
    assert deployed.wait_for(message) != 0
    assert message in deployed.log(message)
    assert not deployed.node_ids(message)


def test_every_command_of_the_guide_was_run(smallest: Reader, deployed: Reader):
    assert len(BLOCKS) > 10
    assert smallest.typed | deployed.typed == set(BLOCKS)


def test_no_other_user_of_the_machine_reads_the_database_keys_and_models():
    (service,) = [unit for unit in UNITS if "User=pfedgpa" in unit]
    assert "UMask=0077" in service.splitlines()
    made = re.findall(r"^mkdir .*", GUIDE, flags=re.MULTILINE)
    assert len(made) == 2
    assert all("&& chmod 700 ~/pfedgpa &&" in line for line in made)


def test_the_services_run_the_commands_that_were_tried():
    services = [
        line
        for unit in UNITS
        for line in unit.replace("\\\n", "").splitlines()
        if line.startswith("ExecStart=")
    ]
    assert len(services) == 2
    for service, text in zip(
        services, ("flower-superlink --host", "--auth-supernode-private-key"), strict=True
    ):
        command = block_with(text).replace("\\\n", "").splitlines()[-1]
        program, *arguments = shlex.split(service.removeprefix("ExecStart="))
        assert [Path(program).name, *arguments] == shlex.split(command)
        # Flower starts its own programs by their names.
        assert f"Environment=PATH={Path(program).parent}:" in UNITS[0]
