"""Files of rows."""

import json

import pytest


@pytest.fixture
def source(tmp_path):
    """Writes rows, or lines as they are, to a file, and gives its path."""

    def write(*rows, name="data.jsonl"):
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (tmp_path / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
        return str(tmp_path / name)

    return write
