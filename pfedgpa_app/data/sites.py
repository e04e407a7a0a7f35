"""A site's own data: a folder of images, or an .npz file of examples of any shape."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from pfedgpa_app.arrays import FileError, common_dtype, read_examples, read_labels
from pfedgpa_app.config import DataConfig, by_x
from pfedgpa_app.data.clients import ClientData
from pfedgpa_app.data.dataset import DataError, Part, assemble
from pfedgpa_app.data.sources import image_stats
from pfedgpa_app.files import composed, is_hidden, quoted
from pfedgpa_app.images import PICTURES, counted, find_pictures, read_picture, sort_out

Note = Callable[[str], None]


def site_data(
    path: Path, config: DataConfig, seed: int, note: Note = lambda text: None
) -> ClientData:
    """Return the data of a site, with its own normalization statistics.

    A folder has ``train/`` and ``test/``, each with a folder of PNG or JPEG files for every class
    (torchvision's ImageFolder layout), or the class folders alone. An .npz file has examples ``x``,
    ``(n, *shape)``, and labels ``y``, ``(n,)``. Without a test split, ``test_fraction`` of each
    class is drawn by the seed. Hidden files are skipped silently; ``note`` is called with
    everything else that is skipped. Raises `DataError` if it is missing, empty, unreadable, or does
    not match the settings.
    """
    try:
        if path.is_dir():
            parts = _read_folder(path, config, note)
        elif path.suffix.lower() == ".npz" and path.is_file():
            examples = read_examples(path, config.info.shape, to_train=True)
            parts = [Part(examples, read_labels(path))]
        elif path.is_file():
            raise DataError(
                f"{path}: is of an unknown file type; right would be a folder of images or an .npz "
                "file with examples x and labels y"
            )
        else:
            raise DataError(f"{path}: no such folder of images or .npz file")
    except (FileError, OSError) as error:
        raise DataError(str(error)) from error
    dataset = assemble(parts, config, seed, str(path))
    (images, labels, is_test, _), stats = dataset, image_stats(dataset)
    train, test = (images[~is_test], labels[~is_test]), (images[is_test], labels[is_test])
    return ClientData(*train, *test, stats, config.info)


def _read_folder(path: Path, config: DataConfig, note: Note) -> list[Part]:
    if not config.info.is_image:
        raise DataError(
            f"{path}: is a folder of images, and data.shape is {by_x(config.info.shape)}; right "
            "would be an .npz file with examples x and labels y"
        )
    given = [name for name in ("train", "test") if (path / name).is_dir()]
    if len(given) == 1:
        raise DataError(f"{path}: has {given[0]}/ alone; right would be train/ and test/")
    parts = [_read_classes(path / name, config, note) for name in given or ["."]]
    if given:
        _note_others(path, set(path.iterdir()) - {path / name for name in given}, note)
    return parts


def _read_classes(folder: Path, config: DataConfig, note: Note) -> Part:
    entries = [entry for entry in folder.iterdir() if not is_hidden(entry.name)]
    folders = [entry for entry in entries if entry.is_dir()]
    class_folders = _class_folders(folder, folders, config.classes)
    _note_others(folder, set(entries) - set(folders), note)
    channels, *size = config.info.shape
    label_of = {name: label for label, name in enumerate(config.classes)}
    images, labels = [], []
    for name, class_folder in sorted(class_folders.items()):
        found = find_pictures(class_folder)
        if found.others and not found.pictures:
            raise DataError(
                f"{class_folder}: class {quoted(name)} has no images, but {counted(found.others)}"
                f"; right would be {', '.join(PICTURES)}"
            )
        if found.others:
            note(f"{class_folder}: skipped: {counted(found.others)}")
        if not found.pictures:
            note(f"{class_folder}: class {quoted(name)} has no images")
        images += [read_picture(file, channels, size) for file in found.pictures]
        labels += [label_of[name]] * len(found.pictures)
    if not images:
        raise DataError(f"{folder}: there are no images in its class folders")
    return Part(torch.stack(common_dtype(images)), torch.tensor(labels))


def _class_folders(folder: Path, entries: list[Path], classes: Sequence[str]) -> dict[str, Path]:
    """Return the folder of each class; names are compared in Unicode's NFC."""
    if hidden := [name for name in classes if is_hidden(name)]:
        raise DataError(
            f"{folder}: folders named {_list(hidden)} are skipped; right would be another name "
            "of that class (data.class-names)"
        )
    found: dict[str, Path] = {}
    for entry in entries:
        name = composed(entry.name)
        if name in found:
            raise DataError(
                f"{folder}: has two folders named {quoted(name)}, in different forms of Unicode; "
                "right would be one"
            )
        found[name] = entry
    unknown = sorted(found.keys() - set(classes))
    if unknown or not found:
        with_comma = [name for name in unknown if "," in name]
        hint = "; a name with a comma needs double quotes: " if with_comma else ""
        raise DataError(
            f"{folder}: has the folders {_list(sorted(found))}; right would be folders named after "
            f"the classes (data.class-names), which are {_list(classes)}"
            f"{hint}{', '.join(map(quoted, with_comma[:1]))}"
        )
    return found


def _note_others(folder: Path, entries: Iterable[Path], note: Note) -> None:
    found = sort_out(entries)
    others = found.others + Counter({"image outside of class folders": len(found.pictures)})
    if others:
        note(f"{folder}: skipped: {counted(others)}")


def _list(names: Sequence[str]) -> str:
    shown = ", ".join(map(quoted, names[:20])) + (", …" if len(names) > 20 else "")
    return shown or "(none)"
