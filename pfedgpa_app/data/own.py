"""Users' own functions that load or partition a data set; their results are checked."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pfedgpa_app.arrays import ArrayError, as_examples, as_labels
from pfedgpa_app.config import DataConfig
from pfedgpa_app.data.dataset import DataError, Part
from pfedgpa_app.errors import described
from pfedgpa_app.files import count_of
from pfedgpa_app.own_functions import OwnFunctionError, own_function
from pfedgpa_app.randomness import drawing_from, make_generator

_RETURNS = "(examples, labels), (examples, labels, owners) or (examples, labels, owners, is_test)"


def load_part(config: DataConfig, seed: int) -> Part:
    """Call the function of ``data.dataset`` with the folder of the data sets.

    Global random generators are seeded during the call. Raises `DataError` if there is no such
    function, it fails, or it does not return a data set.
    """
    name = config.dataset
    # Every client calls it, and must get the same data.
    given = _called("dataset", name, seed, lambda function: function(config.root_path))
    if not isinstance(given, tuple | list) or not 2 <= len(given) <= 4:
        count = f" of {len(given)}" if isinstance(given, tuple | list) else ""
        raise DataError(f"{name}: returns {type(given).__name__}{count}, right would be {_RETURNS}")
    examples, labels, owners, is_test = (*given, None, None)[:4]
    what = "examples are"
    try:
        examples = as_examples(examples, config.info.shape, to_train=True)
        what = "labels are"
        labels = as_labels(labels)
        what = "owners are"
        owners = None if owners is None else _as_owners(owners, len(examples))
        what = "is_test is"
        is_test = None if is_test is None else _as_mask(is_test, len(examples))
    except ArrayError as error:
        raise DataError(f"{name}: {what} {error}") from error
    return Part(examples, labels, owners, is_test)


def own_shares(
    name: str, labels: NDArray[np.int64], num_clients: int, seed: int
) -> list[NDArray[np.int64]]:
    """Return the result of the function of ``data.partition``: each client's indices, ascending.

    It is called with a copy of the training pool's labels ``(n,)``, ``num_clients`` and ``seed``,
    with seeded global random generators. Raises `DataError` if there is no such function, it fails,
    or it does not return a partition.
    """
    # list(), since it may be a generator function.
    given = _called(
        "partition", name, seed, lambda function: list(function(labels.copy(), num_clients, seed))
    )
    if len(given) != num_clients:
        raise DataError(
            f"{name}: returns the indices of {count_of(len(given), 'client')}, right would be "
            f"{num_clients}"
        )
    return [
        _as_share(share, len(labels), f"{name}: client {client}")
        for client, share in enumerate(given)
    ]


def _called(setting: str, name: str, seed: int, call: Callable[[Callable[..., Any]], Any]) -> Any:
    """Return the result of the function that a setting names, with seeded global generators."""
    try:
        function = own_function(name)
        with drawing_from(make_generator(seed, setting)):
            return call(function)
    except OwnFunctionError as error:
        raise DataError(f"{name}: {error}") from error
    except Exception as error:  # user code may raise anything
        raise DataError(f"{name}: failed with {described(error)}") from error


def _as_owners(values: Any, number: int) -> NDArray[Any]:
    array = _as_array(values, number)
    if array.dtype == object:  # as pandas has strings
        kinds = {type(each) for each in array.tolist()}
        if kinds not in ({str}, {int}):
            found = " and ".join(sorted(kind.__name__ for kind in kinds))
            raise ArrayError(f"objects of {found}, right would be integers, or strings")
        array = np.array(array.tolist())
    if array.dtype.kind not in "iuU":
        raise ArrayError(f"of {array.dtype}, right would be integers or strings")
    return array


def _as_mask(values: Any, number: int) -> Tensor:
    array = _as_array(values, number)
    if array.dtype != np.bool_:
        raise ArrayError(f"of {array.dtype}, right would be bool")
    return torch.from_numpy(np.array(array))


def _as_array(values: Any, number: int) -> NDArray[Any]:
    if np.ma.is_masked(values):
        raise ArrayError("a masked array, right would be to leave out the examples")
    try:
        array = np.asarray(values.cpu() if isinstance(values, Tensor) else values)
    except (TypeError, ValueError, RuntimeError) as error:  # such as lists of different lengths
        raise ArrayError(f"no array ({error}), right would be one of {number} values") from error
    if array.shape != (number,):
        raise ArrayError(f"of shape {array.shape}, right would be ({number},)")
    return array


def _as_share(values: Any, size: int, whose: str) -> NDArray[np.int64]:
    """Return the indices of one client's examples, ascending."""
    if isinstance(values, list | tuple) and not values:  # would become an array of floats
        values = np.empty(0, dtype=np.int64)
    try:
        share = as_labels(values if isinstance(values, Tensor) else np.asarray(values)).numpy()
    except (ArrayError, TypeError, ValueError, OverflowError) as error:
        raise DataError(f"{whose} has {error}, as indices") from error
    if share.ndim != 1 or len(share) == 0:
        raise DataError(
            f"{whose} has indices of shape {share.shape}; right would be (n,), with n of 1 or more"
        )
    if share.min() < 0 or share.max() >= size:
        raise DataError(
            f"{whose} has the indices {share.min()} to {share.max()}; right would be 0 to "
            f"{size - 1}, of the training examples"
        )
    ascending = np.unique(share)
    if len(ascending) < len(share):
        raise DataError(
            f"{whose} has {len(share)} indices, of which {len(ascending)} differ; right would be "
            "each index once"
        )
    return ascending
