"The site of a small course: what it gathers is there, nothing is run, and each kind of fault is planted and found."
import json
import re
import shutil
from pathlib import Path

import pages
import pytest
from conftest import course
from small import lesson, script, write

root = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(bool(pages.missing()), reason='needs the extra docs, which make site installs')

readme = '''# small

A course of two lessons.

Here is more.

## Start

```
make lab
```

## Lessons

Each asks one question.

| lesson | question | gives | hours to read | seconds to run |
| --- | --- | --- | --- | --- |
| [00 first](nbs/00_first.ipynb) | What is two? | a two | 1 | 10 |
| [01 second](nbs/01_second.ipynb) | What is three? | a three | 1 | 10 |

## Using the package

```python
from dlfound.first import two
```

The [licence](LICENSE), and [lesson 01](nbs/01_second.ipynb).
'''
first = [
    '#| export\nfrom dlfound.kit import one\n_all_ = ["one"]', "open('ran', 'w')",
    '#| export\ndef two(\n    n: int = 1, # How *often*, see `one`\n) -> int: # As many\n'
    '    "Two"\n    return n * (one() + 1)',
    '#| export\nclass Counter:\n    "Counts"\n    def count(self): "One more"',
    '#| fig-alt: A dot\npicture()', '#| hide\nsecret()', 'verdict()', '\n'.join(f'x = {i}' for i in range(50))]
words = ('A `Counter.count` and `count` are one. '
         'By $a^2$ we call `two()` of `dlfound.first`, as lesson 01 does, and [here](01_second.ipynb#a-part).'
         '\n\n$$\\sum_i b_i$$')
dot = ('iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg==')
claim = dict(verdict='in part', paper='Doe 2020', claim='more is | more', theirs='3', ours='2')


def text(source: str, id: str) -> dict:
    return dict(cell_type='markdown', id=id, metadata={}, source=source)


def output(data: dict) -> list[dict]:
    return [dict(output_type='display_data', data={'text/plain': ''} | data, metadata={})]


def make(folder: Path, *more: str, settings: str = '') -> tuple[str, Path]:
    "Build the site of a small course, with these paragraphs in lesson 00: what make site says, and the folder"
    course(folder)
    shutil.copytree(root / 'docs', folder / 'docs', ignore=shutil.ignore_patterns('_*'))
    (folder / 'settings.ini').write_text((root / 'settings.ini').read_text('utf-8') + settings, encoding='utf-8')
    (folder / 'README.md').write_text(readme)
    (folder / 'CONTRIBUTING.md').write_text('# Contributing\n\nSee [README](README.md) and lesson 00.\n')
    nb = lesson('first', first)
    by_source = {''.join(c['source']).split('\n')[-1]: c for c in nb['cells']}
    by_source['picture()']['outputs'] = output({'image/png': dot})
    by_source['verdict()']['outputs'] = output({'application/vnd.dlfound.verdict+json': claim})
    nb['cells'] += [text('## Words', 'words'), text(words, 'more'), *(text(m, f'more{i}') for i, m in enumerate(more))]
    if more: by_source['picture()']['source'] = 'picture()'
    write(folder / 'nbs/00_first.ipynb', nb)
    nb = lesson('second', ['from dlfound.first import two', 'two() + 1'])
    nb['cells'].append(text('## A part\n\nThe end.', 'part'))
    write(folder / 'nbs/01_second.ipynb', nb)
    (folder / 'benchmarks/results').mkdir(parents=True)
    (folder / 'benchmarks/dots.py').write_text('"""Dots.\n\nMore."""\n')
    machine = dict(cpu='A CPU', vector_unit='AVX2', cores=2, threads=1, system='Linux', python='3.11', versions={})
    row = dict(what='dots', ours=dict(median_s=.002), peer=dict(median_s=.004), ratio=2.0, goal='>= 1', met=True)
    (folder / 'benchmarks/results/dots.json').write_text(json.dumps(dict(machine=machine, results=[row])))
    assert script(folder, 'export.py').returncode == 0
    done = script(folder, 'pages.py')
    return done.stdout + done.stderr, folder


@pytest.fixture(scope='module')
def clean(tmp_path_factory): return make(tmp_path_factory.mktemp('site'))


@pytest.fixture(scope='module')
def planted(tmp_path_factory):
    return make(tmp_path_factory.mktemp('faults'), 'See [this](nowhere.ipynb).', 'See [that](01_second.ipynb#no-part).',
                'See [here](#no-words).', 'Call `dlfound.first.three`.', '![A picture](none.png)',
                '![A picture](https://example.org/a.png)', 'So $\\nosuch$.', '<a href="gone.html">Gone</a>',
                '<script src="https://example.org/a.js"></script>', '![](../dot.png)',
                'Call `two_more(3)`, or a `FirstLearnr`.', 'See `dlfound.first.Counter.again`.',
                settings='git_url = https://github.com/somebody/dlfound\n')


def page(site, name): return (site[1] / 'docs/_build' / name).read_text('utf-8')


def test_a_good_course_has_no_fault_and_nothing_was_run(clean):
    said, folder = clean
    assert re.fullmatch(r'[1-9]\d* passed, 0 failed', said.splitlines()[-1]), said
    assert not [*folder.rglob('ran')] and 'secret' not in page(clean, 'nbs/00_first.html')


def test_lessons_are_linked_in_order(clean):
    lesson = page(clean, 'nbs/00_first.html')
    assert re.search(r'class="right-next"[^>]*href="01_second.html"|href="01_second.html"[^>]*class="right-next"',
                     lesson.replace('\n', ' '))
    assert '<h1>00 first' in lesson and 'What is three?' in page(clean, 'nbs/index.html')
    assert '>lesson 00</' in re.sub('</?span[^>]*>', '', page(clean, 'CONTRIBUTING.html'))
    assert 'href="01_second.html#a-part"' in lesson


def test_names_lead_to_the_module_that_defines_them(clean):
    lesson, first, kit = (page(clean, n) for n in ('nbs/00_first.html', 'api/first.html', 'api/kit.html'))
    assert 'href="../api/first.html#dlfound.first.two"' in lesson
    assert 'id="dlfound.first.two"' in first and 'id="dlfound.kit.one"' in kit and 'id="dlfound.first.one"' not in first
    assert 'href="kit.html#dlfound.kit.one"' in first and '<em>often</em>' in first
    assert lesson.count('href="../api/first.html#dlfound.first.Counter.count"') == 2
    assert 'href="first.html#dlfound.first.two"' in page(clean, 'api/index.html')
    assert 'href="../nbs/00_first.html#first-first03"' in first and 'id="first-first03"' in lesson
    assert 'href="../_modules/dlfound/first.html#two"' in first


def test_cells(clean):
    lesson = page(clean, 'nbs/00_first.html')
    assert 'tag_exported' in lesson and '#|' not in lesson and 'alt="A dot"' in lesson
    assert 'Show 50 lines of code' in lesson and lesson.count('<math') == 2 and 'mathjax.js' not in lesson.lower()
    assert 'In the package' in lesson and 'pip install' not in lesson


def test_search_has_a_line_for_what_it_finds_and_fetches_nothing(clean):
    found = json.loads(page(clean, '_static/prose.js').removeprefix('const prose = '))
    assert found['nbs/00_first'][-1].startswith('A Counter.count and count') and 'here' in found['nbs/00_first'][-1]
    assert found['api/first#dlfound.first.two'] == ['Two']
    assert found['api/first#dlfound.first.Counter.count'] == ['One more']
    assert 'prose.js' in page(clean, 'search.html') and 'prose.js' not in page(clean, 'index.html')
    assert 'fetch(' not in page(clean, '_static/search.js')


def test_what_is_gathered(clean):
    assert all(word in page(clean, 'papers.html') for word in ('Doe 2020', 'more is | more', '1 in part', 'in part'))
    assert all(word in page(clean, 'measured.html') for word in ('2\xa0ms', '4\xa0ms', 'AVX2', 'Dots.'))
    assert '[00 first](nbs/00_first.md)' in page(clean, 'llms.txt')
    copies = {p.with_suffix('') for p in (clean[1] / 'docs/_build').rglob('*.md')}
    assert copies >= {p.with_suffix('') for p in (clean[1] / 'docs/_build/nbs').glob('*.html')}
    assert 'def two(' in page(clean, 'nbs/00_first.md')


def test_links_to_colab_only_where_there_is_an_address(clean, planted):
    services = 'colab.research.google.com/github/somebody/dlfound/blob/main/nbs/00_first.ipynb', 'mybinder.org'
    assert all(s in page(planted, 'nbs/00_first.html') for s in services)
    assert not any(s.split('/')[0] in page(clean, 'nbs/00_first.html') for s in services)


@pytest.mark.parametrize('fault', [
    'nowhere.ipynb', 'no-part', 'no-words', r'dlfound\.first\.three', r'none\.png', r'example\.org/a\.png', 'nosuch',
    r'gone\.html leads nowhere', r'example\.org/a\.js', 'has no alt text', 'two_more is named', 'FirstLearnr is named',
    r'dlfound\.first\.Counter\.again'])
def test_faults_are_found(planted, fault):
    failed = [line for line in planted[0].splitlines() if line.startswith('FAILED')]
    assert any(re.search(fault, line) for line in failed), planted[0]
    assert int(re.search(r'(\d+) failed$', planted[0].splitlines()[-1])[1]) == len(failed)
