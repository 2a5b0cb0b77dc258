"""Files of rows, and folders of tokenizers."""

import json
import shutil

import pytest


@pytest.fixture
def source(tmp_path):
    """Writes rows, or lines as they are, to a file, and gives its path."""

    def write(*rows, name="data.jsonl"):
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (tmp_path / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
        return str(tmp_path / name)

    return write


@pytest.fixture
def folder(tiny_lm, tmp_path):
    """Makes a copy of the tiny tokenizer, with other values in tokenizer_config.json (None takes a key out)."""

    def make(generation=None, **changes):
        target = tmp_path / "model"
        target.mkdir(exist_ok=True)
        shutil.copy(tiny_lm / "tokenizer.json", target)
        config = json.loads((tiny_lm / "tokenizer_config.json").read_text()) | changes
        config = {key: value for key, value in config.items() if value is not None}
        (target / "tokenizer_config.json").write_text(json.dumps(config))
        if generation is not None:
            (target / "generation_config.json").write_text(json.dumps(generation))
        return target

    return make
