"""Problems with worked answers that a program checks, for experiments/checkable.py.

A family is a function of a random generator: question, steps, answer. A question belongs to the test problems if its
checksum says so, so that none is ever in both parts, whoever draws them.
"""

from __future__ import annotations

import calendar
import json
import re
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

MARK = "#"  # before the answer
MONTHS = list(calendar.month_name)[1:]
DAYS = (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
NAMES = ["Ann", "Ben", "Cara", "Dev", "Eli", "Fay", "Gus", "Hana", "Ivo", "June", "Kim", "Leo", "Mia", "Ned", "Ola"]
THINGS = ["pen", "cup", "book", "lamp", "chair", "apple", "ball", "card", "hat", "key", "mug", "plum", "rope", "sock"]
VERDICTS = {"r": "right", "s": "wrong step", "w": "right steps, wrong answer", "f": "no answer", "t": "truncated"}

_EQUATION = re.compile(r"(\d+)([-+*])(\d+)=(-?\d+)")
Problem = tuple[str, str, str]


def calculate(r: Random) -> Problem:
    """Two operations and a third."""
    a, b, m, c, sign = r.randint(2, 99), r.randint(2, 99), r.randint(2, 9), r.randint(2, 99), r.choice("+-")
    a, b = max(a, b), min(a, b)
    first = a + b if sign == "+" else a - b
    last = "+" if first * m < c else r.choice("+-")
    result = first * m + c if last == "+" else first * m - c
    steps = f"{a}{sign}{b}={first}. {first}*{m}={first * m}. {first * m}{last}{c}={result}."
    return f"What is (({a}{sign}{b})*{m}){last}{c}?", steps, str(result)


def trace(r: Random) -> Problem:
    """What four assignments leave in a variable; none of its values is negative or above 399."""
    while True:
        values = {"a": r.randint(1, 9), "b": r.randint(1, 9)}
        program, steps = [f"{name}={value}" for name, value in values.items()], []
        for _ in range(4):
            target, left, sign = r.choice("abc"), r.choice(list(values)), r.choice("+-*")
            right = r.choice([*values, str(r.randint(1, 9))])
            x, y = values[left], int(values.get(right, right))
            values[target] = {"+": x + y, "-": x - y, "*": x * y}[sign]
            program.append(f"{target}={left}{sign}{right}")
            steps.append(f"{target}={values[target]}")
        if all(0 <= int(step[2:]) < 400 for step in steps):
            question = f"A program runs {'; '.join(program)}. What is {steps[-1][0]} at the end?"
            return question, ". ".join(steps) + ".", steps[-1][2:]


def date(r: Random, least: int = 5, most: int = 75) -> Problem:
    """The date some days after another."""
    year, month, days = r.randint(1996, 2031), r.randint(0, 11), r.randint(least, most)

    def length() -> int:
        return 29 if month == 1 and year % 4 == 0 else DAYS[month]

    day = r.randint(1, length())
    question, steps = f"What date is {days} days after {day} {MONTHS[month]} {year}?", f"{day}+{days}={day + days}."
    day += days
    while day > length():
        steps += f" {MONTHS[month]} {year} has {length()} days: {day}-{length()}={day - length()}."
        day -= length()
        year, month = (year, month + 1) if month < 11 else (year + 1, 0)
    return question, steps, f"{day} {MONTHS[month]} {year}"


def clock(r: Random) -> Problem:
    """The time some minutes after another."""
    hour, minute, later = r.randint(0, 23), r.randint(0, 59), r.randint(15, 400)
    total = 60 * hour + minute + later
    steps = f"60*{hour}={60 * hour}. {60 * hour}+{minute}={60 * hour + minute}. {60 * hour + minute}+{later}={total}."
    if total >= 1440:
        steps += f" {total}-1440={total - 1440}."
        total -= 1440
    hours = total // 60
    steps += f" {hours}*60={60 * hours}. {total}-{60 * hours}={total - 60 * hours}."
    return f"What time is {later} minutes after {hour}:{minute:02}?", steps, f"{hours}:{total % 60:02}"


def sort(r: Random) -> Problem:
    """Six numbers."""
    numbers = [r.randint(1, 199) for _ in range(6)]
    return f"Sort these numbers: {_listed(numbers)}", "", _listed(sorted(numbers))


def shop(r: Random) -> Problem:
    """The change of a bill."""
    name, (one, other) = r.choice(NAMES), r.sample(THINGS, 2)
    a, b, c, d = r.randint(2, 9), r.randint(2, 19), r.randint(2, 9), r.randint(2, 19)
    total = a * b + c * d
    paid = (total // 50 + 1) * 50
    question = (
        f"{name} buys {a} {one}s at {b} dollars each and {c} {other}s at {d} dollars each and pays with {paid} "
        f"dollars. How many dollars does {name} get back?"
    )
    steps = f"{a}*{b}={a * b}. {c}*{d}={c * d}. {a * b}+{c * d}={total}. {paid}-{total}={paid - total}."
    return question, steps, str(paid - total)


def bags(r: Random) -> Problem:
    """What is left; like ``shop``, and shorter."""
    name, thing, a, b = r.choice(NAMES), r.choice(THINGS), r.randint(2, 9), r.randint(3, 19)
    c = r.randint(2, a * b - 1)
    question = f"{name} has {a} bags with {b} {thing}s each and gives away {c} {thing}s. How many {thing}s are left?"
    return question, f"{a}*{b}={a * b}. {a * b}-{c}={a * b - c}.", str(a * b - c)


def descending(r: Random) -> Problem:
    """Like ``sort``, the other way round."""
    numbers = [r.randint(1, 199) for _ in range(5)]
    return f"Sort these numbers, the largest first: {_listed(numbers)}", "", _listed(sorted(numbers, reverse=True))


def chain_sum(r: Random) -> Problem:
    """The task of that name of reasoning-gym, as it words it; it has no steps."""
    a, b, sign = r.randint(10, 99), r.randint(10, 99), r.choice("+-")
    answer = a + b if sign == "+" else a - b
    return f"State the final answer to the following arithmetic problem: {a} {sign} {b} =", "", str(answer)


def products(r: Random) -> Problem:
    """Likewise."""
    a, b = r.randint(1, 99), r.randint(1, 99)
    question = f"Solve the following multiplication: {a} * {b}. Give only the result as your final answer."
    return question, "", str(a * b)


def short_date(r: Random, least: int = 5, most: int = 75) -> Problem:
    """``date`` in few characters and without the year, for a model that reads one at a time."""
    while "-29=" in (problem := date(r, least, most))[1]:  # a leap year's February
        pass
    question, steps, answer = problem
    days, start = re.fullmatch(r"What date is (\d+) days after (.*) \d+\?", question).groups()  # type: ignore[union-attr]
    return f"{_in_digits(start)}+{days}", ",".join(re.findall(r"\d+[-+]\d+=\d+", steps)), _in_digits(answer)


def short_far_date(r: Random) -> Problem:
    """Further away than in ``short_date``."""
    return short_date(r, 76, 99)


def short_sort(r: Random) -> Problem:
    """Four numbers in few characters."""
    numbers = [r.randint(1, 99) for _ in range(4)]
    return "s " + " ".join(map(str, numbers)), "", " ".join(map(str, sorted(numbers)))


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def _in_digits(text: str) -> str:
    day, month, *_ = text.split()
    return f"{day}.{MONTHS.index(month) + 1}"


FAMILIES: dict[str, Callable[[Random], Problem]] = {
    each.__name__: each
    for each in (
        *(calculate, trace, date, clock, sort, shop, bags, descending, chain_sum, products),
        *(short_date, short_far_date, short_sort),
    )
}


def make_rows(families: Sequence[str], count: int, is_test: bool, seed: int = 0) -> list[dict]:
    """Different problems of families in turn, as rows of a data set.

    Args:
        families (Sequence[str]): names of ``FAMILIES``.
        count (int): of problems.
        is_test (bool): of the tenth that is for tests, or of the others.
        seed (int): of the generator.

    Returns:
        list[dict]: with ``id``, which begins with the family's name and a colon, and ``messages``.
    """
    r, rows = Random(seed), {}
    while len(rows) < count:
        family = families[len(rows) % len(families)]
        question, steps, answer = FAMILIES[family](r)
        if question not in rows and (zlib.crc32(question.encode()) % 10 == 0) == is_test:
            space = "" if family.startswith("short") else " "
            response = f"{steps}{space}{MARK}{space}{answer}".strip()
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": response}]
            rows[question] = {"id": f"{family}:{len(rows)}", "messages": messages}
    return list(rows.values())


def verdict(real: str, generated: str, truncated: bool = False) -> str:
    """What is right or wrong with a response.

    Args:
        real (str): the worked answer.
        generated (str): the response.
        truncated (bool): it reached the limit of its length.

    Returns:
        str: a letter of ``VERDICTS``.
    """
    if truncated:
        return "t"
    if generated.count(MARK) != 1:
        return "f"
    if generated.split(MARK)[1].strip() == real.split(MARK)[1].strip():
        return "r"
    apply = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}
    false = (apply[sign](int(x), int(y)) != int(z) for x, sign, y, z in _EQUATION.findall(generated))
    return "s" if any(false) else "w"


def check(prompt: str, real: str, generated: str, truncated: bool) -> bool:  # noqa: ARG001 - called by these names
    """For ``pairs.checker``: is the response's answer that of the data?"""
    return verdict(real, generated, truncated) == "r"


def write_problems(folder: Path, families: Sequence[str], unseen: Sequence[str], train: int, test: int) -> None:
    """Writes ``train.jsonl``, ``test.jsonl`` and ``unseen.jsonl``, test problems of families that are not in the
    others."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = {"train": (families, train, False), "test": (families, test, True), "unseen": (unseen, test // 2, True)}
    for name, arguments in parts.items():
        lines = "".join(json.dumps(row) + "\n" for row in make_rows(*arguments))
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
