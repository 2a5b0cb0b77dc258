"""Checks of the first and the last step of an iteration: the loss at equal models, and weights that do not move."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch

from spin.core.errors import SelfTestError

log = logging.getLogger(__name__)

_LEAST_UPDATED_FRACTION = 0.1


def check_first_loss(
    metrics: Mapping[str, float], expected: tuple[float, float], compute_dtype: str, iteration: int
) -> None:
    """The self-test of an iteration's first step, whose policy and opponent are the same weights: a SelfTestError if
    its loss or margin is off the expected by more than 1e-6 in fp32 or 1e-4 in bf16.

    ``expected`` comes from :func:`spin.training.validation.initial_loss`.
    """
    tolerance = 1e-6 if compute_dtype == "fp32" else 1e-4
    loss, margin = expected
    if abs(metrics["loss"] - loss) <= tolerance and abs(metrics["margin"] - margin) <= tolerance:
        return
    drifts = metrics["real_logp_drift"], metrics["generated_logp_drift"]
    cause = (
        f"The policy's log-probs are off the reference by {drifts[0]:.3g} nats for real and {drifts[1]:.3g} for "
        "generated responses: something differs between the reference pass and training (dropout, precision, "
        "another number of ranks, a changed pair store)."
    )
    if not any(drifts):
        cause = (
            "Their log-probs are equal too, so it is the loss that differs from what the config's loss gives for them, "
            "as in a recipe whose own lines change it. If that is meant, put it into a loss of your own "
            "(loss._component_), which this test then asks."
        )
    raise SelfTestError(
        f"The first loss of iteration {iteration} is {metrics['loss']:.8f}, expected {loss:.8f} +- {tolerance:g}, "
        f"because policy and opponent are the same weights. {cause} No weight was changed. self_test=false skips this "
        "test."
    )


def check_updated_fraction(
    fraction: float, lr: float, optimizer: torch.optim.Optimizer, dtype: str, iteration: int, warned: set[int]
) -> None:
    """Warns, once an iteration, of steps that change next to nothing.

    The spacing of bf16 weights is 1/256 to 1/128 of their size: a step of less than half of that is rounded away.
    Rounded at random (``stochastic_rounding`` of the optimizer) it moves few weights too, but those by enough: nothing
    is lost on average, and nothing is said. ``dtype`` is that of the master weights; ``warned`` gets the iteration.
    """
    rounds_at_random = dtype == "bf16" and getattr(optimizer, "stochastic_rounding", False)
    if lr <= 0 or fraction >= _LEAST_UPDATED_FRACTION or iteration in warned or rounds_at_random:
        return
    warned.add(iteration)
    remedy = (
        "bf16 weights round so small a step away. Set dtype=fp32, or "
        "optimizer._component_=spin.training.AdamWStochasticRounding (or spin.training.AdamW8bit, which rounds so too)."
        if dtype == "bf16"
        else "The learning rate is too small for these weights, or their gradients are zero: see grad_norm."
    )
    log.warning(
        f"A step of iteration {iteration} at learning rate {lr:.3g} changed {fraction:.1%} of the weights "
        f"(dtype={dtype}): this is hardly training. {remedy}"
    )
