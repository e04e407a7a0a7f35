"""The files of docker/: what they say, and their services as processes, up to a finished run.

No container engine is needed. The processes run the commands of the compose files; only the
addresses, the ports and the folders of the containers are replaced by ones of this machine.
"""

import io
import ipaddress
import os
import re
import runpy
import shutil
import socket
import subprocess
import sys
import tomllib
from contextlib import redirect_stdout
from datetime import timedelta
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
from click.testing import CliRunner, Result
from containers import DOCKER, Demo, Dockerfile, read_compose
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from flwr.common.config import parse_config_args
from packaging.requirements import Requirement
from published import commands

from benchmarks.network import BIN, PROJECT, read_lines
from pfedgpa_app.config import DataConfig
from pfedgpa_app.data import client_data

PLAIN, TLS = DOCKER / "compose.yaml", DOCKER / "compose.tls.yaml"
SERVER, SITE, GPU = (DOCKER / f"compose.{name}.yaml" for name in ("server", "site", "gpu"))
WAYS = {"plain": (PLAIN,), "tls": (PLAIN, TLS)}
GIVEN = {
    "SERVER_NAME": "fl.example.org",
    "CA_KEY_FOLDER": "/media/key",
    "SUPERLINK": "fl.example.org:18000",
    "DATA": "/srv/scans",
    "CA": "/srv/ca.pem",
}
"""What docker/.env of a server or a site has."""
ALL = WAYS | {"server": (SERVER,), "site": (SITE,), "gpu": (SITE, GPU)}
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


def validate(file: Path) -> Result:
    """Hold a file against the schema of the Compose specification."""
    from check_jsonschema import main as check  # imported here, as other workers need it not

    return CliRunner().invoke(check, ["--builtin-schema", "vendor.compose-spec", str(file)])


@pytest.mark.parametrize("file", [PLAIN, TLS, SERVER, SITE, GPU], ids=lambda file: file.name)
def test_compose_files_obey_the_specification(file: Path):
    result = validate(file)
    assert result.exit_code == 0, result.output


def test_the_specification_knows_no_misspelt_key(tmp_path: Path):
    misspelt = tmp_path / "compose.yaml"
    misspelt.write_text(PLAIN.read_text().replace("healthcheck:", "healtcheck:"))
    result = validate(misspelt)
    assert result.exit_code == 1
    assert "'healtcheck' was unexpected" in result.output


@pytest.mark.parametrize("way", ALL)
def test_what_the_services_name_exists(way: str):
    compose = read_compose(*ALL[way], **GIVEN)
    built = [one.build for one in compose.services.values() if one.build]
    assert len(built) == 1  # once for all, under the name that all use
    assert {one.image for one in compose.services.values()} == {compose.name}
    assert (DOCKER / built[0].context).resolve() == PROJECT
    assert (PROJECT / built[0].dockerfile).exists()
    used = {source for one in compose.services.values() for source, _ in one.mounts.values()}
    files = {source for source in used if source.startswith(".")}
    assert all((DOCKER / source).is_file() for source in files)
    assert {source for source in used - files if source[0] != "/"} == compose.volumes.keys()
    for one in compose.services.values():
        for name, dependency in one.depends_on.items():
            needed = compose.services[name]
            waits_for_health = dependency.condition == "service_healthy"
            assert waits_for_health == (needed.healthcheck is not None)
            assert waits_for_health == (needed.restart == "unless-stopped")


@pytest.mark.parametrize("way", ["server", "site", "gpu"])
def test_what_runs_for_months_is_bounded_and_tells_its_health(way: str):
    compose = read_compose(*ALL[way], **GIVEN)
    staying = [one for one in compose.services.values() if not one.profiles]
    assert len(staying) == 1
    assert staying[0].restart == "unless-stopped"
    assert staying[0].mem_limit
    assert staying[0].healthcheck
    for one in compose.services.values():
        assert one.logging
        assert one.logging.options.keys() == {"max-size", "max-file"}


def test_a_site_is_told_its_own_data_and_where_its_model_is_kept():
    site = read_compose(SITE, **GIVEN).services["supernode"]
    node = parse_config_args([site.words[site.words.index("--node-config") + 1]])
    assert site.mounts[str(node["data-path"])] == ("/srv/scans", True)
    assert site.mounts[str(Path(str(node["model-path"])).parent)] == ("model", False)
    assert site.words[site.words.index("--superlink") + 1] == GIVEN["SUPERLINK"]
    assert not site.ports


def test_a_file_that_a_command_mounts_has_an_absolute_path():
    """After `run -v`, Compose takes a relative path for the name of a volume."""
    mounting = [words for words in commands() if words[0] == "docker" and "-v" in words]
    assert mounting
    assert all(words[words.index("-v") + 1].startswith(("/", "$PWD/")) for words in mounting)


def test_a_gpu_is_given_to_the_service_that_trains_and_torch_is_built_for_it():
    services = read_compose(SITE, GPU, **GIVEN).services
    (device,) = services["supernode"].deploy["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]
    assert services["key"].build
    assert services["key"].build.args["TORCH"] == "cuda"
    assert services["key"].build.args["ROLE"] == "site"


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


@pytest.mark.parametrize("way", ALL)
def test_no_service_may_more_than_it_needs(way: str):
    for name, one in read_compose(*ALL[way], **GIVEN).services.items():
        assert bool(one.ports) == (way == "server" and name == "superlink")
        assert one.read_only
        assert one.cap_drop == ["ALL"]
        assert one.security_opt == ["no-new-privileges:true"]
        assert one.mounts.keys() & {"/app", "/opt", "/tmp"} == set()
        assert "--insecure" not in one.words or way == "plain"


def test_a_private_key_is_seen_where_it_is_made_and_used_alone():
    services = read_compose(SERVER, **GIVEN).services
    assert [name for name, one in services.items() if "/ca" in one.mounts] == ["certificates"]
    assert services["superlink"].mounts["/tls/superlink"] == ("superlink-key", True)
    assert "/tls/superlink" not in services["flwr"].mounts
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
    """Return whether Dockerfile.dockerignore lets a file of the project into the build."""
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
    composes = [read_compose(*files, **GIVEN) for files in ALL.values()]
    mounts = (one.mounts for compose in composes for one in compose.services.values())
    volumes = {
        target for one in mounts for target, (source, _) in one.items() if source[0] not in "./"
    }
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
    command = "pip install --no-cache-dir -r /opt/requirements.txt -c /opt/constraints.txt"
    installed = instructions.index(("RUN", command))
    before = [rest for name, rest in instructions[:installed] if name in ("COPY", "ADD")]
    assert before == [
        "docker/constraints.txt /opt/",
        "--from=dependencies requirements.txt /opt/",
    ]


PYPROJECT = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
INSTALLED = PYPROJECT["dependencies"] + PYPROJECT["optional-dependencies"]["privacy"]
LEFT_OUT = ("ray", "plotly", "matplotlib", "flwr_datasets")


def test_the_image_installs_the_dependencies_of_pyproject_and_a_site_fewer(tmp_path: Path):
    shutil.copy(PROJECT / "pyproject.toml", tmp_path)
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    installed = []
    for role, origin in (("all", "base"), ("site", "dependencies-all")):
        name = ("FROM", f"{origin} AS dependencies-{role}")
        (stage,) = (each for each in Dockerfile().stages if each[0] == name)
        command = stage[-1][1]
        subprocess.run(["sh", "-c", command], cwd=tmp_path, env={"PATH": path}, check=True)
        installed.append((tmp_path / "requirements.txt").read_text().splitlines())
    assert installed[0] == INSTALLED
    without = [x.replace("[simulation]", "") for x in INSTALLED]  # which brings Ray
    named = tuple(name.replace("_", "-") for name in LEFT_OUT)
    assert installed[1] == [line for line in without if not line.startswith(named)]


def test_the_lock_has_a_version_that_pyproject_allows_of_all_but_torch():
    lines = (DOCKER / "constraints.txt").read_text().splitlines()
    locked = dict(line.split("==") for line in lines if not line.startswith("#"))
    for requirement in map(Requirement, INSTALLED):
        if requirement.name not in ("torch", "torchvision"):
            assert locked[requirement.name] in requirement.specifier
    assert not {"torch", "torchvision"} & locked.keys()  # Debian's would be replaced


TRAINED = """
import sys

sys.modules.update(dict.fromkeys({left_out!r}))  # to import them raises
sys.path.insert(0, {tests!r})
from digits_client import SETTINGS, message
from flwr.app import Context, RecordDict
from client_app.app import app

sites = {{"data.dataset": "sites", "data.shape": "1x8x8", "data.num-classes": 10}}
private = {{"privacy.mode": "example"}}
for settings in (sites, sites | private):
    context = Context(1, 1, {{"data-path": {path!r}}}, RecordDict(), {{**SETTINGS, **settings}})
    for kind in ("query", "train", "evaluate"):
        reply = app(message(kind), context)
        assert not reply.has_error(), reply.error
        print(kind)
import server_app.cli
"""


def test_a_site_trains_without_what_its_image_leaves_out(tmp_path: Path):
    data = client_data(DataConfig(), 0, 0, 4)
    file = tmp_path / "own.npz"
    np.savez(file, x=data.train_inputs.numpy(), y=data.train_labels.numpy())
    program = TRAINED.format(left_out=LEFT_OUT, tests=str(Path(__file__).parent), path=str(file))
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=PROJECT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["query", "train", "evaluate"] * 2


class Answers(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, *arguments: object) -> None: ...


def test_a_supernode_that_answers_is_healthy_once_it_is_connected():
    with HTTPServer(("127.0.0.1", 0), Answers) as own, socket.create_server(("", 0)) as superlink:
        Thread(target=own.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{own.server_port}/health"
        port = superlink.getsockname()[1]
        command = ("health.py", url, "--connected-to", f"superlink:{port}")
        with pytest.raises(SystemExit) as ended:
            run(*command)
        assert ended.value.code == f"not connected to superlink:{port}"
        with socket.create_connection(("127.0.0.1", port)):
            run(*command)
        own.shutdown()


def run(program: str, *arguments: str | Path) -> list[str]:
    """Run a program of docker/ in this process; return the lines that it prints."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
        patch.setattr(sys, "argv", [program, *map(str, arguments)])
        runpy.run_path(str(DOCKER / program), run_name="__main__")
    return printed.getvalue().splitlines()


def make(*arguments: str | Path) -> list[Path]:
    """Run certificates.py; return the files that it names."""
    return [Path(line) for line in run("certificates.py", *arguments)]


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


def test_a_certificate_is_renewed_by_the_authority_whose_key_was_kept(tmp_path: Path):
    key = tmp_path / "kept" / "ca.key"
    words = ("superlink", tmp_path / "tls", "superlink", "--ca-key", key, "--days", "30")
    ca_file, file, key_file = make(*words)
    before = [each.read_bytes() for each in (ca_file, key, file, key_file)]
    assert key.stat().st_mode & 0o777 == 0o600
    make(*words)
    after = [each.read_bytes() for each in (ca_file, key, file, key_file)]
    assert [x == y for x, y in zip(before, after, strict=True)] == [True, True, False, False]
    ca, old, new = map(x509.load_pem_x509_certificate, (after[0], before[2], after[2]))
    for certificate in (old, new):
        certificate.verify_directly_issued_by(ca)
        assert certificate.not_valid_after_utc - certificate.not_valid_before_utc < timedelta(31)
    assert ca.not_valid_after_utc - new.not_valid_after_utc > timedelta(3000)


def test_half_an_authority_is_refused_and_kept(tmp_path: Path):
    key = tmp_path / "ca.key"
    words = ("superlink", tmp_path, "superlink", "--ca-key", key)
    ca_file, file, _ = make(*words)
    certificate, kept = file.read_bytes(), key.read_bytes()
    key.unlink()
    for content in (None, make_key()):
        if content:
            key.write_bytes(content)
        with pytest.raises(SystemExit, match="; right would be "):
            make(*words)
        assert file.read_bytes() == certificate
    key.write_bytes(kept)
    ca_file.unlink()
    with pytest.raises(SystemExit):
        make(*words)
    assert key.read_bytes() == kept


def make_key() -> bytes:
    """Return another key than any there is."""
    key = ec.generate_private_key(ec.SECP256R1())
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
