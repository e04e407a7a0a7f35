"""What is chosen by name is named in every place that must know it; a test says which lacks it."""

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest

from client_app.methods import METHODS, Method
from pfedgpa_app.config import Config, ConfigError, ModelConfig
from pfedgpa_app.models import MODELS
from pfedgpa_app.section import Section
from pfedgpa_app.strategies import STRATEGY_INFO, StrategySections
from server_app.strategies import STRATEGIES, ClientwiseFedAvg

PROJECT = Path(__file__).parents[1]
NAMES = list(STRATEGY_INFO)


@pytest.mark.parametrize(
    ("classes", "base", "others"),
    [(STRATEGIES, ClientwiseFedAvg, set()), (METHODS, Method, {"heads"})],
)
def test_every_file_of_a_strategy_is_registered(classes: dict, base: type, others: set[str]):
    assert all(issubclass(each, base) for each in classes.values())
    folder = Path(inspect.getfile(base)).parent
    registered = {inspect.getfile(each) for each in classes.values()}
    files = {str(file) for file in folder.glob("*.py") if file.stem not in {"__init__", *others}}
    assert registered == files


def test_the_signatures_of_the_documents_are_those_of_the_code():
    text = (PROJECT / "docs" / "contributing.md").read_text()
    documented = set(re.findall(r"`(\w+\([^`]*\) -> [^`]+)`", text))
    found = set()
    for base in (ClientwiseFedAvg, Method):
        for node in ast.walk(ast.parse(Path(inspect.getfile(base)).read_text())):
            if isinstance(node, ast.FunctionDef) and node.returns:
                arguments = ast.unparse(node.args).removeprefix("self, ")
                found.add(f"{node.name}({arguments}) -> {ast.unparse(node.returns)}")
    assert len(documented) == 8
    assert documented <= found


def test_every_section_of_strategies_is_that_of_one():
    sections = set(StrategySections.model_fields) - {"strategy"}
    assert sections <= {name.replace("-", "_") for name in NAMES}


def test_the_table_of_strategies_names_every_strategy_but_pfedgpa():
    text = (PROJECT / "docs" / "comparing.md").read_text()
    heading, *rows = re.findall(r"^\| `([^`]+)` \|", text, flags=re.MULTILINE)
    assert heading == "strategy"
    assert ["pfedgpa", *rows] == NAMES


def test_a_strategy_nobody_knows_is_answered_with_those_that_are():
    with pytest.raises(ConfigError) as caught:
        Config.from_flat({"strategy": "fedsgd"})
    assert all(f"'{name}'" in str(caught.value) for name in NAMES)


def test_every_model_may_be_chosen():
    assert list(MODELS) == names_in(ModelConfig.model_fields["name"].annotation)


def names_in(annotation: Any) -> list[str]:
    """Return the names that a type allows, those of a union's parts too."""
    if get_origin(annotation) is Literal:
        return [name for name in get_args(annotation) if isinstance(name, str)]
    return [name for part in get_args(annotation) for name in names_in(part)]


def choices(section: type[Section], prefix: str = "") -> Iterator[tuple[str, list[str]]]:
    """Yield the settings that are chosen by name, with the names."""
    for name, field in section.model_fields.items():
        key = prefix + name.replace("_", "-")
        if isinstance(field.default, Section):
            yield from choices(type(field.default), f"{key}.")
        elif names := names_in(field.annotation):
            yield key, names


def comments() -> dict[str, str]:
    """Return what pyproject.toml says of each setting."""
    found, section = {}, None
    for line in (PROJECT / "pyproject.toml").read_text().splitlines():
        if line.startswith("["):
            _, is_setting, rest = line.strip("[]").partition("tool.flwr.app.config")
            section = f"{rest.strip('.')}.".lstrip(".") if is_setting else None
        elif section is not None and (match := re.match(r"(\S+) = .*?# (.+)", line)):
            found[section + match[1]] = match[2]
    return found


def test_the_comments_in_pyproject_and_the_table_of_settings_are_those_of_the_settings():
    """Descriptions stand in pyproject.toml alone; docs/settings.md has the choices once more."""
    settings, described = Config().to_flat(), comments()
    assert described.keys() == settings.keys()
    text = (PROJECT / "docs" / "settings.md").read_text()
    rows = {
        key: row
        for keys, row in re.findall(r"^\| (`.+?`) \| (.+) \|$", text, flags=re.MULTILINE)
        for key in re.findall("`([^`]+)`", keys)
    }
    assert rows.keys() <= settings.keys()
    for key, names in choices(Config):
        assert [name for name in names if name not in described[key]] == []
        in_row = re.findall(r"`([^`]+)`", rows.get(key, ""))
        assert [name for name in names if name and key in rows and name not in in_row] == []
    often = re.findall(r"`([a-z.-]+)` \(([\d.]+)", text.partition("Often changed:")[2])
    assert often
    assert [(key, value) for key, value in often if str(settings[key]) != value] == []
