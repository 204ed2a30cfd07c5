"""LSD, and what it shares with ESD, PSD and TVM."""

from __future__ import annotations

import torch

from fastdistill.objectives import esd, flow_matching, lsd, psd, tvm
from tests.objectives.cases import WIDTH, SmallNet, assert_same_gradient, random_batch
from tests.objectives.descent import Case, diagonal, lagrangian, share

TAUGHT = {"lsd": {}}
FROM_DATA = {"lsd": {}}
DESCENT = {
    # The gradient flows through the derivative, too: the prediction u - d du/ds is off by 3 theta d^2 e.
    "lsd": Case("lsd", lambda g, d: 2 * 3 * d**2 * lagrangian(g, d) / WIDTH),
    "lsd, diagonal": Case("lsd", lambda g, d: 2 * share(g), diagonal),
}


def test_on_the_diagonal_all_three_are_flow_matching() -> None:
    net, (x0, x1, times) = SmallNet(), random_batch()
    t = times["t"]
    for method in (esd, lsd, psd):
        loss, metrics = method(net, x0, x1, t, t)
        assert_same_gradient(loss, flow_matching(net, x0, x1, t)[0], net)
        assert metrics["distinct_share"] == 0


def test_lsd_and_tvms_first_term_are_one_and_tvm_anchors_at_the_end() -> None:
    net, target, (x0, x1, times) = SmallNet(), SmallNet(), random_batch()
    t, s = times["t"], times["r"]
    terminal, _ = lsd(net, x0, x1, t, s, target=target)
    anchor, _ = flow_matching(net, x0, x1, s)
    both, metrics = tvm(net, x0, x1, t, s, target=target)
    assert_same_gradient(both, terminal + anchor, net)
    torch.testing.assert_close(metrics["anchor_error"], anchor.detach())
