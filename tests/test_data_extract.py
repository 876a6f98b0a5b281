"Hostile and damaged archives, each kind a test: refused with a reason, the target as it was, nothing written outside."
import bz2
import gzip
import io
import lzma
import os
import signal
import struct
import subprocess
import sys
import tarfile
import time
import zipfile

import pytest
from dlfound.data import extract

packers = {'gz': gzip.compress, 'bz2': bz2.compress, 'xz': lzma.compress}


def tar_bytes(*members, end=True):
    "Members are (name, bytes) or TarInfo"
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode='w') as t:
        for m in members:
            if isinstance(m, tarfile.TarInfo): t.addfile(m); continue
            info = tarfile.TarInfo(m[0])
            info.size = len(m[1])
            t.addfile(info, io.BytesIO(m[1]))
    return out.getvalue()


def make_tar(path, *members, pack='gz'):
    path.write_bytes(packers[pack](tar_bytes(*members)))
    return path


def special(name, kind, link=''):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


def make_zip(path, *members, mode=None):
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as z:
        for name, text in members:
            info = zipfile.ZipInfo('x')
            info.filename = info.orig_filename = name
            info.compress_type = zipfile.ZIP_DEFLATED
            if mode: info.external_attr = mode << 16
            z.writestr(info, text)
    return path


@pytest.fixture
def place(tmp_path):
    "A target that holds something, and a check that nothing changed anywhere"
    (tmp_path / 'in/target').mkdir(parents=True)
    (tmp_path / 'in/target/mine.txt').write_text('mine')
    return tmp_path


def snapshot(folder):
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() and not p.is_symlink() else None
            for p in folder.rglob('*')}


def refused(place, archive, words, **limits):
    before = snapshot(place)
    with pytest.raises((ValueError, FileExistsError), match=words): extract(archive, place / 'in/target', **limits)
    assert snapshot(place) == before


@pytest.mark.parametrize('pack', packers)
def test_tar(place, pack):
    archive = make_tar(place / 'a', ('d/x', b'1'), special('e', tarfile.DIRTYPE), ('./d/y', b'2'), pack=pack)
    extract(archive, place / 'in/target')
    assert snapshot(place / 'in/target') == {'mine.txt': b'mine', 'd': None, 'e': None, 'd/x': b'1', 'd/y': b'2'}


def test_zip(place):
    extract(make_zip(place / 'a', ('d/', ''), ('d/x', '1')), place / 'new/target')
    assert snapshot(place / 'new/target') == {'d': None, 'd/x': b'1'}


def test_gz_of_one_file(place):
    (place / 'x.idx.gz').write_bytes(gzip.compress(b'data'))
    assert snapshot(extract(place / 'x.idx.gz', place / 'new')) == {'x.idx': b'data'}


outside = ['../x', 'a/C:/x', 'a/../../x', '/x', '//x', 'C:/x', 'c:x', '..\\x', 'a\\..\\..\\x', '..']


@pytest.mark.parametrize('name', outside)
def test_tar_names_that_leave(place, name):
    refused(place, make_tar(place / 'a', ('ok', b'1'), (name, b'2')), 'leave the folder')


@pytest.mark.parametrize('name', outside)
def test_zip_names_that_leave(place, name):
    refused(place, make_zip(place / 'a', ('ok', '1'), (name, '2')), 'leave the folder')


@pytest.mark.parametrize('name', ['..', '../x'])
def test_gz_name_that_leaves(place, name):
    (place / 'a').write_bytes(gzip.compress(b'x'))
    os.rename(place / 'a', place / '...gz')
    refused(place, place / '...gz', 'leave the folder')


kinds = dict(symlink=tarfile.SYMTYPE, hardlink=tarfile.LNKTYPE, fifo=tarfile.FIFOTYPE, block=tarfile.BLKTYPE,
             char=tarfile.CHRTYPE)


@pytest.mark.parametrize('kind', kinds)
def test_tar_links_and_devices(place, kind):
    refused(place, make_tar(place / 'a', ('ok', b'1'), special('x', kinds[kind], 'ok')), 'link or a device')


def test_write_through_a_link(place):
    refused(place, make_tar(place / 'a', special('d', tarfile.SYMTYPE, '..'), ('d/x', b'1')), 'link or a device')


def test_zip_link(place): refused(place, make_zip(place / 'a', ('x', '/etc/passwd'), mode=0o120777), 'link or a device')


@pytest.mark.parametrize('names', [('README', 'readme'), ('d/x', 'D/y'), ('e\u0301', '\u00c9')])
def test_names_that_differ_only_in_case(place, names):
    refused(place, make_tar(place / 'a', *((n, b'') for n in names)), 'only in case')
    refused(place, make_zip(place / 'b', *((n, '') for n in names)), 'only in case')


@pytest.mark.parametrize('names', [('x', 'x'), ('x', './x'), ('x', 'x/y'), ('x/y', 'x')])
def test_names_that_collide(place, names):
    refused(place, make_tar(place / 'a', *((n, b'') for n in names)), 'there twice')


@pytest.mark.parametrize('name', ['mine.txt', 'MINE.TXT', 'mine.txt/x'])
def test_a_file_that_is_there(place, name):
    refused(place, make_tar(place / 'a', ('new', b''), (name, b'')), 'is there already')


def test_a_link_in_the_target_is_not_followed(place):
    (place / 'elsewhere').mkdir()
    (place / 'in/target/d').symlink_to(place / 'elsewhere')
    refused(place, make_tar(place / 'a', ('d/x', b'1')), 'is there already')
    assert list((place / 'elsewhere').iterdir()) == []


def test_an_accent_spelt_differently_is_there(place):
    (place / 'in/target/\u00e9').write_text('mine')
    refused(place, make_tar(place / 'a', ('e\u0301', b'1')), 'is there already')


@pytest.mark.parametrize('at', [100, 512 + 512 + 100])
def test_damaged_header(place, at):
    raw = bytearray(tar_bytes(('a', b'1'), ('b', b'2'), ('c', b'3')))
    raw[at] ^= 255
    (place / 'a').write_bytes(gzip.compress(bytes(raw)))
    refused(place, place / 'a', 'damaged')


def test_cut_at_a_member(place):
    raw = tar_bytes(('a', b'1' * 512), ('b', bytes(512)))
    (place / 'a').write_bytes(gzip.compress(raw[:4 * 512]))
    refused(place, place / 'a', 'damaged')


def test_target_is_a_file(place):
    with pytest.raises(NotADirectoryError): extract(make_tar(place / 'a', ('x', b'')), place / 'in/target/mine.txt')


def test_too_many_members(place):
    members = [(f'{i}', b'') for i in range(11)]
    refused(place, make_tar(place / 'a', *members), 'more than 10 members', max_members=10)
    refused(place, make_zip(place / 'b', *((n, '') for n, _ in members)), 'more than 10 members', max_members=10)


bomb = bytes(8 << 20)


@pytest.mark.parametrize('pack', packers)
def test_tar_bomb(place, pack): refused(place, make_tar(place / 'a', ('x', bomb), pack=pack), 'unpacks to')


def test_zip_bomb(place): refused(place, make_zip(place / 'a', ('x', bomb)), 'unpacks to')


def test_zip_bomb_that_lies_about_its_size(place):
    path = make_zip(place / 'a', ('x', bomb))
    raw = path.read_bytes().replace(struct.pack('<L', len(bomb)), struct.pack('<L', 10))
    path.write_bytes(raw)
    refused(place, path, 'damaged|unpacks to')


def test_gz_bomb(place):
    (place / 'a.gz').write_bytes(gzip.compress(bomb))
    refused(place, place / 'a.gz', 'unpacks to')


def test_too_large_in_all(place):
    noise = os.urandom(1 << 16)
    refused(place, make_tar(place / 'a', *((f'{i}', noise) for i in range(40))), 'unpacks to', max_bytes=1 << 20)


def test_encrypted_zip(place):
    path = make_zip(place / 'a', ('x', 'secret'))
    raw = bytearray(path.read_bytes())
    raw[6] |= 1
    raw[raw.index(b'PK\x01\x02') + 8] |= 1
    path.write_bytes(raw)
    refused(place, path, 'encrypted')


@pytest.mark.parametrize('pack', packers)
@pytest.mark.parametrize('keep', [.2, .5, .9, .999])
def test_truncated(place, pack, keep):
    path = make_tar(place / 'a', *((f'{i}', os.urandom(3000)) for i in range(5)), pack=pack)
    raw = path.read_bytes()
    path.write_bytes(raw[:int(len(raw) * keep)])
    refused(place, path, 'damaged')


@pytest.mark.parametrize('cut', [512, 700, 512 + 3072, 512 + 3072 + 100])
def test_a_tar_cut_before_it_was_packed(place, cut):
    raw = tar_bytes(*((f'{i}', b'x' * 3000) for i in range(5)))
    (place / 'a').write_bytes(gzip.compress(raw[:cut]))
    refused(place, place / 'a', 'damaged')


def test_truncated_zip(place):
    path = make_zip(place / 'a', ('x', os.urandom(5000)))
    path.write_bytes(path.read_bytes()[:3000])
    refused(place, path, 'damaged')


@pytest.mark.parametrize('at', [.1, .5])
def test_flipped_bits(place, at):
    for make in make_tar, make_zip:
        path = make(place / 'a', ('x', os.urandom(50_000)))
        raw = bytearray(path.read_bytes())
        raw[int(len(raw) * at)] ^= 255
        path.write_bytes(raw)
        refused(place, path, 'damaged')


@pytest.mark.parametrize('content', [b'', b'hello', b'\x7fELF' + bytes(100), b'<html>'])
def test_no_archive(place, content):
    (place / 'a').write_bytes(content)
    refused(place, place / 'a', 'no zip, gz, bz2 or xz')


def test_modes_and_owners_are_not_taken_over(place):
    info = tarfile.TarInfo('x')
    info.mode, info.uid = 0o6777, 12345
    path = extract(make_tar(place / 'a', info), place / 'new') / 'x'
    assert path.stat().st_mode & 0o7111 == 0 and path.stat().st_uid == os.getuid()


def test_killed_in_the_middle_then_done_again(place):
    path = make_tar(place / 'a', *((f'{i}', os.urandom(20_000)) for i in range(1500)))
    code = f'from dlfound.data import extract; extract({str(path)!r}, {str(place / "new")!r})'
    p = subprocess.Popen([sys.executable, '-c', code])
    while p.poll() is None and not any(place.glob('.extract-*/new/1*')): time.sleep(.002)
    p.send_signal(signal.SIGKILL)
    p.wait()
    assert not (place / 'new').exists()
    assert len(list(extract(path, place / 'new').iterdir())) == 1500
