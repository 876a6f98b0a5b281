"The package builds to the same metadata in every way, the environment explains itself, Jupyter saves clean notebooks."
import importlib.metadata
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
from configparser import ConfigParser
from email import message_from_string
from pathlib import Path

import pytest
from small import lesson, run, write

root = Path(__file__).resolve().parent.parent
bin = Path(sys.executable).parent
config = ConfigParser(delimiters=['='], interpolation=None)
config.read(root / 'settings.ini')
s = config['DEFAULT']
made = shutil.ignore_patterns('.venv', '.git', '*.egg-info', 'build', 'dist', '__pycache__', '.hypothesis',
                              '.ipynb_checkpoints')


def facts(text):
    m = message_from_string(text)
    names = ('Name', 'Version', 'Summary', 'Author', 'Requires-Python', 'Requires-Dist', 'Provides-Extra',
             'License-Expression', 'License', 'Classifier', 'Keywords')
    return {k: sorted(m.get_all(k) or []) for k in names}


def install(what, site, *options):
    pip = [sys.executable, '-m', 'pip', 'install', '-q', '--no-deps', *options]
    done = run(*pip, '--target', site, what, cwd=site.parent)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope='module')
def built(tmp_path_factory):
    "A wheel made from the sdist, which was made from a copy of the tree without its git history"
    tmp = tmp_path_factory.mktemp('build')
    shutil.copytree(root, tmp / 'src', ignore=made)
    done = run(sys.executable, '-m', 'build', '--no-isolation', '--outdir', tmp / 'out', tmp / 'src', cwd=tmp)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return tmp / 'out'


def test_one_set_of_facts(built, tmp_path):
    [wheel], [sdist] = built.glob('*.whl'), built.glob('*.tar.gz')
    with zipfile.ZipFile(wheel) as z:
        from_wheel = facts(z.read(next(n for n in z.namelist() if n.endswith('/METADATA'))).decode())
    with tarfile.open(sdist) as t:
        info = next(m for m in t if m.name.count('/') == 1 and m.name.endswith('PKG-INFO'))
        from_sdist = facts(t.extractfile(info).read().decode())
    shutil.copytree(root, tmp_path / 'src', ignore=made)
    install(tmp_path / 'src', tmp_path / 'direct', '--no-build-isolation')
    direct = facts(next((tmp_path / 'direct').glob('*.dist-info/METADATA')).read_text())
    installed = facts(next(Path(sysconfig.get_path('purelib')).glob('dlfound-*.dist-info/METADATA')).read_text())
    assert from_wheel == from_sdist == direct == installed
    assert from_wheel['Name'] == [s['name']] and from_wheel['Requires-Python'] == ['>=' + s['min_python']]
    assert {d for d in from_wheel['Requires-Dist'] if 'extra' not in d} == set(s['requirements'].split())


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
    assert (tmp_path / 'site/dlfound/py.typed').exists() and not (tmp_path / 'site/nbs').exists()


def test_no_requirement_is_written_twice():
    text = (root / 'pyproject.toml').read_text()
    assert not re.search(r'^\[project\]', text, re.M) and not any(r in text for r in s['requirements'].split())


def test_torch_and_torchvision_match():
    import torch
    from torchvision.ops import nms
    boxes = torch.tensor([[0., 0, 10, 10], [1, 1, 11, 11], [20, 20, 30, 30]])
    assert nms(boxes, torch.tensor([.9, .8, .7]), .5).tolist() == [0, 2]


def test_import_does_nothing_else(tmp_path):
    code = ('import torch, sys; state = lambda: (torch.get_num_threads(), torch.initial_seed()); before = state(); '
            'import dlfound.data, dlfound.matmul; '
            'assert state() == before and "matplotlib.pyplot" not in sys.modules')
    done = run(sys.executable, '-c', code, cwd=tmp_path, PYTHONPATH=str(root), DLFOUND_HOME=str(tmp_path / 'home'))
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('body, words', [
    ('case "$1" in -V) echo Python 3.9.2;; *) exit 1;; esac', ['3.11 or newer', 'Python 3.9.2', 'PYTHON=']),
    ('case "$2" in *ensurepip*) exit 1;; *) exec "$REAL" "$@";; esac', ['no venv module', 'apt install python3-venv']),
])
def test_an_unfit_python_gets_one_sentence(tree, body, words):
    fake = tree / 'python3'
    fake.write_text('#!/bin/sh\n' + body + '\n')
    fake.chmod(0o755)
    done = run('sh', 'scripts/env.sh', cwd=tree, PYTHON=str(fake), REAL=sys.executable)
    assert done.returncode == 1 and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert all(w in done.stderr for w in words), done.stderr
    assert not (tree / '.venv').exists()


@pytest.mark.skipif(not (root / '.venv/stamp').exists(), reason='needs the environment that make makes')
def test_a_second_make_does_nothing():
    before = (root / '.venv/stamp').stat().st_mtime_ns
    done = run('make', '--no-print-directory', 'env', cwd=root, MAKEFLAGS='', MAKELEVEL='0')
    assert (done.returncode, done.stdout, done.stderr) == (0, '', '')
    assert (root / '.venv/stamp').stat().st_mtime_ns == before


def test_make_lists_every_target():
    text = (root / 'Makefile').read_text()
    targets = re.search(r'\.PHONY: (.*)', text)[1].split()
    done = run('make', '--no-print-directory', cwd=root, MAKEFLAGS='', MAKELEVEL='0')
    assert done.returncode == 0 and all(len(line) <= 150 for line in done.stdout.splitlines())
    assert sorted(line.split()[1] for line in done.stdout.splitlines()) == sorted(targets)
    assert {'lab', 'test', 'export', 'clean', 'run', 'bench', 'full', 'seeds', 'hooks'} <= set(targets)


@pytest.mark.skipif(not (bin / 'nbdev_test').exists(), reason='needs the environment that make makes')
def test_old_spelling_of_nbdev_test(tree):
    ok = run(bin / 'nbdev_test', tree / 'nbs/tools/kit.ipynb', cwd=tree)
    assert ok.returncode == 0 and 'Success.' in ok.stdout
    write(tree / 'nbs/tools/kit.ipynb', lesson('kit', ['1 / 0']))
    assert run(bin / 'nbdev_test', tree / 'nbs/tools/kit.ipynb', cwd=tree).returncode == 1
    assert not any(e.name.startswith('nbdev') for e in importlib.metadata.distribution('dlfound').entry_points)


def test_hooks_stay_in_the_clone(tree):
    subprocess.run(['git', 'init', '-q'], cwd=tree, check=True)
    home = tree / 'home'
    home.mkdir()
    for _ in range(2):
        done = run('sh', 'scripts/hooks.sh', cwd=tree, HOME=str(home))
        assert done.returncode == 0, done.stderr
    assert list(home.iterdir()) == [] and 'nbdev-merge' in (tree / '.git/config').read_text()
    hook = tree / '.git/hooks/post-merge'
    assert 'nbdev-trust' in hook.read_text()
    hook.write_text('#!/bin/sh\necho mine\n')
    done = run('sh', 'scripts/hooks.sh', cwd=tree)
    assert done.returncode == 1 and 'by hand' in done.stderr and 'mine' in hook.read_text()


jupyter_config = root / '.venv/etc/jupyter/jupyter_server_config.py'


@pytest.mark.skipif(not jupyter_config.exists(), reason='needs the environment that make makes')
def test_jupyter_saves_clean_notebooks(tree):
    token = 'x' * 20
    with socket.socket() as sock:
        sock.bind(('127.0.0.1', 0))
        port = sock.getsockname()[1]
    args = [f'--ServerApp.root_dir={tree}', '--no-browser', '--allow-root', f'--port={port}',
            f'--IdentityProvider.token={token}']
    home = tree / 'home'
    home.mkdir()
    server = subprocess.Popen(
        [root / '.venv/bin/python', '-m', 'jupyter_server', *args], cwd=tree, env=os.environ | {'HOME': str(home)},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        path = tree / 'nbs/00_first.ipynb'
        nb = json.loads(path.read_text())
        clean = json.dumps(nb)
        nb['cells'][-1].update(execution_count=7, metadata={'tags': ['x'], 'scrolled': True})
        nb['metadata'] |= {'language_info': {'name': 'python'}}
        body = json.dumps(dict(type='notebook', format='json', content=nb)).encode()
        address = f'http://127.0.0.1:{port}/api/contents/nbs/00_first.ipynb'
        headers = {'Authorization': f'token {token}', 'Content-Type': 'application/json'}
        request = urllib.request.Request(address, body, headers, method='PUT')
        for _ in range(100):
            try: urllib.request.urlopen(request, timeout=10)
            except urllib.error.HTTPError as e: pytest.fail(f'{e}: {e.read()}')
            except (ConnectionError, urllib.error.URLError): time.sleep(.2)
            else: break
        assert json.loads(path.read_text()) == json.loads(clean)
    finally:
        server.terminate()
        server.wait(10)
