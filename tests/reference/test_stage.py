"""What reference log-probs depend on."""

from spin.data import Pair, Response
from spin.pairs.packing import RowLayout
from spin.reference.stage import score_fingerprint

STOP = 9


def test_score_fingerprint_sees_every_token_and_the_order():
    pairs = [
        Pair("fine", 0, [1], [2, STOP], [Response([3, STOP], "stop")]),
        Pair("truncated", 0, [1], [2, STOP], [Response([3, 3], "length"), Response([4, STOP], "stop")]),
        Pair("equal", 0, [1], [2, STOP], [Response([2, STOP], "stop")]),
    ]
    base = {"opponent": "w", "layout": RowLayout(8), "compute_dtype": "fp32"}
    prints = {
        score_fingerprint(batches=batches, **base)["pairs"]
        for batches in (
            [pairs],
            [pairs[:1], pairs[1:]],
            [pairs[::-1]],
            [[*pairs[:2], Pair("equal", 0, [1], [2, STOP], [Response([2, 8], "stop")])]],
            [[*pairs[:2], Pair("equal", 0, [1, 2], [STOP], [Response([2, STOP], "stop")])]],
        )
    }
    assert len(prints) == 5
    other = {"num_ranks": 2, "chunk_tokens": 64, "compiled": True, "float8": True, "compute_dtype": "bf16"}
    whole = score_fingerprint(batches=[pairs], **base)
    for name, value in other.items():  # they round otherwise
        assert score_fingerprint(batches=[pairs], **base | {name: value}) == whole | {name: value} != whole
