"""Functions that settings name: only those of the user's own code are imported and called.

Settings may come from others: in a suite, in a model's file, in a submitted run. Without this check
they could call any function of Python.
"""

import contextlib
import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pfedgpa_app.errors import INSTALLED, described

TRUST = "PFEDGPA_TRUST"
"""Environment variable: comma-separated packages whose functions settings may name."""

_APP = Path(__file__).parents[1]
# The app's own packages have no functions for settings.
_OUR_OWN = ("client_app", "pfedgpa_app", "server_app")
_OF_PACKAGES = ("site-packages", "dist-packages")


class OwnFunctionError(ValueError):
    """A function that cannot be imported, or is not the user's own; the message says why."""


def own_function(name: str) -> Callable[..., Any]:
    """Return the function ``package.module:function``.

    It must be defined in a module in the app's folder (where `flwr run` unpacks it) or in the
    current one, or in a package that the environment variable `TRUST` names. Nothing else is
    imported. Raises `OwnFunctionError` if it is defined elsewhere, or cannot be imported.
    """
    module_name, _, function_name = name.partition(":")
    package = module_name.partition(".")[0]
    try:
        if not _is_trusted(package):
            raise OwnFunctionError(_refusal(package))
        function: Callable[..., Any] = getattr(importlib.import_module(module_name), function_name)
        origin = _module_of(function).partition(".")[0]
        if origin != package and not _is_trusted(origin):
            raise OwnFunctionError(f"{function_name} is of another package: {_refusal(origin)}")
    except OwnFunctionError:
        raise
    except (ImportError, AttributeError) as error:
        raise OwnFunctionError(
            f"cannot be imported ({error}); right would be package.module:function, of a module "
            "that server and clients can import"
        ) from error
    except Exception as error:  # user code may raise anything
        raise OwnFunctionError(f"importing it failed with {described(error)}") from error
    return function


def _refusal(package: str) -> str:
    return (
        f"{package} is not a module of your own; right would be one in the current folder or the "
        f"app's, with a function that calls what you need, or {TRUST}={package} in the environment "
        "of whoever runs it, if you trust all functions of that package"
    )


def _module_of(function: object) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    return str(getattr(function, "__module__", None) or "builtins")


def _is_trusted(package: str) -> bool:
    """Return whether functions of a package may be called, without importing it."""
    if package in {each.strip() for each in os.environ.get(TRUST, "").split(",")}:
        return True
    if package in _OUR_OWN:
        return False
    try:
        spec = importlib.util.find_spec(package)
    except ValueError:  # of __main__, which has none
        return False
    if spec is None:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)
    folders: list[Path] = []
    if spec.submodule_search_locations is not None:  # several of a namespace package
        folders = [Path(each).resolve().parent for each in spec.submodule_search_locations]
    elif spec.has_location and spec.origin is not None:
        folders = [Path(spec.origin).parent.resolve()]
    return bool(folders) and all(map(_is_own, folders))


def _is_own(folder: Path) -> bool:
    installed = [Path(each).resolve() for each in INSTALLED]
    if set(folder.parts) & set(_OF_PACKAGES) or any(map(folder.is_relative_to, installed)):
        return False
    own = [_APP.resolve()]
    with contextlib.suppress(OSError):  # the current folder was removed
        here = Path.cwd()
        # Services may be started in the root folder, which contains everything.
        own += [here.resolve()] if here != Path(here.anchor) else []
    return any(map(folder.is_relative_to, own))
