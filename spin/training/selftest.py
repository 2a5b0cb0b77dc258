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
    """The self-test of an iteration's first step: policy and opponent are the same weights.

    Args:
        metrics (Mapping[str, float]): of the step, see :func:`spin.training.metrics.pair_metrics`.
        expected (tuple[float, float]): loss and margin of two equal models, see
            :func:`spin.training.validation.initial_loss`; ln 2 and 0 for the logistic SPIN loss.
        compute_dtype (str): ``fp32`` allows 1e-6, ``bf16`` 1e-4.
        iteration (int): counted from 0.

    Raises:
        SelfTestError: If the loss or the margin is off.
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
    Rounded at random it moves few weights too, but those by enough: nothing is lost on average, and nothing is said.

    Args:
        fraction (float): of the weights that a step has changed, see :class:`spin.training.metrics.UpdateFraction`.
        lr (float): the step's learning rate; 0 may move nothing.
        optimizer (torch.optim.Optimizer): its ``stochastic_rounding``, if it has one, says whether bf16 weights are
            rounded at random.
        dtype (str): of the master weights, ``fp32`` or ``bf16``.
        iteration (int): counted from 0.
        warned (set[int]): iterations that have been warned of; this one is added.
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
