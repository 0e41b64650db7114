#!/usr/bin/env bash
# Everything that must pass before a change is proposed: lint, format, types, documentation, tests. Extra arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")"
ruff check .
ruff format --check .
mypy
sphinx-build -q -W --keep-going -b html docs docs/_build
pytest -n "${TEST_WORKERS:-2}" --dist loadgroup "$@"
