"""The command ``pfedgpa``: check settings, compare strategies, look at runs, use their models."""

import json
import os
import sys
import tomllib
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer

from pfedgpa_app.commands_runs import runs_app
from pfedgpa_app.config import Config, ConfigError, flatten
from pfedgpa_app.console import OneLineErrors, OutputDir, RunArgument, fail, read_run
from pfedgpa_app.preflight import preflight
from pfedgpa_app.sharing import too_few
from pfedgpa_app.watch import watch

if TYPE_CHECKING:
    from pfedgpa_app.exported import ExportedModel

app = typer.Typer(cls=OneLineErrors, no_args_is_help=True, add_completion=False)
config_app = typer.Typer(help="Settings.", no_args_is_help=True)
app.add_typer(config_app, name="config")
app.add_typer(runs_app, name="runs")
app.command()(watch)

FileArgument = Annotated[
    Path | None, typer.Argument(help="Overrides of pyproject.toml's defaults, as in conf/.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--config", "-c", help="key=value as in TOML, such as diffusion.fidelity=0.5."),
]
ClassCounts = Annotated[
    str,
    typer.Option(
        help="Images of each class that the client trained on, such as 12,0,30; a model that was "
        "trained with client.class-prior predicts with them."
    ),
]


def _print_version(asked: bool) -> None:
    if asked:
        print(f"pfedgpa {version('pfedgpa')}")
        raise typer.Exit


@app.callback(help=__doc__)
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    """Take what concerns no command."""


@config_app.command()
def check(file: FileArgument = None, config: Overrides = None) -> None:
    """Say what is wrong with settings, all of it, without starting a run.

    Run it in the project's folder.
    """
    sys.path.insert(0, os.getcwd())  # where own modules are, as `flwr run` packs it
    settings = _load(file, config or [])
    try:
        preflight(settings)
    except ConfigError as error:
        fail(str(error))
    changed = settings.changed
    print(f"The configuration is right; {len(changed)} setting(s) differ from the defaults.")
    for key, value in changed.items():
        print(f"  {key} = {value!r}")
    fewest = settings.server.min_available_nodes
    if settings.strategy == "pfedgpa" and (note := too_few(fewest, settings.diffusion)):
        print(f"server.min-available-nodes = {fewest}: a run may begin with so few. {note}.")


@app.command()
def export(
    run: RunArgument,
    client: Annotated[int, typer.Option(min=0, help="Number of the client.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write (safetensors).")],
    force: Annotated[bool, typer.Option(help="Write in place of a file that exists.")] = False,
    class_counts: ClassCounts = "",
    trust: Annotated[
        bool, typer.Option("--trust", help="Call own functions that the run names, from here.")
    ] = False,
    output_dir: OutputDir = "",
) -> None:
    """Take a client's personalized model out of a run, in a file that needs nothing else."""
    # Partitioners take seconds to import, which other commands are spared.
    from pfedgpa_app.exported import ExportedModel

    if trust:
        sys.path.insert(0, os.getcwd())
    try:
        model = ExportedModel.load(read_run(run, output_dir).model_file(client), trusted=trust)
        model = model.with_class_counts(_counts(class_counts))
        _check_output(output, "model.safetensors", force)
        model.save(output)
    except ValueError as error:
        fail(str(error))
    config = model.config
    print(
        f"{output}: client {client} after round {model.server_round} ({config.strategy}, "
        f"{config.data.dataset}, {config.model.name})"
    )


@app.command()
def predict(
    model: Annotated[Path, typer.Argument(help="A file that export wrote, or a site keeps.")],
    images: Annotated[
        list[Path] | None,
        typer.Argument(
            help="PNG or JPEG files, folders of them, or .npz files with an array x, such as a "
            "table (n, features)."
        ),
    ] = None,
    test_set: Annotated[
        bool, typer.Option("--test-set", help="Judge the model on its client's own test set.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, a line a result.")] = False,
    class_counts: ClassCounts = "",
    trust: Annotated[
        bool, typer.Option("--trust", help="Call own functions that the file names, from here.")
    ] = False,
) -> None:
    """Let a model of a file classify images: file, class and probability, a line each."""
    from pfedgpa_app.exported import ExportedModel

    if test_set == bool(images):
        fail("right would be either images or --test-set")
    if test_set and class_counts:
        fail("--class-counts: the test set comes with its training set, which is counted")
    if trust:
        sys.path.insert(0, os.getcwd())
    try:
        exported = ExportedModel.load(model, trusted=trust)
        if class_counts:
            exported = exported.with_class_counts(_counts(class_counts))
        if images:
            _print_classes(exported, images, as_json)
        else:
            _print_evaluation(exported, as_json)
    except ValueError as error:
        fail(str(error))


@app.command()
def report(
    runs: Annotated[
        list[str],
        typer.Argument(help="Runs' names, ids or folders, or the results folder of a bench."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write (HTML).")] = Path(
        "report.html"
    ),
    force: Annotated[bool, typer.Option(help="Write in place of a file that exists.")] = False,
    output_dir: OutputDir = "",
) -> None:
    """Write one HTML page to look at a run, to compare several, or of a bench."""
    # plotly takes time to import, which other commands are spared.
    from pfedgpa_app.page import write_page
    from pfedgpa_app.page.bench import is_bench, page_of_bench
    from pfedgpa_app.page.runs import page_of

    _check_output(output, "report.html", force)
    folders = [Path(os.path.expanduser(run)) for run in runs]
    benches = [folder for folder in folders if is_bench(folder)]
    if benches and len(runs) > 1:
        fail(f"{benches[0]} is a bench; right would be it alone, or runs")
    try:
        if benches:
            page = page_of_bench(benches[0])
        else:
            page = page_of([read_run(run, output_dir) for run in runs])
        write_page(output, page)
    except (OSError, ValueError) as error:
        fail(str(error))
    print(f"{output}: {len(page) / 1e6:.1f} MB, opens in a browser without a network")


def _check_output(output: Path, example: str, force: bool) -> None:
    """End the command if a file must not be written."""
    if not output.parent.is_dir():
        fail(f"{output.parent} is no folder; right would be one that exists")
    if output.is_dir():
        fail(f"{output} is a folder; right would be a file such as {output}/{example}")
    if output.exists() and not force:
        fail(f"{output} exists; --force writes in its place")


def _counts(text: str) -> list[int] | None:
    if not text:
        return None
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        fail(f'--class-counts {text}: right would be whole numbers, such as "12,0,30"')


def _print_classes(model: "ExportedModel", paths: list[Path], as_json: bool) -> None:
    from pfedgpa_app.images import find_files, read_images

    data = model.config.data
    images = read_images(
        find_files(paths), data.info.shape, lambda note: print(note, file=sys.stderr)
    )
    while batch := list(islice(images, 256)):
        probabilities = model.predict(torch.stack([image for _, image in batch]))
        best, classes = probabilities.max(dim=1)
        rows = zip(batch, classes.tolist(), best.tolist(), probabilities.tolist(), strict=True)
        for (name, _), label, probability, row in rows:
            if as_json:
                result = {"file": name, "class": label, "class-name": data.classes[label]}
                print(json.dumps(result | {"probability": probability, "probabilities": row}))
            else:
                print(f"{name}\t{data.classes[label]}\t{probability:.4f}")


def _print_evaluation(model: "ExportedModel", as_json: bool) -> None:
    (accuracy, loss), num_examples = model.evaluate()
    if as_json:
        print(json.dumps({"num-examples": num_examples, "accuracy": accuracy, "loss": loss}))
    else:
        print(f"accuracy {accuracy:.4f}, loss {loss:.4f} on {num_examples} examples")


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
        fail(f'not TOML: {error}; right would be, for example, strategy="local" or seed=1')
    except ConfigError as error:
        fail(str(error))
