"""Which of the opponent's responses are worth learning from: policies by name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType

from spin.core.errors import StoreError
from spin.types import Pair


class FilteredPairs(Iterable[Pair]):
    """Pairs that still have a response after the policies, and ``counts`` of responses, known once all were visited.

    ``keep`` and ``drop`` are for each of three kinds: responses that the length limit ended (kept as they are, without
    an end token; ``mask`` leaves them without weight in the loss), those equal to the real one, which have no gradient,
    and those of a stop token alone; where there is a checker, ``verdicts`` has as much for each of its verdicts.
    Responses without any token cannot be scored and are always dropped. Iterating raises ``StoreError`` at the end if
    no pair was left.
    """

    def __init__(
        self,
        pairs: Iterable[Pair],
        *,
        truncated: str = "keep",
        equal_to_real: str = "keep",
        empty: str = "drop",
        verdicts: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self._pairs, self._verdicts = pairs, verdicts
        self._policies = {"truncated": truncated, "equal_to_real": equal_to_real, "empty": empty, **verdicts}
        self.counts: Counter[str] = Counter()

    def __iter__(self) -> Iterator[Pair]:
        counts = self.counts
        counts.clear()
        counts.update(responses=0, **dict.fromkeys(self._policies, 0), dropped=0, dropped_pairs=0)
        num_pairs = 0
        for num_pairs, pair in enumerate(self._pairs, start=1):  # noqa: B007
            kept = []
            for response, equal in zip(pair.generated, pair.equal_to_real, strict=True):
                size = len(response.token_ids)
                kinds = {
                    "truncated": response.truncated,
                    "equal_to_real": equal,
                    "empty": size == 0 or (size == 1 and not response.truncated),
                    **{verdict: response.verdict == verdict for verdict in self._verdicts},
                }
                counts.update(responses=1, **kinds)
                if size > 0 and not any(found and self._policies[kind] == "drop" for kind, found in kinds.items()):
                    kept.append(response)
            counts["dropped"] += len(pair.generated) - len(kept)
            counts["dropped_pairs"] += not kept
            if kept:
                yield replace(pair, generated=kept)
        if counts["dropped_pairs"] == num_pairs:
            for kind, are in (("equal_to_real", "equal the real ones"), ("right", "are right by pairs.checker")):
                if counts[kind] == counts["responses"]:
                    raise StoreError(
                        f"All {counts['responses']:,} responses {are}, so the model has learned what this data can "
                        "teach and no pair is left to train on. Stop here, or give more data."
                    )
            found = ", ".join(f"{kind.replace('_', ' ')} {count:,}" for kind, count in counts.items())
            raise StoreError(
                f"No pair is left of {num_pairs:,}: {found}. Every response was dropped by pairs.truncated, "
                "pairs.equal_to_real, pairs.empty or the weight 0 of a verdict of pairs.checker; relax them, or raise "
                "sampling.max_new_tokens."
            )
