"""PSD: two jumps that meet anywhere."""

from __future__ import annotations

import torch

from fastdistill.objectives import psd
from tests.objectives.cases import ROWS, SmallNet, random_batch
from tests.objectives.descent import Case, diagonal, halves, share

TAUGHT = {"psd": {}}
FROM_DATA = {"psd": {}}
DESCENT = {
    "psd": Case("psd", halves),
    "psd, diagonal": Case("psd", lambda g, d: 2 * share(g), diagonal),
}


def test_psd_meets_at_the_midpoint_of_each_row() -> None:
    """Check that a midpoint by row is that number's in each of them, and that rows with s = t have none."""
    net, (x0, x1, times) = SmallNet(), random_batch()
    t, s = times["t"], times["s"]
    midpoint = torch.where(torch.arange(ROWS) % 2 == 0, 0.25, 0.6).double()
    _, mixed = psd(net, x0, x1, t, s, midpoint=midpoint)
    errors = {a: psd(net, x0, x1, t, s, midpoint=a)[1]["rows"]["raw_error"] for a in (0.25, 0.6)}
    order = torch.cat(((t != s).nonzero(), (t == s).nonzero())).squeeze(1)
    expected = torch.where(midpoint[order] == 0.25, errors[0.25], errors[0.6])
    torch.testing.assert_close(mixed["rows"]["raw_error"], expected)
    assert (errors[0.25] - errors[0.6]).abs().max() > 1e-5
