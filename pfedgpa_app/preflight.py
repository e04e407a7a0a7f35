"""What can be wrong with right settings: models, layers, devices, packages that are not there."""

from importlib.util import find_spec

import torch
from torch import nn

from pfedgpa_app.config import Config, ConfigError
from pfedgpa_app.models import ModelError, build_model, head_of, unfit_for_vmap
from pfedgpa_app.parameters import ParameterError, ParameterLayout
from pfedgpa_app.privacy import require_opacus, unfit_layers
from pfedgpa_app.randomness import resolve_device
from pfedgpa_app.strategies import STRATEGY_INFO

ENGINE_ON_FLOWER = (
    'client.engine = "vmap": is for `pfedgpa bench`, whose clients train in one process; '
    '`flwr run` gives each a process of its own, and right would be "loop"'
)


def preflight(config: Config, *, one_process: bool = False) -> nn.Module:
    """Build the model of a run, and try whatever else would only fail in its middle.

    ``one_process`` says that all clients train in one process, as in `pfedgpa bench`. Elsewhere
    there is nothing for ``client.engine = "vmap"`` to put together.

    Raises
    ------
    ConfigError
        With every problem.
    """
    problems = []
    try:
        model = build_model(config.model.name, config.data.info, config.seed)
        layout = ParameterLayout.of(model.state_dict(), config.diffusion.patterns)
        problems += [
            f'model.name = "{config.model.name}": {entry.name} is {entry.dtype}, which cannot be '
            "sent and averaged; right would be torch.float32 or torch.float16"
            for entry in layout.entries
            if entry.dtype.is_complex or not _has_numpy(entry.dtype)
        ]
        if STRATEGY_INFO[config.strategy].needs_linear_head:
            head_of(model)
        if config.privacy.is_on:
            require_opacus(config.privacy)
            problems += [
                f'model.name = "{config.model.name}": with privacy.mode = "{config.privacy.mode}", '
                + problem
                for problem in unfit_layers(model, config.data.info, config.privacy)
            ]
        if config.client.engine == "vmap":
            problems += [
                f'model.name = "{config.model.name}": with client.engine = "vmap", {problem}; '
                'right would be client.engine = "loop"'
                for problem in unfit_for_vmap(model, config.data.info)
            ]
    except ModelError as error:
        problems.append(str(error))
    except ConfigError as error:
        problems += error.problems
    except ParameterError as error:
        patterns = config.diffusion.generated_layers
        problems.append(f'diffusion.generated-layers = "{patterns}": {error}')
    if config.client.engine == "vmap" and not one_process:
        problems.append(ENGINE_ON_FLOWER)
    try:
        resolve_device(config.diffusion.device)
    except RuntimeError as error:
        problems.append(f"diffusion.{error}")
    if config.tracking and find_spec(config.tracking) is None:
        problems.append(
            f'tracking = "{config.tracking}": the package is not installed; right would be '
            f'pip install ".[{config.tracking}]" where the ServerApp runs'
        )
    if problems:
        raise ConfigError(problems)
    return model


def _has_numpy(dtype: torch.dtype) -> bool:
    """Return whether NumPy, and so Flower's arrays, has a type."""
    try:
        torch.empty(0, dtype=dtype).numpy()
    except TypeError:
        return False
    return True
