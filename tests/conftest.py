"Every test draws the same random numbers in every run; `make full` tries other examples of the properties."
import gc
import multiprocessing
import os
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

root = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(root / 'scripts'))
settings.register_profile('dlfound', derandomize=os.environ.get('DLFOUND_FULL', '').lower() in ('', '0', 'false'))
settings.load_profile('dlfound')


@pytest.fixture(autouse=True)
def alone():
    "The same seeds before each test; no worker processes of an error that a test has kept after it"
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    yield
    if multiprocessing.active_children(): gc.collect()


def course(folder):
    "Write a small course to a folder without git: one tool, two lessons, clean and up to date"
    import json
    import shutil
    from small import lesson, write
    for name in 'settings.ini', 'setup.py', 'pyproject.toml', 'MANIFEST.in', 'LICENSE':
        shutil.copy(root / name, folder / name)
    shutil.copytree(root / 'scripts', folder / 'scripts', ignore=shutil.ignore_patterns('__pycache__'))
    (folder / 'dlfound').mkdir()
    (folder / 'dlfound/__init__.py').write_text('__version__ = "0.0.1"\n')
    write(folder / 'nbs/tools/kit.ipynb', lesson('kit', ['#| export\ndef one(): return 1', 'one()']))
    two = '#| export\nfrom dlfound.kit import one\ndef two(): return one() + 1'
    write(folder / 'nbs/00_first.ipynb', lesson('first', [two, 'two()']))
    write(folder / 'nbs/01_second.ipynb', lesson('second', ['from dlfound.first import two', 'two() + 1']))
    (folder / 'README.md').write_text('# small\n')
    (folder / 'nbs/outputs.json').write_text(json.dumps({}))
    return folder


@pytest.fixture
def tree(tmp_path): return course(tmp_path)
