"""Pairs as plain values, to be compared: token ids come back from files as arrays."""

import numpy as np


def plain(pair):
    ids = lambda x: np.asarray(x).tolist()  # noqa: E731
    responses = [(ids(each.token_ids), each.finish_reason, each.reference_logp) for each in pair.generated]
    return pair.key, ids(pair.prompt_ids), ids(pair.real_ids), responses, pair.reference_real_logp
