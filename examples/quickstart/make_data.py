"""Makes jargon_train.jsonl and jargon_val.jsonl from the Jargon File, as Debian's package dict-jargon 4.4.7 ships it.

The two files lie in this folder, so nobody needs to run this. It shows how they were made, and makes them again byte
for byte:

    apt-get download dict-jargon && python make_data.py --deb dict-jargon_4.4.7-*_all.deb

Each definition becomes one conversation: the question what a term means, and the definition's first sense as its
authors wrote it, without pronunciation, etymology in brackets, and pointers to other entries. Left out are definitions
that do not fit MAX_CHARS, that are little more than a pointer, that lean on a link or an address, or that are vulgar.
The split follows the hash of the term, so that it does not change when rows come or go.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

MIN_CHARS, MAX_CHARS = 60, 320
VALIDATION_PERCENT = 10
VULGAR = re.compile(
    r"\b\w*(?:fuck|shit|cunt|bitch|rape[ds]?\b|whore|porn|suicide|penis|crap|sex|clit)\w*", re.IGNORECASE
)
GRAMMAR = (
    "n|v|vt|vi|vti|adj|adv|interj|abbrev|excl|prov|suff|pref|quant|imp|np|phrase|coll|obs|poss|cav|chat|for|pl|and|or"
)
# ` /B·S·O·D/, n.`: the line below the term, with pronunciations and parts of speech
GRAMMAR_LINE = re.compile(rf"\s*(?:/[^/\n]*/[,;]?\s*|(?:{GRAMMAR})\b[.,:;]*\s*)*\n")
SPEECH = re.compile(r"^(?:(?:n|v|vt|vi|vti|adj|adv|interj|pl)\.,? *)+")  # the same at the start of a sense
LEANS_ON_A_LINK = re.compile(r"^/|[\[\]{}]|https?:|ftp:|www\.|@\w|\S  +\S|“ | [.,;:] ")
POINTER = re.compile(r"^(?:see|compare|syn|cf|also|contrast|for (?:more|further))\b", re.IGNORECASE)
BASE64 = {c: i for i, c in enumerate("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/")}


def read_entries(dictd: Path) -> Iterator[tuple[str, str]]:
    """Term and definition of every entry of a dictd data base, in the order of its index.

    Args:
        dictd (Path): folder with jargon.index (term, offset, length; numbers in base 64) and jargon.dict.dz (gzip).

    Yields:
        tuple[str, str]: the term and the text below it.
    """
    data = gzip.decompress((dictd / "jargon.dict.dz").read_bytes())
    seen = set()
    for line in (dictd / "jargon.index").read_text(encoding="utf-8").splitlines():
        term, offset, length = line.split("\t")[:3]
        span = decode_number(offset), decode_number(length)
        if term.startswith("00-database") or span in seen:
            continue
        seen.add(span)
        head, _, body = (
            data[span[0] : sum(span)].decode("utf-8").replace("\u00ad", "").partition("\n")
        )  # no soft hyphens
        yield head.strip(), body


def decode_number(digits: str) -> int:
    """A number of the index: base 64, most significant digit first."""
    number = 0
    for digit in digits:
        number = number * 64 + BASE64[digit]
    return number


def clean(body: str) -> str:
    """The first sense of a definition as flowing text; empty if there is none that fits."""
    body = GRAMMAR_LINE.sub("", body, count=1) if GRAMMAR_LINE.match(body) else body
    kept: list[str] = []
    for block in re.split(r"\n\s*\n", body):
        if is_table(block):
            break
        text = " ".join(block.split())
        if re.match(r"(?:2|b)\. ", text):
            break  # the next sense
        text = re.sub(r"^(?:1|a)\. ?", "", text)
        text = re.split(r"\s2\. (?=[A-Z\[])", text)[0]
        text = without_pointers(without_markup(text))
        if not text:
            continue
        if sum(map(len, kept)) + 2 * len(kept) + len(text) > MAX_CHARS:
            break
        kept.append(text)
    answer = "\n\n".join(kept)
    return answer if len(answer) >= MIN_CHARS and answer[-1] in ".!?)”" else ""


def is_table(block: str) -> bool:
    """Whether a block is a drawing, code or a table: wide gaps inside lines, or few letters."""
    letters = sum(c.isalpha() or c.isspace() for c in block)
    return bool(re.search(r"\S {3,}\S", block)) or letters < 0.8 * len(block)


def without_markup(text: str) -> str:
    """Without {links}, addresses, and the [etymology] that many definitions start with."""
    text = re.sub(r"\{\s*\(?(?:https?|ftp|news):?[^}]*\}", "", text)
    text = re.sub(r"<[^<>\s]+@[^<>\s]+>", "", text)
    text = SPEECH.sub("", re.sub(r"\{\s*|\s*\}", "", text))
    while text.startswith("["):
        text = SPEECH.sub("", after_bracket(text).lstrip(" .:;"))
    return text[:1].upper() + text[1:]


def after_bracket(text: str) -> str:
    """What follows the closing bracket that belongs to the opening one at the start."""
    depth = 0
    for position, character in enumerate(text):
        depth += (character == "[") - (character == "]")
        if depth == 0:
            return text[position + 1 :]
    return ""


def without_pointers(text: str) -> str:
    """Without sentences that only point to other entries."""
    sentences = re.split(r"(?<=[.!?”)])\s+(?=[A-Z“‘(])", text)
    return " ".join(sentence for sentence in sentences if not POINTER.match(sentence.lstrip("(")))


def make_rows(entries: Iterator[tuple[str, str]]) -> dict[str, list[dict]]:
    """The rows of both splits, each in an order that depends on the terms alone."""
    splits: dict[str, list[tuple[str, dict]]] = {"train": [], "val": []}
    seen = set()
    for term, body in entries:
        answer = clean(body)
        digest = hashlib.sha256(term.lower().encode()).hexdigest()
        if not answer or digest in seen or LEANS_ON_A_LINK.search(answer) or VULGAR.search(f"{term} {answer}"):
            continue
        seen.add(digest)
        row = {
            "id": f"jargon-{digest[:10]}",
            "messages": [
                {"role": "user", "content": f'What does the hacker slang term "{term}" mean?'},
                {"role": "assistant", "content": answer},
            ],
        }
        splits["val" if int(digest, 16) % 100 < VALIDATION_PERCENT else "train"].append((digest, row))
    return {name: [row for _, row in sorted(rows, key=lambda item: item[0][::-1])] for name, rows in splits.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--deb", type=Path, required=True, help="the Debian package, from `apt-get download dict-jargon`"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder of the two files")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["dpkg-deb", "-x", str(args.deb), folder], check=True)
        splits = make_rows(read_entries(Path(folder) / "usr/share/dictd"))
    for name, rows in splits.items():
        path = args.out / f"jargon_{name}.jsonl"
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        print(f"{path}: {len(rows)} rows")


if __name__ == "__main__":
    main()
