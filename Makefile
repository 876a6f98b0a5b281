# `make` lists the targets; scripts/ holds what they do. PYTHON=… chooses the interpreter that makes .venv.
.DEFAULT_GOAL := help
.PHONY: help lab test export clean run bench full seeds hooks check env site site-open pdf
export PYTHON
env := sh scripts/env.sh
py := .venv/bin/python

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1|\2/p' Makefile | while IFS='|' read -r target text; do printf '%-12s %s\n' "$$target" "$$text"; done

lab: ## open the first lesson in JupyterLab (ARGS="--no-browser --port 9999" are passed on)
	@$(env) && exec $(py) scripts/lab.py $(ARGS)

test: ## run every check: notebooks, pytest, types, lint, committed files
	@$(env) && $(py) scripts/test.py

export: ## write dlfound/ from the notebooks, and their links and tables
	@$(env) && $(py) scripts/export.py

clean: ## strip notebooks of the metadata that Jupyter adds
	@$(env) && .venv/bin/nbdev-clean

check: ## lint the working tree (make test lints what is committed)
	@$(env) && $(py) scripts/check.py .

run: ## run notebooks and save their outputs: make run NB=00 (several: NB="00 01")
	@$(env) && $(py) scripts/run.py $(NB)

full: ## run all notebooks, with their stored results computed anew; all tests, with the whole grid of killed fits and fresh examples
	@$(env) && DLFOUND_FULL=1 $(py) scripts/run.py all
	@$(env) && DLFOUND_FULL=1 $(py) -m pytest -q -p no:cacheprovider tests

seeds: ## run a notebook's checks under two other seeds, saving nothing: make seeds NB=00
	@$(env) && $(py) scripts/run.py --seeds 2 $(NB)

bench: ## measure against peers (which `pip install -e '.[bench]'` brings); results go to benchmarks/results (NAME=matmul runs one)
	@$(env) && for f in benchmarks/$(or $(NAME),[a-z]*).py; do case $$f in */common.py) ;; *) echo "== $$f"; $(py) $$f || exit 1;; esac; done

hooks: ## teach git to merge and diff notebooks by cell, in this clone only
	@$(env) && sh scripts/hooks.sh

site: ## build the site into docs/_build, from the notebooks as they were saved
	@$(env) && $(py) scripts/pages.py

site-open: ## build the site and show it in a browser
	@$(env) && $(py) scripts/pages.py open

pdf: ## build the site and print it into docs/_build/dlfound.pdf, with Chromium
	@$(env) && $(py) scripts/pages.py pdf

env: ## make .venv, which the other targets do when they need it
	@$(env)
