"""Detects collapse: thresholds on metrics of steps and of responses, and what to do about it.

Four things are known to go wrong. Real responses become unlikely (only the margin is trained, so both rewards may
fall); responses no longer end; responses become much longer or shorter; and the game is over, so that nothing is
learned from it any more: every pair is won, or responses equal the real ones. The first shows in the validation loss
and, as the margin does, in a step's metrics, the others in an iteration's responses.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spin.config import schema
from spin.core.command import spin_command
from spin.core.errors import CollapseError, StoreError
from spin.core.ranks import World, broadcast_object, raise_on_all_ranks
from spin.pairs.store import MANIFEST, PairStore

log = logging.getLogger(__name__)

_IN_STEPS = ("real_nll_rise", "acc", "margin")
_IN_VALIDATIONS = ("val_loss", "val_loss_collapse")
LIMITS = (*_IN_STEPS, *_IN_VALIDATIONS, "truncated_fraction", "equal_fraction", "length_drift")


@dataclass(frozen=True)
class Alert:
    """A limit that was passed and is to end the run."""

    rolls_back: bool  # the iteration's steps are to be undone
    message: str  # what was found, and what to do
    name: str  # of the limit

    def error(self, step: int) -> CollapseError:
        """The error that ends the run, once it is rolled back or saved at ``step``."""
        if self.rolls_back:
            state = "back at the iteration's start; fix the config and rerun the same command to resume"
        else:
            state = f"saved at step {step}; {_choices(self.name)}"
        return CollapseError(f"{self.message} The run is {state}.")


def _choices(name: str) -> str:
    """Of a run that a limit has stopped."""
    return (
        "change what ruins it (such as optimizer.lr=... resume_with_changes=[optimizer]), go on all the same "
        f"(watch.{name}.limit=null), go back to an earlier checkpoint (resume=FOLDER), or start over (resume=never)"
    )


class CollapseMonitor:
    """Compares an iteration's numbers with the config's limits, alike on every rank; ``is_main`` prints warnings."""

    def __init__(self, watch: schema.Watch, output_dir: str | Path, is_main: bool) -> None:
        self._output_dir = Path(output_dir)
        self._limits = {name: watch[name]["limit"] for name in LIMITS}
        self._actions = {name: watch[name]["action"] for name in LIMITS}
        self._is_main = is_main
        self._recent = {name: deque[float](maxlen=watch["window"]) for name in _IN_STEPS}
        self._warned: set[tuple[int, str]] = set()
        self.lowest_val_loss = math.inf  # so far
        self.metrics: dict[str, float] = {}  # of the iteration's responses, for the log
        self._stopped: Alert | None = None

    @property
    def can_roll_back(self) -> bool:
        """A limit rolls back, so the state at an iteration's start is needed until its end."""
        looked_at = (*_IN_STEPS, *_IN_VALIDATIONS)
        return any(self._limits[name] is not None and self._actions[name] == "rollback" for name in looked_at)

    def state_dict(self) -> dict[str, Any]:
        """The last steps' values, the lowest validation loss, the responses' metrics, and what stopped the run; JSON
        values."""
        found: dict[str, Any] = {"recent": {name: list(values) for name, values in self._recent.items()}}
        found["metrics"] = self.metrics
        if math.isfinite(self.lowest_val_loss):
            found["lowest_val_loss"] = self.lowest_val_loss
        if self._stopped is not None:
            name = self._stopped.name
            found["stopped"] = {"name": name, "message": self._stopped.message, "limit": self._limits[name]}
        return found

    def load_state_dict(self, state: Mapping[str, Any], is_unchanged: bool = False) -> None:
        """Takes a saved state; one without values is that of an older version. CollapseError if a limit stopped the run
        there, and neither the limit nor anything else that matters (``is_unchanged``) is another one now."""
        if is_unchanged and (stopped := state.get("stopped")):
            name, limit = stopped["name"], stopped["limit"]
            if self._limits[name] == limit and self._actions[name] != "warn":
                raise CollapseError(f"{stopped['message']} The run was stopped there; {_choices(name)}.")
        for name, values in self._recent.items():
            values.extend(state.get("recent", {}).get(name, []))
        self.lowest_val_loss = state.get("lowest_val_loss", math.inf)
        self.metrics = dict(state.get("metrics", {}))

    def start(self, iteration: int, responses: Mapping[str, float]) -> None:
        """Looks at an iteration's :func:`response_metrics` before anything is trained on the responses; a CollapseError
        if a limit was passed whose action is not ``warn``."""
        self.metrics = {name: value for name, value in responses.items() if name != "truncated_fraction"}
        found = {}
        look = spin_command("pairs", self._output_dir / f"iteration_{iteration:03d}" / "responses", "--sample", 5)
        if (fraction := responses["truncated_fraction"]) > (self._limits["truncated_fraction"] or 1):
            found["truncated_fraction"] = (
                f"{fraction:.1%} of the opponent's responses were truncated by sampling.max_new_tokens: they may lack "
                f"their end. See `{look}`. Raise max_new_tokens{', or train less' if iteration else ''}"
            )
        if (fraction := responses["equal_fraction"]) > (self._limits["equal_fraction"] or 1):
            found["equal_fraction"] = (
                f"{fraction:.1%} of the opponent's responses equal the real ones: the SPIN loss learns nothing from "
                "them. The model may have learned what this data can teach; more of other data, or stop here"
            )
        drift, limit = responses.get("length_drift", 1.0), self._limits["length_drift"]
        if limit is not None and not 1 / limit <= drift <= limit:
            found["length_drift"] = (
                f"the opponent's responses are {drift:.2f} times as long as in iteration 0: the policy may be drifting "
                f"away in length. See `{look}`. Lower optimizer.lr, or raise loss.beta"
            )
        alert = self._report(iteration, found)
        if alert is not None:
            raise CollapseError(f"{alert.message} Nothing was trained on these responses yet.")

    def step(self, iteration: int, step_in_iteration: int, metrics: Mapping[str, float]) -> Alert | None:
        """Looks at the validation loss, if ``metrics`` has one, and at the mean of the last steps, once an iteration
        has as many."""
        found = {}
        val_loss, lowest = metrics.get("val_loss", 0.0), self.lowest_val_loss
        if "val_loss" in metrics:
            self.lowest_val_loss = min(lowest, val_loss)  # in this order NaN is not the lowest
        rise = val_loss / lowest - 1 if lowest else 0.0
        for name in _IN_VALIDATIONS:
            if self._limits[name] is not None and not rise <= self._limits[name]:  # which NaN is not either
                found[name] = (
                    f"the validation loss is {val_loss:.4g}, {rise:.0%} above its lowest so far: the "
                    "policy unlearns what the data teaches. An earlier model is better; lower the learning rate or "
                    "train less; in self-play a higher loss.beta or nll_weight holds the policy, too"
                )
        for name, values in self._recent.items():
            if step_in_iteration == 1:
                values.clear()
            if name in metrics:
                values.append(metrics[name])
        means = {name: sum(v) / len(v) for name, v in self._recent.items() if len(v) == v.maxlen}
        if len(means) < len(self._recent):
            return self._report(iteration, found)
        steps = f"mean of {self._recent['acc'].maxlen} steps"
        texts = {
            "real_nll_rise": f"the NLL of real responses is {means['real_nll_rise']:.0%} above that at the iteration's "
            f"start ({steps}): the policy unlearns what it should learn. Raise nll_weight, or lower optimizer.lr",
            "acc": f"acc is {means['acc']:.3f} ({steps}): the policy prefers nearly every real response to its own. "
            "Little is left to learn in this iteration; use fewer epochs, or raise loss.beta",
            "margin": f"the margin is {means['margin']:.2f} ({steps}): the loss is flat there. Use fewer epochs, or "
            "lower loss.beta or optimizer.lr",
        }
        found |= {
            name: text
            for name, text in texts.items()
            if (limit := self._limits[name]) is not None and means[name] > limit
        }
        return self._report(iteration, found)

    def _report(self, iteration: int, found: Mapping[str, str]) -> Alert | None:
        ending = [name for name in found if self._actions[name] != "warn"]
        if ending:
            rolls_back = any(self._actions[name] == "rollback" for name in ending)
            name = ending[0]
            limit = f"watch.{name}.limit={self._limits[name]}"
            text = f"Iteration {iteration}: {found[name]}. ({limit}, action {self._actions[name]})"
            alert = Alert(rolls_back, text, name)
            self._stopped = None if rolls_back else alert
            return alert
        for name, text in found.items():
            if (iteration, name) not in self._warned and self._is_main:
                log.warning(f"Iteration {iteration}: {text}. (watch.{name}.limit={self._limits[name]})")
            self._warned.add((iteration, name))
        return None


def response_metrics(folder: Path, first_folder: Path, world: World) -> dict[str, float]:
    """How an iteration's responses end and how long they are, from the store in its folder: ``truncated_fraction``, and
    ``length_drift``, their mean length over that of iteration 0, whose store may be gone; ``equal_fraction``, those
    equal to the real response. Collective."""
    metrics: dict[str, float] = {}
    with raise_on_all_ranks(world, StoreError):
        if world.is_main:
            found = PairStore.open(folder / "responses").count_responses()
            metrics = {f"{name}_fraction": found[name] / max(1, found["responses"]) for name in ("truncated", "equal")}
            if found["generated"] and (first_folder / "responses" / MANIFEST).exists():
                first = PairStore.open(first_folder / "responses").count_responses()
                if first["generated"]:
                    mean, first_mean = (each["generated"] / each["responses"] for each in (found, first))
                    metrics["length_drift"] = mean / first_mean
    return broadcast_object(metrics, world)
