"""Which data clients have: the classes and the group of each, from the run's settings alone."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

from torch import Tensor

from pfedgpa_app.config import SITES
from pfedgpa_app.report import Run
from pfedgpa_app.state import load_header


@dataclass(frozen=True)
class Holdings:
    """What is known of the clients' data."""

    counts: dict[int, Tensor] = field(default_factory=dict)
    """Training images of each class, ``(num_classes,)``, by client, those of a group together."""
    groups: dict[int, str] = field(default_factory=dict)
    """The name of each client's group: that of the settings, or its most frequent class."""
    missing: str = ""
    """Why there are no counts, if there are none."""
    floor: tuple[tuple[str, str], ...] = ()
    """What it is called, and the mean over clients of the part of their most frequent class: the
    accuracy of a model that always predicts that class. Empty if the test sets have other parts
    than the training sets, or these are not known."""

    @classmethod
    def of(cls, run: Run) -> "Holdings":
        """Return what the settings of a run say, without a download or a call of own functions."""
        data, partitions = run.config.data, _partitions(run.path / "models")
        if data.dataset == SITES:
            return cls(missing="every site has data of its own, of which the server knows nothing")
        if not partitions:
            return cls(
                missing="no model of the run says which partition its client has; models are "
                "written after the last round, by strategies whose clients keep no part of theirs"
            )
        # Data sets take seconds to import, and not every run needs them.
        from pfedgpa_app.data import class_counts

        groups: dict[int, str] = {}
        is_by_group = data.shift != "none" and data.shift_by == "group"
        if data.num_groups > 1 and (is_by_group or data.partition == "dominant-classes"):
            groups = {
                client: f"group {number % data.num_groups + 1}"
                for client, (number, _) in partitions.items()
            }
        # Clients say of how many partitions theirs is one: whoever is alone with a number lies.
        shared = Counter(total for _, total in partitions.values()).most_common(1)[0][0]
        try:
            table = class_counts(data, run.config.seed, shared)
        except ValueError as error:
            return cls(groups=groups, missing=str(error))
        if table is None:
            return cls(
                groups=groups,
                missing=f"how {data.dataset} was shared out is not known on this machine, and "
                "nothing is downloaded or called for it",
            )
        counts = {
            client: table[number]
            for client, (number, total) in partitions.items()
            if total == shared
        }
        groups = groups or {
            client: f"mostly {data.classes[int(each.argmax())]}" for client, each in counts.items()
        }
        order = sorted(counts, key=lambda client: (groups[client], client))
        most = fmean(float(each.max() / each.sum()) for each in counts.values())
        floor = (("accuracy, always the most frequent class", f"{most:.4f}"),)
        has_others = bool(data.test_uniform_fraction) or data.partition == "natural"
        return cls(
            {client: counts[client] for client in order},
            groups,
            floor=() if has_others or not counts else floor,
        )


def _partitions(folder: Path) -> dict[int, tuple[int, int]]:
    """Return each client's partition, and of how many, as the metadata of the models has it."""
    # Imported here, since it imports torch.
    from pfedgpa_app.exported import MODEL_KIND

    found = {}
    for file in sorted(folder.glob("client-*.safetensors")):
        try:
            metadata, _ = load_header(file, MODEL_KIND)
            names = ("client", "partition-id", "num-partitions")
            client, number, total = (metadata[name] for name in names)
        except (KeyError, ValueError):
            continue
        if all(type(each) is int for each in (client, number, total)) and 0 <= number < total:
            found[client] = (number, total)
    return dict(sorted(found.items()))
