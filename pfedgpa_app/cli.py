"""The command ``pfedgpa``: check settings, compare strategies, show runs, use their models."""

import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import version
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pfedgpa_app.commands_runs import runs_app
from pfedgpa_app.console import (
    OutputDir,
    RunArgument,
    fail,
    make_app,
    make_table,
    print_table,
    read_run,
    whole_numbers,
)
from pfedgpa_app.files import count_of, printable, text_of
from pfedgpa_app.state import write_text
from pfedgpa_app.watch import watch

if TYPE_CHECKING:
    from torch import Tensor

    from pfedgpa_app.exported import ExportedModel

app = make_app(no_args_is_help=True)
app.add_typer(runs_app, name="runs")
app.command()(watch)

Output = typer.Option("--output", "-o", help="File to write.")
Force = Annotated[bool, typer.Option(help="Write in place of a file that exists.")]
Trust = Annotated[
    bool, typer.Option("--trust", help="Call own functions that the settings name, from here.")
]
ClassCounts = Annotated[
    str | None,
    typer.Option(
        help="Images of each class that the client trained on, such as 12,0,30; a model that was "
        "trained with client.class-prior predicts with them."
    ),
]


def _print_version(is_given: bool) -> None:
    if is_given:
        print(f"pfedgpa {version('pfedgpa')}")
        raise typer.Exit


@app.callback(help=__doc__)
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    """Add the options of no command."""


@app.command()
def export(
    run: RunArgument,
    client: Annotated[str, typer.Option(help="Number of the client, or its name.")],
    output: Annotated[Path, Output],
    force: Force = False,
    class_counts: ClassCounts = None,
    trust: Trust = False,
    output_dir: OutputDir = "",
) -> None:
    """Write a client's personalized model of a run to a safetensors file of its own."""
    # Imported here, since it imports torch.
    from pfedgpa_app.exported import ExportedModel

    if trust:
        sys.path.insert(0, os.getcwd())
    try:
        found = read_run(run, output_dir)
        file = found.model_file(found.client_called(client))
        model = ExportedModel.load(file, trusted=trust)
        model = model.with_class_counts(_counts(class_counts))
        _check_output(output, "model.safetensors", force)
        model.save(output)
    except ValueError as error:
        fail(str(error))
    config = model.config
    print(
        f"{output}: client {printable(client)} after round {model.server_round} "
        f"({config.strategy}, {config.data.dataset}, {config.model.name})"
    )


@app.command()
def predict(
    model: Annotated[Path, typer.Argument(help="A file that export wrote, or a site keeps.")],
    images: Annotated[
        list[Path] | None,
        typer.Argument(
            help="PNG or JPEG files, folders of them or of folders named after classes, or .npz "
            "files with an array x, such as a table (n, features)."
        ),
    ] = None,
    test_set: Annotated[
        bool, typer.Option("--test-set", help="Evaluate it on its client's own test set.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, a line a result.")] = False,
    class_counts: ClassCounts = None,
    trust: Trust = False,
) -> None:
    """Classify images by a model of a file: file, class and probability, a line each.

    For a folder that has a folder for each class, it also prints accuracy and a confusion table.
    """
    from pfedgpa_app.exported import ExportedModel

    if test_set == bool(images):
        fail("right would be either images or --test-set")
    if test_set and class_counts is not None:
        fail("--class-counts: the test set comes with its training set, which is counted")
    if trust:
        sys.path.insert(0, os.getcwd())
    try:
        exported = ExportedModel.load(model, trusted=trust)
        if class_counts is not None:
            exported = exported.with_class_counts(_counts(class_counts))
        if images:
            _print_classes(exported, images, as_json)
        else:
            (accuracy, loss), num_examples = exported.evaluate()
            if as_json:
                found = {"num-examples": num_examples, "accuracy": accuracy, "loss": loss}
                print(json.dumps(found))
            else:
                size = count_of(num_examples, "example")
                print(f"accuracy {accuracy:.4f}, loss {loss:.4f} on {size}")
    except ValueError as error:
        fail(str(error))


@app.command()
def report(
    runs: Annotated[
        list[str],
        typer.Argument(help="Runs' names, ids or folders, or the results folder of a bench."),
    ],
    output: Annotated[Path, Output] = Path("report.html"),
    force: Force = False,
    output_dir: OutputDir = "",
) -> None:
    """Write one HTML page of a run, of several to compare, or of a bench."""
    # Imported here, since plotly takes long to import.
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
            found = [read_run(run, output_dir) for run in runs]
            if len({run.path.resolve() for run in found}) < len(found):
                fail(f"{', '.join(run.name for run in found)}: right would be each run once")
            page = page_of(found)
        write_text(output, page)
    except (OSError, ValueError) as error:
        fail(str(error))
    print(f"{output}: {len(page) / 1e6:.1f} MB, opens in a browser without a network")


def _check_output(output: Path, example: str, force: bool) -> None:
    if not output.parent.is_dir():
        fail(f"{output.parent} is no folder; right would be one that exists")
    if output.is_dir():
        fail(f"{output} is a folder; right would be a file such as {output}/{example}")
    if output.exists() and not force:
        fail(f"{output} exists; --force writes in its place")


def _counts(text: str | None) -> list[int] | None:
    return None if text is None else whole_numbers("--class-counts", text, "12,0,30")


def _print_classes(model: "ExportedModel", paths: list[Path], as_json: bool) -> None:
    import torch

    from pfedgpa_app.images import find_files, find_labelled, read_images

    data = model.config.data

    def note(text: str) -> None:
        print(printable(text), file=sys.stderr)

    classes_of = data.classes
    unlabelled, labels = find_labelled(paths, data.labels, note)
    files = [*find_files(unlabelled, note), *labels]
    images = read_images(files, data.info.shape, note)
    confusion = Counter[tuple[int, int]]()
    for batch in _batches(images, 256):
        probabilities = model.predict(torch.stack([image for _, image in batch]))
        best, classes = probabilities.max(dim=1)
        rows = zip(batch, classes.tolist(), best.tolist(), probabilities.tolist(), strict=True)
        for (name, _), label, probability, row in rows:
            if (true := labels.get(Path(name))) is not None:
                confusion[true, label] += 1
            if as_json:
                result = {"file": text_of(name), "class": label, "class-name": classes_of[label]}
                print(json.dumps(result | {"probability": probability, "probabilities": row}))
            else:
                shown = map(printable, (name, classes_of[label]))
                print(*shown, f"{probability:.4f}", sep="\t")
    if confusion:
        _print_confusion(confusion, classes_of, as_json)


def _print_confusion(
    confusion: Counter[tuple[int, int]], classes: Sequence[str], as_json: bool
) -> None:
    """Print accuracy, and how often an example of a class (first) was taken for another."""
    right = sum(number for (true, predicted), number in confusion.items() if true == predicted)
    scores = {"num-examples": confusion.total(), "accuracy": right / confusion.total()}
    if as_json:
        size = range(len(classes))
        matrix = [[confusion[true, predicted] for predicted in size] for true in size]
        print(json.dumps(scores | {"classes": classes, "confusion": matrix}))
        return
    print(f"accuracy {scores['accuracy']:.4f} on {count_of(confusion.total(), 'example')}")
    seen = sorted({label for pair in confusion for label in pair})
    table = make_table("class \\ predicted", *(printable(classes[label]) for label in seen))
    for true in seen:
        numbers = (str(confusion[true, predicted]) for predicted in seen)
        table.add_row(printable(classes[true]), *numbers)
    print_table(table)


def _batches(
    images: Iterable[tuple[str, "Tensor"]], size: int
) -> Iterator[list[tuple[str, "Tensor"]]]:
    """Yield images of one type together, since floats beside bytes would all become floats."""
    for _, alike in groupby(images, lambda each: each[1].dtype):
        while batch := list(islice(alike, size)):
            yield batch
