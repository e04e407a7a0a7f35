"""The command ``pfedgpa``: check settings, compare strategies, look at runs."""

import json
import subprocess
import sys
import tempfile
import tomllib
from collections import deque
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from pfedgpa_app.config import Config, ConfigError, flatten
from pfedgpa_app.preflight import preflight
from pfedgpa_app.report import (
    Run,
    draw_accuracy,
    group_by_setting,
    mean_and_spread,
    read_runs,
)

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False)
config_app = typer.Typer(help="Settings.", no_args_is_help=True)
app.add_typer(config_app, name="config")

FileArgument = Annotated[
    Path | None, typer.Argument(help="Overrides of pyproject.toml's defaults, as in conf/.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--config", "-c", help="key=value as in TOML, such as diffusion.fidelity=0.5."),
]
OutputDir = Annotated[
    str, typer.Option(help="Folder of the runs, relative to the home folder; '' is the default.")
]


@config_app.command()
def check(file: FileArgument = None, config: Overrides = None) -> None:
    """Say what is wrong with settings, all of it, without starting a run."""
    settings = _load(file, config or [])
    try:
        preflight(settings)
    except ConfigError as error:
        _fail(str(error))
    defaults = Config().to_flat()
    changed = {key: value for key, value in settings.to_flat().items() if defaults[key] != value}
    print(f"The configuration is right; {len(changed)} setting(s) differ from the defaults.")
    for key, value in changed.items():
        print(f"  {key} = {value!r}")


@app.command()
def compare(
    file: FileArgument = None,
    config: Overrides = None,
    strategies: Annotated[str, typer.Option(help="Comma-separated.")] = (
        "pfedgpa,local,fedavg,fedavg-ft"
    ),
    seeds: Annotated[str, typer.Option(help="Comma-separated.")] = "0,1,2",
    clients: Annotated[int, typer.Option(min=2, help="Simulated clients.")] = 10,
    fresh: Annotated[bool, typer.Option(help="Run again what an earlier call finished.")] = False,
    figure: Annotated[Path | None, typer.Option(help="Draw accuracy over rounds there.")] = None,
) -> None:
    """Run every strategy with every seed on the same partitions, and print the table.

    A run that an earlier call finished is taken as it is, so an interrupted comparison goes on
    where it was. Run it in the project's folder.
    """
    if figure is not None:
        figure.parent.mkdir(parents=True, exist_ok=True)
    settings = [
        _absolute(_load(file, [*(config or []), f'strategy="{strategy}"', f"seed={seed}"]))
        for strategy in strategies.split(",")
        for seed in seeds.split(",")
    ]
    runs = []
    for number, setting in enumerate(settings, start=1):
        title = f"[{number}/{len(settings)}] {setting.strategy}, seed {setting.seed}"
        run = None if fresh else _find_finished(setting, clients)
        print(f"{title}: {'found ' + str(run.path) if run else 'running'}", flush=True)
        runs.append(run or _simulate(setting, clients))
    groups = group_by_setting(runs)
    _print_table(groups)
    if figure is not None:
        draw_accuracy({group[0].config.strategy: group for group in groups}, figure)
        print(f"Figure: {figure.resolve()}")


@app.command()
def runs(output_dir: OutputDir = "") -> None:
    """List the runs, oldest first, with their last accuracy."""
    folder = Config(output_dir=output_dir).output_path
    found = read_runs(folder)
    if not found:
        print(f"No runs in {folder}")
        return
    table = Table("run", "strategy", "data", "seed", "rounds", "personalized", "after training")
    for run in found:
        table.add_row(
            run.path.name,
            run.config.strategy,
            run.config.data.dataset,
            str(run.config.seed),
            f"{len(run.metrics)}/{run.config.num_server_rounds}",
            _percent(run.last("personalized-accuracy")),
            _percent(run.last("finetuned-accuracy")),
        )
    Console().print(f"Runs in {folder}", table, sep="\n", soft_wrap=True)


def _load(file: Path | None, overrides: list[str]) -> Config:
    """Build the settings from a TOML file and ``key=value`` pairs, or end with what is wrong."""
    flat: dict[str, Any] = {}
    try:
        if file is not None:
            flat |= flatten(tomllib.loads(file.read_text()))
        for override in overrides:
            flat |= flatten(tomllib.loads(override))
        return Config.from_flat(flat)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        _fail(f'not TOML: {error}; right would be, for example, strategy="local" or seed=1')
    except (OSError, ConfigError) as error:
        _fail(str(error))


def _absolute(config: Config) -> Config:
    """Name the output folder in full: the app's environment need not be this one."""
    return config.model_copy(update={"output_dir": str(config.output_path)})


def _find_finished(config: Config, clients: int) -> Run | None:
    """Return a complete run of these settings with as many clients, the newest."""
    for run in reversed(read_runs(config.output_path)):
        if run.is_complete and run.num_nodes == clients and run.is_of(config):
            return run
    return None


def _simulate(config: Config, clients: int) -> Run:
    """Run the app of the current folder on Flower's simulation engine, showing its rounds."""
    before = {run.path for run in read_runs(config.output_path)}
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as overrides:
        overrides.writelines(f"{key} = {_toml(v)}\n" for key, v in config.to_flat().items())
        overrides.flush()
        federation = f"num-supernodes={clients} client-resources-num-cpus=1"
        command = [_flwr(), "run", ".", "--stream", "--run-config", overrides.name]
        log = _follow([*command, "--federation-config", federation])
    new = [run for run in read_runs(config.output_path) if run.path not in before]
    for run in new:
        if run.is_complete and run.is_of(config):
            return run
    _fail("flwr run did not finish the run. The end of its log:\n" + "".join(log))


def _follow(command: list[str]) -> deque[str]:
    """Run a command, print what it says of rounds, return its last lines."""
    log: deque[str] = deque(maxlen=60)
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            log.append(line)
            _, found, rest = line.partition("Round ")
            if found and "personalized" in rest:
                print(f"  Round {rest}", end="", flush=True)
    return log


def _flwr() -> str:
    """Return flwr's command, also where the environment of this Python is not activated."""
    beside = Path(sys.executable).with_name("flwr")
    return str(beside) if beside.exists() else "flwr"


def _print_table(groups: list[list[Run]]) -> None:
    """Print a Markdown table: mean and standard deviation over the seeds of the last round."""
    print("\n| strategy | seeds | rounds | personalized | after local training |")
    print("| --- | --- | --- | --- | --- |")
    for group in groups:
        cells = []
        for name in ("personalized-accuracy", "finetuned-accuracy"):
            values = mean_and_spread(group, name)
            cells.append("-" if values is None else f"{values[0]:.4f} ± {values[1]:.4f}")
        config = group[0].config
        print(
            f"| {config.strategy} | {len(group)} | {config.num_server_rounds} "
            f"| {' | '.join(cells)} |"
        )


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    # A JSON string is a TOML string too.
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _fail(message: str) -> NoReturn:
    print(message, file=sys.stderr)
    raise typer.Exit(1)
