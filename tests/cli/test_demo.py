"""`spin demo`: what happens to its model's folder."""

import multiprocessing
import time
from pathlib import Path

from spin.cli import demo_model


def make(out, made):
    """In a process of its own: the model, slowly, from no wheel at all."""

    def convert(gguf, licence, folder):
        made.put(1)
        (folder / "config.json").write_text("{}")
        time.sleep(1)
        (folder / "model.safetensors").write_bytes(b"weights")
        return 1

    demo_model.download_wheel, demo_model.extract, demo_model.convert = Path, lambda *_: ("", ""), convert
    demo_model.make_model(out)


def test_two_at_once_make_one_model(tmp_path):
    """The second one finds what the first has made; it does not delete its half."""
    context = multiprocessing.get_context("fork")
    made = context.Queue()
    both = [context.Process(target=make, args=(tmp_path / "model", made)) for _ in range(2)]
    for each in both:
        each.start()
    for each in both:
        each.join()
    assert [each.exitcode for each in both] == [0, 0] and made.qsize() == 1
    assert {file.name for file in (tmp_path / "model").iterdir()} == {".spin", "config.json", "model.safetensors"}
