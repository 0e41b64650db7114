# Five verbs. `make check` is what must pass before a change is proposed.
PYTHON ?= python3

.PHONY: setup check test docs wheel

setup: ## an environment in .venv with everything
	$(PYTHON) -m venv .venv && .venv/bin/pip install -q -c constraints.txt -e '.[dev]'

check: ## lint, types, documentation, tests
	PATH="$(CURDIR)/.venv/bin:$$PATH" ./test.sh

test: ## tests alone; ARGS="-k store" passes arguments on
	PATH="$(CURDIR)/.venv/bin:$$PATH" pytest -n 2 --dist loadgroup $(ARGS)

docs: ## the site, in docs/_build
	PATH="$(CURDIR)/.venv/bin:$$PATH" sphinx-build -W --keep-going -q -b html docs docs/_build

wheel: ## the package, in dist
	PATH="$(CURDIR)/.venv/bin:$$PATH" python -m build --wheel --outdir dist
