"""Who plays the opponent: backends behind one interface."""

from spin.generators.base import Completion, Generator, GeneratorContext, SamplingParams, sampling_params
from spin.generators.replay import ReplayGenerator
from spin.generators.torchtune import TorchtuneGenerator

__all__ = [
    "Completion",
    "Generator",
    "GeneratorContext",
    "ReplayGenerator",
    "SamplingParams",
    "TorchtuneGenerator",
    "sampling_params",
]
