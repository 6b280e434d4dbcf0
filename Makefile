# On a fresh machine with Python 3.11 or newer:   make demo     make test
# Each makes the environment first if it is not there. Another torch (CUDA, ROCm): make demo TORCH="torch>=2.4"
PYTHON ?= python3
TORCH  ?= torch==2.13.0
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check
JOBS   ?= 2
PYTEST  = PYTHONUTF8=1 OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -n $(JOBS) --dist worksteal

PAPERS := darnet dual_sampling raunet prior_attention
.PHONY: help demo test quick test-reproduce seconds test-portable lab docs bench bench-gpu fuzz export run clean
MINUTES ?= 10
help:                ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 12

$(VENV)/.runtime: settings.ini setup.py constraints.txt
	@echo "Setting up $(VENV): PyTorch first, then the rest (a few minutes, once)"
	$(PYTHON) -m venv $(VENV)
	$(PIP) "$(TORCH)"
	$(PIP) -c constraints.txt -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.runtime
	@echo "Adding what the notebooks, the site and the tests need"
	$(PIP) -c constraints.txt -e ".[dev]"
	@touch $@

demo: $(VENV)/.runtime   ## train and explain a small DARNet on the built-in phantoms; leaves a report
	$(BIN)/covid-ct demo

test: $(VENV)/.dev       ## all tests: pages, library, site, browser
	COVID_CT_BROWSER="$$($(BIN)/python tests/find_browser.py)" $(PYTEST)

quick: $(VENV)/.dev      ## the tests that end within two minutes altogether, for daily work
	$(PYTEST) -m quick

seconds: $(VENV)/.dev    ## record what each test costs; `make quick` chooses by it
	rm -f _bench/seconds.tsv && mkdir -p _bench
	COVID_CT_SECONDS=_bench/seconds.tsv $(PYTEST) -m "not slow and not browser" || true
	$(BIN)/python tests/quick.py _bench/seconds.tsv

test-reproduce: $(VENV)/.runtime  ## the four papers' protocols on phantoms at the small scale: _reproduce/PAPER/report.html
	for p in $(PAPERS); do OMP_NUM_THREADS=$(JOBS) $(BIN)/covid-ct reproduce $$p phantoms --out _reproduce/$$p --scale small || exit 1; done

test-portable: $(VENV)/.dev   ## hours: what trains or draws, under other instruction sets, threads and seeds; WHAT="one page or test"
	PYTHONUTF8=1 $(BIN)/python tests/portable.py $(WHAT)

lab: $(VENV)/.dev        ## open the notebooks
	$(BIN)/jupyter lab index.ipynb

docs: $(VENV)/.dev       ## build the site in _docs/
	$(BIN)/python docs/build.py

bench: $(VENV)/.dev      ## speed and memory as ratios against peers; writes _bench/results.json
	$(BIN)/python -m bench

bench-gpu: $(VENV)/.dev  ## each system at its paper's size on the GPU that is there; keeps the JSON under nbs/reports/
	$(BIN)/python -m bench.gpu

fuzz: $(VENV)/.dev       ## feed the readers broken files for MINUTES=10
	$(BIN)/python tests/fuzz.py --minutes $(MINUTES)

export: $(VENV)/.dev     ## notebooks -> covid_ct/ and README.md, then clean the notebooks
	$(BIN)/nbdev_export
	$(BIN)/python docs/nbs.py clean
	$(BIN)/python docs/readme.py

run: $(VENV)/.dev        ## execute every page in place (NB="nbs/00a_scan.ipynb" for one)
	$(BIN)/python docs/nbs.py run $(NB)

clean:               ## remove what was built
	rm -rf _build _docs _proc _bench _demo _portable build dist *.egg-info
