"""The data set ``watch`` of package seglearn: smartwatch recordings of shoulder exercises.

Ten people did seven exercises with each arm (arXiv 1802.01489), twenty repetitions a recording.
"""

import numpy as np
import torch

from pfedgpa_app.data.dataset import DataError, Part

WINDOW = 100
"""Time steps of an example: 2 s at 50 Hz."""
_TRAIN_FRACTION = 0.6


def load_windows() -> Part:
    """Return the windows of all recordings, ``(n, 6, 100)``, each recording in order of time.

    The channels are acceleration along x, y and z, and angular velocity about them, standardized
    over the training windows of all people. Labels are the exercises, 0 to 6; owners are the
    people, 1 to 10. The first 60 % of each recording is for training and the rest, after a gap of
    one window, for testing. Windows do not overlap. Raises `DataError` if seglearn is not
    installed.
    """
    try:
        # Its file is pickled, and read by its own loader alone.
        from seglearn.datasets import load_watch
    except ImportError as error:
        raise DataError(
            f"watch: package seglearn contains it, and cannot be imported ({error}); right would "
            'be pip install ".[data]"'
        ) from error
    recorded = load_watch()
    windows, labels, people, is_test = [], [], [], []
    for signal, label, person in zip(
        recorded["X"], recorded["y"], recorded["subject"], strict=True
    ):
        for begin, for_testing in window_starts(len(signal)):
            windows.append(signal[begin : begin + WINDOW].T)
            labels.append(label)
            people.append(person)
            is_test.append(for_testing)
    examples = torch.from_numpy(np.stack(windows))
    for_tests = torch.tensor(is_test)
    std, mean = torch.std_mean(examples[~for_tests], dim=(0, 2), correction=0, keepdim=True)
    return Part(
        ((examples - mean) / std).float(), torch.tensor(labels), np.array(people), for_tests
    )


def window_starts(length: int) -> list[tuple[int, bool]]:
    """Return the start of each window of a recording, and whether it is for testing."""
    cut = round(_TRAIN_FRACTION * length)
    train = range(0, cut - WINDOW + 1, WINDOW)
    test = range(cut + WINDOW, length - WINDOW + 1, WINDOW)
    return [(begin, False) for begin in train] + [(begin, True) for begin in test]
