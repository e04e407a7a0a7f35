"""A site's local copy of its personalized model: the last one that the server sent."""

from logging import ERROR, WARNING
from pathlib import Path
from typing import cast

import torch
from flwr.app import ConfigRecord, Context
from flwr.common import log

from client_app.methods import Method, Task
from client_app.node import NodeError, client_number, node_partition
from pfedgpa_app.config import home_path
from pfedgpa_app.exported import MODEL_KIND, ExportedModel
from pfedgpa_app.files import obstacle_to, printable
from pfedgpa_app.state import WriteError, load_header

MODEL_PATH = "model-path"
"""The node config key with the file, and the record of the client's Flower state that marks it as
checked."""
_ROUND = "round"


def check_model_path(context: Context) -> None:
    """Check, before a node's first training, that its model can be written.

    Raises `NodeError` if ``model-path`` names no file in a writable folder. The error is sent to
    the server, so it does not name the path, which is logged for the node's operator. There are no
    later checks: a failed write is not worth losing a round.
    """
    file = _model_file(context)
    if file is None or MODEL_PATH in context.state:
        return
    if not (wrong := obstacle_to(file)):
        context.state[MODEL_PATH] = ConfigRecord()
        return
    log(ERROR, "This node cannot take part: %s %s %s", MODEL_PATH, file, wrong)
    raise NodeError(f"the {MODEL_PATH} of its node config {wrong}")


def keep_model(method: Method, task: Task, context: Context, server_round: int) -> None:
    """Write the model that was sent after a round to ``model-path``, if the node config has one.

    The file is one of ``pfedgpa export``. A failed write is logged and leaves the old file. Models
    of round 0 are untrained and not written. Of the messages after one round, only the first is
    written: their models are equivalent.
    """
    file, kept = _model_file(context), _round_kept(context)
    if file is None or server_round <= kept:
        return
    if kept:
        _warn_of_another(file, context)
    labels, num_classes = task.data.train_labels, task.data.info.num_classes
    has_prior = task.config.client.class_prior
    counts = tuple(torch.bincount(labels, minlength=num_classes).tolist()) if has_prior else None
    model = ExportedModel(
        method.personal_state(task),
        task.config,
        client_number(context),
        server_round,
        task.data.stats,
        None if "data-path" in context.node_config else node_partition(context),
        counts,
        run=str(context.run_id),
    )
    try:
        model.save(file)
        context.state[MODEL_PATH] = ConfigRecord({_ROUND: server_round})
    except WriteError as error:
        text = "The model after round %d is not kept, and the run goes on: %s"
        log(ERROR, text, server_round, error)


def _warn_of_another(file: Path, context: Context) -> None:
    """Log a warning if another run has written to the file since this one did."""
    try:
        other = load_header(file, MODEL_KIND)[0].get("run", "")
    except ValueError:  # missing or damaged: it is replaced
        return
    if other != str(context.run_id):
        text = (
            "%s %s has a model of another run (%s), which is replaced by that of this run (%d); "
            "right would be a file of its own for each run that goes on at the same time"
        )
        name = printable(str(other)) or "of an older version"
        log(WARNING, text, MODEL_PATH, file, name, context.run_id)


def place_of_model(context: Context) -> str:
    """Return where a node's model is, for its log; empty if the node config names no file."""
    file, kept = _model_file(context), _round_kept(context)
    if file is None:
        return ""
    return f"its model after round {kept} is in {file}" if kept else f"no model is in {file} yet"


def _round_kept(context: Context) -> int:
    """Return the round of the model in the file; 0 if this run has written none."""
    kept = context.state.config_records.get(MODEL_PATH, ConfigRecord())
    return cast(int, kept.get(_ROUND, 0))


def _model_file(context: Context) -> Path | None:
    path = context.node_config.get(MODEL_PATH)
    return None if path is None else home_path(str(path))
