"""The opponent's log-probs of all responses, computed once and cached on disk."""

from typing import TYPE_CHECKING

from spin.core.lazy import lazy_names

if TYPE_CHECKING:
    from spin.reference.generator_check import check_generator_logprobs
    from spin.reference.logprobs import pair_objective, response_logps
    from spin.reference.stage import open_scored, score_batches, score_pairs
else:
    __getattr__, __dir__ = lazy_names(__name__, __file__)

__all__ = [
    "check_generator_logprobs",
    "open_scored",
    "pair_objective",
    "response_logps",
    "score_batches",
    "score_pairs",
]
