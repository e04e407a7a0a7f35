"""Settings: the defaults, what is refused and with what words, and where things are kept."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from pfedgpa_app.config import (
    DATASETS,
    MODEL_SHAPES,
    Config,
    ConfigError,
    DataConfig,
    by_x,
    flatten,
)

PROJECT = Path(__file__).parents[1]
OWN_DATA = {"data.dataset": "my.package:load", "model.name": "my.package:net"}
SITES = {"data.dataset": "sites", "data.shape": "1x28x28", "model.name": "cnn-28x28"}

TABLE = {"data.dataset": "breast-cancer", "data.partition": "iid", "model.name": "mlp"}


def problems(flat: dict[str, Any]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        Config.from_flat(flat)
    return caught.value.problems


def the_problem(flat: dict[str, Any]) -> str:
    (problem,) = problems(flat)
    return problem


def test_pyproject_names_every_setting_with_its_default():
    pyproject = tomllib.loads((PROJECT / "pyproject.toml").read_text())
    written = dict(flatten(pyproject["tool"]["flwr"]["app"]["config"]))
    defaults = Config().to_flat()
    assert written == defaults
    assert {key: type(value) for key, value in written.items()} == {
        key: type(value) for key, value in defaults.items()
    }


def test_an_empty_run_config_gives_the_defaults():
    assert Config.from_flat({}) == Config()


@pytest.mark.parametrize("file", sorted((PROJECT / "conf").glob("*.toml")), ids=lambda f: f.stem)
def test_every_file_in_conf_is_a_right_configuration(file: Path):
    written = dict(flatten(tomllib.loads(file.read_text())))
    assert written
    assert Config.from_flat(written).to_flat().items() >= written.items()


@given(
    seed=st.integers(0, 2**31 - 1),
    rate=st.floats(1e-6, 10),
    fidelity=st.floats(0, 1),
    rank=st.one_of(st.just("auto"), st.integers(1, 100)),
    dataset=st.sampled_from(sorted(DATASETS)),
    root=st.text(),
)
def test_flat_settings_survive_the_round_trip(
    seed: int, rate: float, fidelity: float, rank: int | str, dataset: str, root: str
):
    models = {"breast-cancer": "mlp", "flights": "mlp", "watch": "cnn-1d"}
    given_settings = {
        "seed": seed,
        "client.learning-rate": rate,
        "diffusion.fidelity": fidelity,
        "diffusion.rank": rank,
        "data.dataset": dataset,
        "data.root": root,
        "data.partition": "iid",
        "model.name": models.get(dataset, "resnet18"),
    }
    config = Config.from_flat(given_settings)
    assert config.to_flat() == Config().to_flat() | given_settings
    assert Config.from_flat(config.to_flat()) == config


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"strategy": "fedprox"}, r'strategy = "fedprox" right would be "loop"; .* fedavg-ft'),
        (
            {"privacy.mode": "example", "privacy.epsilon": 1.0},
            r'privacy\.mode = "example" right would be "loop"; Opacus',
        ),
        (
            {"client.precision": "bf16"},
            r'client\.precision = "bf16" right would be "loop"; .* fp32',
        ),
    ],
)
def test_what_clients_cannot_do_as_one_graph_is_refused(settings: dict[str, Any], reason: str):
    Config.from_flat(settings)
    problem = the_problem({**settings, "client.engine": "vmap"})
    assert re.fullmatch(rf'client\.engine = "vmap": with {reason}.*', problem)


def test_the_underscores_of_python_are_not_keys():
    assert "did you mean data.train-samples?" in the_problem({"data.train_samples": 5})


def test_an_unknown_key_is_named_with_the_nearest_known_one():
    assert the_problem({"diffusion.fidelty": 0.5}) == (
        "diffusion.fidelty = 0.5: no such setting, did you mean diffusion.fidelity?"
    )


def test_an_unknown_key_like_no_other_is_named_alone():
    assert the_problem({"xyzzy": "a"}) == 'xyzzy = "a": no such setting'


@pytest.mark.parametrize("section", ["data", "client"])
def test_a_value_in_place_of_a_section_is_refused(section: str):
    assert the_problem({section: 3}).startswith(f"{section} = 3: no such setting")


@pytest.mark.parametrize(
    ("key", "value", "right"),
    [
        ("seed", True, "true: should be a whole number"),
        ("seed", None, "None: should be a whole number"),
        ("client.batch-size", 2.0, "2.0: should be a whole number"),
        ("client.batch-size", "50", '"50": should be a whole number'),
        ("client.learning-rate", "0.1", '"0.1": should be a number'),
        ("client.learning-rate", True, "true: should be a number"),
        ("output-dir", 3, "3: should be a string"),
        ("diffusion.rank", True, "true: should be a whole number or 'auto'"),
        ("strategy", "fedsgd", "\"fedsgd\": should be 'pfedgpa', 'local', 'fedavg', 'fedavg-ft'"),
        ("data.dataset", "mnist", 'should read like "package.module:function"'),
        ("model.name", "my-net:f", 'should read like "package.module:function"'),
        ("data.shape", "28 x 28", '"28 x 28": should read like "1x28x28"'),
        ("data.shape", "0x28x28", 'should read like "1x28x28"'),
        ("seed", -1, "-1: should be greater than or equal to 0"),
        ("seed", 2**31, "should be less than 2147483648"),
        ("num-server-rounds", 0, "0: should be greater than or equal to 1"),
        ("server.fraction-train", 0.0, "0.0: should be greater than 0"),
        ("server.fraction-train", 1.1, "1.1: should be less than or equal to 1"),
        ("data.test-fraction", 1.0, "1.0: should be less than 1"),
        ("client.momentum", 1.0, "1.0: should be less than 1"),
        ("client.learning-rate", 0.0, "0.0: should be greater than 0"),
        ("client.weight-decay", float("inf"), "inf: should be a finite number"),
        ("diffusion.fidelity", float("nan"), "nan: should be"),
        ("diffusion.beta-start", 0.0, "0.0: should be greater than or equal to 0.000001"),
        ("diffusion.rank", 0, "0: should be greater than or equal to 1 or 'auto'"),
        ("diffusion.generated-layers", "", '"": '),
    ],
)
def test_a_wrong_value_is_named_with_what_would_be_right(key: str, value: object, right: str):
    problem = the_problem({key: value})
    assert problem.startswith(f"{key} = ")
    assert right in problem


def test_a_list_of_patterns_without_a_pattern_is_refused():
    assert "diffusion.generated-layers" in the_problem({"diffusion.generated-layers": " , "})


def test_an_integer_is_right_where_a_float_is_wanted():
    flat = Config.from_flat({"client.weight-decay": 1}).to_flat()
    assert flat["client.weight-decay"] == 1.0
    assert isinstance(flat["client.weight-decay"], float)


def test_every_problem_is_reported_at_once():
    found = problems(
        {
            "sed": 1,
            "num-server-rounds": 0,
            "client.batch-size": "50",
            "diffusion.beta-start": 0.5,
            "model.name": "cnn-cifar",
        }
    )
    named = [problem.partition(" = ")[0] for problem in found]
    assert sorted(named) == [
        "client.batch-size",
        "diffusion.beta-start",
        "model.name",
        "num-server-rounds",
        "sed",
    ]


def test_the_message_lists_the_problems_one_a_line():
    with pytest.raises(ConfigError) as caught:
        Config.from_flat({"seed": -1, "num-server-rounds": 0})
    first, *lines = str(caught.value).splitlines()
    assert first == "The configuration has 2 problems:"
    assert lines == [f"  - {problem}" for problem in caught.value.problems]


@pytest.mark.parametrize(
    ("flat", "problem"),
    [
        (
            {**OWN_DATA, "data.num-classes": 10},
            'data.shape = "": data.dataset = "my.package:load" is an own data set',
        ),
        (
            {**OWN_DATA, "data.shape": "1x28x28"},
            'data.num-classes = 0: data.dataset = "my.package:load" is an own data set',
        ),
        (
            {**OWN_DATA, "data.shape": "1x28x28", "data.num-classes": 1},
            "data.num-classes = 1: ",
        ),
        (
            {**OWN_DATA, "data.shape": "1x28x28", "data.class-names": "one"},
            'data.num-classes = 0: data.dataset = "my.package:load" is an own data set',
        ),
        (
            {"data.class-names": "zero,one"},
            'data.class-names = "zero,one": has 2 names for 10 classes',
        ),
        (
            {**SITES, "data.num-classes": 3, "data.class-names": "a,b"},
            'data.class-names = "a,b": has 2 names for 3 classes; right would be one each',
        ),
        (
            {**SITES, "data.class-names": "a,b,a"},
            'data.class-names = "a,b,a": has "a" more than once',
        ),
        (
            {"data.dominant-classes": 11},
            'data.dominant-classes = 11, with data.partition = "dominant-classes": digits has only '
            "10 classes, so at most 10",
        ),
        (
            {"data.partition": "pathological", "data.classes-per-client": 11},
            'data.classes-per-client = 11, with data.partition = "pathological": digits has only '
            "10 classes, so at most 10",
        ),
        (
            {"data.dataset": "fashion-mnist"},
            'model.name = "cnn-8x8": takes *x8x8 (* is any) and fashion-mnist has 1x28x28; '
            "right would be cnn-28x28 or resnet18",
        ),
        (
            {**TABLE, "model.name": "cnn-8x8"},
            'model.name = "cnn-8x8": takes *x8x8 (* is any) and breast-cancer has 30; '
            "right would be mlp",
        ),
        (
            {**SITES, "data.num-classes": 2, "data.shape": "2x5x5x5"},
            'model.name = "cnn-28x28": takes *x28x28 (* is any) and sites has 2x5x5x5; '
            "right would be a function of your own, package.module:function",
        ),
        (
            {**TABLE, "data.shift": "rotation"},
            'data.shift = "rotation": is for images, and breast-cancer has the shape 30; '
            'right would be "none" or "permuted-labels"',
        ),
        (
            {"diffusion.start": 1000},
            "diffusion.start = 1000: the forward process has the timesteps 0 to 999",
        ),
        (
            {"diffusion.num-steps": 201, "diffusion.start": 200},
            "diffusion.num-steps = 201: there are only 200 timesteps from diffusion.start = 200",
        ),
        (
            {"diffusion.beta-start": 0.5},
            "diffusion.beta-start = 0.5: more than diffusion.beta-end = 0.02",
        ),
        (
            {"data.partition": "natural"},
            'data.partition = "natural": the examples of digits have no owners; right would be '
            "another partition, watch or flights, or a data set of your own",
        ),
        (
            {
                "data.dataset": "watch",
                "data.partition": "natural",
                "data.test-uniform-fraction": 0.5,
                "model.name": "cnn-1d",
            },
            'data.test-uniform-fraction = 0.5: with data.partition = "natural"',
        ),
        (
            {"diffusion.num-steps": 1000},
            "diffusion.num-steps = 1000: there are only 999 timesteps",
        ),
        (
            {"onboarding.late-clients": 2},
            "onboarding.join-round = 0: with onboarding.late-clients = 2, the round in which they "
            "join should be 2 to num-server-rounds = 10",
        ),
        (
            {"onboarding.late-clients": 2, "onboarding.join-round": 11},
            "onboarding.join-round = 11: with onboarding.late-clients = 2",
        ),
        (
            {"diffusion.start": 999, "diffusion.beta-end": 0.5},
            "diffusion.start = 999: nothing of the parameters is left at this timestep; right "
            "would be an earlier one, or less noise than diffusion.beta-end = 0.5 adds",
        ),
        (
            {"onboarding.start": 900, "diffusion.beta-end": 0.5},
            "onboarding.start = 900: nothing of the parameters is left at this timestep",
        ),
        ({"diffusion.space": "raw"}, 'diffusion.start = "auto": follows from the noise floor'),
        ({"onboarding.join-round": 5}, "onboarding.join-round = 5: no client joins late"),
    ],
)
def test_a_contradiction_is_named_with_what_would_be_right(flat: dict[str, Any], problem: str):
    assert the_problem(flat).startswith(problem)


@pytest.mark.parametrize(
    "flat",
    [
        {"data.dominant-classes": 10},
        {"data.partition": "pathological", "data.classes-per-client": 10},
        {"data.partition": "iid", "data.dominant-classes": 11, "data.classes-per-client": 11},
        {"diffusion.start": 999},
        {"diffusion.num-steps": 200, "diffusion.start": 200},
        {"diffusion.num-steps": 999},
        {"onboarding.late-clients": 3, "onboarding.join-round": 10},
        {"diffusion.beta-start": 0.02},
        {"diffusion.beta-end": 0.5},
    ],
)
def test_what_just_fits_together_is_right(flat: dict[str, Any]):
    assert Config.from_flat(flat).to_flat().items() >= flat.items()


@pytest.mark.parametrize(
    ("flat", "wrong"),
    [
        ({"data.dataset": "mnist", "model.name": "cnn-28x28"}, "data.dataset"),
        ({"data.dataset": "cifar10", "model.name": "cnn"}, "model.name"),
        ({"data.partition": "sorted", "data.dominant-classes": 11}, "data.partition"),
        ({"diffusion.start": "200", "diffusion.num-steps": 500}, "diffusion.start"),
        ({"diffusion.num-timesteps": 0, "diffusion.start": 2000}, "diffusion.num-timesteps"),
        ({"diffusion.beta-end": 2.0, "diffusion.beta-start": 0.5}, "diffusion.beta-end"),
        (
            {**OWN_DATA, "data.shape": "28*28", "data.num-classes": 10},
            "data.shape",
        ),
    ],
)
def test_a_contradiction_with_a_wrong_value_is_not_reported_twice(flat: dict[str, Any], wrong: str):
    assert the_problem(flat).startswith(f"{wrong} = ")


def test_an_incomplete_own_data_set_does_not_hide_other_contradictions():
    found = problems({**OWN_DATA, "diffusion.start": 5000, "diffusion.beta-start": 0.5})
    assert sorted(problem.partition(" = ")[0] for problem in found) == [
        "data.num-classes",
        "data.shape",
        "diffusion.beta-start",
        "diffusion.start",
    ]


def test_classes_are_called_as_class_names_says_or_as_their_labels():
    named = Config.from_flat({**SITES, "data.class-names": "benign, malignant"}).data
    assert named.classes == ("benign", "malignant")
    assert named.info == ((1, 28, 28), 2)
    assert Config().data.classes == tuple("0123456789")
    assert named.labels == {"benign": 0, "malignant": 1}


@pytest.mark.parametrize("name", sorted(DATASETS))
def test_a_data_set_has_a_name_for_each_class_and_folders_may_have_its_number(name: str):
    data = DataConfig(dataset=name, partition="iid")
    assert len(set(data.classes)) == data.info.num_classes
    assert [data.labels[each] for each in data.classes] == list(range(data.info.num_classes))
    assert data.labels[str(data.info.num_classes - 1)] == data.info.num_classes - 1


def test_how_a_data_set_is_partitioned_does_not_concern_what_sites_bring():
    for partition in ("dominant-classes", "pathological"):
        flat = {**SITES, "data.num-classes": 2, "data.partition": partition}
        few = {**flat, "data.dominant-classes": 5, "data.classes-per-client": 5}
        assert Config.from_flat(few).data.info.num_classes == 2


@pytest.mark.parametrize(("written", "shape"), [("30", (30,)), ("2x500", (2, 500))])
def test_an_example_may_have_any_shape(written: str, shape: tuple[int, ...]):
    flat = {**OWN_DATA, "data.num-classes": 2, "data.shape": written, "data.partition": "iid"}
    info = Config.from_flat({**flat, "data.shift": "permuted-labels"}).data.info
    assert info == (shape, 2)
    assert not info.is_image


def test_an_own_data_set_is_as_its_settings_say():
    config = Config.from_flat({**OWN_DATA, "data.shape": "3x64x48", "data.num-classes": 7})
    assert config.data.info == ((3, 64, 48), 7)


@pytest.mark.parametrize("dataset", DATASETS)
@pytest.mark.parametrize("model", MODEL_SHAPES)
def test_a_model_is_right_exactly_for_data_of_its_size(dataset: str, model: str):
    flat = {"data.dataset": dataset, "model.name": model, "data.partition": "iid"}
    shape, sizes = by_x(DATASETS[dataset].shape), by_x(MODEL_SHAPES[model])
    if re.fullmatch(sizes.replace("*", r"\d+"), shape):
        assert Config.from_flat(flat).data.info == DATASETS[dataset]
    else:
        assert the_problem(flat).startswith(f'model.name = "{model}"')


def test_patterns_are_separated_by_commas_and_stripped():
    config = Config.from_flat({"diffusion.generated-layers": "fc.*, conv?.weight ,"})
    assert config.diffusion.patterns == ("fc.*", "conv?.weight")


def test_settings_are_frozen_and_hashable():
    config = Config.from_flat({"seed": 1})
    with pytest.raises(ValidationError, match="frozen"):
        config.seed = 2
    with pytest.raises(ValidationError, match="frozen"):
        config.data.num_groups = 2
    assert {config: "found"}[Config(seed=1)] == "found"


def test_folders_are_below_the_home_folder_where_nothing_is_said(own_home: Path):
    config = Config()
    assert config.output_path == own_home / ".local/share/pfedgpa/runs"
    assert config.data.root_path == own_home / ".cache/pfedgpa"


def test_folders_follow_the_xdg_variables(own_home: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_DATA_HOME", "/var/data")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/cache")
    config = Config()
    assert config.output_path == Path("/var/data/pfedgpa/runs")
    assert config.data.root_path == Path("/var/cache/pfedgpa")


def test_a_relative_xdg_variable_is_ignored(own_home: Path, monkeypatch: pytest.MonkeyPatch):
    """As the XDG base directory specification demands; the working directory must not matter."""
    monkeypatch.setenv("XDG_DATA_HOME", "data")
    assert Config().output_path == own_home / ".local/share/pfedgpa/runs"


@pytest.mark.parametrize(
    ("given_path", "expected"),
    [("/srv/runs", "/srv/runs"), ("runs", "{home}/runs"), ("~/runs", "{home}/runs")],
)
def test_given_folders_are_absolute_or_below_the_home_folder(
    own_home: Path, monkeypatch: pytest.MonkeyPatch, given_path: str, expected: str
):
    monkeypatch.setenv("XDG_DATA_HOME", "/var/data")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/cache")
    config = Config.from_flat({"output-dir": given_path, "data.root": given_path})
    assert str(config.output_path) == expected.format(home=own_home)
    assert str(config.data.root_path) == expected.format(home=own_home)


def test_a_diffusion_model_decides_about_the_results_of_pfedgpa_alone():
    for strategy, matters in (("pfedgpa", True), ("fedavg", False), ("local", False)):
        one = Config.from_flat({"strategy": strategy})
        for key, value in (("diffusion.fidelity", 0.9), ("onboarding.guidance", 1.0)):
            other = Config.from_flat({"strategy": strategy, key: value})
            assert bool(one.differences(other)) == matters
        late = {"onboarding.late-clients": 2, "onboarding.join-round": 3}
        assert one.differences(Config.from_flat({"strategy": strategy, **late}))
        assert one.differences(Config.from_flat({"strategy": strategy, "seed": 1}))
        assert one.differences(Config.from_flat({"strategy": "fedavg-ft"}))


@pytest.mark.parametrize(
    ("key", "value"), [("server.round-timeout", 60.0), ("server.min-available-nodes", 3)]
)
def test_how_long_a_run_waits_for_clients_decides_nothing(key: str, value: float):
    assert not Config().differences(Config.from_flat({key: value}))


@pytest.mark.parametrize(("strategy", "decides"), [("fedavg", False), ("floco", True)])
def test_the_length_of_a_run_decides_only_where_it_fixes_a_round(strategy: str, decides: bool):
    short = Config(strategy=strategy, num_server_rounds=4)
    longer = Config(strategy=strategy, num_server_rounds=8)
    assert bool(short.differences(longer)) == decides
