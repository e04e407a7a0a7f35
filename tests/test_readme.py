"""What README and documents tell people to type is right."""

import re
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from pfedgpa_app.config import Config, flatten
from pfedgpa_app.data import ImageStats, client_data
from pfedgpa_app.exported import ExportedModel
from pfedgpa_app.models import build_model
from pfedgpa_app.preflight import preflight
from server_app.suites import Suite

PROJECT = Path(__file__).parents[1]
README = (PROJECT / "README.md").read_text()
PAGES = [PROJECT / "README.md", *sorted((PROJECT / "docs").glob("*.md"))]
DOCS = PROJECT / "docs"
RUN_CONFIGS = sorted(
    {
        given
        for page in PAGES
        for given in re.findall(r"""--run-config ("[^"]+"|'[^']+'|[^\s'"]+)""", page.read_text())
    }
)


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 120


def test_the_index_has_every_page():
    index = (DOCS / "README.md").read_text()
    assert set(re.findall(r"\]\((\w[\w-]*\.md)\)", index)) == {
        page.name for page in DOCS.glob("*.md") if page.name != "README.md"
    }


def test_the_documents_show_how_to_override_settings():
    assert len(RUN_CONFIGS) >= 8


@pytest.mark.parametrize("given", [one for one in RUN_CONFIGS if one != "resume.toml"])
def test_settings_of_the_documents_are_right(given: str):
    if given.endswith(".toml"):
        text = (PROJECT / given).read_text()
    else:
        pairs = given.strip(given[0]) if given[0] in "'\"" else given
        text = "\n".join(re.findall(r"""\S+?=(?:'[^']*'|"[^"]*"|\S+)""", pairs))
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


def test_the_suite_of_the_documents_is_right(tmp_path: Path):
    (text,) = re.findall(r"```toml\n(.+?)```", (DOCS / "comparing.md").read_text(), flags=re.DOTALL)
    (tmp_path / "conf").symlink_to(PROJECT / "conf")
    (tmp_path / "mine.toml").write_text(text)
    runs = Suite.read(tmp_path / "mine.toml").runs()
    assert len(runs) == 12
    assert {run.config.num_server_rounds for run in runs} == {30}


def test_an_exported_model_is_used_as_the_documents_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    page = (DOCS / "runs.md").read_text()
    (snippet,) = re.findall(r"```python\n(import json\n.+?)```", page, flags=re.DOTALL)
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


def test_the_readmes_own_data_set_is_the_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Module and data of the example are all that the README's command needs."""
    page = (DOCS / "data-and-models.md").read_text()
    module, data, *_ = re.findall(r"```python\n(.+?)```", page, flags=re.DOTALL)
    (tmp_path / "scans.py").write_text(module)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PFEDGPA_TRUST", "scans")
    exec(data, {})
    commands = [given for given in RUN_CONFIGS if "scans:load" in given]
    assert len(commands) == 1  # the same in the README and on the page
    pairs = re.findall(r"""\S+?=(?:'[^']*'|[^\s"]+)""", commands[0].strip('"'))
    config = Config.from_flat(dict(flatten(tomllib.loads("\n".join(pairs)))))
    preflight(config)
    sizes = [len(client_data(config.data, 0, client, 10).train_labels) for client in range(10)]
    sys.modules.pop("scans")
    assert sum(sizes) == pytest.approx(480, abs=3)  # a fifth of each class is held out
