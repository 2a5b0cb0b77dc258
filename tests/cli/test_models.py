"""The list of models, and the page that holds it."""

from spin.cli import main
from spin.model.families import FAMILIES
from tests.hf_folders import FOLDERS


def test_the_page_is_what_the_command_prints(repo, capsys):
    assert main(["models"]) == 0
    printed = capsys.readouterr().out.strip()
    page = (repo / "docs" / "models.md").read_text(encoding="utf-8")
    assert page.partition("<!-- models -->\n")[2].partition("\n<!-- /models -->")[0] == printed


def test_every_family_has_a_folder_that_is_tested():
    tested = {keys.get("model_type", name) for name, keys in FOLDERS.items()}
    assert FAMILIES.keys() == tested - {"gemma3"}  # a part of whose folder is a gemma3_text
