"`make run` saves what it should and nothing else; `make seeds` shifts seeds; `make test` looks at what is committed."
import json
import subprocess
import sys
from pathlib import Path

import pytest
from small import lesson, needs_git, script, write


def cells(path): return json.loads(path.read_text())['cells']


def test_saves_clean_outputs_and_records_them(tree):
    path = tree / 'nbs/02_third.ipynb'
    draw = '#| label: fig-line\n#| fig-alt: a line\nplt.plot([1, 2]);'
    sources = ['import matplotlib.pyplot as plt', draw, '#| eval: false\nseen = 6', 'seen * 7'] # Run All runs all
    write(path, lesson('third', sources, outputs=False))
    done = script(tree, 'run.py', '02')
    assert done.returncode == 0, done.stderr
    made = cells(path)
    assert made[-1]['outputs'][0]['data']['text/plain'] == ['42'] and made[-1]['execution_count'] is None
    assert all(c['metadata'] == {} for c in made)
    picture = (tree / 'nbs/images/fig-line.png').read_bytes()
    assert picture.startswith(b'\x89PNG')
    if (Path(sys.prefix) / 'etc/ipython').exists(): assert b'atplotlib' not in picture # As an upgrade would do
    record = json.loads((tree / 'nbs/outputs.json').read_text())
    assert set(record['02_third.ipynb']['cells']) == {c['id'] for c in made if c['cell_type'] == 'code'}
    before = path.read_bytes()
    record['02_third.ipynb']['seconds'] = 99 # As a plain run took; a full one may take hours
    (tree / 'nbs/outputs.json').write_text(json.dumps(record))
    assert script(tree, 'run.py', '02', DLFOUND_FULL='1').returncode == 0 and path.read_bytes() == before
    assert json.loads((tree / 'nbs/outputs.json').read_text()) == record


@pytest.mark.parametrize('source, env, words', [
    ('1 / 0', {}, 'ZeroDivisionError'),
    ('1', {'DLFOUND_STANDIN': '1'}, 'saved outputs come from real data only'),
    ('import dlfound.data', {}, 'ran on the stand-in for mnist; saved'),
])
def test_leaves_the_notebook_alone(tree, source, env, words):
    (tree / 'dlfound/data.py').write_text('def used(): return dict(mnist=True, imdb=False)\n')
    path = tree / 'nbs/02_third.ipynb'
    write(path, lesson('third', [source]))
    before = path.read_bytes(), (tree / 'nbs/outputs.json').read_bytes()
    done = script(tree, 'run.py', '02', **env)
    assert done.returncode == 1 and words in done.stderr
    assert (path.read_bytes(), (tree / 'nbs/outputs.json').read_bytes()) == before


def test_a_check_runs_every_cell_and_saves_nothing(tree):
    path = tree / 'nbs/02_third.ipynb'
    write(path, lesson('third', ['6 * 7']))
    before = path.read_bytes()
    done = script(tree, 'run.py', '--check', '02', DLFOUND_STANDIN='1')
    assert done.returncode == 0 and done.stdout.startswith('passed  02_third.ipynb'), done.stderr
    assert path.read_bytes() == before and not (tree / 'nbs/images').exists()
    for directive in 'eval: false', 'notest', 'slow':
        write(path, lesson('third', [f'#| {directive}\n1 / 0']))
        done = script(tree, 'run.py', '--check', '02')
        assert done.returncode == 1 and 'ZeroDivisionError' in done.stderr


def test_workers_begin_as_they_are_told(tree):
    path = tree / 'nbs/02_third.ipynb'
    write(path, lesson('third', ['import multiprocessing\nassert multiprocessing.get_start_method() == "spawn"']))
    before = path.read_bytes()
    assert script(tree, 'run.py', '--start-method', 'spawn', '02').returncode == 0
    assert script(tree, 'run.py', '--start-method', 'fork', '02').returncode == 1
    assert path.read_bytes() == before


def test_unknown_notebook(tree):
    done = script(tree, 'run.py', '77')
    assert done.returncode == 1 and "no notebook is called '77'" in done.stderr and '00_first' in done.stderr


def test_seeds_are_shifted_and_nothing_is_saved(tree):
    path = tree / 'nbs/02_third.ipynb'
    write(path, lesson('third', [
        'import torch, random', 'torch.manual_seed(3); a = torch.initial_seed()',
        'g = torch.Generator().manual_seed(5)',
        '#| export\nassert torch.Generator().manual_seed(9).initial_seed() == 9',
        'def f(seed=None): return seed\nb = f(seed=7), f(seed=None)',
        'assert (a, g.initial_seed(), b) == (3, 5, (7, None)), (a, g.initial_seed(), b)']))
    before = path.read_bytes()
    done = script(tree, 'run.py', '--seeds', '2', '02')
    assert done.returncode == 1
    for shifted in '(1003, 1005, (1007, None))', '(2003, 2005, (2007, None))': assert shifted in done.stderr
    assert path.read_bytes() == before


def test_seeds_pass_where_the_claim_does_not_depend_on_them(tree):
    no_new_results = 'import os\nassert os.environ["DLFOUND_FULL"] == "0"'
    cells = ['import random', 'random.seed(0)', 'assert 0 <= random.random() < 1', no_new_results]
    write(tree / 'nbs/02_third.ipynb', lesson('third', cells))
    done = script(tree, 'run.py', '--seeds', '2', '02', DLFOUND_STANDIN='1', DLFOUND_FULL='1')
    assert done.returncode == 0 and done.stdout.count('1 seeds shifted') == 2


@needs_git
def test_what_is_committed_is_checked_not_what_lies_around(tree):
    for step in ['init', '-q'], ['add', '-A'], ['commit', '-qm', 'all']:
        git = ['git', '-c', 'user.name=x', '-c', 'user.email=x@example.org', *step]
        subprocess.run(git, cwd=tree, check=True, capture_output=True)
    (tree / 'nbs/00_first.ipynb').write_text('{broken')
    code = ('import sys, pathlib; sys.path.insert(0, "scripts"); import test; '
            'print((test.committed(pathlib.Path(sys.argv[1])) / "nbs/00_first.ipynb").read_text())')
    out = tree / 'out'
    out.mkdir()
    done = subprocess.run([sys.executable, '-c', code, str(out)], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)['cells']) == 4


def test_neighbouring_pieces_of_a_stream_are_one():
    "As JupyterLab saves them, so that running a lesson there changes nothing; an empty piece is none"
    from run import joined
    def piece(name, text): return dict(output_type='stream', name=name, text=text)
    shown = dict(output_type='display_data', data={}, metadata={})
    given = [piece('stdout', 'a'), piece('stdout', 'b\n'), piece('stderr', ''), piece('stderr', 'c'), shown,
             piece('stderr', 'd')]
    assert joined(given) == [piece('stdout', 'ab\n'), piece('stderr', 'c'), shown, piece('stderr', 'd')]
    assert joined([]) == [] and joined([shown, shown]) == [shown, shown]
