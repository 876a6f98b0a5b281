"Each fault that the lint knows is planted in a small course and found; a clean course has none."
import json
import shutil
import sys
from pathlib import Path

import check
import pytest
from common import generated, hashes, key, notebooks, read, save_manifest
from small import edit, lesson, run, script, write

root = Path(__file__).resolve().parent.parent
bin = Path(sys.executable).parent


def record(tree):
    save_manifest({key(p, tree): dict(seconds=1, cells=hashes(read(p))) for p in notebooks(tree)}, tree)


@pytest.fixture
def clean(tree):
    assert script(tree, 'export.py').returncode == 0
    record(tree)
    return tree


def cell(nb, i): return [c for c in nb['cells'] if not generated(c)][i]


def put(tree, code, where='nbs/01_second.ipynb'):
    "Write code into a cell of a notebook, or into a file"
    path = tree / where
    path.parent.mkdir(exist_ok=True)
    if path.suffix == '.py': path.write_text(code)
    else: edit(path, lambda nb: cell(nb, 2).update(source=code.splitlines(keepends=True)))
    return tree


def test_a_clean_course_has_no_fault(clean):
    for f in check.checks:
        if f is not check.check_front_page: assert f(clean) == [], f.__name__


@pytest.mark.parametrize('line, hint', [
    ('#| exporte', 'did you mean export?'), ('#|hid', 'did you mean hide?'), ('#| fig_alt: x', 'did you mean fig-alt?'),
    ('#| slow', 'stored(name, run)'), ('#| cuda', 'ask for a GPU in Python'),
    ('#| eval: false', 'Run All knows no such'), ('#| notest', 'make test runs every cell'),
])
def test_misspelt_directive(tree, line, hint):
    edit(tree / 'nbs/01_second.ipynb', lambda nb: cell(nb, 2)['source'].insert(0, line + '\n'))
    [bad] = check.check_directives(tree)
    assert hint in bad and '01_second' in bad


def test_directive_below_code(tree):
    edit(tree / 'nbs/01_second.ipynb', lambda nb: cell(nb, 2)['source'].extend(['\n', '#| hide']))
    assert 'move it to the top' in check.check_directives(tree)[0]


def test_wide_line_in_a_cell(tree):
    [bad] = check.check_cell_widths(put(tree, 'x = 1\ny = ' + 97 * 'z'))
    assert 'wrap it at 100' in bad and '101 columns' in bad
    for fine in 'y = ' + 96 * 'z', '#| fig-alt: ' + 99 * 'a', f'sha256 = {64 * "a"!r}' + 40 * ' ' + '# as published':
        assert not check.check_cell_widths(put(tree, fine))


def test_a_check_that_is_never_entered(tree):
    [bad] = check.check_idle(put(tree, 'x = 1\nexpect_fail(lambda: 1 / 0, ZeroDivisionError)'))
    assert 'line 2' in bad and 'checks nothing alone' in bad
    assert not check.check_idle(put(tree, 'with expect_fail(ZeroDivisionError): 1 / 0'))


@pytest.mark.parametrize('folder', ['scripts', 'tests', 'benchmarks'])
def test_wide_line_in_a_file(tree, folder):
    [bad] = check.check_widths(put(tree, '\ny = ' + 117 * '1', f'{folder}/some.py'))
    assert f'{folder}/some.py, line 2: 121 columns' in bad
    assert not check.check_widths(put(tree, 'y = ' + 116 * '1', f'{folder}/some.py'))


def test_long_lesson(tree):
    def grow(nb): nb['cells'] += [dict(cell_type='markdown', id=f'm{i}', metadata={}, source=['x']) for i in range(n)]
    have = len(read(tree / 'nbs/01_second.ipynb')['cells'])
    n = 205 - have
    edit(tree / 'nbs/01_second.ipynb', grow)
    assert not check.check_lesson_sizes(tree)
    n = 206 - have
    edit(tree / 'nbs/00_first.ipynb', grow)
    assert ['00_first.ipynb: 206 cells' in bad for bad in check.check_lesson_sizes(tree)] == [True]


def test_long_module(tree):
    for name, lines in ('loop', 301), ('some', 271), ('fine', 270):
        put(tree, 'x = 1\n' * lines, f'dlfound/{name}.py')
    loop, some = check.check_module_sizes(tree)
    assert 'loop.py: 301 lines, more than 300' in loop and 'some.py: 271 lines, more than 270' in some


def test_tower(tree):
    put(tree, 'class A: pass\nclass B(A): pass\nclass C(B): pass\nclass Module: pass\n', 'dlfound/one.py')
    top = 'from torch import nn\nfrom .one import C as Base\nfrom other import B\nclass D({}): pass\n'
    [bad] = check.check_bases(put(tree, top.format('Base'), 'dlfound/two.py'))
    assert 'dlfound/two.py: D stands on C, B, A' in bad
    for fine in 'object', 'B, nn.Module', 'nn.Module, Exception': # None of which is ours
        assert not check.check_bases(put(tree, top.format(fine), 'dlfound/two.py'))


@pytest.mark.parametrize('base, sub, names', [
    ('def f(self): return self.x', 'def __init__(self): self.x = 1', 'x'),
    ('def f(self): return self.x + self.g()', 'x = 1\n    def g(self): return 2', 'g, x'),
    ('x: int\n    def f(self): return self.x', 'x: int = 1', 'x'),
    ('x = 0\n    def f(self): return self.x', 'x = 1', ''),
    ('def g(self): self.x = 0\n    def f(self): return self.x', 'x = 1', ''),
    ('def f(self): return self.x', 'y = 1', ''), # Whoever sets x, it is no subclass
    ('def g(self): raise NotImplementedError\n    def f(self): return self.g()', 'def g(self): return 1', ''),
])
def test_what_only_a_subclass_has(tree, base, sub, names):
    put(tree, f'class A:\n    {base}\n', 'dlfound/one.py')
    bad = check.check_bases(put(tree, f'from .one import A\nclass B(A):\n    {sub}\n', 'dlfound/two.py'))
    assert [f'one.py: A reads {names}, which only a subclass sets' in b for b in bad] == [True] * bool(names)


@pytest.mark.parametrize('where', ['dlfound/two.py', 'nbs/01_second.ipynb', 'nbs/tools/kit.ipynb'])
@pytest.mark.parametrize('code, found', [
    ('from dlfound.one import _helper', True), ('import dlfound.one as o\no._helper()', True), ('x.y._kept', True),
    ('def _helper(): return 1\n_helper()', False), ('import torch\ntorch._foreach_add', False), ('x.__doc__', False),
    ('class A:\n    def __init__(self): self._kept = 1\n    def f(self): return self._kept', False),
])
def test_private_name(tree, where, code, found):
    put(tree, 'def _helper(): return 1\nclass A:\n    def __init__(self): self._kept = 2\n', 'dlfound/one.py')
    bad = check.check_private(put(tree, code, where))
    assert [where.removeprefix('nbs/') in b and 'private to dlfound/one.py' in b for b in bad] == [True] * found


@pytest.mark.parametrize('where', ['tests/test_some.py', 'nbs/01_second.ipynb'])
@pytest.mark.parametrize('code, found', [
    ('assert time.perf_counter() - start < 2', True), ('assert x and 60 * 2 >= seconds > 0', True),
    ('assert max(t.train_seconds) < .5, t', True), ('assert n / took > 1e3', True), ('assert abs(took) < 1', True),
    ('test(row["seconds"], 3, lt)', True), ('test_close(elapsed, 2., eps=.1)', True),
    ('assert took / seconds < 2', False), ('assert seconds > 0', False), ('assert seconds < 3 * others_took', False),
    ('assert len(seconds) < 3', False), ('assert times < 3', False), ('test(slow.took, fast.took, gt)', False),
    ('if took < 3: pass', False), ('assert seconds == 3', False),
])
def test_absolute_time(tree, where, code, found):
    bad = check.check_times(put(tree, code + '\n', where))
    assert [where.removeprefix('nbs/') in b and 'another time of the same run' in b for b in bad] == [True] * found


def test_cell_without_id(clean):
    path = clean / 'nbs/01_second.ipynb'
    nb = read(path)
    del nb['cells'][2]['id']
    path.write_text(json.dumps(nb))
    assert any('ids' in b for b in check.check_format(clean))


def test_two_cells_with_one_id(clean):
    edit(clean / 'nbs/01_second.ipynb', lambda nb: cell(nb, 2).update(id=cell(nb, 3)['id']))
    assert any('ids' in b for b in check.check_format(clean))


def test_no_kernelspec(clean):
    edit(clean / 'nbs/01_second.ipynb', lambda nb: nb['metadata'].clear())
    assert any('kernel' in b for b in check.check_format(clean))


def test_stale_outputs(clean):
    edit(clean / 'nbs/01_second.ipynb', lambda nb: cell(nb, 3)['source'].append(' + 1'))
    [bad] = check.check_outputs(clean)
    assert 'second02' in bad and 'make run NB=01' in bad


def test_missing_outputs(clean):
    edit(clean / 'nbs/01_second.ipynb', lambda nb: cell(nb, 3).update(outputs=[]))
    assert 'no cell has an output' in check.check_outputs(clean)[0]


def test_removed_cell(clean):
    edit(clean / 'nbs/01_second.ipynb', lambda nb: nb['cells'].pop(2) and None)
    assert 'removed' in check.check_outputs(clean)[0]


def test_unrecorded_notebook(clean):
    write(clean / 'nbs/02_third.ipynb', lesson('third', ['1 + 1']))
    assert 'make run NB=02' in check.check_outputs(clean)[0]


def test_error_kept_as_output(clean):
    error = dict(output_type='error', ename='E', evalue='', traceback=[])
    edit(clean / 'nbs/01_second.ipynb', lambda nb: cell(nb, 3)['outputs'].append(error))
    assert 'is an error' in check.check_outputs(clean)[0]


def test_described_picture_that_is_missing(clean):
    def described(nb):
        cell(nb, 3)['source'].insert(0, '#| fig-alt: a curve\n')
        cell(nb, 3)['outputs'] = [dict(output_type='display_data', data={kind: 'x'}, metadata={})]
    kind = 'text/plain'
    edit(clean / 'nbs/01_second.ipynb', described)
    record(clean)
    [bad] = check.check_outputs(clean)
    assert 'describes a picture and has none' in bad and 'make run NB=01' in bad
    kind = 'image/png'
    edit(clean / 'nbs/01_second.ipynb', lambda nb: cell(nb, 3)['outputs'][0].update(data={kind: 'x'}))
    assert not check.check_outputs(clean)


def test_stored_result(tree):
    needed = 'stored', 'data', 'download', 'archive', 'standin', 'show'
    for name in needed: shutil.copy(root / f'dlfound/{name}.py', tree / 'dlfound')
    page, results = tree / 'nbs/02_third.ipynb', tree / 'dlfound/results'
    top, body = '%precision 3\nfactor = 3', 'return [factor * i for i in range(n)]'
    cells = ['from dlfound.stored import stored', top, f'def run(n=5): {body}', "stored('third', run, n=2).kept"]

    def become(i, code): edit(page, lambda nb: cell(nb, i).update(source=code.splitlines(keepends=True)))
    write(page, lesson('third', [*cells, 'def run(): return 1'], outputs=False))
    [bad] = check.check_stored(tree)
    assert '02_third.ipynb: third.json is not in dlfound/results: run make full' in bad
    done = script(tree, 'run.py', '02', DLFOUND_FULL='1')
    assert done.returncode == 0, done.stderr
    assert read(results / 'third.json')['result'] == [0, 3, 6, 9, 12] and check.check_stored(tree) == []
    become(4, f'def run(n=5): # Said otherwise\n    "Threefold"\n    {body}')
    become(6, 'def run(): return 2') # Below the call
    assert check.check_stored(tree) == []
    for i, code in (4, f'def run(n=5): {body} + []'), (3, top.replace('3', '4')):
        become(i, code)
        [bad] = check.check_stored(tree)
        assert '02_third.ipynb: third.json was computed by another run' in bad and 'make full' in bad
        become(4, cells[2])
    become(4, 'from elsewhere import run')
    [bad] = check.check_stored(tree)
    assert "third.json: no cell defines 'run'" in bad
    become(4, cells[2])
    (results / 'third.json').rename(results / 'other.json')
    missing, stray = check.check_stored(tree)
    assert 'third.json is not in' in missing and 'other.json belongs to no notebook: remove it' in stray


def test_orphaned_module(clean):
    (clean / 'nbs/00_first.ipynb').unlink()
    record(clean)
    (clean / 'dlfound/stray.py').write_text('x = 1\n')
    bad = check.check_names(clean)
    assert any('stray.py' in b for b in bad) and any('00_first.ipynb, which is gone' in b for b in bad)


def test_module_of_another_name(clean):
    edit(clean / 'nbs/01_second.ipynb', lambda nb: cell(nb, 1).update(source=['#| default_exp other']))
    assert 'by its name should to second' in check.check_names(clean)[0]


@pytest.mark.parametrize('line', ['from dlfound.second import x', 'import dlfound.second', 'from dlfound import second',
                                  'if True:\n    from dlfound.second import x'])
def test_lesson_that_imports_a_later_one(clean, line):
    edit(clean / 'nbs/00_first.ipynb', lambda nb: cell(nb, 3).update(source=line.splitlines(keepends=True)))
    assert '00_first.ipynb imports dlfound.second' in check.check_staircase(clean)[0]


def test_tool_that_imports_a_lesson(clean):
    edit(clean / 'nbs/tools/kit.ipynb', lambda nb: cell(nb, 3).update(source=['from dlfound.first import two']))
    assert 'tools import tools only' in check.check_staircase(clean)[0]


def test_lessons_import_from_modules(clean):
    put(clean, 'from dlfound import first, Learner')
    assert 'imports Learner from dlfound: import it from the module' in check.check_lesson_imports(clean)[0]
    put(clean, 'from dlfound import first')
    assert check.check_lesson_imports(clean) == []


def test_export_forgotten(clean):
    edit(clean / 'nbs/00_first.ipynb', lambda nb: cell(nb, 2)['source'].append('  # new'))
    assert any('dlfound/first.py' in b for b in check.check_export(clean))


def test_module_edited_by_hand(clean):
    path = clean / 'dlfound/first.py'
    path.write_text(path.read_text().replace('+ 1', '+ 2'))
    assert any('dlfound/first.py' in b for b in check.check_export(clean))


def test_metadata_left_in(clean):
    edit(clean / 'nbs/01_second.ipynb', lambda nb: cell(nb, 3).update(execution_count=7, metadata=dict(tags=['x'])))
    assert any('01_second' in b for b in check.check_clean(clean))


def test_path_of_a_machine(clean):
    home = '/'.join(['', 'home', 'somebody', 'x.txt'])
    edit(clean / 'nbs/01_second.ipynb', lambda nb: cell(nb, 3)['source'].append(f'; "{home}"'))
    assert 'somebody' in check.check_places(clean)[0]


def test_front_page(clean):
    rows = ('| lesson | question | gives | hours to read | seconds to run |\n| --- | --- | --- | --- | --- |\n'
            '| [00](nbs/00_first.ipynb) | Why? | a two | | |\n| [01](nbs/01_second.ipynb) | How? | nothing | | |\n')
    (clean / 'README.md').write_text('# small\n\n' + rows + '\nand more\n')
    index = lesson('index', [])
    index['cells'] = [index['cells'][0] | dict(source=[rows.splitlines()[0] + '\n', '| --- |'])]
    write(clean / 'nbs/index.ipynb', index)
    record = {'00_first.ipynb': dict(seconds=64, cells={}), '01_second.ipynb': dict(seconds=2, cells={})}
    (clean / 'nbs/outputs.json').write_text(json.dumps(record))
    assert 'run make export' in check.check_front_page(clean)[0]
    assert script(clean, 'export.py').returncode == 0 and check.check_front_page(clean) == []
    text = (clean / 'README.md').read_text()
    assert '| [00 first](nbs/00_first.ipynb) | Why? | a two | 0.5 | 60 |\n' in text and text.endswith('\n\nand more\n')
    made = json.loads((clean / 'nbs/index.ipynb').read_text())['cells'][0]['source']
    assert made[-1] == '| [01 second](01_second.ipynb) | How? | nothing | 0.5 | 10 |'
    (clean / 'README.md').write_text(text.replace('a two', 'one two three four five six').replace('How?', ''))
    assert len(check.check_front_page(clean)) == 2
    write(clean / 'nbs/02_third.ipynb', lesson('third', ['3']))
    assert script(clean, 'export.py').returncode == 0
    assert any('02_third lacks its question' in b for b in check.check_front_page(clean))
