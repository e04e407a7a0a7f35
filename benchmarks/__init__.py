"""Measurements of the app; run as ``python -m benchmarks.<name>`` in the project's folder."""
