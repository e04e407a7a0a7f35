"""Which way imports run, and what no source may use."""

import ast
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]
PACKAGES = ("pfedgpa_app", "client_app", "server_app")
SOURCES = sorted(file for package in PACKAGES for file in (PROJECT / package).rglob("*.py"))

# What may not be imported where. In pfedgpa_app/data, flwr_datasets' partitioners are welcome.
FORBIDDEN = {
    "pfedgpa_app": {"flwr", "flwr_datasets", "client_app", "server_app"},
    "client_app": {"server_app"},
    "server_app": {"client_app"},
}
EXPLICIT_NUMPY_RANDOM = {"default_rng", "Generator", "SeedSequence"}
SEEDED = {"torch", "torch.cuda", "torch.default_generator"}
DRAWS = {"rand", "randn", "randint", "randperm", "normal", "multinomial", "bernoulli"}


def violations(
    rule: Callable[[str], list[str]], files: Iterable[Path] = SOURCES
) -> dict[str, list[str]]:
    """Return what a rule finds in each file, by its path; files with nothing are left out."""
    found = {str(each.relative_to(PROJECT)): rule(each.read_text("utf-8")) for each in files}
    return {file: names for file, names in found.items() if names}


def imported(source: str) -> Iterator[str]:
    """Yield the full names of the imported modules, and of what is imported from them."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def used(source: str) -> Iterator[tuple[str, list[str], int]]:
    """Yield the dotted name, keywords and number of arguments of every call."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            keywords = [str(keyword.arg) for keyword in node.keywords]
            yield ast.unparse(node.func), keywords, len(node.args)


def global_randomness(source: str) -> list[str]:
    """Return what draws from a global generator, or seeds it other than in a fork of it."""
    found = [name for name in imported(source) if name.partition(".")[0] == "random"]
    for name, keywords, num_arguments in used(source):
        module, _, function = name.rpartition(".")
        if (
            (module == "torch" and function in DRAWS and "generator" not in keywords)
            or (module.endswith("np.random") and function not in EXPLICIT_NUMPY_RANDOM)
            or (function == "default_rng" and num_arguments == 0)
            or (function.startswith("manual_seed") and module in SEEDED)
        ):
            found.append(name)
    return found


def unsafe_files(source: str) -> list[str]:
    """Return what reads or writes pickles."""
    modules = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve"}
    found = [name for name in imported(source) if name.partition(".")[0] in modules]
    return found + [
        name
        for name, keywords, _ in used(source)
        if name in ("torch.load", "torch.save") or "allow_pickle" in keywords
    ]


def texts_of_the_locale(source: str) -> list[str]:
    """Return the calls that read or write text in whatever encoding the locale has."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name, call = ast.unparse(node.func), ast.unparse(node)
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        no_text = ("os.open", "Image.open", "archive.open")
        is_binary = re.search(r"'[rwxa]+b'", call) or name in no_text
        opens = name.rpartition(".")[2] in ("open", "fdopen", "NamedTemporaryFile")
        of_path = name.endswith((".read_text", ".write_text"))
        if of_path or keywords.get("text") == "True" or (opens and not is_binary):
            found += [] if "encoding" in keywords else [call]
    return found


def test_text_is_utf_8_whatever_the_locale():
    others = [file for name in ("benchmarks", "docker") for file in (PROJECT / name).glob("*.py")]
    assert violations(texts_of_the_locale, [*SOURCES, *others]) == {}


@pytest.mark.parametrize(
    "source",
    [
        "open(name)",
        "file.open('a')",
        "file.open(newline='')",
        "file.read_text(errors='replace')",
        "file.write_text(text)",
        "tempfile.NamedTemporaryFile('w', suffix='.toml')",
        "subprocess.run(command, text=True)",
    ],
)
def test_the_search_for_texts_of_the_locale_finds_them(source: str):
    assert texts_of_the_locale(source) == [source]


def test_imports_run_one_way():
    for file in SOURCES:
        package, *inner = file.relative_to(PROJECT).parts
        forbidden = FORBIDDEN[package]
        if inner[0] == "data":
            forbidden = forbidden - {"flwr_datasets"}
        names = imported(file.read_text())
        assert not [name for name in names if name.partition(".")[0] in forbidden], file


def test_nothing_is_pickled():
    assert violations(unsafe_files) == {}


def test_nothing_draws_from_a_global_generator():
    # The one place that seeds what models of a user's draw from, and puts it back.
    seeding = {"random", "np.random.get_state", "np.random.seed", "np.random.set_state"}
    seeding |= {"torch.default_generator.manual_seed", "torch.cuda.manual_seed_all"}
    ((file, names),) = violations(global_randomness).items()
    assert (file, {*names}) == ("pfedgpa_app/randomness.py", seeding)


@pytest.mark.parametrize(
    "source",
    [
        "import random",
        "from random import shuffle",
        "torch.randn(3)",
        "np.random.rand(3)",
        "np.random.seed(0)",
        "np.random.default_rng()",
        "torch.manual_seed(0)",
    ],
)
def test_the_search_for_global_generators_finds_them(source: str):
    assert global_randomness(source)


@pytest.mark.parametrize(
    "source", ["import pickle", "torch.load(file)", "np.load(file, allow_pickle=True)"]
)
def test_the_search_for_pickles_finds_them(source: str):
    assert unsafe_files(source)


def test_the_search_for_imports_finds_them():
    source = "import flwr.app\ndef f():\n    from client_app import training, app as other"
    assert list(imported(source)) == ["flwr.app", "client_app.training", "client_app.app"]


def test_every_package_has_sources():
    assert {file.relative_to(PROJECT).parts[0] for file in SOURCES} == set(PACKAGES)
