"""The loss of two equal models."""

from dataclasses import replace

import numpy as np
import pytest

from spin.data import Pair, Response
from spin.loss import SPINLoss, TSPINLoss
from spin.pairs.packing import RowLayout
from spin.training.validation import loss_of_equal_models

STOP = 9


def test_the_loss_of_equal_models():
    """SPIN: ln 2, whatever the references. T-SPIN by hand: the references are the policy's log-probs."""
    pairs = [
        Pair("a", 0, [1], [2, STOP], [Response([3, STOP], "stop", -3.0), Response([4] * 4, "length", -2.0)], -2.0),
        Pair("b", 0, [1], [2, STOP], [Response([3, STOP], "stop", -4.0)], -8.0),
    ]
    loss, margin = loss_of_equal_models(SPINLoss(beta=0.3), pairs, RowLayout())
    assert (loss, margin) == (pytest.approx(np.log(2), abs=1e-15), 0.0)
    triplets = [pairs[0], replace(pairs[1], generated=pairs[1].generated * 2)]
    layout = RowLayout(triplets=True)
    loss, margin = loss_of_equal_models(TSPINLoss(beta=1.0, start_weight=0.1), triplets, layout)
    l_of = lambda z: np.log1p(np.exp(-z))  # noqa: E731
    expected = [l_of(1.0) + 0.1 * l_of(-1.0), l_of(-4.0) + 0.1 * l_of(0.0)]  # -2 + 3, -3 + 2; -8 + 4, -4 + 4
    assert loss == pytest.approx(sum(expected) / 2, rel=1e-14) and margin == pytest.approx(-1.5)
    loss, _ = loss_of_equal_models(TSPINLoss(beta=1.0), triplets, replace(layout, truncated="mask"))
    assert loss == pytest.approx(expected[1], rel=1e-14)  # a's second answer was cut
