"""The settings of a run: a tree of pydantic models, built from Flower's flat run config.

The keys, their defaults and their meanings are in ``[tool.flwr.app.config]`` of pyproject.toml.
"""

import difflib
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from pfedgpa_app.data_section import DATASETS as DATASETS
from pfedgpa_app.data_section import PARTITIONS as PARTITIONS
from pfedgpa_app.data_section import SITES as SITES
from pfedgpa_app.data_section import DataConfig as DataConfig
from pfedgpa_app.data_section import DatasetInfo as DatasetInfo
from pfedgpa_app.data_section import by_x as by_x
from pfedgpa_app.files import count_of, native_path
from pfedgpa_app.files import home_path as home_path
from pfedgpa_app.files import xdg_folder as xdg_folder
from pfedgpa_app.section import Contradiction, Count, Scalar, Seed
from pfedgpa_app.sections import MODEL_SHAPES as MODEL_SHAPES
from pfedgpa_app.sections import CheckpointConfig
from pfedgpa_app.sections import ClientConfig as ClientConfig
from pfedgpa_app.sections import DiffusionConfig as DiffusionConfig
from pfedgpa_app.sections import ModelConfig as ModelConfig
from pfedgpa_app.sections import OnboardingConfig as OnboardingConfig
from pfedgpa_app.sections import PrivacyConfig as PrivacyConfig
from pfedgpa_app.sections import ServerConfig as ServerConfig
from pfedgpa_app.strategies import PLAIN_STRATEGIES, STRATEGY_INFO, StrategySections


class ConfigError(ValueError):
    """Invalid settings; the message lists every problem, one per line."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        lines = "\n".join(f"  - {problem}" for problem in problems)
        super().__init__(f"The configuration has {count_of(len(problems), 'problem')}:\n{lines}")


class Config(StrategySections):
    """All settings of a run."""

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

        Raises `ConfigError` with every problem: unknown keys, wrong types, values out of range,
        contradictions.
        """
        known = cls().to_flat().keys()
        problems = [_unknown(key, value, known) for key, value in flat.items() if key not in known]
        left = {key: value for key, value in flat.items() if key in known}
        wrong = set(flat.keys() - known)
        while True:
            try:
                config = cls.model_validate(_nest(left))
            except ValidationError as error:
                problems += _describe(error, left, wrong)
                # The rest is validated with defaults in place of the wrong values.
                left = {key: value for key, value in left.items() if key not in wrong}
                continue
            if problems:
                raise ConfigError(problems)
            return config

    def to_flat(self) -> dict[str, Scalar]:
        """Return the settings as a flat run config, the inverse of `from_flat`."""
        return dict(flatten(self.model_dump(by_alias=True)))

    @property
    def changed(self) -> dict[str, Scalar]:
        """The settings that differ from the defaults, as a flat run config."""
        defaults = Config().to_flat()
        return {key: value for key, value in self.to_flat().items() if value != defaults[key]}

    @property
    def output_path(self) -> Path:
        """The folder of the runs, absolute."""
        if self.output_dir:
            return home_path(self.output_dir)
        return xdg_folder("XDG_DATA_HOME", ".local/share") / "runs"

    @property
    def earlier_path(self) -> Path | None:
        """The folder of the run to go on from, absolute; None if there is none."""
        if not self.resume_from:
            return None
        return self.output_path / os.path.expanduser(native_path(self.resume_from))

    @property
    def decisive(self) -> dict[str, Scalar]:
        """The settings that determine results, as a flat run config.

        Output, tracking, length and early end, resuming, waiting for clients, cross-site and
        evaluation are not among them, nor are the settings of other strategies.
        """
        free = {"output-dir", "num-server-rounds", "resume-from", "tracking", "checkpoint.every"}
        waiting = ("min-available-nodes", "round-timeout", "join-timeout", "required")
        evaluation = ("evaluate-every", "stop-at", "patience", "cross-site")
        free.update(f"server.{name}" for name in (*waiting, *evaluation))
        if STRATEGY_INFO[self.strategy].depends_on_length:
            free.remove("num-server-rounds")
        sections = STRATEGY_INFO.keys() - {self.strategy}
        if self.strategy != "pfedgpa":
            free |= {f"onboarding.{name}" for name in ("rounds", "guidance", "start", "num-steps")}
            sections.add("diffusion")
        flat = self.to_flat().items()
        return {k: v for k, v in flat if k not in free and k.partition(".")[0] not in sections}

    def differences(self, other: "Config") -> dict[str, tuple[Scalar, Scalar]]:
        """Return the differing settings that determine results, with both values."""
        theirs = other.to_flat()
        return {k: (v, theirs[k]) for k, v in self.decisive.items() if v != theirs[k]}

    def contradictions(self) -> Iterator[Contradiction]:
        """Yield contradictions between sections."""
        info, model = self.data.info, self.model.name
        if not _takes(model, info.shape):
            fitting = [name for name in MODEL_SHAPES if _takes(name, info.shape)]
            own = "a function of your own, package.module:function"
            yield (
                {"model.name", "data.dataset", "data.shape"},
                f'model.name = "{model}": takes {by_x(MODEL_SHAPES[model])} (* is any) and '
                f"{self.data.dataset} has {by_x(info.shape)}; right would be "
                f"{' or '.join(fitting) or own}",
            )
        yield from self.diffusion.contradictions_of_steps(
            "onboarding", self.onboarding.start, self.onboarding.num_steps
        )
        late, join = self.onboarding.late_clients, self.onboarding.join_round
        if late and not 2 <= join <= self.num_server_rounds:
            yield (
                {"onboarding.late-clients", "onboarding.join-round", "num-server-rounds"},
                f"onboarding.join-round = {join}: with onboarding.late-clients = {late}, the round "
                f"in which they join should be 2 to num-server-rounds = {self.num_server_rounds}",
            )
        yield from self._plain_contradictions()

    def _plain_contradictions(self) -> Iterator[Contradiction]:
        """Yield what excludes privacy, or training of all clients as one graph."""
        flat, plain = self.to_flat(), ", ".join(PLAIN_STRATEGIES)

        def excluded(key: str, by: str, right: str) -> Contradiction:
            with_what = f"with {by} = {_show(flat[by])}"
            return {key, by}, f"{key} = {_show(flat[key])}: {with_what} {right}"

        if self.privacy.is_on and self.strategy not in PLAIN_STRATEGIES:
            right = f"right would be {plain}, whose clients train by plain SGD and upload nothing"
            yield excluded("strategy", "privacy.mode", f"{right} but parameters")
        if self.privacy.is_on and self.resume_from:
            right = "a run cannot go on, since its clients lose their privacy ledgers with the run"
            yield excluded("resume-from", "privacy.mode", right)
        if self.privacy.mode == "example" and self.client.class_prior:
            right = "an example's gradient must not depend on the labels of others; right would be"
            yield excluded("client.class-prior", "privacy.mode", f"{right} false")
        if self.privacy.mode == "example" and self.client.precision != "fp32":
            yield excluded("client.precision", "privacy.mode", 'right would be "fp32"')
        if self.client.engine == "loop":
            return
        loop = 'right would be "loop"; '
        if self.strategy not in PLAIN_STRATEGIES:
            reason = f"only the clients of {plain} train by plain SGD, as one graph"
            yield excluded("client.engine", "strategy", loop + reason)
        if self.privacy.mode == "example":
            reason = "Opacus trains one model at a time"
            yield excluded("client.engine", "privacy.mode", loop + reason)
        if self.client.precision != "fp32":
            reason = "models that train as one graph do so in fp32"
            yield excluded("client.engine", "client.precision", loop + reason)


def _takes(model: str, shape: tuple[int, ...]) -> bool:
    """Return whether a model takes a shape; own models always do."""
    sizes = MODEL_SHAPES.get(model)
    return sizes is None or (
        len(sizes) == len(shape)
        and all(size in (None, given) for size, given in zip(sizes, shape, strict=True))
    )


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Turn ``{"seed": 0, "a.b": 1}`` into ``{"seed": 0, "a": {"b": 1}}``."""
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        section, _, name = key.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[name] = value
    return nested


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the flat keys and the values of nested settings, as Flower flattens them."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _unknown(key: str, value: object, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    hint = f", did you mean {close[0]}?" if close else ""
    return f"{key} = {_show(value)}: no such setting{hint}"


def _describe(error: ValidationError, flat: Mapping[str, Any], wrong: set[str]) -> list[str]:
    """Return the problems, one sentence each, and add their keys to ``wrong``.

    pydantic reports one error per alternative of a union. Contradictions with wrong values are left
    out.
    """
    expected: dict[str, list[str]] = {}
    contradictions: list[Contradiction] = []
    for item in error.errors():
        if item["type"] == "contradiction":
            contradictions += item["ctx"]["contradictions"]
        else:
            key = next(k for n in (1, 2) if (k := ".".join(map(str, item["loc"][:n]))) in flat)
            expected.setdefault(key, []).append(_expected(item))
    wrong.update(expected)
    excluded = [message for keys, message in contradictions if not keys & wrong]
    wrong.update(*(keys for keys, _ in contradictions))
    rights = {
        key: " or ".join(dict.fromkeys(texts)).replace(" or should be ", " or ")
        for key, texts in expected.items()
    }
    return [f"{key} = {_show(flat[key])}: {right}" for key, right in rights.items()] + excluded


def _expected(item: Any) -> str:
    """Return what would be right, for one of pydantic's errors."""
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
            message: str = item["msg"].removeprefix("Input ")
            return message.replace("a valid integer", "a whole number").replace("valid ", "")


def _show(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else str(value)
