"""What a client may send, and what of it is refused."""

import io

import numpy as np
import pytest
import torch
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Error,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from flwr.supercore.task_identity import TaskIdentity
from simulated_grid import upload, weights

from pfedgpa_app.config import PrivacyConfig
from pfedgpa_app.parameters import ParameterLayout
from server_app.replies import (
    ReplyError,
    Upload,
    check_ranges,
    metric_ranges,
    read_metrics,
    read_upload,
)

LAYOUT = ParameterLayout.of(weights(0.0))


def reply(answer: RecordDict | Error) -> Message:
    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1
    request = Message(content=RecordDict(), message_type=MessageType.TRAIN, dst_node_id=5)
    return Message(answer, reply_to=request)


def read(answer: RecordDict | Error) -> Upload:
    return read_upload(reply(answer), LAYOUT, {}, "num-examples")


def changed(name: str, value: object) -> dict[str, object]:
    return {**weights(1.0), name: value}


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def raw(data: bytes, dtype: str = "float32", shape: tuple[int, ...] = (2,)) -> Array:
    return Array(dtype=dtype, shape=shape, stype="numpy.ndarray", data=data)


def npy_header(shape: tuple[int, ...], padding: int) -> bytes:
    """Return a file that promises far more than it holds."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        file, {"descr": "<f4", "fortran_order": False, "shape": shape}
    )
    return file.getvalue() + b"\0" * padding


def test_a_good_upload_is_read_to_the_last_bit():
    result = read(upload(weights(0.1), num_examples=7, **{"accuracy-after": 0.5}))
    assert result.num_examples == 7
    assert result.metrics["accuracy-after"] == 0.5
    for name, tensor in weights(0.1).items():
        assert torch.equal(result.state[name], tensor)
        assert result.state[name].dtype == tensor.dtype


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ({"layer.weight": torch.ones(2, 2)}, "no tensor layer.bias"),
        (changed("extra", torch.ones(2)), "no tensor extra"),
        (changed("layer.bias", torch.ones(3)), "layer.bias"),
        (changed("layer.bias", torch.ones(1, 2)), "layer.bias"),
        (changed("layer.bias", torch.ones(2, dtype=torch.float64)), "layer.bias"),
        (changed("layer.bias", torch.ones(2, dtype=torch.int32)), "layer.bias"),
        (changed("layer.bias", torch.tensor([1.0, float("nan")])), "not finite"),
        (changed("layer.weight", torch.full((2, 2), float("inf"))), "not finite"),
        (changed("layer.weight", torch.full((2, 2), 3e38)), "beyond 1e[+]12"),
        (changed("norm.num_batches_tracked", torch.tensor(2**62)), "beyond 1e[+]12"),
        (changed("norm.num_batches_tracked", torch.tensor(-1)), "negative"),
        (changed("layer.bias", torch.ones(200_000)), "800128 bytes"),
        (changed("layer.bias", raw(b"")), "0 bytes"),
        (changed("layer.bias", raw(b"\x80\x04" * 40)), "cannot be read"),
        (changed("layer.bias", raw(npy(np.ones(2, np.float32))[:-1] + b"")), "cannot be read"),
        (changed("layer.bias", raw(npy(np.array([{}, {}], dtype=object)))), "object"),
        (changed("layer.bias", raw(npy_header((2**60,), 8))), "instead of"),
        (changed("layer.bias", raw(npy_header((2,), 8), shape=(9, 9))), None),
    ],
)
def test_an_array_that_does_not_fit_is_refused_by_name(state: dict, reason: str | None):
    if reason is None:  # what the record claims is never believed: the data is right
        assert torch.equal(read(upload(state)).state["layer.bias"], torch.zeros(2))
        return
    with pytest.raises(ReplyError, match=reason):
        read(upload(state))


@pytest.mark.parametrize(
    ("num_examples", "metrics", "reason"),
    [
        (0, {}, "num-examples"),
        (-5, {}, "num-examples"),
        (float("inf"), {}, "num-examples"),
        (float("nan"), {}, "num-examples"),
        (2.0**60, {}, "num-examples"),
        (10, {"loss-after": float("nan")}, "loss-after"),
        (10, {"loss-after": 1e13}, "loss-after"),
    ],
)
def test_numbers_that_are_none_are_refused(num_examples: float, metrics: dict, reason: str):
    with pytest.raises(ReplyError, match=reason):
        read(upload(weights(1.0), num_examples, **metrics))


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("accuracy", 9e11, "between 0 and 1"),
        ("auroc", 1.5, "between 0 and 1"),
        ("recall-1", -0.5, "between 0 and 1"),
        ("accuracy-before", -0.01, "between 0 and 1"),
        ("accuracy-after", 1.01, "between 0 and 1"),
        ("loss", -1.0, "between 0 and 1e"),
        ("loss-after", -1.0, "between 0 and 1e"),
        ("seconds", -1.0, "between 0 and 3e"),
        ("seconds", 9e11, "between 0 and 3e"),
        ("epsilon", 9e11, "between 0 and 1e"),
        ("epsilon", -1.0, "between 0 and 1e"),
    ],
)
def test_numbers_that_cannot_be_are_refused_by_name(name: str, value: float, wanted: str):
    ranges = metric_ranges(PrivacyConfig(mode="update", epsilon=1.0), num_classes=2)
    with pytest.raises(ReplyError, match=f'"{name}" is .*, and should be {wanted}'):
        check_ranges({name: value, "other": value}, ranges)
    check_ranges({name: 0.5, "other": value}, ranges)
    with pytest.raises(ReplyError, match='"recall-2" is of a class that there is not'):
        check_ranges({"recall-2": 0.5}, ranges)


def test_no_epsilon_is_more_than_the_settings_allow():
    budget = metric_ranges(PrivacyConfig(mode="example", epsilon=3.0))
    check_ranges({"epsilon": 3.0}, budget)
    with pytest.raises(ReplyError, match="between 0 and 3"):
        check_ranges({"epsilon": 3.1}, budget)
    with pytest.raises(ReplyError, match="between 0 and 0"):
        check_ranges({"epsilon": 0.1}, metric_ranges(PrivacyConfig()))


def test_a_missing_number_of_examples_is_refused():
    record = upload(weights(1.0))
    record["metrics"] = MetricRecord({"loss": 1.0})
    with pytest.raises(ReplyError, match="num-examples"):
        read(record)


@pytest.mark.parametrize(
    "extra",
    [
        {"more": MetricRecord({"x": 1})},
        {"more": ArrayRecord(weights(1.0))},
        {"more": ConfigRecord({"path": "/etc/passwd"})},
    ],
)
def test_a_record_that_was_not_asked_for_is_refused(extra: dict):
    record = upload(weights(1.0))
    record.update(extra)
    with pytest.raises(ReplyError, match="records"):
        read(record)


def test_a_name_of_a_client_is_written_to_the_log_without_what_would_steer_a_terminal():
    with pytest.raises(ReplyError) as caught:
        read(upload(weights(1.0) | {"\x1b[2Jroot\n2026-01-01 INFO all is well": torch.ones(1)}))
    assert str(caught.value).endswith("no tensor [2Jroot 2026-01-01 INFO all is well")


def test_a_long_message_of_a_client_is_cut_for_the_log():
    with pytest.raises(ReplyError) as caught:
        read(Error(code=0, reason="out\nof memory " * 10_000))
    assert len(str(caught.value)) < 500
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "header",
    ["-" * 3900 + "1", "{'descr': (", "{'descr': (), 'fortran_order': False, 'shape': (2,)}", "{}"],
)
def test_a_hostile_header_is_refused(header: str):
    magic = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode()
    with pytest.raises(ReplyError, match=r"layer\.bias"):
        read(upload(changed("layer.bias", raw(magic + b"\0" * 8))))


def test_an_error_is_refused_with_its_reason():
    with pytest.raises(ReplyError, match="out of memory"):
        read(Error(code=0, reason="out of memory"))


def test_what_a_client_reports_of_its_data_is_read():
    reported = {"image-mean": [72.5, 0.1], "image-std": [90.25, 1.0], "partition": [3, 10]}
    result = read(upload(weights(1.0), **reported))
    assert result.site.keys() == {"image-stats", "partition"}
    stats = result.site["image-stats"]
    assert stats.dtype == torch.float32
    assert torch.equal(stats, torch.tensor([[72.5, 0.1], [90.25, 1.0]]))
    assert result.site["partition"].tolist() == [3, 10]
    assert result.metrics == {"num-examples": 10}  # Flower's aggregation takes scalars


def test_a_client_need_not_report_anything_of_its_data():
    assert read(upload(weights(1.0))).site == {}
    assert read(upload(weights(1.0), partition=[0, 1])).site.keys() == {"partition"}


RIGHT = {"image-mean": [1.0], "image-std": [1.0]}


@pytest.mark.parametrize(
    ("reported", "reason"),
    [
        ({"image-mean": [1.0]}, "lists"),
        ({"image-std": [1.0]}, "lists"),
        ({"image-mean": 1.0, "image-std": 1.0}, "lists"),
        ({"image-mean": [], "image-std": []}, "lists"),
        ({"image-mean": [1.0, 2.0], "image-std": [1.0]}, "lists"),
        ({"image-mean": [1.0] * (2**20 + 1), "image-std": [1.0] * (2**20 + 1)}, "1 to 1048576"),
        ({**RIGHT, "image-mean": [float("nan")]}, "finite"),
        ({**RIGHT, "image-mean": [float("-inf")]}, "finite"),
        ({**RIGHT, "image-mean": [1e300]}, "finite"),
        ({**RIGHT, "image-mean": [2**63 + 1]}, "finite"),
        ({**RIGHT, "image-std": [float("nan")]}, "finite"),
        ({**RIGHT, "image-std": [0.0]}, "above 0"),
        ({**RIGHT, "image-std": [-1.0]}, "above 0"),
        ({**RIGHT, "image-std": [1e-300]}, "above 0"),
        ({"partition": 3}, "partition"),
        ({"partition": [3]}, "partition"),
        ({"partition": [0.0, 2.0]}, "partition"),
        ({"partition": [2, 2]}, "partition"),
        ({"partition": [-1, 2]}, "partition"),
        ({"partition": [0, 2**31]}, "partition"),
    ],
)
def test_what_a_client_reports_wrongly_of_its_data_is_refused(reported: dict, reason: str):
    with pytest.raises(ReplyError, match=reason):
        read(upload(weights(1.0), **reported))


def test_as_many_channels_as_are_allowed_are_read():
    reported = {"image-mean": [1.0] * 2**20, "image-std": [1.0] * 2**20}
    assert read(upload(weights(1.0), **reported)).site["image-stats"].shape == (2, 2**20)


def test_an_evaluation_reply_has_no_arrays():
    metrics = MetricRecord({"num-examples": 3, "accuracy": 0.5})
    good = read_metrics(reply(RecordDict({"metrics": metrics})), "num-examples")
    assert good == {"num-examples": 3, "accuracy": 0.5}
    with pytest.raises(ReplyError, match="records"):
        read_metrics(reply(upload(weights(1.0))), "num-examples")
