"`make export` loses no edit, and writes the links, install lines and tables that follow from the list of notebooks."
import json
import subprocess

import pytest
from small import edit, lesson, needs_git, script, write

pytestmark = needs_git


def cells(path): return json.loads(path.read_text())['cells']


def last(path): return ''.join(cells(path)[-1]['source'])


def git(tree, *args):
    who = ['-c', 'user.name=x', '-c', 'user.email=x@example.org', '-c', 'core.autocrlf=false']
    subprocess.run(['git', *who, *args], cwd=tree, check=True, capture_output=True)


@pytest.fixture
def exported(tree):
    "The small course, exported and committed, with an environment's folder"
    (tree / '.venv').mkdir()
    assert script(tree, 'export.py').returncode == 0
    for step in ['init', '-q'], ['add', 'nbs', 'dlfound', 'scripts'], ['commit', '-qm', 'all']: git(tree, *step)
    return tree


def change(tree, new):
    "Another body for the function of the lesson"
    edit(tree / 'nbs/00_first.ipynb', lambda nb: [c.update(source=[s.replace('+ 1', new) for s in c['source']])
                                                  for c in nb['cells']] and None)


def test_links_and_install_lines(exported):
    first, second, kit = (exported / f'nbs/{name}.ipynb' for name in ('00_first', '01_second', 'tools/kit'))
    assert last(first) == '[all lessons](index.ipynb) · [01 second →](01_second.ipynb)'
    assert last(second) == '[← 00 first](00_first.ipynb) · [all lessons](index.ipynb)'
    assert last(kit) == '[all lessons](../index.ipynb)'
    assert ''.join(cells(first)[1]['source']).endswith('\n# %pip install -q -e "..[lessons]"')
    assert ''.join(cells(kit)[1]['source']).endswith('\n# %pip install -q -e "../..[lessons]"')
    before = {p: p.read_bytes() for p in exported.rglob('nbs/**/*.ipynb')}
    assert 'already' in script(exported, 'export.py').stdout and all(p.read_bytes() == b for p, b in before.items())


def test_an_address_gives_colab(exported):
    settings = exported / 'settings.ini'
    settings.write_text(settings.read_text() + 'git_url = https://github.com/me/dlfound\n')
    assert script(exported, 'export.py').returncode == 0
    assert 'colab.research.google.com/github/me/dlfound/blob/main/nbs/tools/kit.ipynb)' in \
        last(exported / 'nbs/tools/kit.ipynb')
    assert '"dlfound[lessons] @ git+https://github.com/me/dlfound"' in \
        ''.join(cells(exported / 'nbs/00_first.ipynb')[1]['source'])


def test_lessons_named_in_prose_become_links(exported):
    def says(nb): nb['cells'][0]['source'] = ['Lesson 00, lessons 00 and 01, lesson 07, [lesson 00](x), `lesson`.\n',
                                              '## After lesson 00\n', "lesson 00's end"]
    edit(exported / 'nbs/01_second.ipynb', says)
    for _ in range(2): assert script(exported, 'export.py').returncode == 0
    assert ''.join(cells(exported / 'nbs/01_second.ipynb')[0]['source']) == (
        '[Lesson 00](00_first.ipynb), lessons [00](00_first.ipynb) and 01, lesson 07, [lesson 00](x), `lesson`.\n'
        "## After lesson 00\n[lesson 00](00_first.ipynb)'s end")


def test_an_edit_of_a_module_is_not_lost(exported):
    module = exported / 'dlfound/first.py'
    mine = module.read_text().replace('+ 1', '+ 2')
    module.write_text(mine)
    change(exported, '+ 3')
    before = (exported / 'nbs/00_first.ipynb').read_bytes()
    done = script(exported, 'export.py')
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert 'Move the edit to nbs/00_first.ipynb' in done.stderr and 'git restore dlfound/first.py' in done.stderr
    assert module.read_text() == mine and (exported / 'nbs/00_first.ipynb').read_bytes() == before
    git(exported, 'restore', 'dlfound/first.py')
    done = script(exported, 'export.py')
    assert done.returncode == 0 and 'first.py' in done.stdout and 'restart' in done.stdout
    assert '+ 3' in module.read_text()


def test_what_an_export_wrote_may_be_overwritten_and_committed_text_too(exported):
    for new in '+ 3', '+ 4': # The first leaves a module that HEAD does not have
        change(exported, new)
        assert script(exported, 'export.py').returncode == 0
        edit(exported / 'nbs/00_first.ipynb', lambda nb, new=new: [
            c.update(source=[s.replace(new, '+ 1') for s in c['source']]) for c in nb['cells']] and None)
    git(exported, 'restore', 'dlfound')
    (exported / '.venv/exported.json').unlink() # Another clone
    assert script(exported, 'export.py').returncode == 0
    assert '+ 1' in (exported / 'dlfound/first.py').read_text()


def test_line_endings_of_windows_are_no_edit(exported):
    module = exported / 'dlfound/first.py'
    module.write_bytes(module.read_bytes().replace(b'\n', b'\r\n'))
    assert script(exported, 'export.py').returncode == 0


def test_notebooks_of_ones_own_are_left_alone(exported):
    mine = exported / 'my/notes.ipynb'
    write(mine, lesson('notes', ['#| export\nx = 1', '#| eval: false\n1 / 0']))
    before = mine.read_bytes()
    assert script(exported, 'export.py').returncode == 0 and mine.read_bytes() == before
    assert not (exported / 'dlfound/notes.py').exists()
    checked = script(exported, 'check.py', '.').stdout
    assert 'notes' not in checked and 'passed  make export would change nothing' in checked
