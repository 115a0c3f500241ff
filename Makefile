# make demo, make test: all a newcomer needs. Both set up .venv first, from PyPI alone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup demo test test-floor test-av fuzz lint types format wheel clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -c "import sys; sys.exit('Python 3.10 or newer is needed, this is ' + sys.version) if sys.version_info < (3, 10) else 0"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	touch $@

demo: setup
	$(BIN)/vamba demo

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

# What a representative part of the tests finds with the lowest versions that pyproject.toml allows, in an environment of
# its own in build/floor. `make test-floor LATEST=transformers` leaves the named package at its newest.
FLOOR := build/floor
FLOOR_TESTS := tests/modeling/test_golden.py tests/modeling/test_modeling_vamba.py tests/modeling/test_video_memory.py \
	tests/modeling/test_processing_vamba.py tests/vamba/test_registration.py tests/vamba/training/test_run.py
test-floor:
	test -x $(FLOOR)/bin/python || $(PYTHON) -m venv $(FLOOR)
	$(FLOOR)/bin/python -m pip install --quiet --upgrade pip packaging
	$(FLOOR)/bin/python -m pip install --quiet --no-deps -e .
	$(FLOOR)/bin/python .ci/floor_requirements.py $(LATEST) > $(FLOOR)/requirements.txt
	$(FLOOR)/bin/python -m pip install --quiet -r $(FLOOR)/requirements.txt pytest pytest-timeout tensorboard
	$(FLOOR)/bin/python -m pytest $(FLOOR_TESTS)

# The reader's tests with every PyAV that pyproject.toml allows, each in a folder beside .venv.
test-av: setup
	for version in 14.0 14 15 16 17 18; do \
		$(BIN)/python -m pip install --quiet --no-deps --only-binary :all: --upgrade --target build/av-$$version "av==$$version.*" \
		&& PYTHONPATH=build/av-$$version $(BIN)/python -m pytest tests/vamba/video || exit 1; \
	done

# Broken and hostile input of every kind for two minutes, or as FUZZ says: make fuzz FUZZ="--cases 10000"
fuzz: setup
	$(BIN)/python tests/fuzz $(FUZZ)

lint: setup types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	.ci/check_types

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The wheel, installed in an environment of its own and used from outside the checkout.
wheel: setup
	PYTHON=$(abspath $(BIN)/python) bash .ci/check_wheel

clean:
	rm -rf $(VENV) build dist runs *.egg-info
