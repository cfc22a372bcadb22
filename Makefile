# Needs python3 with venv, and a C++ compiler for the extension; everything else comes from requirements-dev.txt.
PYTHON ?= python3
BIN := .venv/bin
CPP_FILES = $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
NATIVE := setup.py pyproject.toml CMakeLists.txt $(CPP_FILES)

.DEFAULT_GOAL := help
.PHONY: help build demo test test-full fuzz bench bench-full bench-ops lint typecheck types docs package package-test \
	project-files device-pack format clean

help: ## Show the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# Two stamps: a changed C++ file rebuilds the extension but does not install the requirements again.
.venv/.requirements: requirements-dev.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

.venv/.installed: .venv/.requirements $(NATIVE)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	@touch $@

.venv: .venv/.installed

build: .venv/.installed ## Create .venv and build the extension
	@$(BIN)/python -c "from msdd_fast.backends import extension_status; print('msdd_fast._C', extension_status()[1])"

demo: .venv/.installed ## Decode sample images into out/demo.png
	$(BIN)/msdd-fast demo --out out/demo.png

lint: .venv/.installed ## Style and types
	$(BIN)/ruff check --quiet .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/clang-format --dry-run --Werror $(CPP_FILES)
	$(MAKE) --no-print-directory typecheck

# The packages under their installed names, as links: kernels/ is msdd_fast.kernels, and so on.
TYPECHECK := build/typecheck/msdd_fast
typecheck: .venv/.installed ## mypy over all packages
	@rm -rf $(TYPECHECK) && mkdir -p $(TYPECHECK)
	@ln -s $(addprefix $(CURDIR)/,$(wildcard msdd_fast/*.py msdd_fast/py.typed) $(filter-out %/__pycache__/,$(sort $(dir $(wildcard msdd_fast/*/)))) kernels training bench) $(TYPECHECK)/
	$(BIN)/mypy --no-error-summary --config-file pyproject.toml $(TYPECHECK)

# Documentation and packaging tools have a virtual environment of their own, without torch.
TOOLS := build/tools/bin
build/tools/.installed: requirements-tools.txt
	$(PYTHON) -m venv build/tools
	$(TOOLS)/python -m pip install --quiet --disable-pip-version-check -r requirements-tools.txt -c requirements-dev.txt
	@touch $@

types: .venv/.installed build/tools/.installed ## Type completeness of the public API, by pyright
	$(BIN)/python tools/type_completeness.py $(TOOLS)/pyright

project-files: build/tools/.installed ## Workflows, issue forms, CITATION.cff and pre-commit's hooks against their schemas
	$(TOOLS)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(TOOLS)/check-jsonschema --builtin-schema vendor.github-issue-forms $(filter-out %/config.yml,$(wildcard .github/ISSUE_TEMPLATE/*.yml))
	$(TOOLS)/check-jsonschema --builtin-schema vendor.github-issue-config .github/ISSUE_TEMPLATE/config.yml
	$(TOOLS)/check-jsonschema --builtin-schema vendor.dependabot .github/dependabot.yml
	$(TOOLS)/check-jsonschema --builtin-schema vendor.citation-file-format CITATION.cff
	$(TOOLS)/pre-commit validate-config

docs: build/tools/.installed ## The documentation site, in build/site; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(TOOLS)/mkdocs build --quiet --strict

package: build/tools/.installed ## Source distribution, and a wheel built from it, in dist/
	rm -rf dist
	MSDD_FAST_BUILD_EXT=1 $(TOOLS)/pyproject-build --outdir dist
	$(TOOLS)/twine check --strict dist/*

package-test: ## Install dist/*.whl in a fresh environment and run the demo from an empty folder
	@set -eu; wheel=$$(ls "$(CURDIR)"/dist/*.whl); folder=$$(mktemp -d); trap 'rm -rf "$$folder"' EXIT; \
	$(PYTHON) -m venv "$$folder/venv"; \
	"$$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check -c requirements-dev.txt "$$wheel[eval]"; \
	mkdir "$$folder/empty"; cd "$$folder/empty"; \
	../venv/bin/python -c "import msdd_fast; print(msdd_fast.__file__)"; \
	../venv/bin/msdd-fast env --check; \
	../venv/bin/msdd-fast demo; \
	test -s out/demo.png

test: lint ## Lint and the tests that need neither a GPU nor much time
	$(BIN)/python -m pytest -q -rs -m "not gpu and not slow"

test-full: lint ## Lint and all tests
	$(BIN)/python -m pytest -q -rs

FUZZ_EXAMPLES ?= 100000
fuzz: .venv/.installed ## Fuzzers with FUZZ_EXAMPLES new examples each; the parsers by coverage, where atheris is installed
	MSDD_FAST_FUZZ=$(FUZZ_EXAMPLES) $(BIN)/python -m pytest -q -rs tests/fuzz

BENCH_OUT ?= out/bench
bench: .venv/.installed ## img/s for each scale and provider, in under ten minutes on two cores; report in out/bench
	$(BIN)/msdd-fast bench --json $(BENCH_OUT)/bench.json --html $(BENCH_OUT)/report.html $(ARGS)

bench-full: .venv/.installed ## The same for a GPU: batch 1, 8, 64, one and 30 steps, guidance, other scale counts
	$(BIN)/msdd-fast bench --suite full --json $(BENCH_OUT)/full.json --html $(BENCH_OUT)/full.html $(ARGS)

bench-ops: .venv/.installed ## Time every op against plain PyTorch; ARGS=--quick to see that it runs
	$(BIN)/python -m pytest -q -rs bench $(ARGS)

SHARED ?= $(firstword $(wildcard $(MSDD_FAST_SHARED) shared ../shared))
device-pack: .venv/.installed ## Fixtures and small training data to carry to a GPU machine, in device-pack/
	$(BIN)/python tools/device_pack.py $(SHARED) device-pack

format: .venv/.installed ## Rewrite the sources in the project's style
	$(BIN)/ruff check --fix --quiet .
	$(BIN)/ruff format --quiet .
	$(BIN)/clang-format -i $(CPP_FILES)

clean: ## Remove everything that was built, the virtual environment too
	rm -rf .venv build dist out *.egg-info msdd_fast/_C* msdd_fast/_build_info.json
	rm -rf .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
