"""What the README tells people to type is right."""

import re
import tomllib
from pathlib import Path

import pytest

from pfedgpa_app.config import Config, flatten

PROJECT = Path(__file__).parents[1]
README = (PROJECT / "README.md").read_text()
RUN_CONFIGS = re.findall(r'--run-config ("[^"]+"|\S+)', README)


def test_the_readme_shows_how_to_override_settings():
    assert len(RUN_CONFIGS) >= 4


@pytest.mark.parametrize("given", RUN_CONFIGS)
def test_settings_of_the_readme_are_right(given: str):
    if given.endswith(".toml"):
        text = (PROJECT / given).read_text()
    else:
        text = "\n".join(re.findall(r"\S+?=(?:'[^']*'|\S+)", given.strip('"')))
    assert Config.from_flat(dict(flatten(tomllib.loads(text)))) != Config()


def test_files_and_folders_that_the_readme_links_exist():
    links = re.findall(r"\]\((?!http)([^)]+)\)", README)
    assert links
    for link in links:
        assert (PROJECT / link).exists(), link
