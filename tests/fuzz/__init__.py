"""Fuzzing of everything that reads data: see `python -m tests.fuzz --help`, and docs/development.md."""
