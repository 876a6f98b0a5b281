"Downloads from servers that are slow, lie, cut off, redirect or do not answer; and a process killed in the middle."
import errno
import hashlib
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import dlfound.download as module
import pytest
from dlfound.download import Unreachable, download, wrong_hash
from servers import payload, serving, silence

sha256, md5 = hashlib.sha256(payload).hexdigest(), hashlib.md5(payload).hexdigest()


@pytest.fixture(scope='module')
def site():
    with serving() as (url, asked): yield url, asked


def left(tmp_path): return sorted(p.name for p in tmp_path.iterdir())


@pytest.mark.parametrize('page', ['good', 'noranges', 'redirect', 'trickle'])
@pytest.mark.parametrize('kind', ['sha256', 'md5', 'none'])
def test_whole(site, tmp_path, page, kind):
    hashes = {'sha256': dict(sha256=sha256), 'md5': dict(md5=md5.upper()), 'none': {}}[kind]
    assert download(f'{site[0]}/{page}.bin', tmp_path / 'deep/x', **hashes).read_bytes() == payload
    assert left(tmp_path / 'deep') == ['x']


@pytest.mark.parametrize('page, words', [('missing', '404'), ('broken', '500'), ('truncated', '100,000 of 512,000'),
                                         ('loop', 'redirect'), ('evil', 'not allowed')])
def test_a_server_that_fails_is_an_error_and_not_unreachable(site, tmp_path, page, words):
    with pytest.raises(OSError, match=words) as e: download(f'{site[0]}/{page}.bin', tmp_path / 'x', sha256)
    assert not isinstance(e.value, Unreachable) and not (tmp_path / 'x').exists()


def test_a_proxy_that_says_no_is_an_error_and_not_unreachable(site, tmp_path, monkeypatch):
    for name in 'no_proxy', 'NO_PROXY': monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv('https_proxy', site[0])
    monkeypatch.setattr('urllib.request._opener', None) # It keeps the proxies of its first use
    with pytest.raises(OSError, match='Tunnel connection failed: 501') as e:
        download('https://example.invalid/x', tmp_path / 'x')
    assert not isinstance(e.value, Unreachable) and left(tmp_path) == []


@pytest.mark.parametrize('url', ['http://127.0.0.1:1/\u00fc.bin', 'http://a..b/x', '{}/nolength.bin'])
def test_only_a_wrong_hash_is_a_value_error(site, tmp_path, url):
    with pytest.raises(OSError, match='cannot download x'): download(url.format(site[0]), tmp_path / 'x', sha256)


def test_a_truncated_download_is_refused_without_a_hash_too(site, tmp_path):
    with pytest.raises(OSError, match='closed the connection'): download(f'{site[0]}/truncated.bin', tmp_path / 'x')
    assert not (tmp_path / 'x').exists()


@pytest.mark.parametrize('page', ['wrong', 'short'])
def test_wrong_bytes_are_deleted_and_named(site, tmp_path, page):
    with pytest.raises(ValueError, match=sha256) as e: download(f'{site[0]}/{page}.bin', tmp_path / 'x', sha256)
    assert f'/{page}.bin: another file' in str(e.value) and str(e.value).count('sha256') == 1 and left(tmp_path) == []


@pytest.mark.parametrize('page, unreachable', [('silent', True), ('stalls', False)])
def test_time_out(site, tmp_path, page, unreachable):
    start = time.time()
    with pytest.raises(OSError) as e: download(f'{site[0]}/{page}.bin', tmp_path / 'x', sha256, timeout=.5)
    assert time.time() - start < silence / 2
    assert isinstance(e.value, Unreachable) == unreachable and not (tmp_path / 'x').exists()


def hangs(*args, **kwargs):
    "A name look-up of a network that leads nowhere"
    time.sleep(silence)
    raise socket.gaierror(-2, 'Name or service not known')


def test_a_resolver_that_hangs(tmp_path, monkeypatch):
    monkeypatch.setattr(socket, 'getaddrinfo', hangs)
    start = time.time()
    with pytest.raises(Unreachable): download('http://example.invalid/x', tmp_path / 'x', timeout=.5)
    assert time.time() - start < silence / 2


def test_a_host_with_many_addresses_that_are_silent(tmp_path, monkeypatch):
    "The time-out of the standard library is one for each of them"
    with full() as address:
        found = socket.getaddrinfo(*address, type=socket.SOCK_STREAM) * 2 * silence
        monkeypatch.setattr(socket, 'getaddrinfo', lambda *args, **kwargs: found)
        start = time.time()
        with pytest.raises(Unreachable): download(f'http://many.invalid:{address[1]}/x', tmp_path / 'x', timeout=.5)
        assert time.time() - start < silence / 2


@contextmanager
def full():
    "The address of a listener whose queue is full: it answers nothing, like a firewall that swallows packets"
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        s.listen(0)
        waiting = [socket.socket() for _ in range(4)]
        for c in waiting:
            c.setblocking(False)
            c.connect_ex(s.getsockname())
        yield s.getsockname()
        for c in waiting: c.close()


@pytest.mark.parametrize('scheme', ['http', 'https'])
def test_a_firewall_that_swallows_packets(tmp_path, scheme):
    with full() as address:
        start = time.time()
        with pytest.raises(Unreachable): download(f'{scheme}://127.0.0.1:{address[1]}/x', tmp_path / 'x', timeout=.5)
        assert time.time() - start < silence / 2


def test_a_firewall_that_swallows_tls(tmp_path):
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        s.listen(5)
        start = time.time()
        url = f'https://127.0.0.1:{s.getsockname()[1]}/x'
        with pytest.raises(Unreachable): download(url, tmp_path / 'x', timeout=.5)
        assert time.time() - start < silence / 2


@pytest.mark.parametrize('answer', [b'no HTTP at all', b''])
def test_what_answers_is_no_web_server(tmp_path, answer):
    def serve():
        with s.accept()[0] as c: c.recv(1000); c.sendall(answer)
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        s.listen(1)
        threading.Thread(target=serve, daemon=True).start()
        url = f'http://127.0.0.1:{s.getsockname()[1]}/x'
        with pytest.raises(OSError, match='cannot download x') as e: download(url, tmp_path / 'x', timeout=5)
    assert not isinstance(e.value, Unreachable)


def test_next_address(site, tmp_path):
    urls = [f'{site[0]}/{p}.bin' for p in ('missing', 'wrong', 'truncated', 'broken', 'good')]
    assert download(urls, tmp_path / 'x', sha256).read_bytes() == payload
    assert left(tmp_path) == ['x']


def test_nobody_listens(tmp_path):
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    urls = f'http://127.0.0.1:{port}/x', 'http://no-such-host.invalid/x'
    with pytest.raises(Unreachable): download(urls, tmp_path / 'x')
    assert not (tmp_path / 'x').exists()


@pytest.mark.parametrize('bad', ['ftp://example.org/x', 'file:///etc/hostname', 'http:///x', 'https://:80/x',
                                 'http://[::1/x', 'x', '', [], [b'http://example.org/x'], [Path('x')]])
def test_other_addresses(tmp_path, bad):
    with pytest.raises(ValueError, match='http'): download(bad, tmp_path / 'x')


def test_a_wrong_hash_and_a_server_that_is_gone(site, tmp_path):
    urls = f'{site[0]}/wrong.bin', 'http://no-such-host.invalid/x'
    with pytest.raises(ValueError, match=f'another file than expected.*{sha256}.*no-such-host'):
        download(urls, tmp_path / 'x', sha256)
    assert left(tmp_path) == []


def test_a_folder_is_refused_before_anything_is_asked(site, tmp_path):
    site[1].clear()
    with pytest.raises(IsADirectoryError, match='name the file'): download(f'{site[0]}/good.bin', tmp_path)
    assert site[1] == [] and left(tmp_path) == []


def test_the_home_of_the_user(site, tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.setenv('USERPROFILE', str(tmp_path))
    assert download(f'{site[0]}/good.bin', '~/in/x') == tmp_path / 'in/x' and left(tmp_path) == ['in']


def test_resumes(site, tmp_path):
    (tmp_path / 'x.part').write_bytes(payload[:300_000])
    site[1].clear()
    assert download(f'{site[0]}/good.bin', tmp_path / 'x', sha256).read_bytes() == payload
    assert site[1] == [('/good.bin', 'bytes=300000-')]


@pytest.mark.parametrize('page', ['good', 'noranges'])
@pytest.mark.parametrize('part', [b'something else', payload, payload + b'!'])
def test_a_part_that_does_not_fit_is_thrown_away(site, tmp_path, page, part):
    (tmp_path / 'x.part').write_bytes(part)
    assert download(f'{site[0]}/{page}.bin', tmp_path / 'x', sha256).read_bytes() == payload


def test_without_a_hash_nothing_is_resumed(site, tmp_path):
    (tmp_path / 'x.part').write_bytes(b'something else')
    assert download(f'{site[0]}/good.bin', tmp_path / 'x').read_bytes() == payload
    site[1].clear()
    urls = [f'{site[0]}/truncated.bin', f'{site[0]}/good.bin']
    assert download(urls, tmp_path / 'y').read_bytes() == payload and site[1][1] == ('/good.bin', None)


def test_wrong_hash(tmp_path):
    (tmp_path / 'x').write_bytes(payload)
    right = (), (sha256,), (None, md5.upper()), (sha256, md5), (f' {sha256}\n',)
    assert [wrong_hash(tmp_path / 'x', *h) for h in right] == [''] * 5
    assert f'its md5 is {md5} and should be {md5[::-1]}' in wrong_hash(tmp_path / 'x', sha256, md5[::-1])


def test_what_is_there_and_right_is_not_downloaded_again(site, tmp_path):
    (tmp_path / 'x').write_bytes(payload)
    site[1].clear()
    download(f'{site[0]}/good.bin', tmp_path / 'x', sha256)
    assert site[1] == []


@pytest.mark.parametrize('hashes', [(), (sha256,)])
def test_a_part_that_is_a_folder_is_told(site, tmp_path, hashes):
    (tmp_path / 'x.part').mkdir()
    with pytest.raises(OSError, match='x.part') as e: download(f'{site[0]}/good.bin', tmp_path / 'x', *hashes)
    assert e.value.errno in (errno.EISDIR, errno.EPERM)


def test_no_space(site, tmp_path, monkeypatch):
    def full(*args): raise OSError(errno.ENOSPC, 'No space left on device')
    monkeypatch.setattr(module, '_stream', full)
    with pytest.raises(OSError) as e: download(f'{site[0]}/good.bin', tmp_path / 'x', sha256)
    assert e.value.errno == errno.ENOSPC


def test_a_pipe_gets_plain_lines(site, tmp_path):
    code = f'from dlfound.download import download; download("{site[0]}/good.bin", "x")'
    done = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == 'downloading x, 0.5 MB\n' and done.stderr == ''


def test_killed_and_taken_up_again(site, tmp_path):
    code = f'from dlfound.download import download; download("{site[0]}/trickle.bin", "x", "{sha256}")'
    p = subprocess.Popen([sys.executable, '-c', code], cwd=tmp_path, stdout=subprocess.DEVNULL)
    part = tmp_path / 'x.part'
    while not (part.exists() and part.stat().st_size > 50_000) and p.poll() is None: time.sleep(.005)
    assert p.poll() is None
    p.send_signal(signal.SIGKILL)
    p.wait()
    assert not (tmp_path / 'x').exists()
    site[1].clear()
    assert download(f'{site[0]}/trickle.bin', tmp_path / 'x', sha256).read_bytes() == payload
    assert site[1][0][1].startswith('bytes=') and left(tmp_path) == ['x']
