"""Errors whose message is written for the person at the command line: what was found, where, what was expected, and the
remedy. The command line prints them without a traceback; anything else that escapes is a defect of this project."""

import os

from spin.core.redact import hide


class SpinError(Exception):
    """Base of every error that a user can cause and fix. Its text shows no secret of the config."""

    def __str__(self) -> str:
        """The message."""
        return hide(super().__str__())


class ConfigError(SpinError, ValueError):
    """A config that cannot work: unknown key, impossible arithmetic, component that is not allowed."""


class DataError(SpinError, ValueError):
    """A data set, row or tokenizer that SPIN cannot learn from."""


class StoreError(SpinError, RuntimeError):
    """A pair store that is missing, damaged or made for something else."""


class GeneratorError(SpinError, RuntimeError):
    """A generator that failed, or whose responses do not fit the prompts."""


class CheckerError(SpinError, RuntimeError):
    """A checker of responses that raised, or said neither right, wrong nor unknown."""


class CheckpointError(SpinError, RuntimeError):
    """A checkpoint that is missing, damaged, or does not fit the model or the config."""


class OutputError(SpinError, RuntimeError):
    """An output folder that cannot be written, is full, or is in use by another run."""


class CollapseError(SpinError, RuntimeError):
    """The policy has passed a limit of the collapse monitor whose action ends the run."""


class SelfTestError(SpinError, RuntimeError):
    """The first step of an iteration did not start at the loss of two equal models."""


class NonFiniteError(SpinError, RuntimeError):
    """Loss, gradient norm or weights are NaN or infinite; nothing of that was saved or exported."""


def show_traceback() -> bool:
    """Whether errors that are reported in one line come with tracebacks: ``SPIN_TRACEBACK=1``."""
    return os.environ.get("SPIN_TRACEBACK") == "1"


class Stopped(Exception):  # noqa: N818 - no error
    """A run was asked to stop, by a signal or its time limit. Raised on all ranks together; no error. Its text, if it
    has one, says what is kept."""
