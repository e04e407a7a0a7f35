"""Clients whose data differ in more than their classes."""

import numpy as np
import pytest
import torch

from pfedgpa_app.config import Config, ConfigError, DataConfig
from pfedgpa_app.data import client_data, load_dataset
from pfedgpa_app.data.shifts import rotated, shifted, with_contrast

IMAGES = torch.arange(2 * 9, dtype=torch.uint8).reshape(2, 1, 3, 3) * 10
LABELS = torch.tensor([0, 7])


def shift(client: int, seed: int = 0, **settings) -> tuple[torch.Tensor, torch.Tensor]:
    return shifted(DataConfig(**settings), seed, client, IMAGES, LABELS)


def test_without_a_shift_data_stay_as_they_are():
    images, labels = shift(3)
    assert images is IMAGES
    assert labels is LABELS


def test_groups_are_turned_by_even_parts_of_a_circle():
    for client in range(8):
        images, labels = shift(client, shift="rotation", num_groups=4)
        expected = np.rot90(IMAGES.numpy(), client % 4, axes=(2, 3))
        assert np.array_equal(images.numpy(), expected)
        assert torch.equal(labels, LABELS)


def test_other_angles_keep_type_size_and_the_middle():
    for angle in (30.0, 120.0, 271.5):
        for images in (IMAGES, IMAGES.float()):
            turned = rotated(images, angle)
            assert turned.dtype == images.dtype
            assert turned.shape == images.shape
            assert torch.equal(turned[:, :, 1, 1], images[:, :, 1, 1])
    dot = torch.zeros(1, 1, 5, 5)
    dot[0, 0, 2, 4] = 1.0  # to the right of the middle
    # Counterclockwise by 45 degrees: up and to the right.
    assert rotated(dot, 45.0)[0, 0].argmax() in (4, 8)


def test_only_half_turns_of_oblong_images_are_exact():
    oblong = torch.arange(6, dtype=torch.uint8).reshape(1, 1, 2, 3)
    assert rotated(oblong, 180.0).flatten().tolist() == [5, 4, 3, 2, 1, 0]
    assert rotated(oblong, 90.0).shape == oblong.shape


def test_groups_have_negatives_and_half_the_contrast():
    values = torch.tensor([0, 100, 255], dtype=torch.uint8)
    assert with_contrast(values, 1).tolist() == [0, 100, 255]
    assert with_contrast(values, -1).tolist() == [255, 155, 0]
    assert with_contrast(values, 0.5).tolist() == [64, 114, 191]
    factors = [1, -1, 0.5, -0.5]
    for client in range(8):
        images, _ = shift(client, shift="contrast", num_groups=4)
        assert torch.equal(images, with_contrast(IMAGES, factors[client % 4]))
    assert with_contrast(torch.tensor([-1.0, 2.0]), -0.5).tolist() == [0.5, -1.0]


def test_sixteen_bits_are_shifted_as_eight_are():
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    finer = images.to(torch.int32) * 257
    for factor in (-1.0, 0.5, 2.0):
        shifted_finer = with_contrast(finer, factor)
        assert shifted_finer.dtype == finer.dtype
        difference = shifted_finer / 257 - with_contrast(images, factor).float()
        assert difference.abs().max() <= 0.5
    assert torch.equal(rotated(finer, 90), rotated(images, 90).to(torch.int32) * 257)
    assert rotated(finer, 30).dtype == finer.dtype
    assert (rotated(finer, 30) / 257 - rotated(images, 30).float()).abs().max() <= 0.51


def test_each_group_has_a_permutation_of_the_labels_and_the_first_none():
    everything = torch.arange(10)

    def permutation(client: int, seed: int = 0, **settings) -> list[int]:
        config = DataConfig(shift="permuted-labels", num_groups=3, **settings)
        return shifted(config, seed, client, torch.zeros(10, 1, 1, 1), everything)[1].tolist()

    assert permutation(0) == permutation(3) == everything.tolist()
    assert permutation(1) == permutation(4)
    found = {tuple(permutation(client)) for client in range(3)}
    assert len(found) == 3
    assert all(sorted(each) == everything.tolist() for each in found)
    assert permutation(1) != permutation(1, seed=1)
    by_client = {tuple(permutation(client, shift_by="client")) for client in range(6)}
    assert len(by_client) == 6


@pytest.mark.parametrize("kind", ["rotation", "contrast"])
def test_every_client_may_have_a_shift_of_its_own(kind: str):
    found = [shift(client, shift=kind, shift_by="client")[0] for client in (0, 1, 2, 0)]
    assert torch.equal(found[0], found[3])
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found[1], found[2])


def test_training_and_test_sets_are_shifted_alike():
    plain = client_data(DataConfig(), 0, 1, 4)
    turned = client_data(DataConfig(shift="rotation"), 0, 1, 4)
    renamed = client_data(DataConfig(shift="permuted-labels"), 0, 1, 4)
    for part in ("train_inputs", "test_inputs"):
        assert torch.equal(getattr(turned, part), getattr(plain, part).rot90(2, dims=(2, 3)))
    pairs = {
        (old, new)
        for part in ("train_labels", "test_labels")
        for old, new in zip(
            getattr(plain, part).tolist(), getattr(renamed, part).tolist(), strict=True
        )
    }
    assert len(pairs) == len({old for old, _ in pairs}) == len({new for _, new in pairs})
    assert any(old != new for old, new in pairs)


def test_half_a_test_set_may_be_of_all_classes():
    config = DataConfig(partition="disjoint", train_samples=50, test_samples=20)
    own = client_data(config, 0, 0, 5)
    mixed = client_data(config.model_copy(update={"test_uniform_fraction": 0.5}), 0, 0, 5)
    classes = own.test_labels.unique().tolist()
    assert torch.equal(mixed.train_labels, own.train_labels)
    assert len(mixed.test_labels) == 20
    counts = torch.bincount(mixed.test_labels, minlength=10)
    # 10 of the client's two classes, and one of each of the ten.
    assert [int(counts[label]) for label in range(10)] == [
        6 if label in classes else 1 for label in range(10)
    ]
    trained = {tuple(image.flatten().tolist()) for image in mixed.train_inputs}
    dataset = load_dataset(DataConfig(), 0)
    held_out = {tuple(image.flatten().tolist()) for image in dataset.images[dataset.is_test]}
    assert all(tuple(image.flatten().tolist()) in held_out - trained for image in mixed.test_inputs)


@pytest.mark.parametrize(
    "setting", [{"data.shift": "rotation"}, {"data.test-uniform-fraction": 0.5}]
)
def test_data_that_sites_bring_is_theirs(setting: dict):
    sites = {"data.dataset": "sites", "data.shape": "1x8x8", "data.num-classes": 2}
    with pytest.raises(ConfigError, match=r'with data.dataset = "sites" right would be'):
        Config.from_flat(sites | setting)
