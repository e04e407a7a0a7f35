"""The command ``pfedgpa config check``: checks before a run."""

import os
import sys
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from pfedgpa_app.config import DATASETS, SITES, Config, ConfigError, flatten
from pfedgpa_app.console import fail, make_app
from pfedgpa_app.files import count_of, read_toml
from pfedgpa_app.sharing import too_few

config_app = make_app(help="Settings.", no_args_is_help=True)

SettingsFile = Annotated[
    Path | None, typer.Argument(help="Overrides of pyproject.toml's defaults, as in conf/.")
]
_PAIRS_HELP = "key=value as in TOML, such as diffusion.fidelity=0.5; may be repeated."
Pairs = Annotated[list[str] | None, typer.Option("--config", "-c", help=_PAIRS_HELP)]


@config_app.command()
def check(
    file: SettingsFile = None,
    config: Pairs = None,
    clients: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Also partition the data among so many, as a run with as many SuperNodes does; "
            "missing data sets are downloaded.",
        ),
    ] = None,
) -> None:
    """Report all problems of settings, without starting a run.

    The model is built and an own data set loaded, which calls own functions. Run it in the
    project's folder.
    """
    settings = checked(file, config or [], clients)
    changed = settings.changed
    count = count_of(len(changed), "setting")
    print(f"The configuration is right; different from the defaults: {count}.")
    for key, value in changed.items():
        print(f"  {key} = {value!r}")
    fewest = settings.server.min_available_nodes
    if settings.strategy == "pfedgpa" and (note := too_few(fewest, settings.diffusion)):
        print(f"server.min-available-nodes = {fewest}: a run may start with so few. {note}.")
    for unchecked in _unchecked(settings, clients):
        print(f"Not checked: {unchecked}")


def checked(file: Path | None, overrides: list[str], clients: int | None) -> Config:
    """Return settings without problems, or end the command with all problems."""
    sys.path.insert(0, os.getcwd())  # for own modules, as `flwr run` packs it
    settings = settings_of(given_settings(file, overrides))
    if problems := list(_problems(settings, clients)):
        fail(str(ConfigError(problems)))
    return settings


def defaults_here() -> dict[str, Any] | None:
    """Return the defaults in this folder's pyproject.toml; None outside of the app's folder."""
    if not Path("pyproject.toml").is_file():
        return None
    tool: Any = read_toml(Path("pyproject.toml")).get("tool", {})
    flwr_app = tool.get("flwr", {}).get("app", {})
    if flwr_app.get("components", {}).get("serverapp") != "server_app.app:app":
        return None
    return dict(flatten(flwr_app.get("config", {})))


def given_settings(file: Path | None, overrides: list[str]) -> dict[str, Any]:
    """Return the settings of a TOML file and ``key=value`` overrides, or end the command."""
    flat: dict[str, Any] = {}
    try:
        if file is not None:
            flat |= flatten(read_toml(file))
        for override in overrides:  # UTF-8 too, whatever the locale
            settings = dict(flatten(tomllib.loads(os.fsencode(override).decode())))
            if not settings:
                fail(f'--config "{override}": right would be, for example, seed=1')
            flat |= settings
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        fail(f'not TOML: {error}; right would be, for example, strategy="local" or seed=1')
    return flat


def settings_of(given: Mapping[str, Any]) -> Config:
    """Build the settings as `flwr run` does here, or end the command with all problems."""
    try:
        return Config.from_flat({**(defaults_here() or {}), **given})
    except ConfigError as error:
        fail(str(error))


def _problems(config: Config, clients: int | None) -> Iterator[str]:
    """Yield the problems of a run beyond its settings."""
    # Imported here, since they import torch and Flower.
    from pfedgpa_app.preflight import preflight
    from server_app.app import make_strategy
    from server_app.checkpoint import ResumeError, resolve_resume, resume

    path = config.output_path
    existing = next(each for each in (path, *path.parents) if os.path.exists(each))
    output_dir = f'output-dir = "{config.output_dir}"'
    if not existing.is_dir():
        yield f"{output_dir}: {existing} is no folder; right would be one"
    elif not os.access(existing, os.W_OK | os.X_OK):
        right = "right would be a folder that the ServerApp may write to"
        yield f"{output_dir}: nothing can be written in {existing}; {right}"
    yield from _data_problems(config, clients)
    try:
        spec = preflight(config)
        config = resolve_resume(config)
        # The earlier run's folder is only read.
        strategy = make_strategy(config, spec, config.earlier_path)
        if config.resume_from:
            resume(config, strategy)
    except ConfigError as error:
        yield from error.problems
    except ResumeError as error:
        yield str(error).replace("\n", "\n  ")


def _data_problems(config: Config, clients: int | None) -> Iterator[str]:
    from pfedgpa_app.data import DataError, client_data
    from pfedgpa_app.data.sources import load_dataset

    data, fewest = config.data, config.server.min_available_nodes
    late = config.onboarding.late_clients
    if clients is not None and fewest > clients:
        yield (
            f"server.min-available-nodes = {fewest}: more than {count_of(clients, 'client')}; a "
            "run would wait for them and end"
        )
    if clients is not None and late >= clients:
        yield (
            f"onboarding.late-clients = {late}: there are only {count_of(clients, 'client')}; "
            "right would be less than that"
        )
    if data.dataset == SITES:
        return
    try:
        if clients is not None:
            client_data(data, config.seed, 0, clients)
        elif data.dataset not in DATASETS:
            load_dataset(data, config.seed)
    except DataError as error:
        yield str(error)


def _unchecked(config: Config, clients: int | None) -> Iterator[str]:
    from pfedgpa_app.randomness import resolve_device

    if config.data.dataset == SITES:
        yield "the data, which are at the sites"
    elif clients is None:
        yield "the partition of the data; --clients NUMBER would check it"
    try:
        resolve_device(config.client.device)
    except RuntimeError:
        yield f'client.device = "{config.client.device}", which this machine does not have'
