"""Run Sphinx over the collected pages: they are read once, and then written in every form that is asked for.

python docs/render.py FOLDER html markdown leaves in FOLDER a folder for each form, and what was wrong in form.txt
"""
import gc
import inspect
import multiprocessing
import os
import sys
from functools import cache
from pathlib import Path

from sphinx.cmd.build import main
from sphinx.search.en import SearchEnglish

here = Path(__file__).resolve().parent
cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def run(work: Path, builder: str, jobs: int) -> int:
    "One run of Sphinx, whose pages are read already if another has run before"
    return main(['-n', '-q', '-b', builder, '-c', str(here), '-d', str(work / 'trees'), '-j', str(jobs),
                 '-w', str(work / f'{builder}.txt'), str(work / 'pages'), str(work / builder)])


def render(work: Path, builders: list[str]) -> int:
    "Read the pages, then a process for each form; how the worst of them ended"
    gc.disable() # Millions of objects live to the end, and looking through them takes a quarter of the time
    inspect.getsourcelines = cache(inspect.getsourcelines) # Each is asked for five times,
    SearchEnglish.stem = cache(SearchEnglish.stem) # and every word once a page
    read = run(work, 'dummy', cores)
    if read: return read
    gc.freeze()
    fork = multiprocessing.get_context('fork') # Which has all pages and modules in memory
    running = [fork.Process(target=lambda b: sys.exit(run(work, b, cores)), args=(b,)) for b in builders]
    for p in running: p.start()
    for p in running: p.join()
    return max(abs(p.exitcode) for p in running)


if __name__ == '__main__': sys.exit(render(Path(sys.argv[1]), sys.argv[2:]))
