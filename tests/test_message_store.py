"""What docs/reliability.md says of how Flower's SuperLink stores messages."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from unittest.mock import Mock

import pytest
from flwr.app import ArrayRecord, Message, MessageType, RecordDict
from flwr.proto.message_pb2 import ObjectTree
from flwr.server.superlink.linkstate import InMemoryLinkState, LinkState, SqlLinkState
from flwr.supercore.corestate import in_memory_corestate, sql_corestate
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_id,
    get_object_tree,
    iterate_object_tree,
)
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.task_identity import TaskIdentity
from simulated_grid import weights

RUN_ID = 1
THREE_MINUTES = timedelta(minutes=3)


@pytest.fixture(params=["without --database", "with --database"])
def state(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[LinkState]:
    """Return what a SuperLink knows."""
    if request.param == "without --database":
        yield InMemoryLinkState(Mock(), ObjectStoreFactory().store())
        return
    file = str(tmp_path / "state.db")
    store = ObjectStoreFactory(file).store()
    found = SqlLinkState(file, Mock(), store)
    found.initialize()
    yield found


def test_an_upload_that_stops_is_waited_for_three_minutes_after_its_last_part(
    state: LinkState, monkeypatch: pytest.MonkeyPatch
):
    clock = [datetime.now(UTC)]
    for module in (in_memory_corestate, sql_corestate):
        monkeypatch.setattr(module, "now", lambda: clock[0])
    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1
    message = Message(
        RecordDict({"arrays": ArrayRecord(weights(1.0))}),
        dst_node_id=1,
        message_type=MessageType.TRAIN,
    )
    objects = {name: each.deflate() for name, each in get_all_nested_objects(message).items()}
    session = state.start_session(RUN_ID)
    first, *_, last = state.preregister_object_tree(get_object_tree(message), session)
    clock[0] += THREE_MINUTES - timedelta(seconds=1)
    assert state.store_object(RUN_ID, session, first, objects[first])
    clock[0] += THREE_MINUTES - timedelta(seconds=1)
    assert state.get_object(RUN_ID, last) == b""  # a round waits for it
    clock[0] += timedelta(seconds=1)
    assert state.get_object(RUN_ID, last) is None  # nobody does
    assert not state.store_object(RUN_ID, session, last, objects[last])


def nested(levels: int) -> ObjectTree:
    """Return objects of which each has the one below as its child, twice."""
    tree = ObjectTree(object_id=get_object_id(b"0"))
    for level in range(1, levels + 1):
        again = ObjectTree(object_id=tree.object_id)
        tree = ObjectTree(object_id=get_object_id(b"%d" % level), children=[tree, again])
    return tree


def test_without_a_database_each_level_of_nesting_doubles_the_work():
    sizes = []
    for levels in (8, 9):
        store, tree = ObjectStoreFactory().store(), nested(levels)
        store.preregister(RUN_ID, tree)
        sizes.append(len([*iterate_object_tree(store.get_object_tree(tree.object_id))]))
    assert sizes == [2**9 - 1, 2**10 - 1]
    assert len(nested(14).SerializeToString()) < 2100


def test_with_a_database_an_object_that_names_a_child_twice_is_refused(tmp_path: Path):
    store = ObjectStoreFactory(str(tmp_path / "state.db")).store()
    with pytest.raises(ValueError, match="duplicate children"):
        store.preregister(RUN_ID, nested(1))
