"""A fit that was killed anywhere and resumed ends with the very bits of one that was not; and what resume refuses.

DLFOUND_FULL=1 (make full) runs the whole grid of fits, places and ways to die.
"""
import ast
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

root = Path(__file__).resolve().parent.parent
full = os.environ.get('DLFOUND_FULL', '0') not in ('', '0')
fits = ('tensors', 'adam', 'seeded', 'workers', 'stream', 'lazy', 'list', 'foreign', 'replacing', 'hidden', 'two',
        'loss', 'counting')
# Batches of validation; 4 in the other fits
n_valid = dict(tensors=2, adam=2, seeded=2, workers=2, stream=2, hidden=2, two=2, loss=2)
hows = 'kill', 'term', 'ctrlc', 'exception'
pytestmark = pytest.mark.skipif(not hasattr(os, 'fork'), reason='the cases are forked')


def places(fit):
    last = n_valid.get(fit, 4) - 1
    return [('train', 0, 3), ('train', 1, 0), ('train', 1, 3), ('train', 1, 6), ('after_train', 1, 7),
            ('valid', 0, 0), ('valid', 1, last // 2), ('valid', 1, last), ('after_validate', 1, last + 1)]


def cases():
    turn = itertools.cycle(hows)
    for fit in fits:
        for i, place in enumerate(places(fit)):
            for how in hows if full else [next(turn)]:
                for every in (1, 2 + i % 2) if full else [1 + i % 3]:
                    yield dict(name=fit, how=how, place=place, every=every)
        next(turn)  # so that the ways to die do not come back to the same places
    for fit in fits if full else ('adam', 'lazy'):
        for how in 'half', 'before', 'after':
            for nth in (2, 9, 13) if full else [9]: yield dict(name=fit, how=how, place=nth)
        yield dict(name=fit, how='kill', place=('train', 1, 3), unit='epoch')
        if fit == 'lazy': yield dict(name=fit, how='kill', place=('valid', 1, 1), unit='epoch')
        else: yield dict(name=fit, how='kill', place=('train', 2, 3), unit='epoch', every=2)
        yield dict(name=fit, how='kill', place=('train', 0, 2), times=4)
    for fit in fits:
        for seconds in (.02, .05, .1, .15, .3) if full else [.1]:
            yield dict(name=fit, how='random', place=seconds, times=2)


@pytest.fixture(scope='module')
def ask():
    "Runs a case in a process that has imported torch, once for all cases"
    path = os.pathsep.join([str(root), os.environ.get('PYTHONPATH', '')])
    env = dict(os.environ, OMP_NUM_THREADS='1', MKL_NUM_THREADS='1', PYTHONPATH=path)
    command = [sys.executable, '-W', 'ignore', str(root / 'tests/resume_cases.py')]
    helper = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
    def ask(case):
        helper.stdin.write(json.dumps(case) + '\n')
        helper.stdin.flush()
        return json.loads(helper.stdout.readline())
    yield ask
    helper.stdin.close()
    helper.wait()


@pytest.mark.parametrize('case', list(cases()), ids=lambda c: '-'.join(str(v) for v in c.values()).replace(', ', '.'))
def test_killed_and_resumed(ask, case):
    answer = ask(case)
    assert answer['ok'], answer
    if case['how'] == 'exception': assert answer['died']['error'].startswith('RuntimeError: out of power')
    elif case['how'] == 'ctrlc': assert answer['died']['error'].startswith('KeyboardInterrupt')
    elif case['how'] != 'random': assert answer['died'] == dict(died=15 if case['how'] == 'term' else 9)


def test_at_least_fifty(): assert len(list(cases())) >= 50


picklers = {'pickle', 'cPickle', 'dill', 'cloudpickle', 'joblib', 'shelve', 'marshal'}

def test_nothing_is_unpickled():
    "No module of the package imports pickle or a relative of it, or calls torch.load or torch.save"
    for path in sorted((root / 'dlfound').glob('*.py')):
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            match node:
                case ast.Import(names): assert not {a.name.split('.')[0] for a in names} & picklers, path
                case ast.ImportFrom(module, names):
                    package, taken = (module or '').split('.')[0], {a.name for a in names}
                    assert not {package, *taken} & picklers, path
                    assert package != 'torch' or not {'load', 'save'} & taken, path
                case ast.Attribute(ast.Name('torch'), name): assert name not in ('load', 'save'), path
