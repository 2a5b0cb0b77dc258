"""The loss of two equal models."""

import numpy as np
import pytest

from spin.data import Pair, Response
from spin.loss import SPACELoss, SPINLoss
from spin.pairs.packing import RowLayout
from spin.training.validation import initial_loss

STOP = 9


def test_the_loss_of_equal_models():
    """SPIN: ln 2, whatever the references. SPACE with mu 2: -ln(1/3) - 2 ln(2/3)."""
    pairs = [
        Pair("a", 0, [1], [2, STOP], [Response([3, STOP], "stop", -3.0), Response([4] * 4, "length", -2.0)], -2.0),
        Pair("b", 0, [1], [2, STOP], [Response([3, STOP], "stop", -4.0)], -8.0),
    ]
    loss, margin = initial_loss(SPINLoss(beta=0.3), pairs, RowLayout())
    assert (loss, margin) == (pytest.approx(np.log(2), abs=1e-15), 0.0)
    loss, margin = initial_loss(SPACELoss(mu=2.0), pairs, RowLayout())
    assert (loss, margin) == (pytest.approx(3 * np.log(3) - 2 * np.log(2), abs=1e-15), 0.0)
