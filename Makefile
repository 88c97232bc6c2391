# Two commands for a fresh machine; each makes .venv when there is none and says what it does.
#   make demo   compile the bundled model for this CPU, write a paragraph, then GPT-2 124M and its speed
#   make test   every check: formatting, lint, types, quick tests, heavy tests (`make quick` leaves out the last)
# PYTHON=/path/to/python3.12 chooses the interpreter that .venv is made from.

PY = .venv/bin/python

.PHONY: demo test quick lint setup-demo setup-test clean

demo: setup-demo
	@$(PY) -m gpt2_tvm.demo

test: lint
	@echo "==> what the tests of the web need; they are skipped with a reason where it cannot be had"
	@$(PY) -m gpt2_tvm.toolchains.webruntime || true
	@[ -d web/node_modules ] || npm ci --prefix web --ignore-scripts --no-audit --no-fund || true
	@echo "==> tests: quick ones first, heavy ones last"
	@$(PY) -m pytest -n 2 --dist loadfile

quick: lint
	@$(PY) -m pytest -n 2 --dist loadfile -m "not heavy"

lint: setup-test
	@echo "==> formatting, lint and types"
	@$(PY) -m ruff format --check .
	@$(PY) -m ruff check .
	@$(PY) -m mypy

setup-demo:
	@sh scripts/setup.sh demo

setup-test:
	@sh scripts/setup.sh test

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
