"""What was measured, one folder a study: run from the root of the repository as ``python -m benchmarks.STUDY.NAME``."""
