"""Measures this library beside what a user would otherwise write: ``python -m benchmarks``; see ``docs/performance.md``."""
