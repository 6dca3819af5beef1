PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed
# LeRobot pins torch below what this project tests with, and needs Python 3.12: an environment of its own.
PYTHON312 ?= python3.12
LEROBOT := .venv-lerobot
PLUGIN := packages/lerobot_policy_lapa
FLOORS := .venv-floors
# Clients of a served policy: openpi's needs NumPy below 2.
CLIENTS := .venv-clients
OPENPI_CLIENT_VERSION := 0.1.2
# Simulators, which need hundreds of megabytes of assets: an environment of their own.
SIMULATORS := .venv-simulators
# It needs other versions of what this project uses, and only sends requests: an environment of its own.
SCHEMATHESIS := .venv-schemathesis
SCHEMATHESIS_VERSION := 4.32.5
EGL := libegl1 libegl-mesa0 libgl1-mesa-dri libgl1

.PHONY: help setup egl demo study test test-slow test-floors docs lint format bench bench-latent faults fuzz-rest check-clients check-envs check-lerobot check-vla-eval clean

help:
	@echo 'make demo       the whole flow on Meta-World, from videos to a table of success rates'
	@echo 'make study      LAPA and other ways of using video: one seed, hours; continues when run again'
	@echo 'make test       the tests (make test-slow: the ones that take minutes)'
	@echo 'make test-floors   the tests with the oldest versions that pyproject.toml allows (Python 3.12, its own'
	@echo '                environment: 6 GB)'
	@echo 'make docs       the documentation as a site, in site/; warnings are errors'
	@echo 'make lint       ruff and mypy'
	@echo 'make bench      the benchmarks, as tables to compare with benchmarks/results/'
	@echo '                (make bench-latent: the latent action model alone)'
	@echo 'make faults     kills, two writers, flipped bits, hostile files, odd data: a quarter of an hour'
	@echo 'make fuzz-rest  2,000 bodies that a server must answer in one line (schemathesis, its own environment: 0.1 GB)'
	@echo 'make check-clients   openpi-client, an OpenVLA client and lapa-client, each in an environment of its own (0.4 GB),'
	@echo '                     drive a served policy'
	@echo 'make check-envs      the tests of the simulators, of Language Table where LANGUAGE_TABLE names a checkout (an'
	@echo '                     environment of its own: about 4 GB)'
	@echo 'make check-lerobot   datasets and policies go both ways between this project and LeRobot, whose commands train,'
	@echo '                     measure and run a policy (an environment of its own: 5.8 GB)'
	@echo 'make check-vla-eval  a policy behind vla-eval, in the same environment'

setup: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; found = "%d.%d" % sys.version_info[:2]; sys.exit(0 if sys.version_info >= (3, 11) else "lapa needs Python 3.11 or newer; " + sys.executable + " is " + found + ". Run: make PYTHON=python3.11 $(MAKECMDGOALS)")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[metaworld,dev]'
	@touch $@

# Meta-World renders through EGL. Installed where nobody need be asked; `lapa demo` names the command otherwise.
egl:
	@! command -v apt-get >/dev/null || dpkg -s $(EGL) >/dev/null 2>&1 || \
	  { as=; [ "$$(id -u)" = 0 ] || as='sudo -n'; \
	    $$as apt-get update -qq && $$as apt-get install -y -qq --no-install-recommends $(EGL); } || \
	  echo 'EGL could not be installed: apt-get install $(EGL)' >&2

demo: setup egl
	$(BIN)/lapa demo --out runs/demo --resume

study: setup egl
	$(BIN)/lapa study run --preset cpu --out runs/study
	$(BIN)/lapa study report runs/study --overwrite

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: setup
	$(BIN)/python -m pytest -m slow

$(FLOORS)/installed: pyproject.toml constraints-floors.txt
	@$(PYTHON312) -c 'import sys; sys.exit(0 if sys.version_info[:2] == (3, 12) else 1)' || \
	  { echo 'constraints-floors.txt is for Python 3.12. Run: make PYTHON312=/path/to/python3.12 test-floors' >&2; exit 1; }
	$(PYTHON312) -m venv $(FLOORS)
	$(FLOORS)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-floors.txt -e '.[metaworld,dev,8bit]'
	@touch $@

test-floors: $(FLOORS)/installed
	OMP_NUM_THREADS=1 $(FLOORS)/bin/python -m pytest -n 2 --dist loadfile

docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup
	$(BIN)/python benchmarks/bench_metaworld.py
	$(BIN)/python benchmarks/bench_data.py
	$(BIN)/python benchmarks/bench_latent.py
	$(BIN)/python benchmarks/bench_policy.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/bench_serve.py

bench-latent: setup
	$(BIN)/python benchmarks/bench_latent.py

faults: setup
	$(BIN)/python benchmarks/faults.py

$(SCHEMATHESIS)/installed-$(SCHEMATHESIS_VERSION):
	$(PYTHON) -m venv $(SCHEMATHESIS)
	$(SCHEMATHESIS)/bin/python -m pip install --quiet --disable-pip-version-check 'schemathesis==$(SCHEMATHESIS_VERSION)'
	@touch $@

fuzz-rest: setup $(SCHEMATHESIS)/installed-$(SCHEMATHESIS_VERSION)
	$(BIN)/python benchmarks/fuzz_rest.py --schemathesis $(SCHEMATHESIS)/bin/schemathesis

$(CLIENTS)/installed: packages/lapa-client/pyproject.toml packages/lapa-client/hatch_build.py src/lapa/serve/client.py
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info < (3, 13) else 1)' || \
	  { echo 'openpi-client needs Python 3.12 or older. Run: make PYTHON=/path/to/python3.12 check-clients' >&2; exit 1; }
	for name in openpi openvla lapa; do $(PYTHON) -m venv --clear $(CLIENTS)/$$name || exit 1; done
	# openpi-client imports typing_extensions without declaring it.
	$(CLIENTS)/openpi/bin/python -m pip install --quiet --disable-pip-version-check \
	  openpi-client==$(OPENPI_CLIENT_VERSION) typing_extensions
	$(CLIENTS)/openvla/bin/python -m pip install --quiet --disable-pip-version-check requests json_numpy
	$(CLIENTS)/lapa/bin/python -m pip install --quiet --disable-pip-version-check ./packages/lapa-client
	@touch $@

check-clients: setup $(CLIENTS)/installed
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/check_clients.py runs/check-clients openpi=$(CLIENTS)/openpi/bin/python \
	  openvla=$(CLIENTS)/openvla/bin/python lapa=$(CLIENTS)/lapa/bin/python

$(SIMULATORS)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(SIMULATORS)
	$(SIMULATORS)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
	  -e '.[metaworld,libero,language-table]' gym-pusht==0.1.8 pytest beartype hypothesis
	@touch $@

check-envs: $(SIMULATORS)/installed
	@test -n "$$LANGUAGE_TABLE" || echo 'Language Table is skipped: LANGUAGE_TABLE names no checkout (docs/5-evaluate.md)'
	OMP_NUM_THREADS=1 $(SIMULATORS)/bin/python -m pytest tests/test_metaworld.py tests/test_libero.py \
	  tests/test_language_table.py tests/test_gymnasium.py

$(LEROBOT)/installed: pyproject.toml $(PLUGIN)/pyproject.toml $(PLUGIN)/constraints.txt
	@$(PYTHON312) -c 'import sys; sys.exit(0 if sys.version_info[:2] == (3, 12) else 1)' || \
	  { echo 'LeRobot is tested with Python 3.12. Run: make PYTHON312=/path/to/python3.12 $(MAKECMDGOALS)' >&2; exit 1; }
	$(PYTHON312) -m venv $(LEROBOT)
	$(LEROBOT)/bin/python -m pip install --quiet --disable-pip-version-check -c $(PLUGIN)/constraints.txt \
	  -e . -e $(PLUGIN) 'lerobot[dataset,training,evaluation]' vla-eval pytest beartype
	@touch $@

check-lerobot: setup $(LEROBOT)/installed
	$(BIN)/python benchmarks/check_lerobot.py write runs/check-lerobot
	$(LEROBOT)/bin/python benchmarks/check_lerobot.py lerobot runs/check-lerobot
	$(BIN)/python benchmarks/check_lerobot.py read runs/check-lerobot
	OMP_NUM_THREADS=1 $(LEROBOT)/bin/python -m pytest tests/test_lerobot_policy.py tests/test_lerobot_export.py
	OMP_NUM_THREADS=1 $(LEROBOT)/bin/python benchmarks/check_lerobot_policy.py runs/check-lerobot-policy

check-vla-eval: $(LEROBOT)/installed
	OMP_NUM_THREADS=1 $(LEROBOT)/bin/python -m pytest tests/test_vla_eval_server.py
	OMP_NUM_THREADS=1 $(LEROBOT)/bin/python benchmarks/check_vla_eval.py runs/check-vla-eval

clean:
	rm -rf .venv $(LEROBOT) $(FLOORS) $(CLIENTS) $(SCHEMATHESIS) $(SIMULATORS) .pytest_cache .mypy_cache .ruff_cache
