"""Checkpoints: everything that the next round needs, in one file of the run's folder.

Generators have no state to save, since seed, purpose and round fix all that they draw.
"""

from pathlib import Path

from pfedgpa_app.config import Config
from pfedgpa_app.model_spec import ModelSpec
from pfedgpa_app.parameters import StateDict
from pfedgpa_app.report import Run
from pfedgpa_app.rounds import RoundRecord
from pfedgpa_app.runs import BANK, BEST, CHECKPOINT, RunNotFoundError, find_run
from pfedgpa_app.state import link_or_copy, load_state, replacing, save_state, writing
from pfedgpa_app.stateful import STATE_VERSION
from server_app.strategies import ClientwiseFedAvg

CHECKPOINT_KIND = f"pfedgpa-checkpoint-{STATE_VERSION}"


class ResumeError(ValueError):
    """A run that cannot be resumed."""


def write_checkpoint(folder: Path, strategy: ClientwiseFedAvg) -> None:
    """Write a strategy's state; after a crash the last checkpoint is as it was."""
    save_state(
        folder / CHECKPOINT,
        CHECKPOINT_KIND,
        strategy.state(),
        round=strategy.record.server_round,
        # JSON has no integer keys.
        clients=[[node_id, number] for node_id, number in strategy.roster.clients.items()],
    )


def keep_best(run: Path, target: Path | None = None) -> None:
    """Copy a run's checkpoint, which is that of its best round, to the folder `BEST`.

    The folder is below ``target``, by default the run. It gets the files of the bank too, as hard
    links where possible. After a crash it has the earlier checkpoint or this one. Raises
    `WriteError` if it cannot be written.
    """
    best = (target or run) / BEST
    with writing(best):
        best.mkdir(exist_ok=True)
        names = {file.name for file in (run / BANK).glob("*.safetensors")}
        if names:
            (best / BANK).mkdir(exist_ok=True)
        there = {file.name for file in (best / BANK).glob("*")}
        for name in names - there:
            link_or_copy(run / BANK / name, best / BANK / name)
        with replacing(best / CHECKPOINT) as linked:
            link_or_copy(run / CHECKPOINT, linked)
        for name in there - names:
            (best / BANK / name).unlink()


def resolve_resume(config: Config) -> Config:
    """Return the settings with ``resume-from``, a name or ``latest``, as an id or a path.

    Raises `ResumeError` if no run is called so, or more than one.
    """
    if not config.resume_from:
        return config
    try:
        path = find_run(config.resume_from, config.output_path)
    except (RunNotFoundError, OSError) as error:
        raise ResumeError(f'resume-from = "{config.resume_from}": {error}') from error
    is_below = path.parent == config.output_path
    return config.model_copy(update={"resume_from": path.name if is_below else str(path)})


def resume(config: Config, strategy: ClientwiseFedAvg) -> Run:
    """Restore a strategy from the run of `resolve_resume`, and return this run.

    Raises `ResumeError` if there is no such run, its checkpoint is missing, damaged or foreign,
    settings that affect results differ, or it has more rounds than ``config``.
    """
    if strategy.clients_keep_parts:
        raise ResumeError(
            f'resume-from = "{config.resume_from}": the clients of {config.strategy} keep parts of '
            "their models, which end with their run; right would be a new run"
        )
    path = config.earlier_path
    assert path is not None
    try:
        run = Run.read(path.parent if path.name == BEST else path)
        tensors, metadata = load_state(path / CHECKPOINT, CHECKPOINT_KIND)
    except ValueError as error:
        raise ResumeError(f'resume-from = "{config.resume_from}": {error}') from error
    differences = config.differences(run.config)
    # Sites may be excluded or included from here on.
    for key in ("server.include", "server.exclude"):
        differences.pop(key, None)
    if differences:
        lines = [f"\n  - {key} = {new!r}, there {old!r}" for key, (new, old) in differences.items()]
        raise ResumeError(
            f"The settings differ from those of the run to go on from:{''.join(lines)}"
        )
    if metadata["round"] > config.num_server_rounds:
        raise ResumeError(
            f"num-server-rounds = {config.num_server_rounds}: the run has completed "
            f"{metadata['round']} rounds; right would be that or more"
        )
    if damaged := _not_finite(tensors, strategy.global_model.spec):
        raise ResumeError(
            f'resume-from = "{config.resume_from}": {path / CHECKPOINT} is damaged: {damaged} has '
            f"values that are not finite. Right would be the checkpoint of another round"
        )
    try:
        strategy.restore(tensors)
    except ValueError as error:  # of the layout's or of the aggregator's
        raise ResumeError(f"The model is not that of the run to go on from: {error}") from error
    strategy.completed_rounds = metadata["round"]
    strategy.record = RoundRecord(metadata["round"])
    strategy.roster.clients = dict(metadata["clients"])
    return run


def _not_finite(tensors: StateDict, spec: ModelSpec) -> str:
    """Return a tensor with NaN or inf, "" for none, but for those of the model such as masks."""
    infinite = [name for name, each in spec.initial.items() if not bool(each.isfinite().all())]
    for name, tensor in tensors.items():
        is_own = any(name.endswith(f".{each}") for each in infinite)
        if not is_own and not bool(tensor.isfinite().all()):
            return name
    return ""
