"""Data sets, one a file, behind one small protocol; and the randomness of a run.

A file here is a data set by being here: it holds `DATA_SET`, which makes one and whose name in a configuration is the
file's. A set of your own is named by `package.module:attribute` instead. See `fastdistill.data.protocol` for what a set
must have.
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
