"""The package builds to the same metadata in every way, the sdist can test itself, the wheel holds dlfound alone,
and the files that GitHub reads name commands and files that exist."""
import ast
import json
import re
import shutil
import sys
import sysconfig
import tarfile
import zipfile
from configparser import ConfigParser
from email import message_from_string
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

import mistune
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version
from small import run

root = Path(__file__).resolve().parent.parent
config = ConfigParser(delimiters=['='], interpolation=None)
config.read(root / 'settings.ini', encoding='utf-8')
s = config['DEFAULT']
made = shutil.ignore_patterns('.venv', '.git', '*.egg-info', 'build', 'dist', '__pycache__', '.hypothesis',
                              '.ipynb_checkpoints', '_build', '_work')
left_behind = ['nbs/.ipynb_checkpoints/00-checkpoint.ipynb', 'nbs/tools/.ipynb_checkpoints/x.ipynb',
               'nbs/.last_checked', 'my/notes.ipynb',
               'tests/__pycache__/x.cpython-311.pyc', 'dlfound/__pycache__/x.cpython-311.pyc']


def facts(text):
    m = message_from_string(text)
    names = ('Name', 'Version', 'Summary', 'Author', 'Requires-Python', 'Requires-Dist', 'Provides-Extra',
             'License-Expression', 'License', 'Classifier', 'Keywords', 'Project-URL')
    return {k: sorted(m.get_all(k) or []) for k in names}


def install(what, site, *options):
    pip = [sys.executable, '-m', 'pip', 'install', '-q', '--no-deps', *options]
    done = run(*pip, '--target', site, what, cwd=site.parent)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope='module')
def built(tmp_path_factory):
    "A wheel made from the sdist, which was made from a copy of the tree without its git history, in some disorder"
    tmp = tmp_path_factory.mktemp('build')
    shutil.copytree(root, tmp / 'src', ignore=made)
    for name in left_behind:
        (tmp / 'src' / name).parent.mkdir(exist_ok=True)
        (tmp / 'src' / name).write_text('{}')
    done = run(sys.executable, '-m', 'build', '--no-isolation', '--outdir', tmp / 'out', tmp / 'src', cwd=tmp)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return tmp / 'out'


@pytest.fixture(scope='module')
def unpacked(built, tmp_path_factory):
    "The sdist, unpacked elsewhere"
    place = tmp_path_factory.mktemp('a place')
    [sdist] = built.glob('*.tar.gz')
    with tarfile.open(sdist) as t: t.extractall(place, filter='data')
    [folder] = place.iterdir()
    return folder


def test_one_set_of_facts(built, unpacked, tmp_path):
    [wheel] = built.glob('*.whl')
    with zipfile.ZipFile(wheel) as z:
        from_wheel = facts(z.read(next(n for n in z.namelist() if n.endswith('/METADATA'))).decode())
    from_sdist = facts((unpacked / 'PKG-INFO').read_text('utf-8'))
    shutil.copytree(root, tmp_path / 'src', ignore=made)
    install(tmp_path / 'src', tmp_path / 'direct', '--no-build-isolation')
    direct = facts(next((tmp_path / 'direct').glob('*.dist-info/METADATA')).read_text('utf-8'))
    assert from_wheel == from_sdist == direct
    assert from_wheel['Name'] == [s['name']] and from_wheel['Requires-Python'] == ['>=' + s['min_python']]
    assert {d for d in from_wheel['Requires-Dist'] if 'extra' not in d} == set(s['requirements'].split())
    for source in Path(sysconfig.get_path('purelib')).glob('dlfound-*.dist-info/direct_url.json'):
        place = url2pathname(urlsplit(json.loads(source.read_text('utf-8'))['url']).path)
        if Path(place).resolve() != root: continue # The environment belongs to another checkout
        assert facts((source.parent / 'METADATA').read_text('utf-8')) == from_wheel


def test_wheel_works_outside_the_repository(built, tmp_path):
    [wheel] = built.glob('*.whl')
    install(wheel, tmp_path / 'site')
    code = ('import dlfound, dlfound.data, torch; from dlfound.matmul import matmul_einsum as f; '
            'print(dlfound.__file__, dlfound.__version__, f(torch.ones(2, 3), torch.ones(3, 1)).sum().item())')
    done = run(sys.executable, '-c', code, cwd=tmp_path, PYTHONPATH=str(tmp_path / 'site'))
    assert done.returncode == 0, done.stderr
    file, version, total = done.stdout.split()
    assert Path(file).is_relative_to(tmp_path) and total == '6.0'
    assert f'__version__ = "{version}"' in (root / 'dlfound/__init__.py').read_text()


def test_wheel_holds_dlfound_alone(built):
    [wheel] = built.glob('*.whl')
    with zipfile.ZipFile(wheel) as z: names = {n for n in z.namelist() if '.dist-info/' not in n}
    sources = {p.relative_to(root).as_posix() for pattern in ('*.py', 'py.typed', 'results/*.json')
               for p in (root / 'dlfound').glob(pattern)}
    assert names == sources


def test_sdist_holds_every_committed_file(unpacked):
    assert not [name for name in left_behind if (unpacked / name).exists()]
    listed = run('git', 'ls-files', '-z', cwd=root) if shutil.which('git') else None
    if not (root / '.git').exists() or not listed or listed.returncode: pytest.skip('needs a git clone')
    committed = listed.stdout.strip('\0').split('\0')
    assert 'nbs/index.ipynb' in committed
    assert not [n for n in committed if (root / n).exists() and not (unpacked / n).exists()]


def test_tests_run_from_the_sdist(unpacked):
    where = '''
from pathlib import Path
import dlfound
from common import notebooks
here = Path(__file__).resolve().parent.parent
def test_where(): assert Path(dlfound.__file__).parent == here / 'dlfound' and len(notebooks()) > 20
'''
    (unpacked / 'tests/test_where.py').write_text(where)
    names = ['where.py', 'package.py::test_names', 'package.py::test_each_is_that_of_its_module',
             'packaging.py::test_requirements_are_what_the_package_imports',
             'packaging.py::test_named_files_and_targets_exist']
    done = run(sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', *(f'tests/test_{n}' for n in names),
               cwd=unpacked, PYTHONPATH='')
    assert done.returncode == 0 and ' passed' in done.stdout, done.stdout[-3000:] + done.stderr
    assert 'skipped' not in done.stdout


def test_no_requirement_is_written_twice():
    text = (root / 'pyproject.toml').read_text()
    assert not re.search(r'^\[project\]', text, re.M) and not any(r in text for r in s['requirements'].split())


def test_requirements_are_what_the_package_imports():
    imports = [n for p in (root / 'dlfound').glob('*.py') for n in ast.walk(ast.parse(p.read_text('utf-8')))]
    names = {a.name for n in imports if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module for n in imports if isinstance(n, ast.ImportFrom) and not n.level}
    found = {n.split('.')[0] for n in names} - set(sys.stdlib_module_names) - {'dlfound'}
    in_notebooks_only = {'IPython'} # Whoever has a notebook has it
    called = {'PIL': 'pillow'}
    wanted = {Requirement(r).name for r in s['requirements'].split()}
    assert {called.get(n, n) for n in found - in_notebooks_only} == wanted


repo = 'https://github.com/somebody/dlfound'
links = '''[a lesson](nbs/00.ipynb#part) ![a picture](./nbs/images/a.png) [![badge](b.svg)](CHANGELOG.md)
<img src="c.png">
[elsewhere](https://example.org/x) [here](#start) [mail](mailto:x@example.org) `rows[0](x)`
```python
x = 1 # One ` alone
layers[0](x)
```
'''
absolute_links = f'''[a lesson]({repo}/blob/HEAD/nbs/00.ipynb#part) ![a picture]({repo}/raw/HEAD/nbs/images/a.png) \
[![badge]({repo}/raw/HEAD/b.svg)]({repo}/blob/HEAD/CHANGELOG.md)
<img src="{repo}/raw/HEAD/c.png">
''' + links.split('\n', 2)[2]


def metadata(tmp_path, readme, *settings):
    "The metadata that setup.py makes with `readme`, and with these lines of settings.ini for its own addresses"
    for name in 'setup.py', 'pyproject.toml', 'LICENSE': shutil.copy(root / name, tmp_path / name)
    lines = [re.sub(r'^(git|doc)_url *=.*\n', '', (root / 'settings.ini').read_text('utf-8'), flags=re.M), *settings]
    (tmp_path / 'settings.ini').write_text('\n'.join(lines), encoding='utf-8')
    (tmp_path / 'README.md').write_text(readme, encoding='utf-8')
    (tmp_path / 'dlfound').mkdir()
    shutil.copy(root / 'dlfound/__init__.py', tmp_path / 'dlfound')
    code = 'from setuptools import build_meta as b; b.prepare_metadata_for_build_wheel(".")'
    done = run(sys.executable, '-c', code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    return message_from_string(next(tmp_path.glob('*.dist-info/METADATA')).read_text('utf-8'))


def test_project_links(tmp_path):
    settings = f'git_url = {repo}/', 'doc_url = https://dlfound.example.org'
    for n, given in enumerate([settings, settings[:1]]):
        (tmp_path / str(n)).mkdir()
        m = metadata(tmp_path / str(n), links, *given)
        urls = dict(u.split(', ') for u in m.get_all('Project-URL'))
        home = 'https://dlfound.example.org' if len(given) == 2 else repo
        assert urls.pop('Homepage') == home and urls.pop('Documentation', repo) == home
        assert urls == dict(Source=repo, Changelog=f'{repo}/blob/HEAD/CHANGELOG.md', Issues=f'{repo}/issues')
        assert m.get_payload() == absolute_links


def test_no_link_is_guessed(tmp_path):
    m = metadata(tmp_path, links)
    assert not m.get_all('Project-URL') and not m.get_all('Home-page') and m.get_payload() == links


def test_links_of_the_page_on_pypi_lead_somewhere(tmp_path):
    readme = (root / 'README.md').read_text('utf-8')
    page = mistune.html(metadata(tmp_path, readme, f'git_url = {repo}').get_payload())
    found = re.findall(r'(href|src)="([^"]*)"', page)
    ours = [(kind, url.removeprefix(repo).split('#')[0]) for kind, url in found if url.startswith(repo + '/')]
    assert all(url.startswith(('https://', '#')) for _, url in found) and len(ours) > 20
    assert all(path.startswith('/raw/HEAD/') for kind, path in ours if kind == 'src')
    assert not [path for _, path in ours if not (root / path.split('/HEAD/')[1]).exists()]


github = root / '.github'
workflows = {p.stem: yaml.safe_load(p.read_text('utf-8')) for p in (github / 'workflows').glob('*.yml')}
pages = ['CONTRIBUTING.md', 'CODE_OF_CONDUCT.md', 'SECURITY.md', '.github/PULL_REQUEST_TEMPLATE.md']


def steps(workflow): return [step for job in workflows[workflow]['jobs'].values() for step in job['steps']]


def pins(): return dict(re.findall(r'^(\w+)==(\S+)$', (github / 'oldest-torch.txt').read_text('utf-8'), re.M))


def test_workflow_runs_the_command_of_readme():
    command, = set(re.findall(r'^make test\b', (root / 'README.md').read_text('utf-8'), re.M))
    step, = [step for step in steps('test') if step.get('run') == command]
    assert step['env']['DLFOUND_STANDIN'] == '1'


def test_oldest_torch_is_the_lower_bound():
    bounds = {r.name: r.specifier for r in map(Requirement, f"{s['requirements']} {s['lessons_requirements']}".split())}
    for name, version in pins().items():
        bound, = bounds[name]
        assert bound.operator == '>=' and Version(bound.version) == Version(version)
    torch, vision = Version(pins()['torch']), Version(pins()['torchvision'])
    assert (torch.major, torch.minor + 15) == (2, vision.minor) # How the two have been numbered since torch 2.0
    matrix = workflows['test']['jobs']['test']['strategy']['matrix']
    oldest, = [job for job in matrix['include'] if job['torch'] == 'oldest']
    assert oldest['python'] == s['min_python'] == matrix['python'][0]


def test_actions_are_of_one_version():
    used = {step['uses'] for name in workflows for step in steps(name) if 'uses' in step}
    assert len(used) == len({u.split('@')[0] for u in used}) and all('@' in u for u in used)


def test_publishing_waits_for_a_person():
    release = workflows['release']
    assert release[True] == {'workflow_dispatch': None, 'release': {'types': ['published']}} # YAML reads `on` as true
    publish = [job for job in release['jobs'].values() if 'pypi-publish' in str(job)]
    assert [(job['environment'], job['needs'], job['permissions']) for job in publish] == [
        ('pypi', 'build', {'id-token': 'write'})]
    assert all(w['permissions'] == {'contents': 'read'} for w in workflows.values())
    assert 'secrets.' not in str(workflows) and 'password' not in str(workflows)


def test_forms_are_whole():
    forms = {p.name: yaml.safe_load(p.read_text('utf-8')) for p in (github / 'ISSUE_TEMPLATE').iterdir()}
    assert forms.pop('config.yml')['blank_issues_enabled'] is True and len(forms) == 2
    for form in forms.values():
        assert form['name'] and form['description'] and {part['type'] for part in form['body']} <= {'input', 'textarea'}
        assert all(part['attributes']['label'] for part in form['body'])
        assert len({part['id'] for part in form['body']}) == len(form['body'])


def test_named_files_and_targets_exist():
    hooks = yaml.safe_load((root / '.pre-commit-config.yaml').read_text('utf-8'))['repos']
    assert [r['repo'] for r in hooks] == ['local']
    files = [*(github / 'workflows').glob('*.yml'), root / '.pre-commit-config.yaml', *(root / p for p in pages)]
    text = '\n'.join(p.read_text('utf-8') for p in files)
    path = r'(?<![\w./-])(?:(?:\.github|scripts|tests|dlfound|nbs)/[\w./-]*\w|settings\.ini|[A-Z_]+\.md)\b'
    named = set(re.findall(path, text))
    examples = {'nbs/NN_topic.ipynb', 'nbs/05_hooks.ipynb', 'dlfound/hooks.py'}
    assert len(named) > 10 and not [n for n in named - examples if not (root / n).exists()]
    targets = set(re.search(r'\.PHONY: (.*)', (root / 'Makefile').read_text('utf-8'))[1].split())
    assert set(re.findall(r'`(?:\w+=\S+ )?make (\w+)', text)) <= targets
    linked = {(root / p).parent / link for p in pages for link in
              re.findall(r'\]\((?!https:)([^)#]+)\)', (root / p).read_text('utf-8'))}
    assert linked and all(link.exists() for link in linked)
