"""torchtune is imported in one file, and in the places that CONTRIBUTING.md lists."""

import re

ELSEWHERE = {"spin/config/components.py", "spin/data/torchtune_tokenizer.py"}


def test_torchtune_is_imported_in_one_place(repo):
    files = [*repo.glob("spin/**/*.py"), *repo.glob("recipes/*.py")]
    imports = re.compile(r"^\s*(from|import) torchtune\b", re.MULTILINE)
    found = {str(file.relative_to(repo)) for file in files if imports.search(file.read_text())}
    assert found == {"spin/model/torchtune.py"} | ELSEWHERE
