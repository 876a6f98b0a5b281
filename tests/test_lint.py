"Each fault that the lint knows is planted in a small course and found; a clean course has none."
import json
import sys
from pathlib import Path

import check
import pytest
from common import hashes, read, save_manifest
from small import edit, lesson, run, write

bin = Path(sys.executable).parent


def record(tree):
    save_manifest({str(p.relative_to(tree / 'nbs')): dict(seconds=1, cells=hashes(read(p))) for p in (tree / 'nbs').rglob('*.ipynb')}, tree)


@pytest.fixture
def clean(tree):
    assert run(bin / 'nbdev-export', cwd=tree).returncode == 0
    record(tree)
    return tree


def cell(nb, i): return nb['cells'][i]


def test_a_clean_course_has_no_fault(clean):
    for f in check.checks:
        if f is not check.check_front_page: assert f(clean) == [], f.__name__


@pytest.mark.parametrize('line, hint', [('#| exporte', 'did you mean export?'), ('#|hid', 'did you mean hide?'), ('#| fig_alt: x', 'did you mean fig-alt?')])
def test_misspelt_directive(clean, line, hint):
    edit(clean / 'nbs/01_second.ipynb', lambda nb: cell(nb, 2)['source'].insert(0, line + '\n'))
    [bad] = check.check_directives(clean)
    assert hint in bad and '01_second' in bad


def test_directive_below_code(clean):
    edit(clean / 'nbs/01_second.ipynb', lambda nb: cell(nb, 2)['source'].extend(['\n', '#| slow']))
    assert 'move it to the top' in check.check_directives(clean)[0]


def test_wide_exported_line(clean):
    wide = 'x = ' + ' + '.join('1' * 40)
    edit(clean / 'nbs/01_second.ipynb', lambda nb: cell(nb, 2).update(source=['#| export\n', wide]))
    [bad] = check.check_width(clean)
    assert 'wrap it at 120' in bad and f'{len(wide)} columns' in bad
    edit(clean / 'nbs/01_second.ipynb', lambda nb: cell(nb, 2).update(source=[wide]))
    assert not check.check_width(clean)


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


def test_slow_cell_without_output(clean):
    write(clean / 'nbs/02_third.ipynb', lesson('third', ['#| slow\n2', '1 + 1']))
    record(clean)
    assert 'make full' in check.check_outputs(clean)[0]


def test_orphaned_module(clean):
    (clean / 'nbs/00_first.ipynb').unlink()
    record(clean)
    (clean / 'dlfound/stray.py').write_text('x = 1\n')
    bad = check.check_names(clean)
    assert any('stray.py' in b for b in bad) and any('00_first.ipynb, which is gone' in b for b in bad)


def test_module_of_another_name(clean):
    edit(clean / 'nbs/01_second.ipynb', lambda nb: cell(nb, 1).update(source=['#| default_exp other']))
    assert 'by its name should to second' in check.check_names(clean)[0]


@pytest.mark.parametrize('line', ['from dlfound.second import x', 'import dlfound.second', 'from dlfound import second', 'if True:\n    from dlfound.second import x'])
def test_lesson_that_imports_a_later_one(clean, line):
    edit(clean / 'nbs/00_first.ipynb', lambda nb: cell(nb, 3).update(source=line.splitlines(keepends=True)))
    assert '00_first.ipynb imports dlfound.second' in check.check_staircase(clean)[0]


def test_tool_that_imports_a_lesson(clean):
    edit(clean / 'nbs/tools/kit.ipynb', lambda nb: cell(nb, 3).update(source=['from dlfound.first import two']))
    assert 'tools import tools only' in check.check_staircase(clean)[0]


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
    rows = ('| lesson | question | exports | seconds |\n|---|---|---|---|\n| [00](nbs/00_first.ipynb) | Why? | `two` | 1 |\n'
            '| [01](nbs/01_second.ipynb) | How? | – | 1 |\n')
    (clean / 'README.md').write_text(rows)
    index = lesson('index', [])
    index['cells'][0]['source'] = [rows.replace('nbs/', '')]
    index['cells'] = index['cells'][:1]
    write(clean / 'nbs/index.ipynb', index)
    assert check.check_front_page(clean) == []
    (clean / 'README.md').write_text(rows.replace('`two`', '`three`').replace('| – | 1 |', '| – | 99 |'))
    bad = check.check_front_page(clean)
    assert any('three, two' in b for b in bad) and any('took 1 s' in b for b in bad) and len(bad) == 2
    (clean / 'README.md').write_text(rows.splitlines()[2])
    assert len(check.check_front_page(clean)) == 1
