"""What experiments/real_model.py measures on texts: can a classifier distinguish real responses from generated ones,
how long are they, do they repeat themselves, is a question answered correctly. Nothing here knows the model."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline, make_union
from sklearn.preprocessing import FunctionTransformer, StandardScaler

INTEGER = re.compile(r"-?\d+")


def classifier_accuracy(real: Sequence[str], generated: Sequence[str], features: str = "text") -> float:
    """How well a classifier distinguishes real from generated responses to prompts that it has not seen.

    Logistic regression, trained on one half of the prompts and tested on the other, then the other way round. 0.5 is a
    coin, 1.0 is always right.

    Args:
        real (Sequence[str]): the data's responses.
        generated (Sequence[str]): the model's, to the same prompts in the same order.
        features (str): ``text``: weighted counts of groups of characters and words. ``opening``: the same over the
            beginning alone, of both responses as long as half of the shorter one, so that neither length nor an end
            that was cut off can be seen. ``length``: the number of characters, and nothing else.

    Returns:
        float: fraction of responses classified correctly.

    Raises:
        ValueError: If the numbers differ, there are fewer than 4 prompts, or ``features`` is unknown.
    """
    if len(real) != len(generated) or len(real) < 4:
        raise ValueError(f"{len(real)} real and {len(generated)} generated responses: expected as many, at least 4.")
    if features not in ("text", "opening", "length"):
        raise ValueError(f"features={features!r}: expected text, opening or length.")
    if features == "opening":
        openings = [_openings(*pair) for pair in zip(real, generated, strict=True)]
        real, generated = [a for a, _ in openings], [b for _, b in openings]
    texts = np.array([*real, *generated], dtype=object)
    labels = np.repeat([1, 0], len(real))
    second_half = np.tile(np.arange(len(real)) % 2 == 1, 2)  # both responses of a prompt are in the same half
    correct = 0
    for tested in (second_half, ~second_half):
        model = make_pipeline(_features(features), LogisticRegression(C=10.0, max_iter=1000))
        model.fit(texts[~tested], labels[~tested])
        correct += int((model.predict(texts[tested]) == labels[tested]).sum())
    return correct / len(texts)


def _openings(real: str, generated: str) -> tuple[str, str]:
    size = min(len(real), len(generated)) // 2
    return real[:size], generated[:size]


def _features(kind: str):
    if kind == "length":
        return make_pipeline(FunctionTransformer(_lengths), StandardScaler())
    characters = TfidfVectorizer(analyzer="char", ngram_range=(1, 4), sublinear_tf=True, lowercase=False)
    words = TfidfVectorizer(token_pattern=r"\w+|[^\w\s]|^\s*$", ngram_range=(1, 2), sublinear_tf=True)
    return make_union(characters, words)


def _lengths(texts: np.ndarray) -> np.ndarray:
    """Shape (n, 2): a boundary on either side, so that both too short and too long can be seen."""
    lengths = np.log1p([[len(text)] for text in texts])
    return np.hstack([lengths, lengths**2])


def repeated_fraction(responses: Sequence[Sequence[int]], size: int = 4) -> float:
    """How much responses repeat themselves: the fraction of a response's groups of tokens that it had before, the mean
    over responses that are long enough for two groups.

    Args:
        responses (Sequence[Sequence[int]]): token ids.
        size (int): tokens of a group.

    Returns:
        float: 0 if nothing repeats.
    """
    shares = []
    for response in responses:
        groups = [tuple(response[i : i + size]) for i in range(len(response) - size + 1)]
        if len(groups) > 1:
            shares.append(1 - len(set(groups)) / len(groups))
    return float(np.mean(shares)) if shares else 0.0


def distinct_fraction(responses: Sequence[Sequence[int]], size: int = 2) -> float:
    """How varied responses are among each other: different groups of tokens among all groups of all responses.

    Args:
        responses (Sequence[Sequence[int]]): token ids.
        size (int): tokens of a group.

    Returns:
        float: 1 if no group occurs twice.
    """
    groups = [tuple(response[i : i + size]) for response in responses for i in range(len(response) - size + 1)]
    return len(set(groups)) / len(groups) if groups else 1.0


def says_number(text: str, number: str) -> bool:
    """Whether the last whole number of a text is the one asked for.

    Args:
        text (str): a response.
        number (str): digits, with a minus sign if below zero.

    Returns:
        bool: False too if there is no number in it.
    """
    found = INTEGER.findall(text.replace(",", ""))
    return bool(found) and int(found[-1]) == int(number)


def chosen_right(scores: dict[str, float]) -> float:
    """Accuracy over questions with choices: the choice of the highest score is taken.

    Args:
        scores (dict[str, float]): by ``question:choice:is_right``, the last one 0 or 1.

    Returns:
        float: fraction of questions whose right choice has the highest score.

    Raises:
        ValueError: If a question has no choice that is right, or more than one.
    """
    by_question: dict[str, list[tuple[float, int]]] = {}
    for key, score in scores.items():
        question, _, is_right = key.rsplit(":", 2)
        by_question.setdefault(question, []).append((score, int(is_right)))
    broken = [question for question, choices in by_question.items() if sum(right for _, right in choices) != 1]
    if broken:
        raise ValueError(f"questions without exactly one right choice: {', '.join(broken[:5])}.")
    return float(np.mean([max(choices)[1] for choices in by_question.values()]))
