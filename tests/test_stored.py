"Files are whole or not there, whatever ends the writer; a hash sees what code does and nothing else; results are kept."
import ast
import json
import os
import signal
import stat
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import pytest

import dlfound
from dlfound import stored as module
from dlfound.stored import Stored, code_hash, stored, whole_file


# A file that is whole or not there

@pytest.mark.parametrize('error', [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit])
@pytest.mark.parametrize('old', [None, 'old'])
def test_an_error_leaves_what_was_there(tmp_path, error, old):
    path = tmp_path / 'f'
    if old: path.write_text(old)
    with pytest.raises(error), whole_file(path) as part:
        part.write_text('half')
        raise error
    assert [p.read_text() for p in tmp_path.iterdir()] == ([old] if old else [])


def test_the_old_file_is_there_until_the_block_has_ended(tmp_path):
    path = tmp_path / 'f'
    path.write_text('old')
    with whole_file(path) as part:
        part.write_text('new')
        assert path.read_text() == 'old' and part.parent == path.parent
    assert path.read_text() == 'new'


def test_a_reader_never_sees_a_part(tmp_path):
    path, seen, done = tmp_path / 'f', set(), threading.Event()
    texts = {c * 200_000 for c in 'abc'}
    path.write_text('a' * 200_000)

    def read():
        while not done.is_set(): seen.add(path.read_text())

    reader = threading.Thread(target=read)
    reader.start()
    for i in range(60):
        with whole_file(path) as part, open(part, 'w') as f:
            for _ in range(200): f.write('abc'[i % 3] * 1000)
    done.set()
    reader.join()
    assert seen and seen <= texts


def test_a_killed_writer_leaves_what_was_there(tmp_path):
    path = tmp_path / 'f'
    path.write_text('old')
    code = f'''
import sys, time
from dlfound.stored import whole_file
with whole_file({str(path)!r}) as part:
    part.write_text('half')
    print('writing', flush=True)
    time.sleep(60)
'''
    writer = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True)
    assert writer.stdout.readline() == 'writing\n'
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    assert path.read_text() == 'old'
    with whole_file(path) as part: part.write_text('new')
    assert path.read_text() == 'new'


@pytest.mark.parametrize('umask', [0o022, 0o077, 0o002])
def test_permissions_are_those_of_any_new_file(tmp_path, umask):
    before = os.umask(umask)
    try:
        (tmp_path / 'plain').touch()
        with whole_file(tmp_path / 'f') as part: part.write_text('x')
        with whole_file(tmp_path / 'private') as part: # As a library that writes a file of its own and renames it
            own = os.open(tmp_path / 'own', os.O_CREAT | os.O_WRONLY, 0o600)
            os.close(own)
            os.replace(tmp_path / 'own', part)
    finally: os.umask(before)
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in tmp_path.iterdir()}
    assert modes == dict.fromkeys(('plain', 'f', 'private'), 0o666 & ~umask)


@pytest.mark.parametrize('mode', [0o600, 0o640, 0o444, 0o755])
def test_permissions_of_the_file_that_is_replaced_are_kept(tmp_path, mode):
    path = tmp_path / 'f'
    path.touch()
    path.chmod(mode)
    with whole_file(path) as part: part.write_text('x')
    assert (stat.S_IMODE(path.stat().st_mode), path.read_text()) == (mode, 'x')


def test_links_are_followed(tmp_path):
    (tmp_path / 'disk').mkdir()
    (tmp_path / 'first').symlink_to('second') # Relative, and one after the other
    (tmp_path / 'second').symlink_to(tmp_path / 'disk' / 'w')
    for text in 'new', 'newer': # The first time it points to nothing
        with whole_file(tmp_path / 'first') as part: part.write_text(text)
        assert (tmp_path / 'first').is_symlink() and (tmp_path / 'second').is_symlink()
        assert (tmp_path / 'disk' / 'w').read_text() == text
    assert [p.name for p in (tmp_path / 'disk').iterdir()] == ['w']


def test_home_folders_and_plain_strings(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    with whole_file('~/runs/today/w.txt') as part: part.write_text('x')
    monkeypatch.chdir(tmp_path)
    with whole_file('here.txt') as part: part.write_text('y')
    assert (tmp_path / 'runs/today/w.txt').read_text() + (tmp_path / 'here.txt').read_text() == 'xy'


def test_a_file_system_that_cannot_sync_folders_is_good_enough(tmp_path, monkeypatch):
    real = os.fsync

    def fsync(handle): # As on SMB, VirtualBox or FUSE mounts
        if stat.S_ISDIR(os.fstat(handle).st_mode): raise OSError(22, 'Invalid argument')
        real(handle)

    monkeypatch.setattr(os, 'fsync', fsync)
    with whole_file(tmp_path / 'f') as part: part.write_text('x')
    assert (tmp_path / 'f').read_text() == 'x'


def test_what_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    (tmp_path / 'folder').mkdir()
    with pytest.raises(OSError), whole_file(tmp_path / 'folder') as part: part.write_text('x')
    with pytest.raises(FileNotFoundError), whole_file(tmp_path / 'gone') as part: part.unlink()
    with pytest.raises(NotADirectoryError), whole_file(tmp_path / 'folder/../gone/f') as part:
        (tmp_path / 'unused').touch()
        raise NotADirectoryError
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == ['unused']

    def fsync(handle): raise OSError(28, 'No space left on device')

    (tmp_path / 'f').write_text('old')
    monkeypatch.setattr(os, 'fsync', fsync)
    with pytest.raises(OSError, match='No space'), whole_file(tmp_path / 'f') as part: part.write_text('x')
    assert (tmp_path / 'f').read_text() == 'old' and not list(tmp_path.glob('.*'))


# A hash of code

page = ['''
scale = 2
def helper(x, by=scale):
    return x * by
''', '''
class Net:
    "A net"
    layers = 3
    def forward(self, x):
        "One pass"
        return helper(x)
''', '''
def unused(): return 0
def run(n=10, seed=0):
    "The experiment"
    def inner(x): return [Net().forward(i + offset) for i in range(x)]
    return inner(n)
offset = 1
''']
pinned = '8acc027fd370'


def edited(old, new, cells=page):
    assert any(old in c for c in cells), old
    return code_hash([c.replace(old, new) for c in cells], 'run')


def test_the_hash_is_the_same_in_every_version_of_python():
    assert code_hash(page, 'run') == pinned


def test_it_does_not_rest_on_how_python_prints_a_tree(monkeypatch):
    def dump(*args, **kwargs): raise AssertionError('ast.dump differs between versions')
    monkeypatch.setattr(ast, 'dump', dump)
    assert code_hash(page, 'run') == pinned


def test_it_does_not_rest_on_fields_that_a_version_adds(monkeypatch):
    real = ast.iter_fields

    def newer(node):
        yield from real(node)
        yield 'added', []
        yield 'also_added', None

    monkeypatch.setattr(ast, 'iter_fields', newer)
    assert code_hash(page, 'run') == pinned


@pytest.mark.parametrize('old, new', [
    ('return x * by', 'return x * by # twice'), ('return x * by', 'return (x\n            * by)'),
    ('"One pass"', '"Another docstring"'), ('    "One pass"\n', '\n'), ('    "A net"\n', ''),
    ('    "The experiment"\n', '    """A long\n    text"""\n'), ('def unused(): return 0', 'def unused(): return 1'),
    ('def unused(): return 0', ''), ('scale = 2', 'scale = 2\nother = 3'),
    ('scale = 2', 'x, n, i, inner = 1, 2, 3, 4\nscale = 2'),
    ('scale = 2', 'print("hello")\nscale = 2'), ('offset = 1', 'offset = 1\nfor i in range(3): print(i)'),
    ('offset = 1', 'offset = 1\nx = [i for i in range(3)]'), ('offset = 1', 'import numpy as x\noffset = 1'),
])
def test_what_does_not_count(old, new):
    assert edited(old, new) == pinned


@pytest.mark.parametrize('old, new', [
    ('x * by', 'x + by'), ('scale = 2', 'scale = 3'), ('scale = 2', 'scale = 2.'), ('layers = 3', 'layers = 4'),
    ('helper(x)', 'helper(-x)'), ('offset = 1', 'offset = 2'), ('offset = 1', 'offset = "1"'),
    ('offset = 1', 'offset: int = 2'),
    ('offset = 1', 'offset = 1\noffset += 1'), ('offset = 1', 'a, (offset, *b) = 1, (2, 3)'), ('n=10', 'n=11'),
    ('offset = 1', 'for offset in range(3): pass'), ('offset = 1', 'with open("f") as offset: pass'),
    ('offset = 1', 'if scale: offset = 1'), ('offset = 1', 'print(offset := 2)'), ('def helper', '@print\ndef helper'),
    ('class Net:', 'class Net(int):'), ('range(x)', 'range(x + scale)'),
    ('return 0', 'return 0\ndef range(x): return []'),
])
def test_what_counts(old, new):
    assert edited(old, new) != pinned


def test_the_last_definition_counts_and_those_that_it_stands_on():
    late = ['def run(): return 1', 'def run(): return 2']
    assert code_hash(late, 'run') == code_hash(late[1:], 'run') != code_hash(late[:1], 'run')
    grown = ['class A: x = 1', 'class A(A): y = 1', 'def run(): return A']
    assert code_hash(grown, 'run') != code_hash(['class A: x = 2', *grown[1:]], 'run')
    summed = ['n = 1', 'n = n + 1', 'def run(): return n']
    assert code_hash(summed, 'run') != code_hash(['n = 2', *summed[1:]], 'run')


def test_cells_that_are_no_python_are_left_out():
    assert code_hash(['%timeit run()', '!ls', 'def broken(', *page], 'run') == pinned
    assert code_hash(["get_ipython().run_line_magic('timeit', 'run()')", *page], 'run') == pinned


def test_a_line_for_jupyter_does_not_hide_its_cell():
    for line in '%time 1', '!ls', 'files = !ls', 'if 0:\n    !ls', 'print?', 'x = 1\n%time x', 'a = \"\"\"\n%b\n\"\"\"':
        cells = [f'{line}\n{page[0]}', *page[1:]]
        assert code_hash(cells, 'run') == pinned != edited('scale = 2', 'scale = 3', cells)


def test_what_is_defined_nowhere_has_no_hash():
    for name in 'missing', 'numpy', '<lambda>', '':
        with pytest.raises(ValueError, match='no cell defines'): code_hash(['import numpy', *page], name)


def test_functions_that_call_each_other_end():
    even = 'def even(n): return n == 0 or odd(n - 1)'
    odd = 'def odd(n): return n > 0 and even(n - 1)'
    assert code_hash([even, odd], 'even') == code_hash([odd, even], 'even') != code_hash([even, odd + ' + 0'], 'even')


# A result that is kept

experiment = '''
calls = []
def run(n=100):
    calls.append(n)
    return dict(n=n, pair=(1, 2), by={1: 'one'})
'''


@pytest.fixture
def notebook(tmp_path, monkeypatch):
    "The names of a page that has run one cell, whose results go to a folder of its own"
    monkeypatch.setattr(dlfound, '__file__', str(tmp_path / 'dlfound/__init__.py'))
    monkeypatch.delenv('DLFOUND_FULL', raising=False)
    monkeypatch.setattr(module, 'used', dict)
    names = dict(In=['', experiment])
    exec(experiment, names)
    return names


def kept(tmp_path): return {p.name: json.loads(p.read_text()) for p in (tmp_path / 'dlfound/results').glob('*')}


def test_full_writes_and_every_page_reads(notebook, tmp_path, monkeypatch):
    monkeypatch.setenv('DLFOUND_FULL', '1')
    first = stored('dice', notebook['run'], n=3)
    assert notebook['calls'] == [3, 100]
    [(name, file)] = kept(tmp_path).items()
    assert name == 'dice.json' and file['code'] == code_hash([experiment], 'run') and file['data'] == ''
    assert {'seconds', 'device', 'torch', 'python'} < set(file)
    for value in '', '0', None:
        monkeypatch.setenv('DLFOUND_FULL', value) if value is not None else monkeypatch.delenv('DLFOUND_FULL')
        again = stored('dice', notebook['run'], n=4)
        assert again.kept == first.kept == dict(n=100, pair=[1, 2], by={'1': 'one'})
        assert again.live == dict(again.kept, n=4) # Of one form
    assert notebook['calls'] == [3, 100, 4, 4, 4]


@pytest.mark.parametrize('value', ['', '0', None])
def test_nothing_is_kept_unless_asked_for(notebook, tmp_path, monkeypatch, value):
    if value is not None: monkeypatch.setenv('DLFOUND_FULL', value)
    with pytest.raises(FileNotFoundError, match='dice.json; make full computes it'):
        stored('dice', notebook['run'], n=3)
    assert notebook['calls'] == [] and kept(tmp_path) == {}


def test_a_mistake_shows_before_the_hours(notebook, tmp_path, monkeypatch):
    "A small run that fails, a result that JSON cannot hold, a function without code on the page"
    monkeypatch.setenv('DLFOUND_FULL', '1')
    run = notebook['run']

    def failing(n=100):
        run(n)
        raise ZeroDivisionError

    def unwritable(n=100):
        run(n)
        return {1, 2}

    with pytest.raises(ZeroDivisionError): stored('dice', failing, n=3)
    with pytest.raises(TypeError, match='set is not JSON'): stored('dice', unwritable, n=3)
    for nameless in partial(run, n=2), lambda n=100: run(n), eval('lambda n=100: run(n)', notebook):
        with pytest.raises(ValueError, match='no cell defines'): stored('dice', nameless, n=3)
    assert 100 not in notebook['calls'] and kept(tmp_path) == {}


def test_a_result_of_stand_ins_is_not_kept_and_the_old_one_stays(notebook, tmp_path, monkeypatch):
    monkeypatch.setenv('DLFOUND_FULL', '1')
    stored('dice', notebook['run'], n=3)
    before = kept(tmp_path)
    monkeypatch.setattr(module, 'used', lambda: dict(mnist=False, imdb=True))
    with pytest.raises(RuntimeError, match='real data only'): stored('dice', notebook['run'], n=3)
    assert kept(tmp_path) == before


def test_in_stand_in_mode_the_result_says_whose_data_it_used(notebook, monkeypatch):
    monkeypatch.setenv('DLFOUND_FULL', '1')
    monkeypatch.setattr(module, 'used', lambda: dict(mnist=False))
    there = stored('dice', notebook['run'], n=3)
    assert there.file['data'] == 'mnist' and 'stand-in' not in repr(there)
    monkeypatch.delenv('DLFOUND_FULL')
    monkeypatch.setattr(module, 'used', lambda: dict(mnist=True))
    here = stored('dice', notebook['run'], n=3)
    assert here.kept == there.kept and 'on the real data (mnist); this page has a stand-in' in repr(here)


def test_a_name_may_hold_braces(notebook):
    result = Stored('{x}', dict(result=1, seconds=2, device='{CPU}', torch='3'), 1)
    assert repr(result) == '{x}: computed in 2 s on {CPU} with torch 3'


def test_results_come_with_the_package():
    results = Path(dlfound.__file__).parent / 'results'
    assert (results / 'rolls_until_six.json').exists()
    for path in results.glob('*'):
        file = json.loads(path.read_text())
        assert path.suffix == '.json' and {'code', 'seconds', 'device', 'torch', 'data', 'result'} <= set(file)
