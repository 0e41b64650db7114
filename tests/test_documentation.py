"""What README and documentation tell people to type: commands that the command line takes, scripts that are there, code
that runs."""

import re
import shlex

import pytest
from support import ROOT

from meta_train import cli

DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [*DOCS, ROOT / "CONTRIBUTING.md", ROOT / "RELEASE.md", *sorted((ROOT / "pretrained").glob("*/README.md"))]


def commands(text: str) -> list[list[str]]:
    """What is typed in code blocks and inline code, as words; lines that go on by a backslash are one."""
    blocks = re.findall(r"^```(?:sh|bash|console)?\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE))
    found = []
    for line in lines:
        for part in re.split(r"&&|(?<!&)&(?!&)", line.partition("  #")[0]):
            try:
                words = shlex.split(part)
            except ValueError:  # inline code that is no command
                continue
            for start in ("learned-opt", "python", "python3"):
                if start in words:
                    found.append(words[words.index(start) :])
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_are_ones_that_can_be_typed(page):
    for words in commands(page.read_text()):
        shown = " ".join(words)
        if words[0] == "learned-opt":
            if len(words) > 1 and not re.search(r"\[|\|", shown):  # a synopsis has brackets
                cli._parser().parse_args([re.sub(r"^[NI]$", "1", word) for word in words[1:] if word != "..."])
        elif len(words) > 1 and words[1].endswith(".py"):
            assert (ROOT / words[1]).is_file() or page.parent.joinpath(words[1]).is_file(), shown


def programs(text: str) -> list[str]:
    """The blocks of Python that begin with an import; others are pieces that show a form."""
    blocks = re.findall(r"^```python\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    return [block for block in blocks if block.startswith(("import ", "from "))]


@pytest.mark.parametrize(
    "page", [page for page in DOCS if programs(page.read_text())], ids=lambda path: str(path.relative_to(ROOT))
)
def test_code_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for program in programs(page.read_text()):
        exec(compile(program, str(page), "exec"), names)


def test_where_things_are_they_are():
    """Of the table that sends a newcomer from a question to a function."""
    table = (ROOT / "docs" / "how_it_works.md").read_text().split("\n## Where things are\n")[1].split("\n## ")[0]
    rows = [re.findall(r"`([^`]+)`", line.rpartition("|")[0].rpartition("|")[2]) for line in table.splitlines()]
    rows = [names for names in rows if names]
    assert len(rows) >= 5
    for *names, path in rows:
        text = (ROOT / path).read_text()
        assert names
        assert all(re.search(rf"\bdef {name}\(", text) for name in names), (names, path)
    steps = (ROOT / "CONTRIBUTING.md").read_text()
    (copied,) = [path for *_, path in rows if path.startswith("learned_opt/rules/")]
    assert f"copied from `{copied}`" in steps
