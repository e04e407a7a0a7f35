"""A site's own data: a folder of images, or an .npz file of examples of any shape."""

import os
from pathlib import Path

import torch

from pfedgpa_app.arrays import FileError, read_examples, read_labels
from pfedgpa_app.config import DataConfig, by_x
from pfedgpa_app.data.clients import ClientData
from pfedgpa_app.data.sources import DataError, Part, assemble, image_stats
from pfedgpa_app.images import PICTURES, read_picture


def site_data(path: Path, config: DataConfig, seed: int) -> ClientData:
    """Return all data of a site, normalized by itself.

    A folder has ``train/`` and ``test/``, each with a folder of PNG or JPEG files for every class
    (torchvision's ImageFolder layout), or the class folders alone. An .npz file has examples
    ``x``, ``(n, *shape)``, and labels ``y``, ``(n,)``. Where nothing is set apart for testing,
    ``test_fraction`` of each class is, drawn by the seed.

    Raises
    ------
    DataError
        If it is missing, empty, unreadable, or not what the settings say.
    """
    try:
        if path.is_dir():
            parts = _read_folder(path, config)
        elif path.suffix.lower() == ".npz" and path.is_file():
            parts = [(read_examples(path, config.info.shape), read_labels(path))]
        else:
            raise DataError(f"{path}: no such folder of images or .npz file")
    except (FileError, OSError) as error:
        raise DataError(str(error)) from error
    dataset = assemble(parts, config, seed, str(path))
    train, test = ~dataset.is_test, dataset.is_test
    return ClientData(
        dataset.images[train],
        dataset.labels[train],
        dataset.images[test],
        dataset.labels[test],
        image_stats(dataset),
        config.info,
    )


def _read_folder(path: Path, config: DataConfig) -> list[Part]:
    if not config.info.is_image:
        raise DataError(
            f"{path}: is a folder, of pictures, and data.shape is {by_x(config.info.shape)}; right "
            "would be an .npz file with examples x and labels y"
        )
    given = [name for name in ("train", "test") if (path / name).is_dir()]
    if len(given) == 1:
        raise DataError(f"{path}: has {given[0]}/ alone; right would be train/ and test/")
    return [_read_classes(path / name, config) for name in given or ["."]]


def _read_classes(folder: Path, config: DataConfig) -> Part:
    """Return the images and labels of a folder with a folder for every class."""
    from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset  # it takes seconds

    classes = config.classes
    found = {entry.name for entry in folder.iterdir() if entry.is_dir() and entry.name[0] != "."}
    if not found or found - set(classes):
        raise DataError(
            f"{folder}: has the folders {_list(sorted(found))}; right would be folders named after "
            f"the classes (data.class-names), which are {_list(classes)}"
        )
    labels = {name: label for label, name in enumerate(classes) if name in found}
    for name in labels:
        _refuse_linked_folders(folder / name)
    files = make_dataset(folder, labels, extensions=IMG_EXTENSIONS, allow_empty=True)
    if not files:
        raise DataError(f"{folder}: there are no images in its class folders")
    channels, *size = config.info.shape
    images = []
    for name, _ in files:
        if not name.lower().endswith(PICTURES):
            raise DataError(f"{name}: right would be a {' or '.join(PICTURES)} file")
        images.append(read_picture(Path(name), channels, size))
    return torch.stack(images), torch.tensor([label for _, label in files])


def _refuse_linked_folders(folder: Path) -> None:
    """Refuse links to folders inside of one: a loop of them would never end, or count twice."""
    for root, names, _ in os.walk(folder):
        for name in names:
            if (Path(root) / name).is_symlink():
                raise DataError(
                    f"{Path(root) / name}: is a link to a folder; right would be the folder itself"
                )


def _list(names: list[str] | tuple[str, ...]) -> str:
    """Return names for a message, the first of them if they are many."""
    shown = ", ".join(names[:20]) + (", …" if len(names) > 20 else "")
    return shown or "(none)"
