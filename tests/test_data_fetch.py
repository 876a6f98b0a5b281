"Where a set is looked for, what is an error, what is never mistaken for data, what two processes do to each other."
import errno
import gzip
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
import numpy as np
import pytest
import torch
from dlfound.data import Archive, Source, fetch, is_standin, load_mnist, make_digits
from servers import payload, serving

root = Path(__file__).resolve().parent.parent
patience, = data._answers.__defaults__ # Seconds within which a host must answer


@pytest.fixture
def home(tmp_path, monkeypatch):
    for name in list(os.environ):
        if name.startswith('DLFOUND_') or name.lower().endswith('_proxy'): monkeypatch.delenv(name)
    monkeypatch.setenv('DLFOUND_HOME', str(tmp_path / 'home'))
    monkeypatch.setattr(data, '_taken', {})
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
        source = Source('toy', ((Archive('toy.tgz', urls, sha256),),), 'none', 'nobody', 'toy', standin=standin)
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
    assert capsys.readouterr().out == 'toy: the real data, from the mirror\n'
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
    assert 'toy: the real data, downloaded\n' in capsys.readouterr().out
    assert sorted(p.name for p in home.iterdir()) == ['.lock-toy', 'downloads', 'toy']
    assert not list((home / 'downloads').iterdir())


def test_unreachable_gives_the_stand_in_and_says_so_once(home, toy, nobody, capsys):
    toy(nobody)
    path = fetch('toy')
    assert (path / 'x').read_text() == 'stand-in' and path == fetch('toy') and is_standin('toy')
    out = capsys.readouterr().out
    assert out.count('\n') == 1 and 'STAND-IN' in out


def test_a_stand_in_never_counts_as_real(home, toy, nobody, mirror, monkeypatch):
    toy(nobody)
    monkeypatch.delenv('DLFOUND_MIRROR')
    fetch('toy')
    with pytest.raises(ConnectionError, match='Three ways out.*network.*DLFOUND_MIRROR.*cache'):
        fetch('toy', standin=False)
    monkeypatch.setenv('DLFOUND_MIRROR', str(mirror))
    assert (fetch('toy', standin=False) / 'x').read_text() == 'real' and not is_standin('toy')


def test_forced_stand_in(home, toy, nobody, mirror, monkeypatch):
    toy(nobody)
    real = fetch('toy')
    monkeypatch.setenv('DLFOUND_STANDIN', '1')
    assert (fetch('toy') / 'x').read_text() == 'stand-in' and is_standin('toy')
    with pytest.raises(ConnectionError, match='unset DLFOUND_STANDIN'): fetch('toy', standin=False)
    monkeypatch.setenv('DLFOUND_STANDIN', '0')
    assert fetch('toy') == real


def test_offline_never_asks(home, toy, monkeypatch):
    monkeypatch.setenv('DLFOUND_OFFLINE', '1')
    monkeypatch.setattr(data, '_answers', lambda urls: pytest.fail('asked'))
    toy('http://127.0.0.1:1/toy.tgz')
    assert (fetch('toy') / 'x').read_text() == 'stand-in'
    with pytest.raises(ConnectionError, match='DLFOUND_OFFLINE'): fetch('toy', standin=False)
    assert not (home / '.unreachable').exists()


def test_not_asked_again_for_a_while(home, toy, nobody, monkeypatch):
    toy(nobody)
    fetch('toy')
    monkeypatch.setattr(data, '_answers', lambda urls: pytest.fail('asked'))
    fetch('toy')
    monkeypatch.undo()


def test_asked_again_later_and_when_the_real_set_is_wanted(home, toy, nobody, monkeypatch):
    toy(nobody)
    fetch('toy')
    asked = []
    monkeypatch.setattr(data, '_answers', lambda urls: asked.append(1))
    with pytest.raises(ConnectionError): fetch('toy', standin=False)
    assert asked == [1]
    os.utime(home / '.unreachable', (time.time() - 3600,) * 2)
    fetch('toy')
    assert asked == [1, 1]


@pytest.mark.parametrize('page, error', [('wrong', ValueError), ('missing', OSError), ('broken', OSError),
                                         ('truncated', OSError)])
def test_a_server_that_answers_badly_is_an_error(home, toy, page, error):
    with serving() as (site, _):
        toy(f'{site}/{page}.tgz')
        with pytest.raises(error): fetch('toy')
    assert not (home / 'toy').exists() and not (home / 'standin').exists()


def test_wrong_hash_in_the_mirror(home, toy, nobody, mirror):
    toy(nobody, sha256='0' * 64)
    with pytest.raises(ValueError, match='0' * 64 + '.*Replace it in the mirror'): fetch('toy')
    assert not (home / 'toy').exists()


def test_mirror_that_is_no_folder(home, toy, nobody, mirror, monkeypatch):
    toy(nobody)
    fetch('toy')
    for bad in str(mirror / 'nowhere'), str(mirror / 'toy.tgz'):
        monkeypatch.setenv('DLFOUND_MIRROR', bad)
        with pytest.raises(NotADirectoryError, match='DLFOUND_MIRROR'): fetch('toy')


def test_empty_mirror_and_no_network(home, toy, nobody, mirror):
    toy(nobody)
    (mirror / 'toy.tgz').unlink()
    with pytest.raises(ConnectionError, match='lacks toy.*Three ways out'): fetch('toy')
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
    with pytest.raises(ConnectionError, match='no stand-in.*Three ways out'): fetch('toy')


def test_what_is_not_the_set_is_no_cache(home, mirror):
    (home / 'imdb').mkdir(parents=True)
    with pytest.raises(ValueError, match='does not hold imdb: move it away'): fetch('imdb')
    make_digits(home / 'mnist', 20, 10, 10)
    with pytest.raises(ValueError, match='does not hold mnist: move it away'): fetch('mnist', standin=False)
    assert len(list((home / 'mnist').iterdir())) == 4


def test_a_firewall_that_swallows_tls(home, toy):
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        s.listen(5)
        toy(f'https://127.0.0.1:{s.getsockname()[1]}/toy.tgz')
        start = time.time()
        assert (fetch('toy') / 'x').read_text() == 'stand-in'
        assert time.time() - start < 2 * patience


def test_unknown_set(home):
    with pytest.raises(ValueError, match='mnist'): fetch('minst')


def test_no_space(home, toy, nobody, mirror, monkeypatch):
    def full(*args): raise OSError(errno.ENOSPC, 'No space left on device')
    toy(nobody)
    monkeypatch.setattr(data, '_copy', full)
    with pytest.raises(OSError, match='no space left for toy.*DLFOUND_HOME') as e: fetch('toy')
    assert e.value.errno == errno.ENOSPC and not (home / 'toy').exists() and not (home / '.work-toy').exists()


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
def test_home_that_cannot_be_written(home, toy, nobody, mirror, tmp_path):
    toy(nobody)
    home.mkdir()
    for p in [home, *home.parents]:
        if p.stat().st_uid == os.getuid() and p != Path('/'): os.chmod(p, 0o755)
    os.chmod(home, 0o555)
    pid = os.fork()
    if not pid:
        code = 1
        try:
            if os.getuid() == 0: os.setgroups([]); os.setgid(65534); os.setuid(65534)
            try: fetch('toy')
            except PermissionError as e: code = 0 if 'set DLFOUND_HOME' in str(e) else 2
            except BaseException: code = 3
        finally: os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    os.chmod(home, 0o755)


def test_a_firewall_that_swallows_packets(home, toy, monkeypatch):
    "A listener whose queue is full answers nothing, like a firewall"
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        s.listen(0)
        waiting = []
        for _ in range(4):
            c = socket.socket()
            c.setblocking(False)
            c.connect_ex(s.getsockname())
            waiting.append(c)
        toy(f'http://127.0.0.1:{s.getsockname()[1]}/toy.tgz')
        start = time.time()
        assert (fetch('toy') / 'x').read_text() == 'stand-in'
        assert time.time() - start < 2 * patience
        for c in waiting: c.close()


def test_a_resolver_that_hangs(home, toy, monkeypatch):
    def hangs(*args, **kwargs):
        time.sleep(4 * patience)
        raise socket.gaierror(-2, 'Name or service not known')
    monkeypatch.setattr(socket, 'getaddrinfo', hangs)
    toy('http://example.invalid/toy.tgz')
    start = time.time()
    assert (fetch('toy') / 'x').read_text() == 'stand-in'
    assert time.time() - start < 2 * patience


slow = '''
import sys, time, dlfound.data as d
copy = d._copy
def slowly(*a, **k): time.sleep(.02); return copy(*a, **k)
d._copy = slowly
d.SOURCES['toy'] = d.Source('toy', ((d.Archive('big.tgz', (), sys.argv[1]),),), '', '', 'toy')
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
    assert not (home / '.work-toy').exists()


@pytest.fixture
def digits(home, monkeypatch):
    monkeypatch.setenv('DLFOUND_STANDIN', '1')
    make_digits(home / 'standin/mnist', 60, 12, 20, seed=1)
    return home / 'standin/mnist'


def test_load_mnist_reads_the_idx_files(digits):
    x, y, xv, yv, xt, yt = load_mnist(test=True)
    assert [len(a) for a in (x, y, xv, yv, xt, yt)] == [60, 60, 12, 12, 20, 20]
    assert x.dtype == xt.dtype == torch.float32 and y.dtype == torch.int64
    assert x.shape[1] == 784 and 0 <= x.min() and x.max() <= 1
    raw = gzip.decompress((digits / 'train-images-idx3-ubyte.gz').read_bytes())
    assert torch.equal((xv[-1] * 255).round().byte(), torch.tensor(list(raw[-784:]), dtype=torch.uint8))
    assert len(load_mnist()) == 4 and yt.bincount().tolist() == [2] * 10


@pytest.mark.parametrize('change, words', [
    (lambda b: b[:-1], 'holds'), (lambda b: b + b'x', 'holds'), (lambda b: b'\0\0\x08\x01' + b[4:], '0x801'),
    (lambda b: b[:3], 'no idx file|holds|begins'),
    (lambda b: b[:4] + b'\0\0\0\x01' + b[8:12] + b[12:16] + b[16:16 + 784], '1 images and 72 labels'),
])
def test_damaged_idx(digits, change, words):
    path = digits / 'train-images-idx3-ubyte.gz'
    path.write_bytes(gzip.compress(change(gzip.decompress(path.read_bytes()))))
    with pytest.raises(ValueError, match=words): load_mnist()


def test_damaged_gz(digits):
    path = digits / 'train-images-idx3-ubyte.gz'
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match='fetch the set again'): load_mnist()


def test_label_outside_the_classes(digits):
    path = digits / 'train-labels-idx1-ubyte.gz'
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-1] + b'\x0a'))
    with pytest.raises(ValueError, match='label 10'): load_mnist()


def test_make_digits_leaves_the_global_generator_alone(tmp_path):
    torch.manual_seed(3)
    np.random.seed(3)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    make_digits(tmp_path / 'a', 20, 10, 10)
    assert torch.equal(before[0], torch.get_rng_state()) and (before[1] == np.random.get_state()[1]).all()


@pytest.mark.parametrize('seed', [42, 43, 44])
def test_no_font_is_in_two_parts(tmp_path, monkeypatch, seed):
    used, draw = [], data._draw
    monkeypatch.setattr(data, '_draw', lambda glyphs, n, g: used.append(glyphs) or draw(glyphs, n, g))
    make_digits(tmp_path / 'a', 20, 10, 10, seed)
    fonts = [{f.numpy().tobytes() for f in part} for part in used]
    a, b, c = fonts
    assert all(len(f) >= 4 for f in fonts) and not (a & b | a & c | b & c)


mirror_here = root.parent / 'shared/data'


@pytest.mark.skipif(not mirror_here.is_dir(), reason='needs the real archives')
@pytest.mark.parametrize('name', ['mnist', 'imdb', 'wikitext-2', 'fsdd'])
def test_real_archives(home, name, monkeypatch):
    monkeypatch.setenv('DLFOUND_MIRROR', str(mirror_here))
    path = fetch(name, standin=False)
    assert any(path.iterdir())
    sizes = [50_000] * 2 + [10_000] * 4
    if name == 'mnist': assert [len(a) for a in load_mnist(test=True)] == sizes
