"What `import dlfound` gives: a few names, by the way of their modules, when they are asked for."
import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import dlfound
import pytest

root = Path(__file__).resolve().parent.parent


def test_names():
    "The literal list, the imports for type checkers and the table agree, and no name is a module's"
    tree = ast.parse((root / 'dlfound/__init__.py').read_text('utf-8'))
    block, = (n for n in tree.body if isinstance(n, ast.If))
    typed = {a.name: n.module for n in block.body for a in n.names}
    assert typed == dlfound._home and sorted(typed) == dlfound.__all__
    assert not set(typed) & {p.stem for p in (root / 'dlfound').glob('*.py')}


@pytest.mark.parametrize('name', dlfound.__all__)
def test_each_is_that_of_its_module(name):
    assert getattr(dlfound, name) is getattr(import_module(f'dlfound.{dlfound._home[name]}'), name)
    assert name in dir(dlfound)


def test_lazily():
    "Alone it imports no torch; a star, a module and a name that is not there work as everywhere"
    code = '''
import sys, dlfound
assert 'torch' not in sys.modules and 'numpy' not in sys.modules
assert not [m for m in sys.modules if m.startswith('dlfound.')]
from dlfound import one_cycle, schedule
assert one_cycle is schedule.one_cycle
try: dlfound.nonsense
except AttributeError as e: assert 'Learner' in str(e)
else: raise AssertionError
assert not hasattr(dlfound, 'shape')
from dlfound import *
assert Learner.__module__ == 'dlfound.learner' and callable(resume)
'''
    done = subprocess.run([sys.executable, '-W', 'error::ImportWarning', '-c', code], cwd=root, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
