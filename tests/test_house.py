"The environment explains itself, the targets of make do what they say, Jupyter saves clean notebooks."
import importlib.metadata
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from small import lesson, needs_git, run, write

root = Path(__file__).resolve().parent.parent
bin = Path(sys.executable).parent


def test_torch_and_torchvision_match():
    import torch
    nms = pytest.importorskip('torchvision.ops').nms
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


@needs_git
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
