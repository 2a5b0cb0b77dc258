"""The journal of a shard's responses: what is kept of it, and what of a file that anybody may have written."""

import hashlib
import json
import math
import os

import numpy as np
import pytest

from spin.core.errors import OutputError
from spin.pairs.journal import Journal
from spin.types import Response

ORIGIN = {"store": "abc", "shard": 1, "num_shards": 3}
KEPT = {
    0: Response([5, 6, 9], "stop"),
    2: Response([], "length"),
    1: Response([7], "length", logprobs=[-0.1 - 1e-17]),
    3: Response([1, 2], "length", logprobs=[-math.pi, -1e-300]),
}


@pytest.fixture
def file(tmp_path):
    file = tmp_path / "journal-00001.jsonl"
    journal = Journal(file, ORIGIN)
    for index, response in KEPT.items():
        journal.append(index, response)
    return file


def read(file, count=4, **origin):
    return Journal(file, ORIGIN | origin).read(count)


def test_what_was_appended_is_read_bit_for_bit_and_more_can_be_appended(file, caplog):
    assert read(file) == KEPT
    Journal(file, ORIGIN).append(4, Response(np.array([3, 4]).tolist(), "length"))
    assert read(file, 5) == KEPT | {4: Response([3, 4], "length")}
    assert not caplog.text
    assert read(file.with_name("journal-00009.jsonl")) == {}


def test_a_line_torn_anywhere_is_dropped_and_the_next_one_is_whole(file, caplog):
    """A process or a disk may end within a line at each byte; the line after it starts on its own."""
    content = file.read_bytes()
    start = content.rindex(b"\n") + 1
    before = dict(list(KEPT.items())[:3])
    for end in range(start, len(content)):
        caplog.clear()
        file.write_bytes(content[:end])
        assert read(file) == before
        assert ("1 lines are not used" in caplog.text) == (end > start)
        Journal(file, ORIGIN).append(3, KEPT[3])
        assert read(file) == KEPT


@pytest.mark.parametrize("other", [{"store": "abd"}, {"shard": 2}, {"num_shards": 4}])
def test_a_journal_of_another_store_or_shard_is_not_used(file, other, caplog):
    assert read(file, **other) == {} and "4 lines are not used" in caplog.text


def test_an_edited_byte_costs_its_line(file, caplog):
    lines = file.read_bytes().split(b"\n")
    for place in range(len(lines[1])):
        edited = bytearray(lines[1])
        edited[place] ^= 1
        file.write_bytes(b"\n".join([lines[0], bytes(edited), *lines[2:]]))
        assert read(file).keys() == {1, 2, 3}
    assert "torn, edited, or not of this shard" in caplog.text


def forge(file, text):
    """A line of any text under a checksum that is right."""
    checksum = hashlib.sha256(json.dumps(ORIGIN, sort_keys=True).encode() + text).hexdigest()
    with file.open("ab") as stream:
        stream.write(b"\n" + checksum.encode() + b" " + text)


@pytest.mark.parametrize(
    "row",
    [
        {"index": 4, "token_ids": [1], "finish_reason": "stop"},
        {"index": -1, "token_ids": [1], "finish_reason": "stop"},
        {"index": True, "token_ids": [1], "finish_reason": "stop"},
        {"index": "0", "token_ids": [1], "finish_reason": "stop"},
        {"index": 0, "token_ids": [1]},
        {"index": 0, "token_ids": [1], "finish_reason": "stop", "more": 1},
        [0, [1], "stop"],
        "text",
        None,
    ],
)
def test_what_is_no_response_is_left_out(file, row, caplog):
    forge(file, json.dumps(row).encode())
    assert read(file) == KEPT and "1 lines are not used" in caplog.text


@pytest.mark.parametrize(
    "text", [b"", b"\xff", b"{" * 5000, b'{"index": ' + b"1" * 5000 + b"}", b'{"index": 0, "index": 1}', b"\x00" * 99]
)
def test_no_text_is_too_strange(file, text, caplog):
    forge(file, text)
    assert read(file) == KEPT and "1 lines are not used" in caplog.text


def test_what_is_no_file_is_not_read_and_not_written_to(tmp_path, caplog):
    """A pipe would block for ever; a link could lead to a file of the user's."""
    folder, pipe, link, target = (tmp_path / name for name in ("folder", "pipe", "link", "target"))
    folder.mkdir()
    os.mkfifo(pipe)
    target.write_text("mine")
    link.symlink_to(target)
    for path in (folder, pipe, link):
        assert read(path) == {}
        with pytest.raises(OutputError, match=rf"{path.name}: cannot write"):
            Journal(path, ORIGIN).append(0, KEPT[0])
    assert caplog.text.count("cannot be read") == 2 and target.read_text() == "mine"
