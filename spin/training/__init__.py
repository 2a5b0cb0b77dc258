"""What a training step needs besides the model and the loss."""

from typing import TYPE_CHECKING

from spin.core.lazy import lazy_names

if TYPE_CHECKING:
    from spin.training.gradients import compare_gradients, gradient_metrics, is_checked
    from spin.training.metrics import (
        PairSums,
        ResponseSums,
        Step,
        UpdateFraction,
        pair_metrics,
        prefix_keys,
        speed_metrics,
        validation_metrics,
    )
    from spin.training.nonfinite import NonFiniteGuard, check_last_update
    from spin.training.optim import AdamW8bit, AdamWStochasticRounding, optimizer_step
    from spin.training.schedules import in_each_iteration, lr_factor, per_iteration
    from spin.training.selftest import check_first_loss, check_loss, check_updated_fraction
    from spin.training.validation import eval_pair_losses, initial_loss, validation_loss
    from spin.training.watch import Alert, CollapseMonitor, response_metrics
else:
    __getattr__, __dir__ = lazy_names(__name__, __file__)

__all__ = [
    "AdamW8bit",
    "AdamWStochasticRounding",
    "Alert",
    "CollapseMonitor",
    "NonFiniteGuard",
    "PairSums",
    "ResponseSums",
    "Step",
    "UpdateFraction",
    "check_first_loss",
    "check_last_update",
    "check_loss",
    "check_updated_fraction",
    "compare_gradients",
    "eval_pair_losses",
    "gradient_metrics",
    "in_each_iteration",
    "initial_loss",
    "is_checked",
    "lr_factor",
    "optimizer_step",
    "pair_metrics",
    "per_iteration",
    "prefix_keys",
    "response_metrics",
    "speed_metrics",
    "validation_loss",
    "validation_metrics",
]
