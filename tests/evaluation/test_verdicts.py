"""spin/evaluation/verdicts.py: verdicts, exact match and what they sum up to; expected values derived by hand."""

import pytest

from spin.config.schema import JUDGE_TEMPLATE, Judge
from spin.core.errors import ConfigError
from spin.evaluation import verdicts

PATTERN = Judge.model_fields["pattern"].default


@pytest.mark.parametrize(
    ("text", "pattern", "verdict"),
    [
        ("Answer A is shorter. [[B]]", PATTERN, "second"),
        ("[[A]] at first sight, but no: [[C]]", PATTERN, "tie"),
        ("[[A]]", PATTERN, "first"),
        ("I would say A.", PATTERN, None),
        ("", PATTERN, None),
        ("verdict: b", r"(?i)verdict:\s*(\w)", "second"),
        ("verdict: d", r"(?i)verdict:\s*(\w)", None),
    ],
)
def test_a_verdict_is_the_last_match(text, pattern, verdict):
    assert verdicts.read_verdict(text, pattern) == verdict


def test_a_win_takes_both_orders():
    """All else is a tie, a judge that goes by the place included; nothing if one of the two cannot be read."""
    read = ("first", "second", "tie")
    found = {(first, second): verdicts.outcome_of(first, second) for first in read for second in read}
    assert (found.pop(("first", "second")), found.pop(("second", "first"))) == ("win", "loss")
    assert set(found.values()) == {"tie"} and len(found) == 7
    assert verdicts.outcome_of(None, "first") is verdicts.outcome_of("tie", None) is None


def test_texts_with_braces_stay_as_they_are():
    fields = {"prompt": "{first}", "first": "{second} {x}", "second": "\\1 {0}", "reference": ""}
    assert verdicts.fill_template("{prompt}|{first}|{second}", **fields) == "{first}|{second} {x}|\\1 {0}"


def test_templates_and_patterns_that_cannot_work():
    for template, message in (
        ("{prompt} {first}", r"no \{second\}"),
        ("nothing", r"no \{first\} and no \{second\}"),
        ("{first} {second} {answer}", r"\{answer\} is no field; known are \{prompt\}"),
    ):
        with pytest.raises(ConfigError, match=message):
            verdicts.check_template(template)
    verdicts.check_template(JUDGE_TEMPLATE)
    for pattern, message in (("([", "not a regular expression"), ("[AB]", "has 0 groups"), ("(A)(B)", "has 2 groups")):
        with pytest.raises(ConfigError, match=f"judge.pattern=.*{message}"):
            verdicts.check_pattern("judge.pattern", pattern)
    verdicts.check_pattern("judge.pattern", PATTERN)


def test_a_prompt_as_a_judge_reads_it():
    user = {"role": "user", "content": "What is a bit?"}
    assert verdicts.conversation_text([user]) == "What is a bit?"
    system = {"role": "system", "content": "Be brief."}
    assert verdicts.conversation_text([system, user]) == "System: Be brief.\n\nUser: What is a bit?"


def test_a_judge_sees_tools_and_calls():
    tool = {"type": "function", "function": {"name": "weather", "parameters": {}}}
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Köln"}}}
    user = {"role": "user", "content": "Rain?", "tools": [tool]}
    asks = {"role": "assistant", "content": "", "tool_calls": [call, call]}
    shown = '{"name": "weather", "arguments": {"city": "Köln"}}'
    assert verdicts.message_text(asks) == f"{shown}\n{shown}"
    assert verdicts.message_text({**asks, "content": "I look.", "tool_calls": [call]}) == f"I look.\n{shown}"
    assert verdicts.conversation_text([user]) == 'Tools: [{"name": "weather", "parameters": {}}]\n\nUser: Rain?'
    result = {"role": "tool", "content": "dry"}
    assert verdicts.conversation_text([user, asks, result]).endswith(f"Assistant: {shown}\n{shown}\n\nTool: dry")


@pytest.mark.parametrize(
    ("text", "form"),
    [  # 100 is not 1E+2
        *(("  Paris.\n", "paris"), ("New   YORK", "new york"), ("1,000", "1000"), ("$1000.00.", "1000")),
        *(("0.50", "0.5"), ("-0", "0"), ("+7", "7"), ("100", "100"), ("1_000", "1_000"), ("nan", "nan")),
        *(("**42**", "42"), ("3/4", "3/4")),
    ],
)
def test_what_does_not_matter_in_a_final_value(text, form):
    assert verdicts.canonical(text) == form


def test_the_last_match_is_extracted():
    number = r"([-+]?\d[\d,]*(?:\.\d+)?)"
    assert verdicts.extract("6 times 7 makes 42.0, I think.", number) == "42"
    assert verdicts.extract("I do not know.", number) is None
    assert verdicts.extract("18 - 4 = 14\n#### 1,014", r"####\s*(.+)") == "1014"
    assert verdicts.extract(" Whole text. ", None) == "whole text"


def test_outcomes_of_exact_match():
    cases = {(True, True): "tie", (False, False): "tie", (True, False): "win", (False, True): "loss"}
    assert {case: verdicts.outcome_of_match(*case) for case in cases} == cases


@pytest.mark.parametrize(
    ("successes", "n", "interval"),
    [
        # z = 1.96: (p + z2/2n +- z sqrt(p(1-p)/n + z2/4n2)) / (1 + z2/n); at p = 0 it is (0, z2 / (n + z2))
        (0, 10, (0.0, 0.2775)),
        (10, 10, (0.7225, 1.0)),
        (5, 10, (0.2366, 0.7634)),
        (8, 10, (0.4902, 0.9433)),
        (500, 1000, (0.4691, 0.5309)),
    ],
)
def test_wilsons_interval(successes, n, interval):
    assert verdicts.wilson_interval(successes, n) == pytest.approx(interval, abs=1e-4)


@pytest.mark.parametrize(
    ("wins", "losses", "p"),
    # 2 * (1 + 10 + 45) / 1024 for 8 to 2; equal numbers are the middle of the distribution
    [(5, 0, 0.0625), (0, 5, 0.0625), (8, 2, 112 / 1024), (1, 2, 1.0), (3, 3, 1.0), (0, 0, 1.0), (600, 400, 2.73e-10)],
)
def test_the_sign_test(wins, losses, p):
    assert verdicts.sign_test(wins, losses) == pytest.approx(p, rel=0.01)


def test_ties_count_as_half_and_unreadable_ones_not_at_all():
    found = verdicts.win_summary(["win", "win", "tie", "loss", None])
    assert (found["samples"], found["wins"], found["ties"], found["losses"], found["unreadable"]) == (5, 2, 1, 1, 1)
    assert found["win_rate"] == 2.5 / 4
    assert found["win_rate_interval"] == list(verdicts.wilson_interval(2.5, 4))
    assert found["sign_test_p"] == 1.0
    nothing = verdicts.win_summary([None, None])
    assert nothing["win_rate"] is nothing["win_rate_interval"] is nothing["sign_test_p"] is None


def test_position_bias():
    """Five pairs, ten verdicts: four for the first place, three for the second, two ties, one unreadable.

    Of the four pairs with both verdicts one place wins twice in two (first-first, second-second) and the verdicts
    agree in two: (first, second) names one response, (tie, tie) none.
    """
    found_pairs = [("first", "first"), ("second", "second"), ("first", "second"), ("tie", "tie"), ("first", None)]
    found = verdicts.bias_summary(found_pairs)
    assert (found["asked"], found["unreadable"]) == (10, 1)
    assert found["first_fraction"] == 4 / 7
    assert found["same_place_fraction"] == found["agreement_fraction"] == 2 / 4
    assert verdicts.bias_summary([("tie", None)])["first_fraction"] is None
    assert verdicts.bias_summary([])["same_place_fraction"] is None
