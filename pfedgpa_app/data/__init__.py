"""Data sets, and how clients share them.

`client_data` is what a client calls: its own training and test samples of the data set, which
`load_dataset` reads and `partitions` shares out. A site that has data of its own calls `site_data`.
"""

from pfedgpa_app.data.clients import ClientData, class_counts, client_data
from pfedgpa_app.data.dataset import DataError, Dataset
from pfedgpa_app.data.sites import site_data
from pfedgpa_app.data.sources import ImageStats, image_stats, load_dataset, normalize

__all__ = [
    "ClientData",
    "DataError",
    "Dataset",
    "ImageStats",
    "class_counts",
    "client_data",
    "image_stats",
    "load_dataset",
    "normalize",
    "site_data",
]
