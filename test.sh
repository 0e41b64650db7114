#!/usr/bin/env bash
# Everything that must pass before a change is proposed: lint, format, types, tests. Extra arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")"
ruff check .
ruff format --check .
mypy
pytest -n "${TEST_WORKERS:-2}" --dist loadgroup "$@"
