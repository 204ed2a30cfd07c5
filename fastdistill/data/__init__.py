"""Collect the data sets, each a file that keeps one small protocol, and the randomness of a run.

Every file here that isn't a helper is a data set. It holds `DATA_SET`, which makes the set, and a configuration names
the set by the file's name. A set of your own is named by `package.module:attribute` instead.
`fastdistill.data.protocol` says what a set must have.
"""

from __future__ import annotations

from fastdistill.data.digits import Digits
from fastdistill.data.protocol import Batch, DataSet
from fastdistill.data.randomness import drop_labels, epoch_rows, generator_at
from fastdistill.data.registry import DATASETS, make_data_set
from fastdistill.data.ring import Ring

__all__ = [
    "DATASETS",
    "Batch",
    "DataSet",
    "Digits",
    "Ring",
    "drop_labels",
    "epoch_rows",
    "generator_at",
    "make_data_set",
]
