"""The command ``pfedgpa data check``: a check of a site's data."""

import json
import os
import zipfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pfedgpa_app.config import SITES, Config, by_x
from pfedgpa_app.console import Json, fail, make_app, make_table, print_table
from pfedgpa_app.files import is_hidden, printable, text_of
from server_app.commands_config import Pairs, SettingsFile, given_settings, settings_of

if TYPE_CHECKING:
    from torch import Tensor

    from pfedgpa_app.data import ClientData

data_app = make_app(help="Data.", no_args_is_help=True)

# The model is not checked: an own one, never called, takes any shape.
_ANY_MODEL = "any:model"


@data_app.callback()
def main() -> None:
    """Make `check` a subcommand."""


@data_app.command()
def check(
    path: Annotated[Path, typer.Argument(help="A folder of images, or an .npz file.")],
    file: SettingsFile = None,
    config: Pairs = None,
    as_json: Json = False,
) -> None:
    """Report the training and test data of a site, or why they cannot be used.

    Settings are those of the run; data.shape and data.class-names (or data.num-classes) are needed.
    The path is the SuperNode's data-path.
    """
    given = {"data.dataset": SITES, **given_settings(file, config or [])}
    settings = settings_of({**given, "model.name": _ANY_MODEL})
    # Imported here, since they import torch.
    from pfedgpa_app.data import DataError, site_data

    path = Path(os.path.abspath(path.expanduser()))
    notes: list[str] = []
    try:
        data = site_data(path, settings.data, settings.seed, notes.append)
    except DataError as error:
        fail(str(error))
    summary = _summary(path, settings, data, [*notes, *_unread(path)])
    if as_json:
        print(json.dumps(summary, indent=2))
    else:
        _print(summary)


def _summary(path: Path, config: Config, data: "ClientData", notes: list[str]) -> dict[str, Any]:
    """Return the summary of a site's data."""
    names, splits = config.data.classes, (data.train_inputs, data.test_inputs)
    counts = [
        labels.bincount(minlength=len(names)).tolist()
        for labels in (data.train_labels, data.test_labels)
    ]
    return {
        "path": text_of(str(path)),
        "training": len(data.train_labels),
        "testing": len(data.test_labels),
        "shape": by_x(config.data.info.shape),
        "type": _type_of(data.train_inputs),
        "lowest": min(float(each.min()) for each in splits if each.numel()),
        "highest": max(float(each.max()) for each in splits if each.numel()),
        "bytes": sum(each.numel() * each.element_size() for each in splits),
        "classes": [
            {"class": name, "training": training, "testing": testing}
            for name, training, testing in zip(names, *counts, strict=True)
        ],
        "not-read": notes,
    }


def _print(facts: dict[str, Any]) -> None:
    examples = f"{facts['training']} examples for training, {facts['testing']} for testing"
    print(f"{printable(facts['path'])} can be used: {examples}.")
    print(
        f"Each is {facts['shape']}, {facts['type']} from {facts['lowest']:g} to "
        f"{facts['highest']:g}; {facts['bytes'] / 1e6:.3g} MB in memory."
    )
    table = make_table("class", "training", "testing")
    for row in facts["classes"]:
        if row["training"] or row["testing"]:
            name = printable(row["class"])
            table.add_row(name, str(row["training"]), str(row["testing"]))
    print_table(table)
    empty = [row["class"] for row in facts["classes"] if not row["training"] + row["testing"]]
    if empty:
        shown = ", ".join(map(printable, empty[:20])) + (", …" if len(empty) > 20 else "")
        print(f"{len(empty)} of {len(facts['classes'])} classes have no examples: {shown}")
    for note in facts["not-read"]:
        print(f"Not read: {printable(note)}")


def _type_of(images: "Tensor") -> str:
    from pfedgpa_app.arrays import LEVELS

    return "16 bits" if images.dtype == LEVELS else str(images.dtype).removeprefix("torch.")


def _unread(path: Path) -> list[str]:
    """Return what is skipped without a log message: hidden files, arrays beside x and y."""
    if path.is_file():
        with zipfile.ZipFile(path) as archive:
            names = [name.removesuffix(".npy") for name in archive.namelist()]
        others = sorted(set(names) - {"x", "y"})
        return [f"{path}: arrays other than x and y: {', '.join(others)}"] if others else []
    hidden = Counter[str]()
    for _, folders, files in os.walk(path):
        hidden["hidden folder"] += sum(map(is_hidden, folders))
        hidden["hidden file"] += sum(map(is_hidden, files))
        folders[:] = [name for name in folders if not is_hidden(name)]
    counts = [f"{number} {kind}{'s' * (number > 1)}" for kind, number in hidden.items() if number]
    return [f"{path}: {', '.join(counts)}, skipped"] if counts else []
