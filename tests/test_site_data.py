"""Data that a site brings itself: folders of images and .npz files, and what is wrong with them."""

import os
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pfedgpa_app.config import DataConfig
from pfedgpa_app.data import DataError, image_stats, normalize, site_data
from pfedgpa_app.data.sources import Dataset

CONFIG = DataConfig(dataset="sites", shape="1x6x4", class_names="normal,benign,malignant")


def pictures(folder: Path, number: int, first: int = 0) -> None:
    """Write pictures of one grey each, which tells them apart: first, first + 1, ..."""
    folder.mkdir(parents=True)
    for grey in range(first, first + number):
        Image.new("L", (4, 6), grey).save(folder / f"{grey:03}.png")


def greys(images: torch.Tensor) -> list[int]:
    return images[:, 0, 0, 0].tolist()


@pytest.fixture
def apart(tmp_path: Path) -> Path:
    """A folder with train/ and test/."""
    pictures(tmp_path / "train" / "normal", 3, first=0)
    pictures(tmp_path / "train" / "malignant", 2, first=10)
    pictures(tmp_path / "test" / "benign", 1, first=20)
    pictures(tmp_path / "test" / "malignant", 1, first=30)
    return tmp_path


@pytest.fixture
def together(tmp_path: Path) -> Path:
    """A folder with class folders alone."""
    pictures(tmp_path / "scans" / "benign", 10)
    pictures(tmp_path / "scans" / "malignant", 5, first=100)
    return tmp_path / "scans"


def test_train_and_test_are_as_the_folder_has_them_and_labels_as_class_names(apart: Path):
    data = site_data(apart, CONFIG, seed=0)
    assert dict(zip(greys(data.train_inputs), data.train_labels.tolist(), strict=True)) == {
        **{0: 0, 1: 0, 2: 0},
        **{10: 2, 11: 2},
    }
    tests = dict(zip(greys(data.test_inputs), data.test_labels.tolist(), strict=True))
    assert tests == {20: 1, 30: 2}
    assert data.train_inputs.dtype == torch.uint8
    assert data.train_inputs.shape == (5, 1, 6, 4)
    assert data.info == CONFIG.info


def test_a_site_is_normalized_by_its_own_training_images(apart: Path):
    data = site_data(apart, CONFIG, seed=0)
    images = data.train_inputs
    alone = Dataset(images, data.train_labels, torch.zeros(len(images), dtype=torch.bool))
    assert all(map(torch.equal, data.stats, image_stats(alone)))
    assert float(data.stats.mean) == pytest.approx((0 + 1 + 2 + 10 + 11) / 5)


def test_class_folders_alone_are_split_by_the_seed(together: Path):
    splits = []
    for seed in (0, 0, 1):
        data = site_data(together, CONFIG, seed)
        train, test = set(greys(data.train_inputs)), set(greys(data.test_inputs))
        assert not train & test
        assert train | test == {*range(10), *range(100, 105)}
        assert (data.test_labels == 1).sum() == 2  # a fifth of each class
        assert (data.test_labels == 2).sum() == 1
        splits.append(test)
    assert splits[0] == splits[1] != splits[2]


def test_without_class_names_folders_are_called_after_labels(tmp_path: Path):
    pictures(tmp_path / "7", 4)
    config = DataConfig(dataset="digits")
    with pytest.raises(DataError, match="6x4; right would be 8x8"):
        site_data(tmp_path, config, 0)
    config = DataConfig(dataset="sites", shape="1x6x4", num_classes=8)
    assert site_data(tmp_path, config, 0).train_labels.tolist() == [7, 7, 7]


HIDDEN = [".ipynb_checkpoints", ".thumbnails", "@eaDir", ".Trash-1000", "__MACOSX", "$RECYCLE.BIN"]


@pytest.mark.parametrize("below", [".", "benign", "benign/2024"])
def test_what_is_hidden_is_no_data_at_any_depth(together: Path, below: str):
    """Copies of pictures, which would otherwise be both trained on and tested with."""
    (together / below).mkdir(exist_ok=True)
    for hidden in HIDDEN:
        shutil.copytree(together / "malignant", together / below / hidden / "malignant")
        shutil.copy(together / "malignant/100.png", together / below / hidden)
    for name in ("._000.png", ".DS_Store", "Thumbs.db", "desktop.ini"):
        (together / below / name).write_bytes(b"x")
    notes: list[str] = []
    data = site_data(together, CONFIG, 0, notes.append)
    assert sorted(greys(data.train_inputs) + greys(data.test_inputs)) == [
        *range(10),
        *range(100, 105),
    ]
    assert notes == []


def test_a_hidden_link_to_a_folder_is_passed_over(together: Path):
    (together / "benign" / ".again").symlink_to(together / "benign")
    assert len(site_data(together, CONFIG, 0).train_labels) == 12


def test_what_is_no_picture_is_counted_by_kind(together: Path):
    (together / "benign" / "old").mkdir()
    for name in ("a.tif", "old/b.TIF", "old/c.dcm", "README"):
        (together / "benign" / name).touch()
    for name in ("notes.txt", "stray.png"):
        (together / name).touch()
    notes: list[str] = []
    assert len(site_data(together, CONFIG, 0, notes.append).train_labels) == 12
    assert notes == [
        f"{together}: skipped: 1 .txt, 1 image outside of class folders",
        f"{together / 'benign'}: skipped: 1 .dcm, 2 .tif, 1 without a suffix",
    ]


def test_what_is_beside_train_and_test_is_counted(apart: Path):
    (apart / "val").mkdir()
    (apart / "labels.csv").touch()
    notes: list[str] = []
    site_data(apart, CONFIG, 0, notes.append)
    assert notes == [f"{apart}: skipped: 1 .csv, 1 folder"]


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_names_that_look_alike_are_one(tmp_path: Path, form: str):
    pictures(tmp_path / unicodedata.normalize("NFD", "naïf"), 4)
    config = CONFIG.model_copy(update={"class_names": unicodedata.normalize(form, "naïf,malin")})
    assert site_data(tmp_path, config, 0).train_labels.tolist() == [0, 0, 0]
    pictures(tmp_path / unicodedata.normalize("NFC", "naïf"), 4)
    with pytest.raises(DataError, match=r'has two folders named "naïf".*right would be one'):
        site_data(tmp_path, config, 0)


def test_a_class_with_a_comma_stands_in_quotes(tmp_path: Path):
    pictures(tmp_path / "left, upper", 4)
    wrong = DataConfig(dataset="sites", shape="1x6x4", class_names="right,left, upper")
    with pytest.raises(DataError, match=r'comma needs double quotes: "left, upper"'):
        site_data(tmp_path, wrong, 0)
    (tmp_path / "right" / ".thumbnails").mkdir(parents=True)
    config = wrong.model_copy(update={"class_names": 'right, "left, upper"'})
    notes: list[str] = []
    assert site_data(tmp_path, config, 0, notes.append).train_labels.tolist() == [1, 1, 1]
    assert notes == [f'{tmp_path / "right"}: class "right" has no images']


def test_a_class_that_would_be_passed_over_is_refused(tmp_path: Path):
    pictures(tmp_path / "b", 4)
    pictures(tmp_path / ".a", 4)
    config = CONFIG.model_copy(update={"class_names": ".a,b"})
    with pytest.raises(DataError, match=r'named "\.a" are skipped; right would be another'):
        site_data(tmp_path, config, 0)


def test_pictures_of_sixteen_bits_keep_their_levels(tmp_path: Path):
    """A scan of 12 bits would have 16 levels if it were cut to 8."""
    scans = np.random.default_rng(0).integers(0, 4096, (10, 6, 4), dtype=np.uint16)
    (tmp_path / "benign").mkdir()
    for number, scan in enumerate(scans):
        Image.fromarray(scan).save(tmp_path / "benign" / f"{number}.png")
    # One of 8 bits beside them is as bright as it would be in 16.
    Image.new("L", (4, 6), 10).save(tmp_path / "benign" / "8bits.png")
    data = site_data(tmp_path, CONFIG, 0)
    levels = torch.cat([data.train_inputs, data.test_inputs]).squeeze(1).numpy()
    wanted = [*scans, np.full((6, 4), 10 * 257)]
    assert sorted(map(np.ndarray.tolist, levels)) == sorted(map(np.ndarray.tolist, wanted))
    pool = data.train_inputs.numpy().astype(np.float64) / 257
    assert float(data.stats.mean) == pytest.approx(pool.mean(), rel=1e-6)
    normalized = normalize(data.train_inputs, data.stats)
    np.testing.assert_allclose(normalized, (pool - pool.mean()) / pool.std(), atol=1e-5)


def test_colours_are_read_as_the_settings_want_them(tmp_path: Path):
    folder = tmp_path / "benign"
    folder.mkdir()
    for number in range(2):
        Image.new("RGB", (4, 6), (50 + number, 60, 70)).save(folder / f"{number}.JPG")
    colour = CONFIG.model_copy(update={"shape": "3x6x4"})
    assert site_data(tmp_path, CONFIG, 0).train_inputs.shape == (1, 1, 6, 4)
    assert site_data(tmp_path, colour, 0).train_inputs.shape == (1, 3, 6, 4)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64])
def test_npz_files_hold_x_and_y(tmp_path: Path, dtype: type):
    x = (np.arange(20 * 24).reshape(20, 1, 6, 4) % 200).astype(dtype)
    y = np.arange(20) % 3
    np.savez(tmp_path / "scans.npz", x=x, y=y)
    data = site_data(tmp_path / "scans.npz", CONFIG, 0)
    images = torch.cat([data.train_inputs, data.test_inputs])
    labels = torch.cat([data.train_labels, data.test_labels])
    assert images.dtype == (torch.uint8 if dtype == np.uint8 else torch.float32)
    rows = [next(row for row in range(20) if (x[row] == image.numpy()).all()) for image in images]
    assert sorted(rows) == list(range(20))
    assert labels.tolist() == y[rows].tolist()


def remove(*names: str):
    def change(folder: Path) -> None:
        for name in names:
            shutil.rmtree(folder / name)

    return change


def write(name: str, data: bytes = b"no picture"):
    def change(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)

    return change


def too_wide(folder: Path) -> None:
    Image.new("L", (5, 6)).save(folder / "train/normal/wide.png")


def pipe(folder: Path) -> None:
    os.mkfifo(folder / "train/normal/pipe.png")


def loop(folder: Path) -> None:
    (folder / "train/normal/again").symlink_to(folder / "train/normal")


FAULTS = {
    "missing": (remove("."), "no such folder of images or .npz file"),
    "empty": (remove("train", "test"), r"has the folders \(none\)"),
    "no test": (remove("test"), "has train/ alone; right would be train/ and test/"),
    "no images": (remove("train/normal", "train/malignant"), r"has the folders \(none\)"),
    "other classes": (
        write("train/malign/1.png"),
        r'"malign", "malignant", "normal"; right would be .* "normal", "benign", "malignant"$',
    ),
    "unreadable": (write("train/normal/broken.png"), r"broken\.png: cannot be read"),
    "wrong size": (too_wide, r"wide\.png: is 6x5; right would be 6x4"),
    "a loop": (loop, r"train/normal/again: is a link to a folder; right would be the folder"),
    "no file": (pipe, r"pipe\.png: .*is no regular file; right would be one"),
    "other format alone": (
        write("train/benign/1.tif"),
        r'train/benign: class "benign" has no images, but 1 \.tif; right would be \.png',
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_with_a_folder_is_said(apart: Path, fault: str):
    change, message = FAULTS[fault]
    change(apart)
    with pytest.raises(DataError, match=message):
        site_data(apart, CONFIG, 0)


def test_a_picture_of_another_size_is_refused_before_it_is_decoded(
    apart: Path, monkeypatch: pytest.MonkeyPatch
):
    Image.new("L", (6000, 6000)).save(apart / "train/malignant/0-large.png")  # the first file
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", None)
    with pytest.raises(DataError, match=r"large\.png: is 6000x6000; right would be 6x4"):
        site_data(apart, CONFIG, 0)


def test_a_photograph_that_lies_in_its_file_is_measured_upright(tmp_path: Path):
    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned by 90 degrees
    (tmp_path / "benign").mkdir()
    for name in ("1.jpg", "2.jpg"):
        Image.new("L", (6, 4)).save(tmp_path / "benign" / name, exif=turned)
    assert site_data(tmp_path, CONFIG, 0).train_inputs.shape == (1, 1, 6, 4)


def test_a_file_of_another_kind_is_not_called_missing(tmp_path: Path):
    (tmp_path / "scans.csv").touch()
    with pytest.raises(DataError, match=r"scans\.csv: is of an unknown file type; right would be"):
        site_data(tmp_path / "scans.csv", CONFIG, 0)


def test_class_folders_without_images_are_empty(tmp_path: Path):
    (tmp_path / "benign").mkdir()
    with pytest.raises(DataError, match="no images in its class folders"):
        site_data(tmp_path, CONFIG, 0)


X = np.zeros((4, 1, 6, 4), np.uint8)
Y = np.zeros(4, np.int64)
ARRAYS = {
    "no y": ({"x": X}, "its array y cannot be read"),
    "objects": ({"x": X, "y": np.array([{}, 1, 2, 3])}, "y is object"),
    "fractions": (
        {"x": X, "y": Y / 3},
        r"y is float64 .*right would be whole numbers of shape \(n,\)",
    ),
    "one y less": ({"x": X, "y": Y[1:]}, "4 examples and labels"),
    "other classes": ({"x": X, "y": Y + 3}, "labels go from 3 to 3, right would be 0 to 2"),
    "other size": (
        {"x": X[:, :, 1:], "y": Y},
        r"x is uint8 of shape \(4, 1, 5, 4\); right would be .* \(n, 1, 6, 4\)",
    ),
    "no images": ({"x": X[:0], "y": Y[:0]}, "has no examples"),
}


@pytest.mark.parametrize("fault", ARRAYS)
def test_what_is_wrong_with_arrays_is_said(tmp_path: Path, fault: str):
    arrays, message = ARRAYS[fault]
    np.savez(tmp_path / "scans.npz", **arrays)
    with pytest.raises(DataError, match=message):
        site_data(tmp_path / "scans.npz", CONFIG, 0)


def test_a_folder_of_a_class_that_may_not_be_read_is_not_passed_over(
    together: Path, monkeypatch: pytest.MonkeyPatch
):
    pictures(together / "benign" / "old", 3, first=50)
    scandir = os.scandir

    def forbidden(path: str) -> object:
        if str(path).endswith("old"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", forbidden)
    with pytest.raises(DataError, match=r"Permission denied: .*old"):
        site_data(together, CONFIG, 0)


def test_a_folder_that_may_not_be_read_is_an_error_of_the_data(
    apart: Path, monkeypatch: pytest.MonkeyPatch
):
    def forbidden(self: Path) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "iterdir", forbidden)
    with pytest.raises(DataError, match=r"Permission denied: .*train"):
        site_data(apart, CONFIG, 0)
