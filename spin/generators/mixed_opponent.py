"""Opponents that are a geometric mixture of the policy and of what the run started from.

With a share ``a`` the opponent's probability of a response is proportional to ``p_t^(1 - a) p_0^a``. Within a pair the
normalizers cancel, so log-probs are all that it takes: ``(1 - a) log p_t + a log p_0`` stands in the loss where the
opponent's stood. It is the policy as it is that answers the prompts.

Source:
    alpha-SPIN of https://arxiv.org/abs/2404.04291: a penalty on the divergence from the base policy amounts to this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import zip_longest

import torch
from torch import nn

from spin.core.errors import SelfTestError, StoreError
from spin.model.fingerprint import weights_fingerprint
from spin.model.sharding import local_tensor, reshard
from spin.types import Pair


def mix_references(pairs: Iterable[Pair], starts: Iterable[Pair], share: float) -> Iterator[Pair]:
    """Pairs under the mixed opponent.

    Args:
        pairs (Iterable[Pair]): scored by the policy at the iteration's start.
        starts (Iterable[Pair]): the same pairs in the same order, scored by what the run started from.
        share (float): ``a``, in [0, 1].

    Yields:
        Pair: with the mixture's log-probs, up to a constant for each prompt.

    Raises:
        StoreError: If the two are not the same pairs.
    """
    for pair, start in zip_longest(pairs, starts):
        if pair is None or start is None or pair.key != start.key or len(pair.generated) != len(start.generated):
            ours, theirs = ("nothing" if each is None else each.sample_id for each in (pair, start))
            raise StoreError(
                f"the iteration's opponent scored sample {ours} where the run's start scored {theirs}: the two stores "
                "do not belong together. Remove the iteration's folder pairs_start; it will be made again."
            )
        yield replace(
            pair,
            reference_real_logp=_mixed(pair.reference_real_logp, start.reference_real_logp, share),
            generated=[
                replace(ours, reference_logp=_mixed(ours.reference_logp, theirs.reference_logp, share))
                for ours, theirs in zip(pair.generated, start.generated, strict=True)
            ],
        )


def _mixed(policy: float | None, start: float | None, share: float) -> float:
    assert policy is not None and start is not None  # both stores are of scored pairs
    return (1 - share) * policy + share * start


@contextmanager
def weights_of_start(model: nn.Module, load_start: Callable[[], None], policy: str) -> Iterator[str]:
    """Lends a model the weights that the run started from, for the time of a block. Collective.

    The policy's trained weights wait in CPU memory, each rank's shards on its own host.

    Args:
        model (nn.Module): the policy, sharded or plain.
        load_start (Callable[[], None]): puts the first weights into it.
        policy (str): fingerprint of its weights now.

    Yields:
        str: fingerprint of the first weights.

    Raises:
        SelfTestError: If the weights that are put back are not the policy's.
    """
    reshard(model)  # what is gathered at the moment is no parameter
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    kept = [local_tensor(parameter.detach()).to("cpu", copy=True) for parameter in trained]
    try:
        with torch.no_grad():
            load_start()
        yield weights_fingerprint(model)
    finally:
        reshard(model)
        with torch.no_grad():
            for parameter, values in zip(trained, kept, strict=True):
                local_tensor(parameter.detach()).copy_(values)
    if weights_fingerprint(model) != policy:
        raise SelfTestError(
            "The policy's weights are not what they were before the run's first weights took their place "
            "(pairs.start_share, or T-SPIN). Nothing was trained on them; start the run again from its last state."
        )
