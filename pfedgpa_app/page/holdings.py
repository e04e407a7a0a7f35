"""Which data clients have: the classes and the group of each, from the run's settings alone."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from pfedgpa_app.config import SITES, Config
from pfedgpa_app.report import Run
from pfedgpa_app.state import load_metadata


@dataclass(frozen=True)
class Holdings:
    """What is known of the clients' data.

    Attributes
    ----------
    counts
        Training images of each class, ``(num_classes,)``, by client.
    groups
        The name of each client's group: that of the settings, or its most frequent class.
    missing
        Why there are no counts, if there are none.
    """

    counts: dict[int, Tensor] = field(default_factory=dict)
    groups: dict[int, str] = field(default_factory=dict)
    missing: str = ""

    @classmethod
    def of(cls, run: Run) -> "Holdings":
        """Return what the settings of a run say, without a download or a call of own functions."""
        partitions = _partitions(run.path / "models")
        if run.config.data.dataset == SITES:
            return cls(missing="every site has data of its own, of which the server knows nothing")
        if not partitions:
            return cls(
                missing="no model of the run says which partition its client has; models are "
                "written after the last round, by strategies whose clients keep no part of theirs"
            )
        groups = _groups(run.config, partitions)
        try:
            counts = _counts(run.config, partitions)
        except ValueError as error:
            return cls(groups=groups, missing=str(error))
        if not groups:
            names = run.config.data.classes
            groups = {
                client: f"mostly {names[int(each.argmax())]}" for client, each in counts.items()
            }
        return cls(counts, groups)

    @property
    def by_group(self) -> dict[int, Tensor]:
        """The counts, with the clients of a group one after the other."""
        order = sorted(self.counts, key=lambda client: (self.groups.get(client, ""), client))
        return {client: self.counts[client] for client in order}


def _counts(config: Config, partitions: dict[int, tuple[int, int]]) -> dict[int, Tensor]:
    # Data sets take seconds to import, and not every run can tell.
    from pfedgpa_app.data import class_counts

    # Clients say of how many partitions theirs is one: whoever is alone with a number lies.
    shared = Counter(total for _, total in partitions.values()).most_common(1)[0][0]
    table = class_counts(config.data, config.seed, shared)
    if table is None:
        raise ValueError(
            f"how {config.data.dataset} was shared out is not known on this machine, and "
            "nothing is downloaded or called for it"
        )
    return {
        client: table[number] for client, (number, total) in partitions.items() if total == shared
    }


def _groups(config: Config, partitions: dict[int, tuple[int, int]]) -> dict[int, str]:
    data = config.data
    by_group = data.partition == "dominant-classes" or (
        data.shift != "none" and data.shift_by == "group"
    )
    if not by_group or data.num_groups < 2:
        return {}
    return {
        client: f"group {number % data.num_groups + 1}"
        for client, (number, _) in partitions.items()
    }


def _partitions(folder: Path) -> dict[int, tuple[int, int]]:
    """Return each client's partition, and of how many, as the metadata of the models has it."""
    # It imports partitioners, which take seconds.
    from pfedgpa_app.exported import MODEL_KIND

    found = {}
    for file in sorted(folder.glob("client-*.safetensors")):
        try:
            facts = load_metadata(file, MODEL_KIND)
            client, number, total = (
                facts[name] for name in ("client", "partition-id", "num-partitions")
            )
        except (KeyError, ValueError):
            continue
        if all(type(each) is int for each in (client, number, total)) and 0 <= number < total:
            found[client] = (number, total)
    return dict(sorted(found.items()))
