"""Checks of the first and the last step of an iteration: the loss at equal models, and weights that do not move."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch

from spin.config.components import raised_in
from spin.core.errors import ConfigError, SelfTestError

log = logging.getLogger(__name__)

_LEAST_UPDATED_FRACTION = 0.1


def check_loss(loss: Callable[..., Any], name: str) -> None:
    """Tries a loss on three pairs, before there are responses to lose: a ConfigError that names the component if it
    raises, does not give three float tensors of shape (n,) with a gradient, or makes a pair's loss depend on others."""
    policy = [torch.tensor(logps, dtype=torch.float64, requires_grad=True) for logps in ([-9, -4, -7], [-3, -8, -5])]
    logps = [*policy, *(torch.tensor(logps, dtype=torch.float64) for logps in ([-8, -5, -7], [-4, -6, -5]))]
    takes = "policy_real_logps, policy_generated_logps, reference_real_logps, reference_generated_logps"
    try:
        given = loss(*logps)
        alone = [loss(*(each[i : i + 1] for each in logps)) for i in range(3)]
    except (Exception, SystemExit) as error:  # code of the user's own may raise anything
        raise ConfigError(
            f"loss: {name} raised {raised_in(name, error)} when it was tried on three pairs, then on each alone. "
            f"Expected a function of {takes}, each of shape (n,)."
        ) from error
    is_triple = isinstance(given, tuple | list) and len(given) == 3
    if not is_triple or not all(isinstance(each, torch.Tensor) and each.shape == (3,) for each in given):
        parts = list(given) if isinstance(given, tuple | list) else [given]
        found = [f"shape {tuple(each.shape)}" if isinstance(each, torch.Tensor) else repr(each)[:60] for each in parts]
        problem = f"gave {', '.join(found)} for three pairs, expected three tensors of shape (3,)"
    elif not given[0].is_floating_point() or not given[0].requires_grad:
        problem = (
            f"gave losses of {given[0].dtype} without a gradient: was the policy detached, or turned into numbers?"
        )
    elif not torch.allclose(given[0], torch.cat([each[0] for each in alone]), rtol=1e-3, equal_nan=True):
        problem = "gave other losses to three pairs than to each alone: entry i may depend on pair i only"
    else:
        return
    raise ConfigError(
        f"loss: {name} {problem}. It returns losses, rewards of the real and rewards of the generated responses, one "
        "of each for every pair."
    )


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
