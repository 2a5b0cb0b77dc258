"""What a run's curves say that went wrong, and what to do about it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from spin.core.terminal import plural
from spin.report.record import IterationRecord, Metrics, RunRecord, is_number
from spin.run.messages import LEAST_GAIN

TAIL = 0.2  # fraction of an iteration's steps that stands for its end
LEAST_STEPS = 4  # fewer say nothing
FALLING_NATS = 1.0  # that real responses have lost
TRUNCATED_FRACTION = 0.3
LOSS_ABOVE = 0.2  # over ln 2
WON_ACC = 0.99
UPDATED_FRACTION = 0.1
VAL_LOSS_RISE = 0.02  # relative to the start
LOSS_MOVES = 0.005  # nats between thirds of an iteration
SAME_WAY, OTHER_WAY = 0.8, 0.5  # cosine of SPIN's gradient to that of fine-tuning
LENGTH_CHANGE = 0.1  # relative to the first iteration
TRUNCATED_RISE = 0.05
LN_2 = math.log(2)


def verdict(run: RunRecord) -> str:
    """One sentence: what the newest iteration with enough steps does, and what to watch."""
    trained = [iteration for iteration in run.iterations if len(iteration.steps) >= LEAST_STEPS]
    if not trained:
        return f"Too early to say: an iteration needs {LEAST_STEPS} steps for a verdict."
    found = [f"Iteration {trained[-1].number} {_progress(trained[-1].steps)}"]
    losses = [value for _, value in run.series("val_loss")]
    if len(losses) > 1:
        rise = losses[-1] / losses[0] - 1 if losses[0] else 0.0
        if rise > VAL_LOSS_RISE:
            found.append("validation loss rises: watch")
        elif abs(rise) < LEAST_GAIN:
            found.append("validation loss stays")
        elif rise < 0:
            found.append("validation loss falls")
    played = [iteration for iteration in run.iterations if iteration.responses]
    if played:
        first, last = played[0], played[-1]
        ratio = last.mean_tokens["generated"] / (first.mean_tokens["generated"] or 1.0)
        if abs(ratio - 1) > LENGTH_CHANGE:
            found.append(f"responses get {'longer' if ratio > 1 else 'shorter'}: watch")
        if last.truncated / last.responses > first.truncated / first.responses + TRUNCATED_RISE:
            found.append("more responses are truncated: watch")
    return "; ".join(found) + "."


def _progress(steps: Sequence[Metrics]) -> str:
    third = len(steps) // 3
    middle, end = (_mean(part, "loss") or 0.0 for part in (steps[-2 * third : -third], steps[-third:]))
    acc = _mean(steps[-third:], "acc")
    if all(row.get("acc") == 0 for row in steps[1:]):
        return "does not learn"
    if end < middle - LOSS_MOVES:
        return "still learns"
    if end > middle + LOSS_MOVES:
        return "gets worse"
    return "has little left to learn" if acc is not None and acc >= WON_ACC else "has levelled off"


def advice(run: RunRecord) -> list[str]:
    """Known failures that show in a run."""
    of_text: dict[str, list[int]] = {}
    for iteration in run.iterations:
        for text in _of_iteration(run, iteration):
            of_text.setdefault(text, []).append(iteration.number)
    found = [f"{plural('Iteration', len(of))} {', '.join(map(str, of))}: {text}" for text, of in of_text.items()]
    compared = [iteration for iteration in run.iterations if any("gradient/signal" in row for row in iteration.steps)]
    found += [f"Iteration {iteration.number}: {_of_gradients(iteration.steps)}" for iteration in compared[-1:]]
    losses = run.series("val_loss")
    if len(losses) > 1 and losses[-1][1] > losses[0][1] * (1 + VAL_LOSS_RISE):
        found.append(
            f"The validation loss rose from {losses[0][1]:.3f} to {losses[-1][1]:.3f} nats per token: real responses "
            "became less likely. Try fewer epochs or iterations, a lower optimizer.lr, or nll_weight above 0."
        )
    skipped = [row["nonfinite_steps"] for row in run.rows if is_number(row.get("nonfinite_steps"))]
    if skipped and skipped[-1] > 0:
        found.append(
            f"{skipped[-1]} batches were left out because loss or gradient was not finite; nonfinite.jsonl names their "
            "samples."
        )
    return found


def _of_iteration(run: RunRecord, iteration: IterationRecord) -> list[str]:
    found, steps = [], iteration.steps
    truncated = iteration.truncated / iteration.responses if iteration.responses else 0.0
    if truncated > TRUNCATED_FRACTION:
        found.append(
            f"{truncated:.0%} of the opponent's responses were truncated by the length limit. Length alone may "
            "distinguish them from real ones: raise sampling.max_new_tokens, or set pairs.truncated to mask or drop."
        )
    earlier = [
        row["step"] for row in run.rows if is_number(row.get("iteration")) and row["iteration"] < iteration.number
    ]
    has_first = bool(steps) and steps[0]["step"] == max(earlier, default=0) + 1  # a file that begins later has lost it
    if run.is_logistic and has_first and abs(steps[0]["loss"] - LN_2) > 1e-3:
        found.append(
            f"the first loss is {steps[0]['loss']:.4f}, not ln 2 = 0.6931: policy and opponent were not computed "
            "alike. Run with self_test=true, which says what differs."
        )
    if len(steps) >= LEAST_STEPS:
        found += _of_curves(steps, run.is_logistic)
    return found


def _of_curves(steps: Sequence[Metrics], logistic: bool) -> list[str]:
    found = []
    tail = steps[-max(1, round(TAIL * len(steps))) :]
    real, generated, acc, loss = (
        _mean(tail, name) for name in ("real_logp_drift", "generated_logp_drift", "acc", "loss")
    )
    if real is not None and generated is not None and real < -FALLING_NATS and generated < 0:
        found.append(
            f"both log-probs fall (real {real:.1f}, generated {generated:.1f} nats against the opponent's): the loss "
            "is lowered by making everything less likely. Set nll_weight above 0, or lower optimizer.lr."
        )
    if all(row.get("margin") == 0 for row in steps[1:]):
        updated = _mean(tail, "updated_fraction")
        remedy = "raise optimizer.lr"
        if _mean(tail, "equal_fraction") == 1:
            remedy = "all responses equal the real ones, so take other data, or stop here"
        elif updated is not None and updated < UPDATED_FRACTION:
            remedy = f"a step changes {updated:.1%} of the weights: set dtype=fp32, or raise optimizer.lr"
        found.append(
            f"the margin stays at 0: no real response gains on its generated one, so nothing is learned; {remedy}."
        )
    elif acc is not None and acc >= WON_ACC and len(tail) > 1:  # one batch says little
        found.append(
            f"acc is {acc:.3f} at the end: the policy prefers nearly every real response to its own. Fewer epochs, or "
            "a higher loss.beta in later iterations."
        )
    if logistic and loss is not None and loss > LN_2 + LOSS_ABOVE:
        found.append(
            f"the loss is {loss:.3f} at the end, far above ln 2 = 0.693: the generated responses gained on the real "
            "ones. Lower optimizer.lr, or lengthen lr_scheduler.warmup."
        )
    return found


def _of_gradients(steps: Sequence[Metrics]) -> str:
    """What the comparisons of an iteration's gradients say, of which there is at least one."""
    names = [f"gradient/{name}" for name in ("cosine", "cosine_error", "ratio", "signal", "sft_signal")]
    clear = [[row[name] for name in names] for row in steps if all(is_number(row.get(name)) for name in names)]
    if not clear:
        (first, *_) = (row for row in steps if names[3] in row)
        signal, of_sft = (first[name] if is_number(first[name]) else 0.0 for name in names[3:])
        return (
            "SPIN's gradient and fine-tuning's on the same responses do not both stand out of the noise between pairs "
            f"({signal:.1%} and {of_sft:.1%} of a step's squared gradient are signal): "
            + (
                "fine-tune instead (spin_sft)."
                if of_sft > 0.5
                else "there may be too few rows to tell, or nothing left to learn from this data. Look at val_loss."
            )
        )
    (cosine, error, ratio, signal, of_sft), (last, last_error, *_) = clear[0], clear[-1]
    text = f"SPIN's gradient has the cosine {cosine:.2f} ± {error:.2f} to that of fine-tuning on the same responses"
    if cosine > SAME_WAY:
        size = f"1/{1 / ratio:.0f} of its size" if 0 < ratio < 0.67 else f"{ratio:.1f} times its size"
        text = (
            f"this iteration moves as fine-tuning on the same responses would (cosine {cosine:.2f} ± {error:.2f}), by "
            f"a gradient of {size}, of which {signal:.1%} is signal and the rest noise (of fine-tuning's {of_sft:.1%} "
            "is signal): fine-tune instead (spin_sft)"
        )
    if last < OTHER_WAY < cosine:
        text += (
            f". At its end the cosine is {last:.2f} ± {last_error:.2f}: the policy has left the opponent whose "
            "responses it trains on. Fewer steps an iteration, or a lower optimizer.lr"
        )
    return f"{text}."


def _mean(rows: Sequence[Metrics], name: str) -> float | None:
    values = [row[name] for row in rows if is_number(row.get(name))]
    return sum(values) / len(values) if values else None
