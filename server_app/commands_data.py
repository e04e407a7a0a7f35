"""The command ``pfedgpa data check``: a check of a site's data."""

import os
import zipfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.filesize import decimal

from pfedgpa_app.config import SITES, Config, by_x
from pfedgpa_app.console import fail, make_app, make_table, print_table
from pfedgpa_app.files import count_of, home_path, is_hidden, obstacle_to, printable
from server_app.commands_config import Pairs, SettingsFile, given_settings, settings_of

if TYPE_CHECKING:
    from pfedgpa_app.data import ClientData

data_app = make_app(help="Data.", no_args_is_help=True)


@data_app.callback()
def main() -> None:
    """Make `check` a subcommand."""


@data_app.command()
def check(
    path: Annotated[Path, typer.Argument(help="A folder of images, or an .npz file.")],
    file: SettingsFile = None,
    config: Pairs = None,
    model_path: Annotated[
        str,
        typer.Option(help="Check the SuperNode's model-path too; nothing is written."),
    ] = "",
) -> None:
    """Report the training and test data of a site, or why they cannot be used.

    Settings are those of the run; data.shape and data.class-names (or data.num-classes) are needed.
    The path is the SuperNode's data-path.
    """
    # Imported here, since they import torch.
    from pfedgpa_app.data import DataError, site_data

    # An own model takes any shape; it is not called.
    given = {"data.dataset": SITES, **given_settings(file, config or []), "model.name": "any:model"}
    settings = settings_of(given)
    path = Path(os.path.abspath(path.expanduser()))
    notes: list[str] = []
    try:
        data = site_data(path, settings.data, settings.seed, notes.append)
    except DataError as error:
        fail(str(error))
    _print(path, settings, data)
    for note in (*notes, *_unread(path)):
        print(f"Not read: {printable(note)}")
    if model_path:
        model = home_path(model_path)
        if wrong := obstacle_to(model):
            fail(f"model-path {model} {wrong}")
        replaced = ", in place of the file that is there" if model.exists() else ""
        print(f"The site's model will be written to {printable(str(model))}{replaced}.")


def _print(path: Path, config: Config, data: "ClientData") -> None:
    """Print numbers and range of a site's examples, and a table of its classes."""
    from pfedgpa_app.arrays import LEVELS

    splits = [inputs for inputs in (data.train_inputs, data.test_inputs) if inputs.numel()]
    num_bytes = sum(inputs.nbytes for inputs in splits)
    lowest, highest = min(float(x.min()) for x in splits), max(float(x.max()) for x in splits)
    dtype = data.train_inputs.dtype
    kind = "16 bits" if dtype == LEVELS else str(dtype).removeprefix("torch.")
    examples = (
        f"{count_of(len(data.train_labels), 'example')} for training, {len(data.test_labels)}"
    )
    print(f"{printable(str(path))} can be used: {examples} for testing.")
    print(
        f"Each is {by_x(config.data.info.shape)}, {kind} from {lowest:g} to {highest:g}; "
        f"{decimal(num_bytes)} in memory."
    )
    names = [printable(name) for name in config.data.classes]
    training = data.train_labels.bincount(minlength=len(names)).tolist()
    testing = data.test_labels.bincount(minlength=len(names)).tolist()
    table, empty = make_table("class", "training", "testing"), []
    for name, *numbers in zip(names, training, testing, strict=True):
        if any(numbers):
            table.add_row(name, *map(str, numbers))
        else:
            empty.append(name)
    print_table(table)
    if empty:
        shown = ", ".join(empty[:20]) + (", …" if len(empty) > 20 else "")
        print(f"Classes without examples, {len(empty)} of {len(names)}: {shown}")


def _unread(path: Path) -> list[str]:
    """Return what is skipped without a log message: hidden files, arrays beside x and y."""
    if path.is_file():
        with zipfile.ZipFile(path) as archive:
            names = {name.removesuffix(".npy") for name in archive.namelist()}
        others = ", ".join(sorted(names - {"x", "y"}))
        return [f"{path}: arrays other than x and y: {others}"] if others else []
    hidden = Counter[str]()
    for _, folders, files in os.walk(path):
        hidden["hidden folder"] += sum(map(is_hidden, folders))
        hidden["hidden file"] += sum(map(is_hidden, files))
        folders[:] = [name for name in folders if not is_hidden(name)]
    counts = [count_of(number, kind) for kind, number in hidden.items() if number]
    return [f"{path}: {', '.join(counts)}, skipped"] if counts else []
