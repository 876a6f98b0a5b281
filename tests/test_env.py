"The environment: made once, made anew where it must be, and a failed installation says what to do."
import importlib.metadata
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import install
import pytest
from servers import serving
from small import lesson, run, write

root = Path(__file__).resolve().parent.parent
bin = Path(sys.executable).parent

# Makes environments whose python is itself; its pip does what the variables say.
stub = '''#!/bin/sh
case "$*" in
"-m venv .venv")
    mkdir -p .venv/bin && cp "$0" .venv/bin/python
    echo "command = $0 -m venv $(pwd -P)/.venv" > .venv/pyvenv.cfg;;
"-m pip install"*)
    [ "${STUB_PIP:-}" != real ] || exec "$REAL" "$@"
    echo called >> pip-calls
    if [ -t 1 ]; then echo 'on a terminal'; fi
    printf '%s\\n' "${STUB_SAYS:-fine}" >&2
    [ -z "${STUB_FAILS:-}" ] || exit "$STUB_FAILS"
    echo '#!/bin/sh' > .venv/bin/nbdev-test;;
*) exec "$REAL" "$@";;
esac
'''


@pytest.fixture
def course(tree):
    "A course in a folder whose name is awkward, and a Python that makes environments in no time"
    home = tree / "it's an Übung"
    home.mkdir()
    for path in [p for p in tree.iterdir() if p != home]: shutil.move(path, home)
    (tree / 'python3').write_text(stub)
    (tree / 'python3').chmod(0o755)
    return home


def env(course, **variables):
    "Run env.sh of a course with the stub as its Python"
    variables |= dict(PYTHON=str(course.parent / 'python3'), REAL=sys.executable)
    return run('sh', course / 'scripts/env.sh', cwd=course.parent, **variables)


def calls(course):
    "How often pip was called"
    return len((course / 'pip-calls').read_text().splitlines())


def test_a_second_run_does_nothing(course):
    first = env(course)
    assert first.returncode == 0 and 'Making .venv' in first.stdout, first.stderr
    assert 'This folder was moved' not in first.stdout
    again = env(course)
    assert (again.returncode, again.stdout, again.stderr, calls(course)) == (0, '', '', 1)
    (course / 'settings.ini').write_text((course / 'settings.ini').read_text() + '\n# \\1\n')
    assert 'Making' not in env(course).stdout and calls(course) == 2
    assert env(course).stdout == '' and calls(course) == 2


def test_jupyter_gets_its_files(course):
    env(course)
    settings = course / '.venv/share/jupyter/lab/settings/overrides.json'
    config = course / '.venv/etc/jupyter/jupyter_server_config.py'
    layout, = (course / '.venv/share/jupyter/lab/workspaces').iterdir()
    assert config.read_bytes() == (root / 'scripts/jupyter/jupyter_server_config.py').read_bytes()
    assert settings.read_bytes() == (root / 'scripts/jupyter/overrides.json').read_bytes()
    layout.write_text('the side bar is open')
    (course / 'scripts/jupyter/overrides.json').write_text('{}')
    env(course)
    assert settings.read_text() == '{}' and layout.read_text() == 'the side bar is open' and calls(course) == 1


def test_a_moved_environment_is_made_anew(course):
    env(course)
    (course / '.venv/old').touch()
    there = course.rename(course.parent / 'elsewhere "now"')
    done = env(there)
    assert done.returncode == 0 and 'This folder was moved or copied' in done.stdout and str(course) in done.stdout
    assert not (there / '.venv/old').exists() and calls(there) == 2
    copy = shutil.copytree(there, there.parent / 'copy')
    assert 'moved or copied' in env(copy).stdout and calls(copy) == 3
    assert env(there).stdout == '' and env(copy).stdout == ''


def test_a_link_to_the_folder_is_no_move(course):
    env(course)
    link = course.parent / 'link'
    link.symlink_to(course)
    assert env(link).stdout == '' and calls(course) == 1


@pytest.mark.parametrize('damage', ['python', 'pip'])
def test_a_half_made_environment_is_made_anew(course, damage):
    env(course)
    python = course / '.venv/bin/python'
    python.unlink()
    if damage == 'pip':
        (course / '.venv/stamp').unlink()
        python.write_text('#!/bin/sh\ncase "$2" in *pip*) exit 1;; *) exec "$REAL" "$@";; esac\n')
        python.chmod(0o755)
    assert 'Making .venv' in env(course).stdout and calls(course) == 2


@pytest.mark.parametrize('body, words', [
    ('case "$1" in -V) echo Python 3.9.2;; *) exit 1;; esac', ['3.11 or newer', 'Python 3.9.2', 'PYTHON=']),
    ('case "$2" in *ensurepip*) exit 1;; *) exec "$REAL" "$@";; esac', ['no venv module', 'apt install python3-venv']),
    ('case "$2" in venv) echo "Errno 28" >&2; exit 1;; *) exec "$REAL" "$@";; esac', ['No .venv', 'room on the disk']),
])
def test_an_unfit_python_gets_one_sentence(course, body, words):
    (course.parent / 'python3').write_text('#!/bin/sh\n' + body + '\n')
    done = env(course)
    said = [line for line in done.stderr.splitlines() if line != 'Errno 28']
    assert done.returncode == 1 and len(said) == 1 and all(w in said[0] for w in words), done.stderr
    assert not (course / '.venv').exists()


def test_a_failed_installation_is_explained_and_tried_again(course):
    failed = env(course, STUB_SAYS='OSError: [Errno 28] No space left on device', STUB_FAILS='1')
    assert failed.returncode == 1 and not (course / '.venv/stamp').exists()
    *_, why, where = failed.stderr.strip().splitlines()
    assert 'The disk is full' in why and 'GB are free' in why and 'install.log' in where
    assert 'No space left' in (course / '.venv/install.log').read_text() and 'on a terminal' not in failed.stderr
    done = env(course)
    assert done.returncode == 0 and 'Making' not in done.stdout and calls(course) == 2
    assert (course / '.venv/install.log').read_text() == 'fine\n'


def test_pip_has_a_terminal_where_we_have_one(course):
    ours, its = os.openpty()
    stub = dict(PYTHON=str(course.parent / 'python3'), REAL=sys.executable, STUB_FAILS='1', STUB_SAYS='Read timed out.')
    process = subprocess.Popen(['sh', 'scripts/env.sh'], cwd=course, env=os.environ | stub, stdout=its, stderr=its)
    os.close(its)
    text = b''
    while chunk := install.read(ours): text += chunk
    os.close(ours)
    assert process.wait() == 1
    assert b'on a terminal' in text and b'does not answer' in text and text.count(b'Read timed out.') == 1
    assert 'on a terminal' in (course / '.venv/install.log').read_text()


@pytest.mark.parametrize('index, words', [
    ('https://127.0.0.1:9/simple', ['does not answer', 'PIP_INDEX_URL']),
    ('{server}/missing.x', ['not even setuptools', 'PIP_INDEX_URL']),
])
def test_real_pip_and_an_index_that_fails(course, index, words):
    clean = {name: '' for name in os.environ if name.startswith('PIP_') or name.lower().endswith('_proxy')}
    with serving() as (server, _):
        ours = dict(PIP_INDEX_URL=index.format(server=server), PIP_RETRIES='1', PIP_CONFIG_FILE=os.devnull)
        done = env(course, STUB_PIP='real', **clean | ours, PIP_DRY_RUN='1')
    assert done.returncode == 1 and not (course / '.venv/stamp').exists()
    why = done.stderr.split('The installation failed. ')[1].splitlines()[0]
    assert all(w in why for w in words), done.stderr


# The decisive lines of what pip 23 to 26 says
said = {
    "'NameResolutionError(\"HTTPSConnection(host='example.org', port=443): Failed to resolve 'example.org' "
    "([Errno -3] Temporary failure in name resolution)\")': /simple/setuptools/": 'is there a network',
    "'NewConnectionError('<object>: Failed to establish a new connection: [Errno -2] Name or service not known')'":
        'is there a network',
    "ReadTimeoutError: HTTPSConnectionPool(host='example.org', port=443): Read timed out.": 'does not answer',
    "'ProxyError('Cannot connect to proxy.', NewConnectionError('… [Errno 111] Connection refused'))'": 'The proxy',
    "'ProxyError('Cannot connect to proxy.', OSError('Tunnel connection failed: 407 Proxy Authentication Required'))'":
        'The proxy',
    "'SSLError(SSLCertVerificationError(1, '[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: self-signed "
    "certificate in certificate chain (_ssl.c:1006)'))'": 'PIP_CERT=',
    "'SSLError(SSLError(1, '[SSL: WRONG_VERSION_NUMBER] wrong version number (_ssl.c:1006)'))'": 'does not answer',
    'ERROR: HTTP error 403 while getting https://example.org/torch.whl': 'HTTP error 403',
    '403 Client Error: Forbidden for url: https://example.org/simple/torch/': '403 Client Error',
    'ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device': 'The disk is full',
    "ERROR: Could not install packages due to an OSError: [Errno 13] Permission denied: '/x/.venv/lib/a.py'\n"
    'Check the permissions.': 'may not be written',
    "ERROR: torch has an invalid wheel, torch's Wheel-Version (2.0) is not compatible with this version of pip":
        '-m pip install -U pip',
    'ERROR: No matching distribution found for torch>=2.6 (from dlfound[dev])': 'has no torch>=2.6 for Python 3.',
    'ERROR: No matching distribution found for setuptools>=77': 'not even setuptools',
    'ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE.': 'PIP_NO_CACHE_DIR=1',
    'ERROR: Failed building wheel for pyzmq\nFailed to build pyzmq': 'could not be built',
    'ERROR: ResolutionImpossible: for help visit https://pip.pypa.io/': 'PIP_CONSTRAINT',
    'Segmentation fault': 'The lines above say why',
}


@pytest.mark.parametrize('text, words', said.items())
def test_what_pip_says_becomes_advice(text, words, monkeypatch):
    monkeypatch.delenv('https_proxy', raising=False)
    effects = '\nERROR: subprocess-exited-with-error' if 'Error(' in text else ''
    assert words in install.reason(f'Collecting torch\n{text}{effects}\n')


def test_an_error_that_was_overcome_is_no_reason():
    text = 'ReadTimeoutError: Read timed out.\n' + 'Collecting more\n' * 200 + 'No space left on device'
    assert 'disk is full' in install.reason(text)
    assert install.reason(text.rsplit('\n', 1)[0]) == 'The lines above say why.'
    assert 'memory' in install.reason(text, -9)


@pytest.mark.parametrize('platform, machine, words', [('darwin', 'x86_64', 'Intel Macs'), ('linux', 'x86_64', 'glibc')])
def test_a_machine_without_pytorch_is_named(platform, machine, words, monkeypatch):
    monkeypatch.setattr(sys, 'platform', platform)
    monkeypatch.setattr(install.platform, 'machine', lambda: machine)
    monkeypatch.setattr(install.platform, 'libc_ver', lambda: ('', ''))
    assert words in install.reason('No matching distribution found for torch>=2.6')
    monkeypatch.setattr(install.platform, 'machine', lambda: 'arm64')
    monkeypatch.setattr(install.platform, 'libc_ver', lambda: ('glibc', '2.36'))
    assert words not in install.reason('No matching distribution found for torch>=2.6')


def test_too_little_room_is_a_warning(tmp_path, monkeypatch):
    usage = namedtuple('usage', 'total used free')
    for name in 'PIP_INDEX_URL', 'PIP_EXTRA_INDEX_URL', 'PIP_NO_CACHE_DIR': monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(install, 'root', tmp_path)
    monkeypatch.setattr(install.tempfile, 'gettempdir', lambda: str(tmp_path))
    monkeypatch.setenv('HOME', str(tmp_path / 'missing'))
    monkeypatch.setattr(sys, 'platform', 'linux')

    def warned(free):
        monkeypatch.setattr(install.shutil, 'disk_usage', lambda path: usage(1, 1, free * 1e9))
        return install.warnings()

    assert warned(13) == []
    assert len(warned(8)) == 1 and '9.2 GB are needed' in warned(8)[0] and '8.0 GB are free' in warned(8)[0]
    monkeypatch.setenv('PIP_EXTRA_INDEX_URL', 'https://download.pytorch.org/whl/cpu')
    assert warned(8) == [] and '1.9 GB are needed' in warned(1)[0]
    assert warned(1)[0].startswith('Warning')


@pytest.mark.parametrize('platform, gpu, index, torch, hint', [
    ('linux', None, '', False, True),
    ('linux', '/bin/nvidia-smi', '', False, False),
    ('darwin', None, '', False, False),
    ('linux', None, 'https://download.pytorch.org/whl/cpu', False, False),
    ('linux', None, '', True, False),
])
def test_the_small_installation_is_offered(platform, gpu, index, torch, hint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'platform', platform)
    monkeypatch.setattr(install, 'root', tmp_path)
    monkeypatch.setattr(install, 'pip', lambda *args: (0, ''))
    monkeypatch.setattr(install.shutil, 'which', lambda name: gpu)
    monkeypatch.delenv('PIP_INDEX_URL', raising=False)
    monkeypatch.setenv('PIP_EXTRA_INDEX_URL', index)
    if torch: (tmp_path / '.venv/lib/python3.12/site-packages/torch').mkdir(parents=True)
    assert install.main() == 0
    out = capsys.readouterr().out
    assert ('PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make lab' in out) == hint
    assert ('GB to download' in out) != torch


@pytest.mark.skipif(not (root / '.venv/stamp').exists(), reason='needs the environment that make makes')
def test_a_second_make_does_nothing():
    before = (root / '.venv/stamp').stat().st_mtime_ns
    done = run('make', '--no-print-directory', 'env', cwd=root, MAKEFLAGS='', MAKELEVEL='0')
    assert (done.returncode, done.stdout, done.stderr) == (0, '', '')
    assert (root / '.venv/stamp').stat().st_mtime_ns == before


@pytest.mark.skipif(not (bin / 'nbdev_test').exists(), reason='needs the environment that make makes')
def test_old_spelling_of_nbdev_test(tree):
    ok = run(bin / 'nbdev_test', tree / 'nbs/tools/kit.ipynb', cwd=tree)
    assert ok.returncode == 0 and 'Success.' in ok.stdout
    write(tree / 'nbs/tools/kit.ipynb', lesson('kit', ['1 / 0']))
    assert run(bin / 'nbdev_test', tree / 'nbs/tools/kit.ipynb', cwd=tree).returncode == 1
    assert not any(e.name.startswith('nbdev') for e in importlib.metadata.distribution('dlfound').entry_points)
