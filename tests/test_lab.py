"The lab: an untouched lesson stays untouched, Jupyter's server behaves as ever otherwise, the side bar starts closed."
import asyncio
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
from jupyter_client.manager import start_new_kernel
from jupyter_server.services.contents.largefilemanager import AsyncLargeFileManager
from jupyterlab_server.workspaces_handler import WorkspacesManager
from small import lesson, run, write
from tornado.web import HTTPError

import lab

root = Path(__file__).resolve().parent.parent
ours = root / 'scripts/jupyter'


@contextmanager
def server(tree):
    "A function that asks a server with our configuration: method, path and body to status and reply"
    with socket.socket() as sock:
        sock.bind(('127.0.0.1', 0))
        port = sock.getsockname()[1]
    (tree / 'home').mkdir()
    args = [f'--config={ours / "jupyter_server_config.py"}', f'--ServerApp.root_dir={tree}', f'--port={port}',
            '--IdentityProvider.token=secret', '--ServerApp.jpserver_extensions={}', '--no-browser', '--allow-root']
    process = subprocess.Popen(
        [sys.executable, '-m', 'jupyter_server', *args], cwd=tree / 'home', stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, env=os.environ | {'HOME': str(tree / 'home')})

    def call(method, path, body=None):
        address = f'http://127.0.0.1:{port}/api/{urllib.parse.quote(path, safe="/?=&")}'
        headers = {'Authorization': 'token secret', 'Content-Type': 'application/json'}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(address, data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as reply: return reply.status, json.load(reply)
        except urllib.error.HTTPError as e: return e.code, e.read()

    try:
        for _ in range(300):
            try: call('GET', 'status')
            except OSError: time.sleep(.1)
            else: break
        yield call
    finally:
        process.terminate()
        process.wait(20)


@pytest.fixture(scope='module')
def api(tmp_path_factory):
    tree = tmp_path_factory.mktemp('lab')
    shutil.copytree(root / 'nbs', tree / 'nbs', ignore=shutil.ignore_patterns('.*'))
    with server(tree) as call: yield call, tree


def save(call, path, content):
    status, reply = call('PUT', f'contents/{path}', dict(type='notebook', format='json', content=content))
    assert status in (200, 201), reply


def test_saving_an_untouched_notebook_changes_no_byte(api):
    call, tree = api
    paths = sorted(p for p in (tree / 'nbs').rglob('*.ipynb'))
    assert len(paths) >= 25
    for path in paths:
        name, before = path.relative_to(tree).as_posix(), path.read_bytes()
        _, model = call('GET', f'contents/{name}?content=1&hash=1')
        assert 'language_info' in model['content']['metadata'] and b'"language_info"' not in before
        save(call, name, model['content'])
        assert path.read_bytes() == before, name
    assert not list(tree.rglob('.last_checked'))


def test_a_notebook_comes_with_what_its_kernel_would_write(api):
    call, _ = api
    _, model = call('GET', 'contents/nbs/00_matmul.ipynb?content=1')
    _, specs = call('GET', 'kernelspecs')
    spec = specs['kernelspecs']['python3']['spec']
    manager, client = start_new_kernel(kernel_name='python3')
    try: info = client.kernel_info(reply=True, timeout=60)['content']['language_info']
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    kernel = dict(name='python3', display_name=spec['display_name'], language=spec['language'])
    assert model['content']['metadata'] == dict(kernelspec=kernel, language_info=info)


def test_only_what_was_changed_is_saved(api):
    call, tree = api
    path = tree / 'nbs/changed.ipynb'
    write(path, lesson('changed', ['1', '2']))
    before = json.loads(path.read_text())
    _, model = call('GET', 'contents/nbs/changed.ipynb?content=1')
    cell = model['content']['cells'][2]
    cell.update(source='1 # mine', execution_count=7, metadata={'tags': ['x'], 'scrolled': True})
    save(call, 'nbs/changed.ipynb', model['content'])
    before['cells'][2]['source'] = ['1 # mine']
    assert json.loads(path.read_text()) == before


files = {
    'none.ipynb': '{"cells": [], "nbformat": 4, "nbformat_minor": 5}',
    'empty.ipynb': '{"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}',
    'null.ipynb': '{"cells": [], "metadata": {"kernelspec": null}, "nbformat": 4, "nbformat_minor": 5}',
    'julia.ipynb': '{"cells": [], "metadata": {"kernelspec": {"name": "julia", "display_name": "J"}}, "nbformat": 4, '
                   '"nbformat_minor": 5}',
    'old.ipynb': '{"worksheets": [{"cells": []}], "metadata": {"name": ""}, "nbformat": 3, "nbformat_minor": 0}',
    'broken.ipynb': '{"cells": [',
    'list.ipynb': '[1, 2]',
    'no.ipynb': 'no notebook at all',
    'note.txt': 'é\n' * 10,
    'big.txt': 'line\n' * 400_000,
    'metadata.json': '{"metadata": {"kernelspec": {"name": "python3"}}}',
    'bytes.bin': b'\xff\xfe\x00',
    'folder/inside.txt': 'x',
    'course.ipynb': None,
}
requests = [f'{name}?content=1' for name in files] + [
    'course.ipynb?content=0', 'course.ipynb?content=1&type=file&format=text', 'course.ipynb?content=0&hash=1',
    'folder?content=1', 'folder?content=0', 'folder?content=1&type=notebook', 'missing.ipynb?content=1',
    'note.txt?content=1&type=notebook', 'big.txt?content=1&format=base64&type=file&hash=1', '?content=1']


@pytest.mark.filterwarnings('ignore')
def test_everything_else_is_served_as_ever(api):
    call, tree = api
    for name, text in files.items():
        path = tree / 'other' / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if text is None: write(path, lesson('course', ['1']))
        else: path.write_bytes(text if isinstance(text, bytes) else text.encode())
    stock = AsyncLargeFileManager(root_dir=str(tree))
    for request in requests:
        name, query = request.split('?')
        options = dict(urllib.parse.parse_qsl(query))
        options |= dict(content=options['content'] == '1', require_hash='hash' in options)
        options.pop('hash', None)
        status, reply = call('GET', f'contents/other/{request}')
        try: expected = asyncio.run(stock.get(f'other/{name}', **options))
        except HTTPError as e:
            assert status == e.status_code, (request, reply)
            continue
        assert status == 200, (request, reply)
        if request == 'course.ipynb?content=1': del reply['content']['metadata'], expected['content']['metadata']
        text = json.dumps(expected, default=lambda time: time.isoformat().replace('+00:00', 'Z'))
        assert reply == json.loads(text), request


def test_other_saves_are_as_ever(api):
    call, tree = api
    text = dict(type='file', format='text')
    for chunk, content in (1, 'one\n'), (2, 'two\n'), (-1, 'three\n'):
        assert call('PUT', 'contents/parts.txt', text | dict(content=content, chunk=chunk))[0] in (200, 201)
    assert (tree / 'parts.txt').read_text() == 'one\ntwo\nthree\n'
    _, new = call('POST', 'contents/', dict(type='notebook'))
    assert json.loads((tree / new['path']).read_text())['cells'] == []
    assert call('PUT', 'contents/made', dict(type='directory'))[0] == 201 and (tree / 'made').is_dir()
    odd = dict(cells=[dict(cell_type='code', source='1', metadata={})], metadata={}, nbformat=4, nbformat_minor=5)
    call('PUT', 'contents/odd.ipynb', dict(type='notebook', format='json', content=odd))
    assert json.loads((tree / 'odd.ipynb').read_text())['cells'][0]['source'] in ('1', ['1'])


def test_the_side_bar_starts_closed(tmp_path):
    layout, = ours.glob('*.jupyterlab-workspace')
    shutil.copy(layout, tmp_path)
    workspace = WorkspacesManager(str(tmp_path)).load('default')
    assert workspace['metadata']['id'] == 'default'
    assert workspace['data']['layout-restorer:data']['left']['collapsed'] is True


def test_jupyterlab_knows_our_settings():
    schemas = Path(sys.prefix, 'share/jupyter/lab/schemas')
    for name, values in json.loads((ours / 'overrides.json').read_text()).items():
        extension, plugin = name.split(':')
        schema = json.loads((schemas / extension / f'{plugin}.json').read_text(encoding='utf-8'))
        assert values.keys() <= schema['properties'].keys()


def start(tree, *args, **variables):
    "What lab.py starts, as its arguments and its environment"
    python = tree / '.venv/bin/python'
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "import json, os, sys; '
                      'print(json.dumps([sys.argv, dict(os.environ)]))" "$@"\n')
    python.chmod(0o755)
    done = run(sys.executable, tree / 'scripts/lab.py', *args, cwd=tree, **variables)
    assert done.returncode == 0, done.stderr
    *said, printed = done.stdout.splitlines()
    return '\n'.join(said), *json.loads(printed)


def test_the_lab_opens_the_first_lesson(tree):
    home = {name: '' for name in lab.places}
    said, args, env = start(tree, '--port', '9999', HOME=str(tree), **home)
    assert args[1:3] == ['-m', 'jupyterlab'] and args[-2:] == ['--port', '9999'] and said == ''
    assert f'--ServerApp.root_dir={tree}' in args and '--LabApp.default_url=/lab/tree/nbs/00_matmul.ipynb' in args
    assert ('--allow-root' in args) == (os.geteuid() == 0)
    assert not any(env.get(name) for name in lab.places)


def test_a_home_that_cannot_be_written_is_replaced(tree):
    home = {name: '' for name in lab.places}
    said, _, env = start(tree, HOME='/dev/null', **home | {'IPYTHONDIR': str(tree)})
    assert 'cannot be written' in said and str(tree / '.venv/home') in said
    assert env['IPYTHONDIR'] == str(tree)
    assert all(Path(env[name]).is_relative_to(tree / '.venv/home') for name in lab.places if name != 'IPYTHONDIR')


@pytest.mark.parametrize('folder, ok', [('{tmp}/a/b', True), ('/dev/null/a', False), ('{tmp}/file/a', False),
                                        ('~/a', False)])
def test_what_can_be_written(folder, ok, tmp_path):
    (tmp_path / 'file').touch()
    assert lab.writable(Path(folder.format(tmp=tmp_path))) is ok
