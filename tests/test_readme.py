"""What the README tells people to type is right."""

import re
import tomllib
from pathlib import Path

import pytest
import torch

from pfedgpa_app.config import Config, flatten
from pfedgpa_app.data import ImageStats
from pfedgpa_app.exported import ExportedModel
from pfedgpa_app.models import build_model
from server_app.bench import Suite

PROJECT = Path(__file__).parents[1]
README = (PROJECT / "README.md").read_text()
PAGES = [PROJECT / "README.md", *sorted((PROJECT / "docs").glob("*.md"))]
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


def headings(page: Path) -> set[str]:
    """Return the headings of a page as links name them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_links_to_exists(page: Path):
    for link in re.findall(r"\]\((?!http)([^)]+)\)", page.read_text()):
        path, _, heading = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not heading or heading in headings(target), link


def test_the_suite_of_the_readme_is_right(tmp_path: Path):
    (text,) = re.findall(r"```toml\n(.+?)```", README, flags=re.DOTALL)
    (tmp_path / "conf").symlink_to(PROJECT / "conf")
    (tmp_path / "mine.toml").write_text(text)
    runs = Suite.read(tmp_path / "mine.toml").runs()
    assert len(runs) == 12
    assert {run.config.num_server_rounds for run in runs} == {30}


def test_an_exported_model_is_used_as_the_readme_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (snippet,) = re.findall(r"```python\n(import json\n.+?)```", README, flags=re.DOTALL)
    config = Config.from_flat({"data.dataset": "cifar10", "model.name": "cnn-cifar"})
    state = build_model("cnn-cifar", config.data.info, seed=1).state_dict()
    stats = ImageStats(torch.tensor([120.0, 110.0, 90.0]), torch.tensor([60.0, 50.0, 70.0]))
    exported = ExportedModel(state, config, 0, 10, stats)
    exported.save(tmp_path / "model.safetensors")
    images = torch.arange(5 * 3 * 32 * 32).reshape(5, 3, 32, 32).to(torch.uint8)
    model = build_model("cnn-cifar", config.data.info, seed=2)
    names = {"model": model, "images": images}
    monkeypatch.chdir(tmp_path)
    exec(snippet, names)
    logits = names["logits"]
    torch.testing.assert_close(logits.softmax(1), exported.predict(images))
