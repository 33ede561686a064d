# Each target does all its own set-up in $(VENV), and only when setup.py or constraints.txt changed.
PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
# Further keys of the quickstart's runs, such as trainer.steps=4, and of its model, such as steps=100.
QUICKSTART_ARGS ?=
MODEL_ARGS ?=
# Not empty: install the second environment of the tests from the plain package index alone.
PLAIN_INDEX ?=
# What launches jobs: `g2rl launch` finds it by this variable.
export G2RL_LAUNCH_PYTHON ?= $(abspath $(VENV))/launch/bin/python

INSTALLED := $(VENV)/.installed
LAUNCH_INSTALLED := $(VENV)/launch/.installed
export OMP_NUM_THREADS ?= 1
# Packages are installed uncompiled: without bytecode, every command would compile them again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: venv launch-venv fast test lint quickstart docs

venv: $(INSTALLED)

$(INSTALLED): setup.py constraints.txt tools/install.py
	@$(PYTHON) tools/install.py $(VENV)
	@touch $@

launch-venv: $(LAUNCH_INSTALLED)

$(LAUNCH_INSTALLED): constraints-launch.txt $(INSTALLED)
	@$(PYTHON) tools/install.py --launch $(VENV)/launch
	@touch $@

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .

# What changes of most files break first: mathematics, configuration, data, rewards, files.
fast: lint
	$(VENV)/bin/python -m pytest tests/unit tests/parity -m "not slow" $(PYTEST_ARGS)

# All tests, and those that touch Megatron once more with the other supported megatron-core, if its Python is here.
test:
	@$(PYTHON) tools/run_tests.py $(VENV) --lint $(if $(PLAIN_INDEX),--plain-index) $(PYTEST_ARGS)

# Both runs start from the same fine-tuned model, which is created only once.
quickstart: $(INSTALLED)
	@$(VENV)/bin/g2rl warm-start examples/quickstart/model.yaml $(MODEL_ARGS)
	@$(VENV)/bin/g2rl train examples/quickstart/grpo.yaml $(QUICKSTART_ARGS)
	@$(VENV)/bin/g2rl train examples/quickstart/g2rl.yaml $(QUICKSTART_ARGS)
	@$(VENV)/bin/g2rl report runs/quickstart_grpo runs/quickstart_g2rl --output runs/quickstart.html
	@echo "open runs/quickstart.html in a browser; the trained models are runs/quickstart_*/model, and models/quickstart is where they started"

docs: $(INSTALLED)
	$(VENV)/bin/python -m megatron_g2rl.config.reference > docs/configuration.md
	$(VENV)/bin/python -m megatron_g2rl.tracking.table > docs/metrics.md
