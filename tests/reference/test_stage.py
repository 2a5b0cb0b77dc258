"""What reference log-probs depend on."""

from spin.data import Pair, Response
from spin.pairs.packing import RowLayout
from spin.reference.stage import score_fingerprint
from tests.recipes.helpers import tiny_config

STOP = 9


def test_score_fingerprint_sees_every_token_and_the_order(tmp_path):
    pairs = [
        Pair("fine", 0, [1], [2, STOP], [Response([3, STOP], "stop")]),
        Pair("truncated", 0, [1], [2, STOP], [Response([3, 3], "length"), Response([4, STOP], "stop")]),
        Pair("equal", 0, [1], [2, STOP], [Response([2, STOP], "stop")]),
    ]

    def fingerprint(batches, *changes, num_ranks=1):
        return score_fingerprint(batches, tiny_config(tmp_path, *changes), RowLayout(8), "w", num_ranks)

    prints = {
        fingerprint(batches)["pairs"]
        for batches in (
            [pairs],
            [pairs[:1], pairs[1:]],
            [pairs[::-1]],
            [[*pairs[:2], Pair("equal", 0, [1], [2, STOP], [Response([2, 8], "stop")])]],
            [[*pairs[:2], Pair("equal", 0, [1, 2], [STOP], [Response([2, STOP], "stop")])]],
        )
    }
    assert len(prints) == 5
    whole = fingerprint([pairs])
    for change in ("logprob_chunk_tokens=64", "compile=true", "enable_float8_training=true", "compute_dtype=bf16"):
        assert fingerprint([pairs], change) != whole, "they round otherwise"
    assert fingerprint([pairs], num_ranks=2) == whole | {"num_ranks": 2}
