"""The list of a config's keys, and the page that holds it."""

from spin.cli import main


def test_the_page_is_what_the_command_prints(repo, capsys):
    assert main(["keys"]) == 0
    page = (repo / "docs" / "keys.md").read_text(encoding="utf-8")
    shown = page.partition("<!-- keys -->\n")[2].partition("\n<!-- /keys -->")[0]
    assert shown == capsys.readouterr().out.strip(), "put what `spin keys` prints between the marks of docs/keys.md"


def test_a_word_shows_its_rows(capsys):
    """By hand, from the schema and the docstrings."""
    assert main(["keys", "global_batch"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| `")]
    takes, does = "a whole number from 1 to 1,048,576", "prompts per optimizer step, over all ranks"
    assert rows == [f"| `global_batch_size` | `64` | {takes} | {does} |"]
    assert main(["keys", "tokenizer.path"]) == 0
    assert "| `tokenizer.path` | `${model.path}` | folder with the tokenizer files |" in capsys.readouterr().out
    assert main(["keys", "watch.acc.limit"]) == 0
    assert "| `0.99` |" in capsys.readouterr().out
    assert main(["keys", "no_such_key"]) == 1
    assert "no key has 'no_such_key'" in capsys.readouterr().err
