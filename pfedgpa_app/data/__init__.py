"""Data sets, and their partitions among clients.

`client_data` returns a client's partition of a named or own data set, `site_data` the data of a
site that brings its own.
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
