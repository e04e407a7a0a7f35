"""Models that were taken away from a run."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from pfedgpa_app.config import DATASETS, Config
from pfedgpa_app.data import ImageStats, client_data, image_stats, load_dataset
from pfedgpa_app.evaluation import evaluate
from pfedgpa_app.exported import ExportedModel, ExportError
from pfedgpa_app.models import build_model

OWN_DATA = {
    "data.dataset": "own_data:load",
    "data.shape": "1x8x8",
    "data.num-classes": 10,
}
DIGITS = load_dataset(Config().data, 0)


def exported(model: str = "cnn-8x8", **settings: Any) -> ExportedModel:
    """Return a model of digits with random parameters."""
    config = Config.from_flat({"model.name": model, **settings})
    state = build_model(model, config.data.info, seed=7).state_dict()
    return ExportedModel(state, config, 3, 10, image_stats(DIGITS), (1, 4), trusted=True)


def test_a_saved_model_is_loaded_whole(tmp_path: Path):
    model = exported(seed=5, **{"diffusion.fidelity": 0.5})
    model.save(tmp_path / "model.safetensors")
    loaded = ExportedModel.load(tmp_path / "model.safetensors", trusted=True)
    assert replace(loaded, state={}, stats=None) == replace(model, state={}, stats=None)
    assert loaded.stats is not None
    for left, right in zip(loaded.stats, image_stats(DIGITS), strict=True):
        assert torch.equal(left, right)
    for name, tensor in model.state.items():
        assert torch.equal(loaded.state[name], tensor)


def test_what_a_client_did_not_report_is_not_there(tmp_path: Path):
    replace(exported(), stats=None, partition=None).save(tmp_path / "model.safetensors")
    loaded = ExportedModel.load(tmp_path / "model.safetensors")
    assert loaded.stats is None
    assert loaded.partition is None
    with pytest.raises(ExportError, match="client 3 did not report how its data is normalized"):
        loaded.predict(DIGITS.images[:1])
    with pytest.raises(ExportError, match="the examples of client 3 are not known here"):
        loaded.evaluate()


def test_predictions_are_the_softmax_of_the_models_logits_on_normalized_images():
    model = exported()
    module = build_model("cnn-8x8", DATASETS["digits"], seed=0)
    module.load_state_dict(model.state)
    images = DIGITS.images[:600]
    pixels = DIGITS.images[~DIGITS.is_test].double()
    normalized = ((images.double() - pixels.mean()) / pixels.std(correction=0)).float()
    with torch.no_grad():
        exponentials = module.eval()(normalized).double().exp()
    expected = exponentials / exponentials.sum(1, keepdim=True)
    actual = model.predict(images)
    assert actual.shape == (600, 10)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-6)


def test_the_test_set_is_that_of_the_client_in_its_run():
    model = exported()
    data = client_data(Config().data, 0, 1, 4)
    result, num_examples = model.evaluate()
    assert num_examples == len(data.test_labels)
    assert result == evaluate(model.module, data.test_inputs, data.test_labels, data.stats)
    other, _ = replace(model, partition=(0, 4)).evaluate()
    assert other != result


def test_a_model_is_judged_in_the_precision_of_its_run():
    exact, coarse = exported(), exported(**{"client.precision": "bf16"})
    data = client_data(Config().data, 0, 1, 4)
    test = (data.test_inputs, data.test_labels, data.stats)
    result, _ = coarse.evaluate()
    assert result == evaluate(exact.module, *test, "bf16")
    assert result.loss != exact.evaluate()[0].loss
    assert not torch.equal(coarse.predict(DIGITS.images[:9]), exact.predict(DIGITS.images[:9]))


@pytest.mark.parametrize(
    ("images", "reason"),
    [
        (torch.zeros(2, 1, 8, 9, dtype=torch.uint8), r"right would be \(n, 1, 8, 8\)"),
        (torch.zeros(1, 8, 8, dtype=torch.uint8), r"right would be \(n, 1, 8, 8\)"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), r"right would be \(n, 1, 8, 8\)"),
        (torch.zeros(2, 1, 8, 8), "torch.float32; right would be torch.uint8"),
    ],
)
def test_images_that_a_model_does_not_take_are_refused(images: torch.Tensor, reason: str):
    with pytest.raises(ExportError, match=reason):
        exported().predict(images)


def test_a_model_of_float_data_takes_floats_alone():
    model = replace(exported(), stats=ImageStats(torch.zeros(1), torch.ones(1)))
    images = DIGITS.images[:5]
    with pytest.raises(ExportError, match=r"torch\.uint8; right would be torch\.float32"):
        model.predict(images)
    with torch.no_grad():
        expected = model.module(images.float()).softmax(1)
    assert torch.equal(model.predict(images.float()), expected)


def test_a_normalization_of_other_channels_is_refused():
    model = replace(exported(), stats=ImageStats(torch.zeros(3), torch.ones(3)))
    with pytest.raises(ExportError, match="3 channels or features; right would be 1"):
        model.predict(DIGITS.images[:1])


def test_tensors_that_are_not_the_models_are_refused_by_name(tmp_path: Path):
    model = exported()
    wrong = replace(model, state={**model.state, "fc2.bias": torch.zeros(9)})
    with pytest.raises(ValueError, match=r"fc2\.bias has the shape \(9,\)"):
        wrong.predict(DIGITS.images[:1])


@pytest.mark.parametrize(
    ("settings", "use"),
    [
        ({"model.name": "own_models:linear"}, lambda model: model.predict(DIGITS.images[:1])),
        (OWN_DATA, lambda model: model.evaluate()),
    ],
    ids=["model", "data"],
)
def test_a_file_that_is_not_trusted_cannot_name_code_to_call(
    settings: dict, use: Callable[[ExportedModel], object]
):
    config = Config.from_flat(settings)
    model = replace(exported(), config=config, trusted=False)
    with pytest.raises(ExportError, match=r'= "own_\w+:l\w+" is a Python function .*--trust'):
        use(model)


def test_an_own_model_is_built_where_it_is_trusted():
    model = exported("own_models:linear")
    assert model.predict(DIGITS.images[:2]).shape == (2, 10)


def save_with(file: Path, changes: dict[str, Any]) -> None:
    """Write a model whose metadata says something else; "gone" removes a field."""
    exported().save(file)
    metadata = safe_open(file, "pt").metadata()
    fields = json.loads(metadata["fields"]) | changes
    metadata["fields"] = json.dumps({k: v for k, v in fields.items() if v != "gone"})
    save_file(exported().state, file, metadata)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"client": -1}, "client"),
        ({"round": "gone"}, "round"),
        ({"image-mean": [None]}, "image-mean"),
        ({"image-std": [0.0]}, "image-std"),
        ({"config": "gone"}, "config"),
        ({"config": {"sed": 1}}, "sed = 1: no such setting"),
    ],
)
def test_a_file_with_wrong_facts_is_refused(tmp_path: Path, changes: dict, reason: str):
    file = tmp_path / "model.safetensors"
    save_with(file, changes)
    with pytest.raises(ExportError, match=rf"(?s)model\.safetensors is damaged.*{reason}"):
        ExportedModel.load(file)


@pytest.mark.parametrize("fields", [None, "", "{", "3", "[1]", "[" * 100_000])
def test_a_file_with_damaged_metadata_is_refused(tmp_path: Path, fields: str | None):
    file = tmp_path / "model.safetensors"
    metadata = {"kind": "pfedgpa-model-2"} | ({} if fields is None else {"fields": fields})
    save_file({"x": torch.ones(1)}, file, metadata)
    with pytest.raises(ValueError, match=r"model\.safetensors has damaged metadata"):
        ExportedModel.load(file)


PRIOR = {"client.class-prior": True}


def test_a_model_of_the_class_prior_predicts_with_the_class_counts_of_its_client(tmp_path: Path):
    plain, model = exported(), exported(**PRIOR).with_class_counts()
    labels = client_data(Config().data, 0, 1, 4).train_labels.tolist()
    assert model.class_counts == tuple(labels.count(label) for label in range(10))
    weighted = plain.predict(DIGITS.images[:9]) * (torch.tensor(model.class_counts) + 0.5)
    model.save(tmp_path / "model.safetensors")
    loaded = ExportedModel.load(tmp_path / "model.safetensors", trusted=True)
    torch.testing.assert_close(
        loaded.predict(DIGITS.images[:9]), weighted / weighted.sum(1, keepdim=True)
    )


def test_a_model_of_the_class_prior_is_judged_with_it():
    model = exported(**PRIOR)
    data = client_data(Config().data, 0, 1, 4)
    counts = torch.bincount(data.train_labels, minlength=10)
    expected = evaluate(
        model.module,
        data.test_inputs,
        data.test_labels,
        data.stats,
        offset=(counts + 0.5).log(),
    )
    assert model.evaluate()[0] == expected
    assert expected.loss != exported().evaluate()[0].loss


def test_without_class_counts_a_model_of_the_class_prior_says_what_is_missing():
    model = replace(exported(**PRIOR), partition=None)
    assert model.with_class_counts() is model
    with pytest.raises(ExportError, match="class counts of client 3, which are not in the file"):
        model.predict(DIGITS.images[:1])
    counted = model.with_class_counts([3] * 10)
    torch.testing.assert_close(
        counted.predict(DIGITS.images[:5]), exported().predict(DIGITS.images[:5])
    )


@pytest.mark.parametrize("counts", [[1] * 9, [1] * 11, [-1] + [1] * 9])
def test_class_counts_that_do_not_fit_are_refused(counts: list[int]):
    with pytest.raises(ExportError, match="right would be 10 numbers from 0"):
        exported(**PRIOR).with_class_counts(counts)


def test_class_counts_are_refused_where_nothing_would_use_them():
    with pytest.raises(ExportError, match=r"without client\.class-prior"):
        exported().with_class_counts([3] * 10)


def test_the_data_of_a_run_is_counted_only_where_its_settings_may_be_used():
    model = replace(exported(**OWN_DATA, **PRIOR), trusted=False)
    with pytest.raises(ExportError, match="allow calling it"):
        model.with_class_counts()
