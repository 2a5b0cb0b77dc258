"""SPIN where everything can be computed: softmax policies over a few responses, trained by the product's own loss.

    python experiments/tabular.py     # writes docs/experiments/tabular.json, and tabular.svg with matplotlib

A policy is a table of logits, one row a prompt. The loss of an iteration is the expectation of ``spin.loss.SPINLoss``
over a real response from the data and a response of the opponent, summed over all combinations: no sampling, no noise.
So what an iteration trained to its end does to a policy can be compared with theory:

    p_{t+1}(y) ~ p_t(y) (p_data(y) / p_t(y))^(1 / lambda)       (theorem 5.4 of arXiv 2401.01335, logistic loss)
    log(p_{t+1} / p_data) = (1 - 1 / lambda) log(p_t / p_data) + const
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pages import drawing, save

from spin.core.files import write_json
from spin.loss import SPINLoss

OUT = Path(__file__).parents[1] / "docs" / "experiments"
# two prompts with four responses; the first is the example of the reference values in tests/oracles
P_DATA = [[0.5, 0.2, 0.2, 0.1], [0.7, 0.1, 0.1, 0.1]]
P_0 = [[0.25, 0.25, 0.4, 0.1], [0.1, 0.2, 0.3, 0.4]]
LAMBDAS = (0.1, 0.5, 0.75, 1.0, 2.0, 5.0)
ITERATIONS = 6
LEARNING_RATE, STEPS = 0.5, 2000  # of gradient descent on the logits


def closed_form(p_t: torch.Tensor, p_data: torch.Tensor, lam: float) -> torch.Tensor:
    """The optimum of an iteration.

    Args:
        p_t (torch.Tensor): the opponent's probabilities, shape (prompts, responses).
        p_data (torch.Tensor): the data's, same shape.
        lam (float): lambda, the config's beta.

    Returns:
        torch.Tensor: probabilities, same shape.
    """
    return (p_t.log() + (p_data.log() - p_t.log()) / lam).softmax(-1)


def population_loss(logits: torch.Tensor, p_t: torch.Tensor, p_data: torch.Tensor, loss: SPINLoss) -> torch.Tensor:
    """Expectation of the loss over real and generated responses, the mean over prompts.

    Args:
        logits (torch.Tensor): the policy's, shape (prompts, responses).
        p_t (torch.Tensor): the opponent's probabilities, same shape.
        p_data (torch.Tensor): the data's, same shape.
        loss (SPINLoss): with lambda as its beta.

    Returns:
        torch.Tensor: shape ().
    """
    prompts, responses = logits.shape
    policy, opponent = logits.log_softmax(-1), p_t.log()

    def real(logps: torch.Tensor) -> torch.Tensor:  # (n, a) -> (n * a * a,), constant along the last a
        return logps[:, :, None].expand(prompts, responses, responses).reshape(-1)

    def generated(logps: torch.Tensor) -> torch.Tensor:
        return logps[:, None, :].expand(prompts, responses, responses).reshape(-1)

    losses, _, _ = loss(real(policy), generated(policy), real(opponent), generated(opponent))
    return (losses * real(p_data) * generated(p_t)).sum() / prompts


def fit(p_t: torch.Tensor, p_data: torch.Tensor, lam: float) -> torch.Tensor:
    """Trains an iteration to its end: LBFGS from the opponent until nothing moves.

    Args:
        p_t (torch.Tensor): the opponent's probabilities, shape (prompts, responses).
        p_data (torch.Tensor): the data's, same shape.
        lam (float): lambda.

    Returns:
        torch.Tensor: the policy's probabilities, same shape.
    """
    logits, loss = p_t.log().clone().requires_grad_(), SPINLoss(beta=lam)
    optimizer = torch.optim.LBFGS(
        [logits],
        max_iter=5000,
        tolerance_grad=1e-15,
        tolerance_change=0,
        history_size=50,
        line_search_fn="strong_wolfe",
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        value = population_loss(logits, p_t, p_data, loss)
        value.backward()
        return value

    optimizer.step(closure)
    return logits.detach().softmax(-1)


def descend(
    p_t: torch.Tensor, p_data: torch.Tensor, lam: float, learning_rate: float, steps: int
) -> list[torch.Tensor]:
    """Gradient descent on the logits, from the opponent.

    Args:
        p_t (torch.Tensor): the opponent's probabilities, shape (prompts, responses).
        p_data (torch.Tensor): the data's, same shape.
        lam (float): lambda.
        learning_rate (float): of each step.
        steps (int): how many.

    Returns:
        list[torch.Tensor]: the policy's probabilities before the first step and after each.
    """
    logits, loss = p_t.log().clone().requires_grad_(), SPINLoss(beta=lam)
    path = [p_t]
    for _ in range(steps):
        (gradient,) = torch.autograd.grad(population_loss(logits, p_t, p_data, loss), logits)
        with torch.no_grad():
            logits -= learning_rate * gradient
        path.append(logits.detach().softmax(-1))
    return path


def kl(p_data: torch.Tensor, policy: torch.Tensor) -> float:
    """Divergence of a policy from the data, the mean over prompts.

    Args:
        p_data (torch.Tensor): probabilities, shape (prompts, responses).
        policy (torch.Tensor): same shape.

    Returns:
        float: nats.
    """
    return max(0.0, (p_data * (p_data.log() - policy.log())).sum(-1).mean().item())  # rounding may go below


def measure() -> dict[str, Any]:
    """Iterations trained to their end, and one iteration step by step, for several lambdas."""
    p_data, p_0 = (torch.tensor(p, dtype=torch.float64) for p in (P_DATA, P_0))
    to_the_end: dict[str, Any] = {}
    step_by_step: dict[str, Any] = {}
    for lam in LAMBDAS:
        policy, divergences = p_0, [kl(p_data, p_0)]
        for _ in range(ITERATIONS):
            policy = closed_form(policy, p_data, lam)
            if not policy.min() > 1e-300:  # it has given up responses for good
                break
            divergences.append(kl(p_data, policy))
        to_the_end[str(lam)] = {
            "multiplier": 1 - 1 / lam,
            "deviation_from_closed_form": (fit(p_0, p_data, lam) - closed_form(p_0, p_data, lam)).abs().max().item(),
            "kl": divergences,
        }
        path = [kl(p_data, policy) for policy in descend(p_0, p_data, lam, LEARNING_RATE, STEPS)]
        best = min(range(len(path)), key=path.__getitem__)
        step_by_step[str(lam)] = {"best_step": best, "best_kl": path[best], "last_kl": path[-1], "kl": path[::20]}
    return {
        "p_data": P_DATA,
        "p_0": P_0,
        "learning_rate": LEARNING_RATE,
        "steps": STEPS,
        "to_the_end": to_the_end,
        "step_by_step": step_by_step,
    }


def plot(results: dict[str, Any], file: Path) -> None:
    """Two panels: divergence by iteration, and by step of one iteration."""
    figure, (left, right) = drawing().subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    steps = range(0, results["steps"] + 1, 20)
    for number, (lam, end) in enumerate(results["to_the_end"].items()):
        shown = {"color": f"C{number}", "label": f"lambda {lam}"}
        left.plot([max(value, 1e-16) for value in end["kl"]], marker="o", markersize=3, **shown)
        right.plot(steps, [max(value, 1e-16) for value in results["step_by_step"][lam]["kl"]], **shown)
    left.set(xlabel="iteration, each trained to its end", ylabel="KL(data | policy), nats", yscale="log")
    right.set(xlabel="gradient step of the first iteration", yscale="log", ylim=(1e-7, 1e2))
    left.set_ylim(1e-16, 1e3)
    left.legend(fontsize="small")
    save(figure, file)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, writes and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT, help="folder for tabular.json and tabular.svg")
    parser.add_argument("--no-plot", action="store_true", help="do not draw, which needs matplotlib")
    args = parser.parse_args(arguments)
    results = measure()
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / "tabular.json", results)
    if not args.no_plot:
        plot(results, args.out / "tabular.svg")
    print(f"{'lambda':>6} {'1 - 1/lambda':>13}  {'KL after 0 to 3 iterations to the end':<44} best step (KL), last KL")
    for lam, end in results["to_the_end"].items():
        steps = results["step_by_step"][lam]
        values = " ".join(f"{value:10.3g}" for value in end["kl"][:4])
        best = f"{steps['best_step']} ({steps['best_kl']:.3g}), {steps['last_kl']:.3g}"
        print(f"{lam:>6} {end['multiplier']:>13.3g}  {values:<44} {best}")


if __name__ == "__main__":
    main()
