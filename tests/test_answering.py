"""What a client says that cannot answer, and of the code that it runs."""

import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from digits_client import context, message
from flwr.app import Message, MessageType, RecordDict

from client_app import answering
from client_app.answering import answer_by, reason_of
from client_app.app import app
from pfedgpa_app.config import Config
from pfedgpa_app.data import DataError
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
    (tmp_path / "scans.py").write_text(SCANS)
    monkeypatch.syspath_prepend(tmp_path)
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
    assert reply.error.reason == f"{REASONS[function]} {place}"


@pytest.mark.usefixtures("scans")
def test_an_error_within_a_package_is_told_where_it_was_called():
    own = context(**OWN, **{"data.dataset": "scans:stack"})
    reason = app(message(MessageType.TRAIN), own).error.reason
    assert reason.startswith("ValueError: all the input array")
    assert reason.endswith(f"in stack (scans.py, line {line_of('np.concatenate')})")


def test_an_error_of_the_app_says_what_would_be_right_and_no_place():
    node = context(**{"data.dataset": "sites", "data.shape": "1x8x8", "data.num-classes": 2})
    reason = app(message(MessageType.EVALUATE), node).error.reason
    assert "every site brings its own data" in reason
    assert ".py" not in reason


def test_no_folder_is_told(scans: Path):
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
    assert caplog.text.count("A message cannot be answered: KeyError") == 1
    assert caplog.text.count("Traceback") == 1
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


@pytest.mark.usefixtures("scans")
def test_a_benchmark_ends_with_what_a_client_says(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("server_app.simulation.client_data", lambda *arguments: None)
    config = Config.from_flat({**OWN, "data.dataset": "scans:load"})
    with pytest.raises(ClientError, match=r"client 0 failed: KeyError: 'diagnosis' in load"):
        simulate(config, 2, num_processes=0)


def test_other_functions_answer_by_their_name():
    asked = Message(RecordDict(), dst_node_id=1, message_type=MessageType.QUERY)
    assert answer_by("client_app.query:query", asked, context()).has_content()
    missing = answer_by("client_app.query:none", asked, context())
    assert "has no attribute 'none'" in missing.error.reason
