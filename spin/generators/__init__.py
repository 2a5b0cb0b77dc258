"""Who plays the opponent: backends behind one interface."""

from typing import TYPE_CHECKING

from spin.core.lazy import lazy_names

if TYPE_CHECKING:
    from spin.generators.checker import check_responses
    from spin.generators.engines import EngineGroup, engine_group, policy_loaded
    from spin.generators.generator import (
        Generator,
        GeneratorContext,
        SamplingParams,
        StreamingGenerator,
        sampling_params,
    )
    from spin.generators.replay import ReplayGenerator
    from spin.generators.stage import (
        PlayTask,
        filtered_responses,
        limits_of,
        play_report,
        play_tasks,
        response_tokens,
        shortest_last,
    )
    from spin.generators.torchtune import TorchtuneGenerator
    from spin.generators.vllm import VLLMGenerator
    from spin.generators.vllm_server import VLLMServerGenerator
    from spin.types import Response
else:
    __getattr__, __dir__ = lazy_names(__name__, __file__)

__all__ = [
    "EngineGroup",
    "PlayTask",
    "check_responses",
    "engine_group",
    "filtered_responses",
    "limits_of",
    "play_report",
    "play_tasks",
    "policy_loaded",
    "response_tokens",
    "shortest_last",
    "Response",
    "Generator",
    "GeneratorContext",
    "ReplayGenerator",
    "SamplingParams",
    "StreamingGenerator",
    "TorchtuneGenerator",
    "VLLMGenerator",
    "VLLMServerGenerator",
    "sampling_params",
]
