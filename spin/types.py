"""What flows between the stages of an iteration: prompts, responses, pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeAlias

FinishReason = Literal["stop", "length"]
Verdict = Literal["right", "wrong", "unknown"]  # of a checker
if TYPE_CHECKING:
    import numpy as np

# a list where people write them, an int32 array where they come from a store
TokenIds: TypeAlias = "Sequence[int] | np.ndarray"


@dataclass(frozen=True)
class Prompt:
    """One sample of the data set, tokenized once.

    Args:
        sample_id (str): unique name of the sample in its data set.
        prompt_ids (TokenIds): before the response in generation, and before both in training.
        real_ids (TokenIds): the data set's response, closed by the end-of-turn token.
    """

    sample_id: str
    prompt_ids: TokenIds
    real_ids: TokenIds


@dataclass(frozen=True)
class Response:
    """One generated response to one prompt.

    Args:
        token_ids (TokenIds): as the model wrote them, stop token included if it wrote one.
        finish_reason (FinishReason): ``stop`` if the model ended the response, ``length`` if the limit did.
        reference_logp (float | None): the opponent's log-prob, summed over the tokens, in nats; None until scored.
        logprobs (Sequence[float] | None): the generator's, per token, in nats, under the unaltered distribution; None
            unless asked for. Not stored.
        verdict (Verdict | None): what ``pairs.checker`` says of it; None if there is none.
    """

    token_ids: TokenIds
    finish_reason: FinishReason
    reference_logp: float | None = None
    logprobs: Sequence[float] | None = field(default=None, kw_only=True)
    verdict: Verdict | None = field(default=None, kw_only=True)

    @property
    def truncated(self) -> bool:
        """The length limit ended it, not the model."""
        return self.finish_reason == "length"


@dataclass(frozen=True)
class Pair:
    """A prompt with its real response and the opponent's responses to it.

    Args:
        sample_id (str): the sample of the data set.
        iteration (int): the iteration whose opponent wrote the generated responses, from 0.
        prompt_ids (TokenIds): token ids of the prompt.
        real_ids (TokenIds): token ids of the real response.
        generated (list[Response]): the opponent's responses; none where only the real response is scored.
        reference_real_logp (float | None): the current opponent's log-prob of the real response, summed over its
            tokens, in nats; None until scored.
    """

    sample_id: str
    iteration: int
    prompt_ids: TokenIds
    real_ids: TokenIds
    generated: list[Response] = field(default_factory=list)
    reference_real_logp: float | None = None

    @property
    def key(self) -> tuple[int, str]:
        """``(iteration, sample_id)``, unique among the pairs of an iteration."""
        return (self.iteration, self.sample_id)

    @property
    def parts(self) -> list[TokenIds]:
        """Token ids in the order of a row: the prompt, the real response, the generated ones."""
        return [self.prompt_ids, self.real_ids, *(response.token_ids for response in self.generated)]

    @property
    def reference_logps(self) -> list[float | None]:
        """The opponent's summed log-probs of the real response and the generated ones, in nats; None until scored."""
        return [self.reference_real_logp, *(response.reference_logp for response in self.generated)]

    @property
    def equal_to_real(self) -> list[bool]:
        """Of each generated response: its tokens are the real one's."""
        import numpy as np  # the command line imports this module before it has parsed anything

        return [np.array_equal(response.token_ids, self.real_ids) for response in self.generated]

    @property
    def num_tokens(self) -> int:
        """Tokens that the pair takes in a row: the prompt once, and every response."""
        return sum(map(len, self.parts))
