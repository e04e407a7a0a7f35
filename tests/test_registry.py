"""A strategy is named in every place that must know it, and the test says which one does not."""

import re
from pathlib import Path

from client_app.methods import METHODS
from pfedgpa_app.config import Config
from pfedgpa_app.strategies import STRATEGY_INFO, StrategySections
from server_app.strategies import STRATEGIES

PROJECT = Path(__file__).parents[1]
NAMES = list(STRATEGY_INFO)


def test_every_strategy_has_a_server_in_server_app_strategies():
    assert list(STRATEGIES) == NAMES


def test_every_strategy_has_a_method_in_client_app_methods():
    assert list(METHODS) == NAMES


def test_every_section_of_settings_is_that_of_a_strategy():
    sections = set(StrategySections.model_fields) - {"strategy"}
    assert sections <= {name.replace("-", "_") for name in NAMES}


def test_the_comment_in_pyproject_names_every_strategy():
    text = (PROJECT / "pyproject.toml").read_text()
    (comment,) = re.findall(r"^strategy = .*# (.+)$", text, flags=re.MULTILINE)
    assert comment.split(" | ") == NAMES


def test_the_table_of_rivals_names_every_strategy_but_pfedgpa():
    text = (PROJECT / "docs" / "rivals.md").read_text()
    heading, *rows = re.findall(r"^\| `([^`]+)` \|", text, flags=re.MULTILINE)
    assert heading == "strategy"
    assert ["pfedgpa", *rows] == NAMES


def test_a_strategy_nobody_knows_is_answered_with_those_that_are():
    problem = str(_refused({"strategy": "fedsgd"}))
    assert all(f"'{name}'" in problem for name in NAMES)


def _refused(flat: dict[str, object]) -> ValueError:
    try:
        Config.from_flat(flat)
    except ValueError as error:
        return error
    raise AssertionError("not refused")
