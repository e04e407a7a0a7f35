"""The commands that README, documents and files of settings publish."""

import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pfedgpa_app.config import DATASETS
from pfedgpa_app.data import sources
from pfedgpa_app.data.dataset import Part
from pfedgpa_app.randomness import make_generator

PROJECT = Path(__file__).parents[1]
Words = tuple[str, ...]

# In the text of a page, a name without what it is given is a mention and no command.
INLINE = re.compile(
    r"`((?:python -m benchmarks\.|pfedgpa (?:bench|data \w+|export|predict|report|run|watch) [^-`]"
    r"|pfedgpa runs \w+ |flwr run \. |pytest |docker |ray start )[^`]*)`"
)
# In a comment or a docstring, a line of its own, which may go on.
INDENTED = re.compile(
    r"^(?:#   | {4})((?:python -m benchmarks\.|pfedgpa |flwr |docker )(?:.*\\\n#? *)*.*)$",
    flags=re.MULTILINE,
)
BETWEEN = {"&&", "||", ";", "|", "&", "(", ")"}


PROCESSES = ("benchmarks.reliability", "benchmarks.rounds", "benchmarks.startup")
"""Those that start Flower's servers."""


def pages() -> list[Path]:
    """Return README and documents, but for the guide whose blocks test_deployment.py types."""
    return [PROJECT / "README.md", *sorted((PROJECT / "docs").glob("*.md"))]


def commands() -> list[Words]:
    """Return all commands as words, each once."""
    found = []
    for page in pages():
        text = page.read_text()
        if page.name != "deployment.md":
            for block in re.findall(r"```bash\n(.+?)```", text, flags=re.DOTALL):
                found += [words for line in joined(block) for words in split(line)]
        for line in INLINE.findall(re.sub(r"```.+?```", "", text, flags=re.DOTALL)):
            found += split(line)
    for folder in ("conf", "docker", "benchmarks"):
        for file in sorted((PROJECT / folder).rglob("*")):
            if file.suffix in (".py", ".toml", ".yaml") or file.name == "Dockerfile":
                for line in INDENTED.findall(file.read_text()):
                    found += split(re.sub(r"\\\n#? *", "", line))
    return list(dict.fromkeys(found))


def joined(block: str) -> list[str]:
    """Return the lines of a block, those that go on as one."""
    return block.replace("\\\n", " ").splitlines()


def split(line: str) -> Iterator[Words]:
    """Yield the commands of a line, without comments, variables before them and redirections."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words: list[str] = []
    tokens = iter([*lexer, ";"])
    for token in tokens:
        if token in BETWEEN:
            if words:
                yield tuple(words)
            words = []
        elif token.startswith(">"):
            next(tokens)
        elif words or not re.fullmatch(r"[A-Z_]+=.*", token):
            words.append(token)


def benchmarks(*, have_processes: bool) -> list[Words]:
    """Return the commands of benchmarks that start Flower's servers, or those of all others."""
    found = [words for words in commands() if words[:2] == ("python", "-m")]
    return [words for words in found if (words[2] in PROCESSES) == have_processes]


def lay_out(folder: Path) -> None:
    """Make a project's folder to type in: what is written there is lost."""
    for path in PROJECT.iterdir():
        if path.name not in ("docs", "build", ".git"):
            (folder / path.name).symlink_to(path)
    shutil.copytree(PROJECT / "docs" / "results", folder / "docs" / "results")


def noise(name: str, root: Path) -> list[Part]:
    """Return a small set for training and one for testing, in place of what is downloaded."""
    info, parts = DATASETS[name], []
    for seed in range(2):
        labels = torch.arange(200 * info.num_classes) % info.num_classes
        images = torch.randint(256, (len(labels), *info.shape), generator=make_generator(seed))
        parts.append(Part(images.byte(), labels))
    return parts


def run_quickly(words: Words, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a benchmark quickly, in this process, as a command would."""
    _, _, module, *options = words
    lay_out(folder)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sources, "_torchvision", noise)
    monkeypatch.setattr(sys, "argv", [module, *options, "--quick"])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # typer puts its own there
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(module, run_name="__main__")
    assert not ended.value.code
