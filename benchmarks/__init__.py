"""Measurements of the app; run as ``python -m benchmarks.<name>`` in the project's folder."""

import os

# Typer's tracebacks print the values of all variables; Python's own do not.
os.environ.setdefault("_TYPER_STANDARD_TRACEBACK", "1")
