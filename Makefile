PYTHON ?= python3
INSTALLED = .venv/.installed

.PHONY: quickstart test test-quick coverage docs check pictures install slurm-up slurm-down bench-slurm bench-driver

install: $(INSTALLED)

# Sweeps the quickstart; a second call goes on with it, or shows again what it found.
quickstart: $(INSTALLED)
	.venv/bin/python sweeps/launch.py sweeps/quickstart.yaml $(if $(wildcard runs/quickstart/sweep.json),--resume)

# Everything that this machine can run; what it can't is named with the reason.
test: export LORVP_TEST_INSTALL = 1
test: check
	.venv/bin/python -m pytest -rs --by-file -m "not alone"
	.venv/bin/python -m pytest -rs -s -n 0 -m alone

# What needs no daemon and trains no whole sweep, in about a minute.
test-quick: $(INSTALLED)
	.venv/bin/python -m pytest -m "not slow and not slurm and not gpu and not browser and not alone"

# Which lines the tests run, in drivers and jobs, too; `make coverage TESTS=tests/cluster` counts those of a part.
coverage: export LORVP_TEST_INSTALL = 1
coverage: TESTS = tests
coverage: $(INSTALLED)
	.venv/bin/coverage erase
	-.venv/bin/coverage run -m pytest -rs -m "not alone" $(TESTS)
	.venv/bin/coverage combine --quiet
	.venv/bin/coverage report --fail-under 90

# The documentation as a site, in site/; a link that leads nowhere is an error.
docs: export NO_MKDOCS_2_WARNING = 1
docs: $(INSTALLED)
	.venv/bin/mkdocs build --strict

check: $(INSTALLED)
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy
	.venv/bin/lint-imports

# The README's pictures of MLflow, by Chromium; runs/screenshots has more of them.
pictures: $(INSTALLED)
	LORVP_SCREENSHOTS=runs/screenshots .venv/bin/python -m pytest -n 0 tests/system/test_browser.py
	cp runs/screenshots/mlflow-*.png docs/images

# A real SLURM of three nodes on this machine, to try a sweep on; needs root and the packages in tests/support/slurm_sim.py.
slurm-up: $(INSTALLED)
	.venv/bin/python tests/support/slurm_sim.py up /tmp/lorvp-slurm

slurm-down:
	.venv/bin/python tests/support/slurm_sim.py down /tmp/lorvp-slurm

# What a cluster costs a sweep: the table in docs/cluster.md.
bench-slurm: $(INSTALLED)
	.venv/bin/python tests/benchmarks/bench_slurm.py

# What a sweep's driver costs the machine and the disk: the table in docs/benchmarks.md. Needs strace.
bench-driver: $(INSTALLED)
	.venv/bin/python tests/benchmarks/bench_driver.py

$(INSTALLED): requirements.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or later is needed; this is " + sys.version if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --disable-pip-version-check -r requirements.txt
	.venv/bin/pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $(INSTALLED)
