"""The settings of a run: one tree of pydantic models, built once from Flower's flat run config.

The keys, their defaults and what they mean stand in ``[tool.flwr.app.config]`` of pyproject.toml.
"""

import difflib
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from pfedgpa_app.contradictions import contradictions
from pfedgpa_app.files import native_path
from pfedgpa_app.section import Count, Scalar, Seed
from pfedgpa_app.sections import (
    DATASETS,
    MODEL_SHAPES,
    PARTITIONS,
    SITES,
    CheckpointConfig,
    ClientConfig,
    DataConfig,
    DatasetInfo,
    DiffusionConfig,
    ModelConfig,
    OnboardingConfig,
    PrivacyConfig,
    ServerConfig,
    below_home,
    by_x,
    xdg_folder,
)
from pfedgpa_app.strategies import STRATEGY_INFO, StrategySections

__all__ = [
    "DATASETS",
    "MODEL_SHAPES",
    "PARTITIONS",
    "SITES",
    "CheckpointConfig",
    "ClientConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "DatasetInfo",
    "DiffusionConfig",
    "ModelConfig",
    "OnboardingConfig",
    "PrivacyConfig",
    "ServerConfig",
    "below_home",
    "by_x",
    "flatten",
    "xdg_folder",
]

# Settings that had another name in earlier versions, whose runs and models are there still.
_RENAMED = {"data.image-shape": "data.shape"}
# Settings of earlier versions, which the folders of their runs name, and what is done now.
_REMOVED = {"diffusion.blocks": "whole", "diffusion.old-uploads": "kin"}


class ConfigError(ValueError):
    """Settings that a run cannot start with; the message lists every problem, one a line."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        lines = "\n".join(f"  - {problem}" for problem in problems)
        super().__init__(f"The configuration has {len(problems)} problem(s):\n{lines}")


class Config(StrategySections):
    """Everything a run depends on: the strategy and the sections of all, and what follows here."""

    seed: Seed = 0
    num_server_rounds: Count = 10
    output_dir: str = ""
    resume_from: str = ""
    tracking: Literal["", "tensorboard", "mlflow", "wandb"] = ""
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    client: ClientConfig = ClientConfig()
    server: ServerConfig = ServerConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    onboarding: OnboardingConfig = OnboardingConfig()
    privacy: PrivacyConfig = PrivacyConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    @classmethod
    def from_flat(cls, flat: Mapping[str, Any]) -> "Config":
        """Build the settings from a flat run config such as ``{"diffusion.start": 200}``.

        What an earlier version wrote is passed over where it asks for what is done now anyway.

        Raises
        ------
        ConfigError
            With every problem: unknown keys, wrong types, values out of range, contradictions.
        """
        known = cls().to_flat().keys()
        problems = {
            key: _unknown(key, value, known) for key, value in flat.items() if key not in known
        }
        sound = {key: value for key, value in flat.items() if key in known}
        try:
            config = cls.model_validate(_nest(sound))
        except ValidationError as error:
            problems |= _describe(error, sound)
            # The rest is judged as if the wrong values had not been given.
            config = cls.model_validate(
                _nest({k: v for k, v in sound.items() if k not in problems})
            )
        contrary = [
            message for keys, message in contradictions(config) if not keys & problems.keys()
        ]
        if problems or contrary:
            raise ConfigError([*problems.values(), *contrary])
        return config

    def to_flat(self) -> dict[str, Scalar]:
        """Return the settings as a flat run config, the inverse of `from_flat`."""
        return dict(flatten(self.model_dump(by_alias=True)))

    @classmethod
    def from_older(cls, flat: Mapping[str, Any]) -> "Config":
        """Build the settings from what `to_flat` returned, perhaps in an earlier version.

        Raises
        ------
        ConfigError
            As `from_flat`, of settings that are no longer there too.
        """
        return cls.from_flat(
            {
                _RENAMED.get(key, key): value
                for key, value in flat.items()
                if (key, value) not in _REMOVED.items()
            }
        )

    @property
    def changed(self) -> dict[str, Scalar]:
        """The settings that differ from the defaults, as a flat run config."""
        defaults = Config().to_flat()
        return {key: value for key, value in self.to_flat().items() if value != defaults[key]}

    @property
    def output_path(self) -> Path:
        """The folder of the runs, absolute."""
        if self.output_dir:
            return below_home(self.output_dir)
        return xdg_folder("XDG_DATA_HOME", ".local/share") / "runs"

    @property
    def earlier_path(self) -> Path | None:
        """The folder of the run to go on from, absolute; None if there is none."""
        if not self.resume_from:
            return None
        return self.output_path / os.path.expanduser(native_path(self.resume_from))

    @property
    def decisive(self) -> dict[str, Scalar]:
        """The settings that decide about results, as a flat run config.

        Where the output goes, who else is told, how far the run goes, what it goes on from, how
        long it waits for clients and when it judges are not among them, nor are the settings of
        strategies that the run does not have.
        """
        free = {
            "output-dir",
            "num-server-rounds",
            "resume-from",
            "tracking",
            "checkpoint.every",
            "server.min-available-nodes",
            "server.round-timeout",
            "server.join-timeout",
            "server.evaluate-every",
        }
        if STRATEGY_INFO[self.strategy].depends_on_length:
            free.remove("num-server-rounds")
        sections = STRATEGY_INFO.keys() - {self.strategy}
        if self.strategy != "pfedgpa":
            free |= {f"onboarding.{name}" for name in ("rounds", "guidance", "start", "num-steps")}
            sections.add("diffusion")
        return {
            key: value
            for key, value in self.to_flat().items()
            if key not in free and key.partition(".")[0] not in sections
        }

    def differences(self, other: "Config") -> dict[str, tuple[Scalar, Scalar]]:
        """Return the settings that decide about results and differ, with both values."""
        theirs = other.to_flat()
        return {
            key: (value, theirs[key])
            for key, value in self.decisive.items()
            if value != theirs[key]
        }


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Turn ``{"seed": 0, "a.b": 1}`` into ``{"seed": 0, "a": {"b": 1}}``."""
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        section, _, name = key.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[name] = value
    return nested


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the flat keys and the values of nested settings, the way Flower flattens them."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _unknown(key: str, value: object, known: Iterable[str]) -> str:
    if key in _REMOVED:
        return f'{key} = {_show(value)}: is no setting any more; every run does "{_REMOVED[key]}"'
    close = difflib.get_close_matches(key, known, n=1)
    hint = f", did you mean {close[0]}?" if close else ""
    return f"{key} = {_show(value)}: no such setting{hint}"


def _describe(error: ValidationError, flat: Mapping[str, Any]) -> dict[str, str]:
    """Turn pydantic's errors into one sentence a key; a union reports one error an alternative."""
    wanted: dict[str, list[str]] = {}
    for item in error.errors():
        location = [str(part) for part in item["loc"]]
        key = next(key for n in (1, 2) if (key := ".".join(location[:n])) in flat)
        wanted.setdefault(key, []).append(_wanted(item))
    return {
        key: f"{key} = {_show(flat[key])}: "
        + " or ".join(dict.fromkeys(texts)).replace(" or should be ", " or ")
        for key, texts in wanted.items()
    }


def _wanted(item: Any) -> str:
    """Say what would have been right instead of one of pydantic's errors."""
    match item["type"]:
        case "literal_error":
            return f"should be {item['ctx']['expected']}"
        case "string_pattern_mismatch" if "x[1-9]" in item["ctx"]["pattern"]:
            return (
                'should read like "1x28x28" (channels x height x width) or "30" (features of a '
                "table)"
            )
        case "string_pattern_mismatch" if ":" not in item["ctx"]["pattern"]:
            return 'should be patterns of parameter names, such as "*" or "fc.*,head.*"'
        case "string_pattern_mismatch":
            return 'should read like "package.module:function"'
        case _:
            message: str = item["msg"]
            return (
                message.removeprefix("Input ")
                .replace("a valid integer", "a whole number")
                .replace("valid ", "")
            )


def _show(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)
