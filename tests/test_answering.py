"""What a client says that cannot answer, and of the code that it runs."""

import logging
import pickle
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FunctionType

import pytest
from digits_client import context, message
from flwr.app import Message, MessageType, RecordDict

from client_app import answering
from client_app.answering import answer_by, outline_of
from client_app.app import app
from client_app.node import NodeError, query
from pfedgpa_app.config import Config, ConfigError
from pfedgpa_app.data import DataError
from pfedgpa_app.errors import reason_of
from pfedgpa_app.model_spec import ModelError
from pfedgpa_app.source import source_hash
from server_app.simulation import ClientError, simulate

PROJECT = Path(__file__).parents[1]
SCANS = """
import json

import numpy as np


def load(root):
    return {"label": 1}["diagnosis"]


def parse(root):
    return json.loads("no JSON")


def stack(root):
    return np.concatenate([np.zeros(2), np.zeros((2, 2))])


def check(root):
    assert root is None


def tell(root):
    raise ValueError("first line\\n\\n" + "x" * 1000)
"""
OWN = {"data.shape": "1x8x8", "data.num-classes": 2, "data.partition": "iid"}


@pytest.fixture(autouse=True)
def forget_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answering, "_logged", set())


@pytest.fixture
def scans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return the file of a user's own module."""
    sys.modules.pop("scans", None)  # that of the documents, if another test wrote it
    (tmp_path / "scans.py").write_text(SCANS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PFEDGPA_TRUST", "scans")
    yield tmp_path / "scans.py"
    sys.modules.pop("scans", None)


def line_of(text: str) -> int:
    (found,) = [number for number, line in enumerate(SCANS.splitlines(), 1) if text in line]
    return found


REASONS = {
    "load": "KeyError: 'diagnosis' in load",
    "parse": "JSONDecodeError: Expecting value: line 1 column 1 (char 0) in parse",
    "check": "AssertionError in check",
    "tell": f"ValueError: first line {'x' * 189}… in tell",
}
PLACES = {
    "load": '"diagnosis"',
    "parse": "json.loads",
    "check": "assert",
    "tell": "raise ValueError",
}


@pytest.mark.usefixtures("scans")
@pytest.mark.parametrize("function", REASONS)
def test_an_own_data_set_that_raises_is_told_with_its_place(function: str):
    own = context(**OWN, **{"data.dataset": f"scans:{function}"})
    reply = app(message(MessageType.TRAIN), own)
    place = f"(scans.py, line {line_of(PLACES[function])})"
    assert reply.error.reason == f"scans:{function}: failed with {REASONS[function]} {place}"


@pytest.mark.usefixtures("scans")
def test_an_error_within_a_package_is_told_where_it_was_called():
    own = context(**OWN, **{"data.dataset": "scans:stack"})
    reason = app(message(MessageType.TRAIN), own).error.reason
    assert reason.startswith("scans:stack: failed with ValueError: all the input array")
    assert reason.endswith(f"in stack (scans.py, line {line_of('np.concatenate')})")


def test_an_error_of_the_app_says_what_would_be_right_and_no_place():
    node = context(**{"data.dataset": "sites", "data.shape": "1x8x8", "data.num-classes": 2})
    reason = app(message(MessageType.EVALUATE), node).error.reason
    assert "every site brings its own data" in reason
    assert ".py" not in reason


def test_no_folder_is_sent(scans: Path):
    reason = app(
        message(MessageType.TRAIN), context(**OWN, **{"data.dataset": "scans:load"})
    ).error.reason
    assert str(scans.parent) not in reason
    assert "/" not in reason


def test_the_traceback_is_logged_at_the_node_once(scans: Path, caplog: pytest.LogCaptureFixture):
    own = {**OWN, "data.dataset": "scans:load"}
    with caplog.at_level(logging.ERROR):
        for partition in range(3):
            app(message(MessageType.TRAIN), context(partition, **own))
    assert caplog.text.count("A message cannot be answered: scans:load: failed with KeyError") == 1
    assert caplog.text.count("Traceback") == 2  # of the cause, and of what was made of it
    assert str(scans) in caplog.text


def test_an_error_without_words_has_a_name():
    with pytest.raises(NotImplementedError) as caught:
        raise NotImplementedError
    said = reason_of(caught.value)
    assert said.startswith("NotImplementedError in test_an_error_without_words_has_a_name (")


def test_an_error_of_several_lines_is_one():
    with pytest.raises(DataError) as caught:
        raise DataError("right would be\n  a folder")
    assert reason_of(caught.value) == "right would be a folder"


@pytest.mark.parametrize("kind", [MessageType.TRAIN, MessageType.EVALUATE])
@pytest.mark.parametrize("privacy", [{}, {"privacy.mode": "update", "privacy.epsilon": 1.0}])
def test_a_site_with_own_data_names_no_file_to_the_server(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str, privacy: dict[str, object]
):
    for name in ("Smith_John_HIV-positive.png", "b.png"):
        (tmp_path / "0").mkdir(exist_ok=True)
        (tmp_path / "0" / name).write_bytes(b"no picture")
    sites = {"data.dataset": "sites", "data.shape": "1x8x8", "data.num-classes": 2}
    site = context(**sites, **privacy)
    site.node_config["data-path"] = str(tmp_path)
    with caplog.at_level(logging.ERROR):
        reply = app(message(kind), site)
    assert reply.error.reason == (
        "there is a problem with its data; the log of the node's SuperNode says which"
    )
    assert f"{tmp_path}/0/" in caplog.text
    assert "png: cannot be read" in caplog.text


@pytest.mark.parametrize(
    ("error", "about"),
    [
        (ConfigError(["a"]), "its settings"),
        (NodeError("a"), "its settings"),
        (ModelError("a"), "its model's code"),
        (PermissionError("/srv/Smith_John.png"), "its code"),
        (type("DataError", (Exception,), {})("a foreign class of this name"), "its code"),
    ],
)
def test_what_a_site_says_follows_from_the_class_of_the_error(error: Exception, about: str):
    said = f"there is a problem with {about}; the log of the node's SuperNode says which"
    assert outline_of(error) == said


@pytest.mark.usefixtures("scans")
def test_a_benchmark_ends_with_what_a_client_says(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("server_app.simulation.client_data", lambda *arguments: None)
    config = Config.from_flat({**OWN, "data.dataset": "scans:load"})
    with pytest.raises(ClientError, match=r"client 0 failed: .*KeyError: 'diagnosis' in load"):
        simulate(config, 2, num_processes=0)


def handlers() -> list[Callable[..., Message]]:
    return list(app._registered_funcs.values())


def inner(function: FunctionType) -> Iterator[FunctionType]:
    """Yield the functions that a function closes over, and itself."""
    yield function
    for cell in function.__closure__ or ():
        if isinstance(cell.cell_contents, FunctionType):
            yield from inner(cell.cell_contents)


def test_what_the_simulation_sends_of_the_app_needs_no_import_of_it():
    """Ray finds a function by its module and name, and sends one that has none as a value."""
    assert len(handlers()) == 3
    for handler in handlers():
        own = [each for each in inner(handler) if each.__module__.startswith("client_app")]
        assert own
        for each in own:
            with pytest.raises((AttributeError, pickle.PicklingError)):
                pickle.dumps(each)
            used = {each.__globals__.get(name) for name in each.__code__.co_names}
            assert not [one for one in used if getattr(one, "__module__", "") == each.__module__]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """Return another place at which the code of the clients is installed."""
    shutil.copytree(PROJECT / "client_app", tmp_path / "client_app")
    return tmp_path / "client_app"


def test_the_same_code_has_the_same_hash_wherever_it_is(copy: Path):
    ours = source_hash(PROJECT / "client_app")
    assert source_hash(copy) == ours
    source_hash.cache_clear()
    file = copy / "node.py"
    file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n"))
    (copy / "__pycache__").mkdir(exist_ok=True)
    (copy / "__pycache__" / "node.cpython-311.pyc").write_bytes(b"compiled")
    assert source_hash(copy) == ours


@pytest.mark.parametrize("change", ["content", "name", "more", "less"])
def test_other_code_has_another_hash(copy: Path, change: str):
    source_hash.cache_clear()
    if change == "content":
        with (copy / "methods" / "ditto.py").open("a") as file:
            file.write("# a fault\n")
    elif change == "name":
        (copy / "node.py").rename(copy / "nodes.py")
    elif change == "more":
        (copy / "more.py").touch()
    else:
        (copy / "kept_model.py").unlink()
    assert source_hash(copy) != source_hash(PROJECT / "client_app")


def test_a_node_reports_the_hash_of_its_code():
    request = Message(RecordDict(), dst_node_id=1, message_type=MessageType.QUERY)
    for reply in (query(request, context()), app(request, context())):
        assert reply.content["source"]["source"] == source_hash(PROJECT / "client_app")


def test_other_functions_answer_by_their_name():
    request = Message(RecordDict(), dst_node_id=1, message_type=MessageType.QUERY)
    assert answer_by("client_app.node:query", request, context()).has_content()
    missing = answer_by("client_app.node:none", request, context())
    assert "has no attribute 'none'" in missing.error.reason
