"Where a set is looked for, what is an error, what is never mistaken for data, what two processes do to each other."
import errno
import hashlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import dlfound.data as data
import dlfound.standin as standin_module
import pytest
from dlfound.data import Archive, Source, Unreachable, fetch, is_standin, load_mnist, make_digits, used
from servers import serving

root = Path(__file__).resolve().parent.parent


@pytest.fixture
def home(tmp_path, monkeypatch):
    for name in list(os.environ):
        if name.startswith('DLFOUND_') or name.lower().endswith('_proxy'): monkeypatch.delenv(name)
    monkeypatch.setenv('DLFOUND_HOME', str(tmp_path / 'home'))
    for name, empty in ('_taken', {}), ('_rooms', {}), ('_silent', set()): monkeypatch.setattr(data, name, empty)
    return tmp_path / 'home'


@pytest.fixture
def archive(tmp_path):
    "A small set in a tar, and its hash"
    (tmp_path / 'pack/toy').mkdir(parents=True)
    (tmp_path / 'pack/toy/x').write_text('real')
    with tarfile.open(tmp_path / 'toy.tgz', 'w:gz') as t: t.add(tmp_path / 'pack/toy', 'toy')
    return tmp_path / 'toy.tgz', hashlib.sha256((tmp_path / 'toy.tgz').read_bytes()).hexdigest()


def standin(folder): (folder / 'x').write_text('stand-in')


@pytest.fixture
def toy(monkeypatch, archive):
    "Make `toy` a known set with these addresses"
    def known(*urls, sha256=archive[1], standin=standin):
        source = Source('toy', ((Archive('toy.tgz', urls, sha256),),), 'none', 'nobody', standin=standin)
        monkeypatch.setitem(data.SOURCES, 'toy', source)
        return source
    return known


@pytest.fixture
def nobody():
    "An address at which nobody listens"
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return f'http://127.0.0.1:{s.getsockname()[1]}/toy.tgz'


@pytest.fixture
def mirror(tmp_path, archive, monkeypatch):
    (tmp_path / 'mirror').mkdir()
    shutil.copy(archive[0], tmp_path / 'mirror')
    monkeypatch.setenv('DLFOUND_MIRROR', str(tmp_path / 'mirror'))
    return tmp_path / 'mirror'


def test_mirror_then_cache(home, toy, nobody, mirror, monkeypatch, capsys):
    toy(nobody)
    assert (fetch('toy') / 'x').read_text() == 'real'
    assert capsys.readouterr().out == 'toy: the real data, from the mirror: toy.tgz\n'
    monkeypatch.delenv('DLFOUND_MIRROR')
    fetch('toy'), fetch('toy')
    assert capsys.readouterr().out == ''
    data._taken.clear()
    assert (fetch('toy', standin=False) / 'x').read_text() == 'real' and not is_standin('toy')
    assert capsys.readouterr().out == 'toy: the real data, from the cache\n'


def test_mirror_in_a_folder_of_the_set(home, toy, nobody, mirror):
    toy(nobody)
    (mirror / 'toy').mkdir()
    (mirror / 'toy.tgz').rename(mirror / 'toy/toy.tgz')
    assert (fetch('toy') / 'x').read_text() == 'real'


def test_network(home, toy, archive, capsys, monkeypatch):
    import servers
    monkeypatch.setattr(servers, 'payload', archive[0].read_bytes())
    with serving() as (site, asked):
        toy(f'{site}/missing.tgz', f'{site}/good.tgz')
        assert (fetch('toy') / 'x').read_text() == 'real'
    assert 'toy: the real data, downloaded: toy.tgz\n' in capsys.readouterr().out
    assert sorted(p.name for p in home.iterdir()) == ['.lock-toy', 'downloads', 'toy']
    assert not list((home / 'downloads').iterdir())


def asked(monkeypatch):
    "A list that grows when the network is asked, which does not answer"
    calls = []
    def silent(*args, **kwargs): calls.append(1); raise Unreachable('no network')
    monkeypatch.setattr(data, 'download', silent)
    return calls


def test_unreachable_gives_the_stand_in_and_says_so_once(home, toy, nobody, capsys):
    toy(nobody)
    path = fetch('toy')
    assert (path / 'x').read_text() == 'stand-in' and path == fetch('toy') and is_standin('toy')
    out = capsys.readouterr().out
    assert out == ('toy: a STAND-IN that dlfound made, because no server answered: connect to the network and restart, '
                   'or set DLFOUND_MIRROR to a folder with toy.tgz\n')


@pytest.mark.parametrize('name, why', [
    ('DLFOUND_STANDIN', 'because DLFOUND_STANDIN is set: unset it\n'),
    ('DLFOUND_OFFLINE', 'because DLFOUND_OFFLINE is set: unset it, or set DLFOUND_MIRROR to a folder with toy.tgz\n'),
])
def test_the_line_says_why_and_what_to_do(home, toy, monkeypatch, capsys, name, why):
    toy('http://127.0.0.1:1/toy.tgz')
    monkeypatch.setenv(name, '1')
    calls = asked(monkeypatch)
    fetch('toy')
    out = capsys.readouterr().out
    assert out.startswith('toy: a STAND-IN') and out.endswith(why) and out.count('\n') == 1 and not calls
    with pytest.raises(ConnectionError, match='the real toy cannot be had: ' + why[8:-1]): fetch('toy', standin=False)


def test_a_stand_in_never_counts_as_real(home, toy, nobody, mirror, monkeypatch):
    toy(nobody)
    monkeypatch.delenv('DLFOUND_MIRROR')
    fetch('toy')
    with pytest.raises(ConnectionError, match='no server answered: connect to the network .*DLFOUND_MIRROR.* toy.tgz'):
        fetch('toy', standin=False)
    monkeypatch.setenv('DLFOUND_MIRROR', str(mirror))
    assert (fetch('toy', standin=False) / 'x').read_text() == 'real' and not is_standin('toy')


def test_forced_stand_in(home, toy, nobody, mirror, monkeypatch):
    toy(nobody)
    real = fetch('toy')
    monkeypatch.setenv('DLFOUND_STANDIN', '1')
    assert (fetch('toy') / 'x').read_text() == 'stand-in' and is_standin('toy')
    with pytest.raises(ConnectionError, match='DLFOUND_STANDIN is set: unset it'): fetch('toy', standin=False)
    for no in '0', 'False', '':
        monkeypatch.setenv('DLFOUND_STANDIN', no)
        assert fetch('toy') == real


def test_offline_never_asks(home, toy, mirror, monkeypatch):
    monkeypatch.setenv('DLFOUND_OFFLINE', '1')
    calls = asked(monkeypatch)
    toy('http://127.0.0.1:1/toy.tgz')
    assert (fetch('toy') / 'x').read_text() == 'real'
    monkeypatch.delenv('DLFOUND_MIRROR')
    monkeypatch.setenv('DLFOUND_HOME', str(home / 'other'))
    assert (fetch('toy') / 'x').read_text() == 'stand-in' and not calls


def test_not_asked_again_but_when_the_real_set_is_wanted(home, toy, monkeypatch):
    toy('http://127.0.0.1:1/toy.tgz')
    calls = asked(monkeypatch)
    assert fetch('toy') == fetch('toy') and is_standin('toy') and calls == [1]
    with pytest.raises(ConnectionError): fetch('toy', standin=False)
    assert calls == [1, 1]


def test_the_network_is_back(home, toy, mirror, monkeypatch, capsys):
    toy('http://127.0.0.1:1/toy.tgz')
    monkeypatch.delenv('DLFOUND_MIRROR')
    asked(monkeypatch)
    fetch('toy')
    monkeypatch.setattr(data, 'download', lambda urls, dest, *hashes: copied(mirror / 'toy.tgz', dest))
    assert (fetch('toy', standin=False) / 'x').read_text() == 'real' and used() == {'toy': False}
    assert 'toy: the real data, downloaded: toy.tgz\n' in capsys.readouterr().out


def left(folder): return sorted(p.name for p in folder.iterdir())


def copied(file, dest):
    dest.parent.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copy(file, dest))


@pytest.mark.parametrize('page, error', [('wrong', ValueError), ('missing', OSError), ('broken', OSError),
                                         ('truncated', OSError)])
def test_a_server_that_answers_badly_is_an_error(home, toy, page, error):
    with serving() as (site, _):
        toy(f'{site}/{page}.tgz')
        with pytest.raises(error) as e: fetch('toy')
    assert not isinstance(e.value, Unreachable)
    assert not (home / 'toy').exists() and not (home / 'standin').exists()


def test_wrong_hash_in_the_mirror(home, toy, nobody, mirror):
    toy(nobody, sha256='0' * 64)
    with pytest.raises(ValueError, match='0' * 64 + '.*Replace it'): fetch('toy')
    assert not (home / 'toy').exists()


def test_mirror_that_is_no_folder(home, toy, nobody, mirror, monkeypatch):
    toy(nobody)
    for bad in str(mirror / 'nowhere'), str(mirror / 'toy.tgz'):
        monkeypatch.setenv('DLFOUND_MIRROR', bad)
        with pytest.raises(NotADirectoryError, match='DLFOUND_MIRROR'): fetch('toy')
    monkeypatch.setenv('DLFOUND_MIRROR', str(mirror))
    real = fetch('toy')
    monkeypatch.setenv('DLFOUND_MIRROR', str(mirror / 'unplugged')) # A set in the cache needs no mirror
    assert fetch('toy') == real


def test_empty_mirror_and_no_network(home, toy, nobody, mirror):
    toy(nobody)
    (mirror / 'toy.tgz').unlink()
    with pytest.raises(ConnectionError, match='the real toy cannot be had: no server answered.*a folder with toy.tgz'):
        fetch('toy')
    assert not (home / 'standin').exists()


def test_empty_mirror_and_a_network(home, toy, mirror, archive, monkeypatch):
    import servers
    monkeypatch.setattr(servers, 'payload', archive[0].read_bytes())
    (mirror / 'toy.tgz').unlink()
    with serving() as (site, _):
        toy(f'{site}/good.tgz')
        assert (fetch('toy') / 'x').read_text() == 'real'


def test_set_without_stand_in(home, toy, nobody):
    toy(nobody, standin=None)
    with pytest.raises(ConnectionError, match='the real toy cannot be had: no server answered'): fetch('toy')


def test_an_empty_folder_is_no_set(home, toy, nobody, mirror):
    toy(nobody)
    (home / 'toy').mkdir(parents=True)
    (home / 'toy/.DS_Store').touch() # As a Mac may leave
    with pytest.raises(OSError, match='home/toy is in the way: remove it'): fetch('toy')
    (home / 'toy/.DS_Store').unlink()
    assert (fetch('toy') / 'x').read_text() == 'real' and left(home) == ['.lock-toy', 'toy']


def test_an_empty_folder_is_no_stand_in(home, toy, nobody):
    toy(nobody)
    (home / 'standin/toy').mkdir(parents=True)
    assert (fetch('toy') / 'x').read_text() == 'stand-in'


def test_a_set_without_address(home, toy, mirror, monkeypatch):
    toy()
    assert (fetch('toy') / 'x').read_text() == 'real'
    monkeypatch.delenv('DLFOUND_MIRROR')
    monkeypatch.setenv('DLFOUND_HOME', str(home / 'other'))
    assert is_standin('toy')


def test_a_set_that_no_server_has(home, toy, monkeypatch, capsys):
    toy()
    calls = asked(monkeypatch)
    for offline in '0', '1':
        monkeypatch.setenv('DLFOUND_OFFLINE', offline)
        with pytest.raises(ConnectionError, match='no server has it: set DLFOUND_MIRROR to a folder with toy.tgz$'):
            fetch('toy', standin=False)
    assert not calls and not home.exists() and is_standin('toy')
    assert capsys.readouterr().out.endswith('no server has it: set DLFOUND_MIRROR to a folder with toy.tgz\n')


@pytest.mark.parametrize('page', ['missing', 'broken', 'truncated'])
def test_an_answer_of_another_kind_has_a_remedy(home, toy, page, monkeypatch):
    with serving() as (site, _):
        toy(f'{site}/{page}.tgz')
        with pytest.raises(OSError) as e: fetch('toy')
    assert e.value.__notes__ == ['For a stand-in, if any, set DLFOUND_STANDIN=1, '
                                 'or set DLFOUND_MIRROR to a folder with toy.tgz']
    monkeypatch.setenv('DLFOUND_STANDIN', '1')
    assert is_standin('toy')


def test_a_set_of_several_files(home, mirror, monkeypatch):
    files = [mirror / 'a.gz', mirror / 'toy/b.gz']
    files[1].parent.mkdir()
    for f in files: f.write_text(f.name)
    archives = tuple(Archive(f.name, (), hashlib.sha256(f.name.encode()).hexdigest()) for f in files)
    monkeypatch.setitem(data.SOURCES, 'toy', Source('toy', (archives,), '', '', unpack=False))
    assert {p.name: p.read_text() for p in fetch('toy').iterdir()} == {'a.gz': 'a.gz', 'b.gz': 'b.gz'}
    monkeypatch.setenv('DLFOUND_HOME', str(home / 'other'))
    files[0].unlink()
    with pytest.raises(ConnectionError, match='a folder with a.gz, b.gz'): fetch('toy')


def test_unknown_set(home):
    with pytest.raises(ValueError, match='mnist'): fetch('minst')


def test_no_space(home, toy, nobody, mirror, monkeypatch):
    def full(*args): raise OSError(errno.ENOSPC, 'No space left on device')
    toy(nobody)
    monkeypatch.setattr(data, 'extract', full)
    with pytest.raises(OSError, match='No space left') as e: fetch('toy')
    assert not hasattr(e.value, '__notes__')
    assert e.value.errno == errno.ENOSPC and [p.name for p in home.iterdir()] == ['.lock-toy']


def no_home(home, kind, monkeypatch):
    "A cache that cannot be written, for root too"
    if kind == 'file': home.write_text('in the way')
    if kind == 'below a file': home.write_text(''); monkeypatch.setenv('DLFOUND_HOME', str(home / 'deep/home'))
    if kind == 'read-only':
        def refuse(*args, **kwargs): raise OSError(errno.EROFS, 'Read-only file system')
        monkeypatch.setattr(standin_module, 'FileLock', refuse)


homes = pytest.mark.parametrize('kind', ['file', 'below a file', 'read-only'])


@homes
def test_a_stand_in_without_a_home_that_can_be_written(home, toy, nobody, monkeypatch, capsys, kind):
    made = []
    toy(nobody, standin=lambda folder: made.append(folder) or standin(folder))
    no_home(home, kind, monkeypatch)
    path = fetch('toy')
    assert (path / 'x').read_text() == 'stand-in' and fetch('toy') == path and is_standin('toy') and len(made) == 1
    assert used() == {'toy': True}
    out = capsys.readouterr().out
    assert 'STAND-IN' in out and 'cannot be written: set DLFOUND_HOME' in out and out.count('\n') == 1
    monkeypatch.setenv('DLFOUND_STANDIN', '1')
    assert fetch('toy') == path


@homes
def test_real_data_need_a_home_that_can_be_written(home, toy, nobody, mirror, monkeypatch, kind):
    toy(nobody)
    no_home(home, kind, monkeypatch)
    with pytest.raises(PermissionError, match='set DLFOUND_HOME'): fetch('toy')
    monkeypatch.delenv('DLFOUND_MIRROR')
    with pytest.raises(PermissionError, match='set DLFOUND_HOME'): fetch('toy', standin=False)


def test_a_stand_in_of_one_process_is_removed_with_it(home, tmp_path):
    home.write_text('in the way')
    code = 'from dlfound.data import load_mnist, fetch\nprint(len(load_mnist()[0]), fetch("mnist"), sep="\\n")'
    env = os.environ | {'PYTHONPATH': str(root), 'DLFOUND_STANDIN': '1', 'TMPDIR': str(tmp_path)}
    done = subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True)
    said, n, path = done.stdout.splitlines()
    assert n == '10000' and Path(path).parent == tmp_path and not Path(path).exists() and done.stderr == ''


def test_imports_without_the_locks_of_unix_and_windows(tmp_path):
    code = ('import sys, torch; sys.modules.update(fcntl=None, msvcrt=None); '
            'import dlfound.data as d; print(d.load_mnist.__name__)')
    done = subprocess.run([sys.executable, '-c', code], env=os.environ | {'PYTHONPATH': str(root)},
                          capture_output=True, text=True)
    assert done.stdout == 'load_mnist\n', done.stderr


def test_a_resolver_that_hangs(home, toy, monkeypatch):
    def hangs(*args, **kwargs):
        time.sleep(2)
        raise socket.gaierror(-2, 'Name or service not known')
    real = data.download
    monkeypatch.setattr(socket, 'getaddrinfo', hangs)
    monkeypatch.setattr(data, 'download', lambda *args: real(*args, timeout=.2))
    toy('http://example.invalid/toy.tgz')
    assert (fetch('toy') / 'x').read_text() == 'stand-in'


slow = '''
import sys, time, dlfound.data as d
import shutil
copy = shutil.copyfileobj
def slowly(*a, **k): time.sleep(.02); return copy(*a, **k)
shutil.copyfileobj = slowly
d.SOURCES['toy'] = d.Source('toy', ((d.Archive('big.tgz', (), sys.argv[1]),),), '', '')
print(len(list(d.fetch('toy').iterdir())))
'''


@pytest.fixture
def big(tmp_path, mirror):
    (tmp_path / 'many/toy').mkdir(parents=True)
    for i in range(60): (tmp_path / f'many/toy/{i}').write_text(str(i))
    with tarfile.open(mirror / 'big.tgz', 'w:gz') as t: t.add(tmp_path / 'many/toy', 'toy')
    return hashlib.sha256((mirror / 'big.tgz').read_bytes()).hexdigest()


def start(big):
    return subprocess.Popen([sys.executable, '-c', slow, big], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, env=os.environ | {'PYTHONPATH': str(root)})


def test_two_processes_at_once(home, big):
    both = [start(big), start(big)]
    outs = [p.communicate() for p in both]
    assert [p.returncode for p in both] == [0, 0], outs
    assert all(out.endswith('60\n') for out, _ in outs) and sorted('mirror' in out for out, _ in outs) == [False, True]


def test_killed_in_the_middle_then_done_again(home, big):
    p = start(big)
    while p.poll() is None and not any(len(files) > 5 for _, _, files in os.walk(home / '.work-toy')): time.sleep(.01)
    assert p.poll() is None
    p.send_signal(signal.SIGKILL)
    p.wait()
    assert not (home / 'toy').exists()
    again = start(big)
    out, err = again.communicate()
    assert again.returncode == 0 and out.endswith('60\n'), err
    assert sorted(p.name for p in home.iterdir()) == ['.lock-toy', 'toy']


mirror_here = root.parent / 'shared/data'


@pytest.mark.skipif(not mirror_here.is_dir(), reason='needs the real archives')
@pytest.mark.parametrize('name', ['mnist', 'imdb', 'wikitext-2', 'fsdd'])
def test_real_archives(home, name, monkeypatch):
    monkeypatch.setenv('DLFOUND_MIRROR', str(mirror_here))
    path = fetch(name, standin=False)
    assert any(path.iterdir())
    sizes = [50_000] * 2 + [10_000] * 4
    if name == 'mnist': assert [len(a) for a in load_mnist(test=True)] == sizes
