"Hostile and damaged archives, each kind a test: refused with a reason, the target as it was, nothing written outside."
import bz2
import errno
import gzip
import io
import lzma
import os
import random
import shutil
import signal
import stat
import struct
import subprocess
import sys
import tarfile
import time
import zipfile

import pytest
from dlfound.archive import extract

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
    "A folder with an empty target in it, and a file beside that"
    (tmp_path / 'in/target').mkdir(parents=True)
    (tmp_path / 'in/mine.txt').write_text('mine')
    return tmp_path


def snapshot(folder):
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() and not p.is_symlink() else None
            for p in folder.rglob('*')}


def refused(place, archive, words, **limits):
    before = snapshot(place)
    for target in 'in/target', 'in/new':
        with pytest.raises(ValueError, match=f'is refused and nothing extracted: .*({words})') as e:
            extract(archive, place / target, **limits)
        assert snapshot(place) == before and archive.name in str(e.value)


def old(raw):
    "The tar as it was before 1988: headers of names, numbers and a check sum; a slash ends the name of a folder"
    raw, at = bytearray(raw), 0
    while any(raw[at:at + 512]):
        size, name = int(raw[at + 124:at + 135], 8), raw[at:at + 100].rstrip(b'\0')
        if raw[at + 156:at + 157] == tarfile.DIRTYPE and not name.endswith(b'/'): raw[at + len(name)] = ord('/')
        raw[at + 156:at + 157], raw[at + 257:at + 512] = b'\0', bytes(255)
        raw[at + 148:at + 156] = b' ' * 8
        raw[at + 148:at + 156] = b'%06o\0 ' % sum(raw[at:at + 512])
        at += 512 + -(-size // 512) * 512
    return bytes(raw)


members = ('d/x', b'1'), special('e', tarfile.DIRTYPE), ('./d/y', b'2' * 600)


@pytest.mark.parametrize('change', [bytes, old])
@pytest.mark.parametrize('pack', [bytes, *packers.values()])
@pytest.mark.parametrize('target', ['in/target', 'in/new', 'far/away/new'])
def test_tar(place, pack, change, target):
    raw = change(tar_bytes(*members))
    assert (b'ustar' in raw) == (change is bytes)
    (place / 'a').write_bytes(pack(raw))
    assert extract(place / 'a', place / target) == place / target
    assert snapshot(place / target) == {'d': None, 'e': None, 'd/x': b'1', 'd/y': b'2' * 600}
    assert not list(place.rglob('.*'))


def test_a_plain_tar_is_checked_like_a_packed_one(place):
    for raw in tar_bytes(('ok', b''), ('../x', b'')), old(tar_bytes(('ok', b''), ('../x', b''))):
        (place / 'a').write_bytes(raw)
        refused(place, place / 'a', 'leave the folder')
    (place / 'a').write_bytes(tar_bytes(('x', os.urandom(5000)))[:3000])
    refused(place, place / 'a', 'cannot be read')


def test_zip(place):
    extract(make_zip(place / 'a', ('d/', ''), ('d/x', '1')), place / 'new/target')
    assert snapshot(place / 'new/target') == {'d': None, 'd/x': b'1'}


def test_an_empty_archive(place):
    assert snapshot(extract(make_tar(place / 'a'), place / 'new')) == {}
    assert snapshot(extract(make_zip(place / 'b'), place / 'other')) == {}


def test_names_as_pathlib_or_strings_and_a_folder_through_a_link(place):
    (place / 'link').symlink_to(place / 'in')
    extract(str(make_tar(place / 'a', ('x', b'1'))), str(place / 'link/new'))
    assert snapshot(place / 'in/new') == {'x': b'1'}


@pytest.mark.parametrize('make', [make_tar, make_zip])
def test_backslashes_separate(place, make):
    path = make(place / 'a', ('d\\x', b'1'), ('d\\e\\y', b'2'), ('.\\d/z', b'3'))
    assert snapshot(extract(path, place / 'new')) == {'d': None, 'd/e': None, 'd/x': b'1', 'd/e/y': b'2', 'd/z': b'3'}


def test_no_bytes_of_a_zip_are_lost(place):
    path = make_zip(place / 'a', ('d/', 'text'))
    assert snapshot(extract(path, place / 'new')) == {'d': b'text'}
    refused(place, make_zip(place / 'b', ('d/', 'text'), ('d/x', '')), 'would be the same file')


def test_a_folder_of_a_zip_may_end_in_a_backslash(place):
    path = make_zip(place / 'a', ('d\\', ''), ('d\\x', '1'), ('e\\', ''))
    assert snapshot(extract(path, place / 'new')) == {'d': None, 'd/x': b'1', 'e': None}


outside = ['../x', 'a/C:/x', 'f.txt:s', '1:2', 'a/' * 99 + 'x', 'a/' * 15_000 + 'x', '',
           'a/../../x', '/x', '//x', 'C:/x', 'c:x', '..\\x', 'a\\..\\..\\x', '..']


@pytest.mark.parametrize('name', outside)
def test_tar_names_that_leave(place, name):
    refused(place, make_tar(place / 'a', ('ok', b'1'), (name, b'2')), 'leave the folder')


@pytest.mark.parametrize('name', outside)
def test_zip_names_that_leave(place, name):
    refused(place, make_zip(place / 'a', ('ok', '1'), (name, '2')), 'leave the folder')


kinds = dict(symlink=tarfile.SYMTYPE, hardlink=tarfile.LNKTYPE, fifo=tarfile.FIFOTYPE, block=tarfile.BLKTYPE,
             char=tarfile.CHRTYPE, sparse=tarfile.GNUTYPE_SPARSE)


@pytest.mark.parametrize('kind', kinds)
def test_tar_links_and_devices(place, kind):
    refused(place, make_tar(place / 'a', ('ok', b'1'), special('x', kinds[kind], 'ok')), 'link, a device')


def test_write_through_a_link(place):
    refused(place, make_tar(place / 'a', special('d', tarfile.SYMTYPE, '..'), ('d/x', b'1')), 'link, a device')


def test_zip_link(place): refused(place, make_zip(place / 'a', ('x', '/etc/passwd'), mode=0o120777), 'link or a device')


def test_a_file_of_holes_that_would_fill_the_disk(place):
    info = tarfile.TarInfo('x')
    info.pax_headers = {'GNU.sparse.major': '0', 'GNU.sparse.minor': '1', 'GNU.sparse.name': 'x',
                        'GNU.sparse.size': str(1 << 44), 'GNU.sparse.map': '0,0'}
    refused(place, make_tar(place / 'a', info), 'has holes')


@pytest.mark.parametrize('names', [('README', 'readme'), ('d/x', 'D/y'), ('A/', 'a/'), ('A/', 'a'), ('A/x', 'a/'),
                                   ('e\u0301', '\u00c9'), ('x', 'x'), ('x', './x'), ('x', 'x/y'), ('x/y', 'x'),
                                   ('x\\y', 'x/y')])
def test_names_that_collide(place, names):
    def member(name): return special(name, tarfile.DIRTYPE) if name.endswith('/') else (name, b'')
    refused(place, make_tar(place / 'a', *map(member, names)), 'would be the same file')
    refused(place, make_zip(place / 'b', *((n, '') for n in names)), 'would be the same file')


def test_a_folder_may_be_there_twice(place):
    for make in make_tar, make_zip:
        path = make(place / 'a', ('d/x', b''), ('d/y', b''))
        assert len(snapshot(extract(path, place / make.__name__))) == 3
    path = make_tar(place / 'a', special('d/', tarfile.DIRTYPE), ('d/x', b''), special('d', tarfile.DIRTYPE))
    assert len(snapshot(extract(path, place / 'new'))) == 2


@pytest.mark.parametrize('there', ['file', 'x', '.hidden', 'folder', 'link'])
def test_a_folder_that_is_not_empty_is_left_as_it_is(place, there):
    target = place / 'in/target'
    if there == 'folder': (target / there).mkdir()
    elif there == 'link': (target / there).symlink_to(place)
    else: (target / there).write_text('mine')
    archive = make_tar(place / 'a', ('x', b'1'))
    before = snapshot(place)
    with pytest.raises(FileExistsError, match='no empty one: name a new folder'): extract(archive, target)
    assert snapshot(place) == before


@pytest.mark.parametrize('at', [100, 512 + 512 + 100])
def test_damaged_header(place, at):
    raw = bytearray(tar_bytes(('a', b'1'), ('b', b'2'), ('c', b'3')))
    raw[at] ^= 255
    (place / 'a').write_bytes(gzip.compress(bytes(raw)))
    refused(place, place / 'a', 'cannot be read')


def test_cut_at_a_member(place):
    raw = tar_bytes(('a', b'1' * 512), ('b', bytes(512)))
    (place / 'a').write_bytes(gzip.compress(raw[:4 * 512]))
    refused(place, place / 'a', 'cannot be read')


def test_an_empty_folder_keeps_its_mode_and_a_link_to_it_stays_one(place):
    target = place / 'in/target'
    target.chmod(0o700)
    (place / 'link').symlink_to(target)
    assert extract(make_tar(place / 'a', ('x', b'1')), place / 'link') == target
    assert (place / 'link').is_symlink() and snapshot(target) == {'x': b'1'}
    assert stat.S_IMODE(target.stat().st_mode) == 0o700 and not list(place.rglob('.*'))


def test_a_read_only_folder_can_be_filled(place):
    (place / 'in/target').chmod(0o555)
    assert snapshot(extract(make_tar(place / 'a', ('x', b'1')), place / 'in/target')) == {'x': b'1'}
    assert stat.S_IMODE((place / 'in/target').stat().st_mode) == 0o755


def test_folders_within_folders(place):
    deep = [special('a' + '/a' * i, tarfile.DIRTYPE) for i in range(1500)]
    refused(place, make_tar(place / 'a', *deep, ('../z', b'')), 'leave the folder')


def test_the_current_folder(place, monkeypatch):
    archive = make_tar(place / 'a', ('x', b'1'))
    monkeypatch.chdir(place / 'in/target')
    before = snapshot(place)
    for name in '.', place / 'in/target', '../target':
        with pytest.raises(FileExistsError, match='in/target is the current folder'): extract(archive, name)
    assert snapshot(place) == before and snapshot(extract(archive, 'new')) == {'x': b'1'}


def test_the_home_of_the_user(place, monkeypatch):
    monkeypatch.setenv('HOME', str(place))
    monkeypatch.setenv('USERPROFILE', str(place))
    make_tar(place / 'a', ('x', b'1'))
    assert extract('~/a', '~/new') == place / 'new' and snapshot(place / 'new') == {'x': b'1'}


@pytest.mark.parametrize('make', [make_tar, make_zip])
def test_a_name_too_long_for_the_disk(place, make):
    refused(place, make(place / 'a', ('x' * 300, b'1')), 'cannot be read')


def test_target_is_a_file(place):
    archive = make_tar(place / 'a', ('x', b''))
    with pytest.raises(FileExistsError, match='no empty one'): extract(archive, place / 'in/mine.txt')
    assert (place / 'in/mine.txt').read_text() == 'mine'


def test_a_full_disk_is_not_the_archives_fault(place, monkeypatch):
    def full(*args): raise OSError(errno.ENOSPC, 'No space left on device')
    archive = make_tar(place / 'a', ('x', b'1'))
    before = snapshot(place)
    monkeypatch.setattr(shutil, 'copyfileobj', full)
    with pytest.raises(OSError, match='No space left') as e: extract(archive, place / 'in/target')
    assert e.value.errno == errno.ENOSPC and snapshot(place) == before


def test_too_many_members(place):
    members = [(f'{i}', b'') for i in range(11)]
    words = 'over 10 members.*raise max_members'
    refused(place, make_tar(place / 'a', *members), words, max_members=10)
    refused(place, make_zip(place / 'b', *((n, '') for n, _ in members)), words, max_members=10)
    refused(place, make_tar(place / 'c', ('/'.join('abcdefghij') + '/x', b'')), words, max_members=10)
    assert len(snapshot(extract(make_tar(place / 'd', *members[:10]), place / 'ten', max_members=10))) == 10


bomb = bytes(8 << 20)


@pytest.mark.parametrize('pack', packers)
def test_tar_bomb(place, pack): refused(place, make_tar(place / 'a', ('x', bomb), pack=pack), 'unpacks to')


def test_zip_bomb(place): refused(place, make_zip(place / 'a', ('x', bomb)), 'unpacks to')


def test_zip_bomb_that_lies_about_its_size(place):
    path = make_zip(place / 'a', ('x', bomb))
    raw = path.read_bytes().replace(struct.pack('<L', len(bomb)), struct.pack('<L', 10))
    path.write_bytes(raw)
    refused(place, path, 'cannot be read|unpacks to')


def test_bomb_of_a_header(place):
    info = tarfile.TarInfo('x')
    info.pax_headers = {'comment': ' ' * (8 << 20)}
    refused(place, make_tar(place / 'a', info), 'unpacks to')


def test_too_large_in_all(place):
    noise = os.urandom(1 << 16)
    archive = make_tar(place / 'a', *((f'{i}', noise) for i in range(40)))
    refused(place, archive, 'unpacks to.*raise max_ratio or max_bytes', max_bytes=1 << 20)


def test_the_limits_can_be_lifted(place):
    path = make_tar(place / 'a', ('x', bomb))
    assert snapshot(extract(path, place / 'new', max_ratio=float('inf'))) == {'x': bomb}


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
    refused(place, path, 'cannot be read')


@pytest.mark.parametrize('cut', [512, 700, 512 + 3072, 512 + 3072 + 100])
def test_a_tar_cut_before_it_was_packed(place, cut):
    raw = tar_bytes(*((f'{i}', b'x' * 3000) for i in range(5)))
    (place / 'a').write_bytes(gzip.compress(raw[:cut]))
    refused(place, place / 'a', 'cannot be read')


@pytest.mark.parametrize('pack', [bytes, *packers.values()])
@pytest.mark.parametrize('more', ['hole', 'tar', 'garbage'])
def test_bytes_after_the_end(place, pack, more):
    raw = bytearray(tar_bytes(('a', b'1'), ('b', b'2')))
    if more == 'hole': raw[1024:1536] = bytes(512)
    else: raw += tar_bytes(('c', b'3')) if more == 'tar' else b'garbage'
    (place / 'a').write_bytes(pack(bytes(raw)))
    refused(place, place / 'a', 'more bytes after its end')


def test_truncated_zip(place):
    path = make_zip(place / 'a', ('x', os.urandom(5000)))
    path.write_bytes(path.read_bytes()[:3000])
    refused(place, path, 'cannot be read')


@pytest.mark.parametrize('at', [.1, .5])
def test_flipped_bits(place, at):
    for make in make_tar, make_zip:
        path = make(place / 'a', ('x', os.urandom(50_000)))
        raw = bytearray(path.read_bytes())
        raw[int(len(raw) * at)] ^= 255
        path.write_bytes(raw)
        refused(place, path, 'cannot be read')


@pytest.mark.parametrize('content', [b'', b'hello', b'(\xb5/\xfd' + bytes(600), b"7z\xbc\xaf'\x1c" + bytes(600),
                                     gzip.compress(b'data'), gzip.compress(b'data' * 400),
                                     b'\x7fELF' + bytes(100), b'<html>'])
def test_no_archive(place, content):
    (place / 'a').write_bytes(content)
    refused(place, place / 'a', 'no zip, and no whole tar, plain or in gz, bz2 or xz')


def test_modes_and_owners_are_not_taken_over(place):
    info = tarfile.TarInfo('x')
    info.mode, info.uid = 0o6777, 12345
    path = extract(make_tar(place / 'a', info), place / 'new') / 'x'
    assert path.stat().st_mode & 0o7111 == 0 and path.stat().st_uid == os.getuid()


def test_killed_in_the_middle_then_done_again(place):
    path = make_tar(place / 'a', *((f'{i}', os.urandom(20_000)) for i in range(1500)))
    code = f'from dlfound.archive import extract; extract({str(path)!r}, {str(place / "new")!r})'
    p = subprocess.Popen([sys.executable, '-c', code])
    while p.poll() is None and not any(place.glob('.extract-*/new/1*')): time.sleep(.002)
    assert p.poll() is None
    p.send_signal(signal.SIGKILL)
    p.wait()
    assert not (place / 'new').exists()
    assert len(list(extract(path, place / 'new').iterdir())) == 1500


@pytest.mark.parametrize('make', [make_tar, make_zip])
def test_any_damage_is_an_error_of_one_kind_or_does_no_harm(place, make):
    whole = make(place / 'a', ('d/x', os.urandom(900)), ('y', b'text' * 200), ('z', b'')).read_bytes()
    plain = gzip.decompress(whole) if make is make_tar else whole
    for i in range(300):
        raw = bytearray(random.choice([whole, plain]))
        for _ in range(random.randint(1, 4)): raw[random.randrange(len(raw))] = random.randrange(256)
        if i % 3 == 0: del raw[random.randrange(len(raw)):]
        (place / 'b').write_bytes(raw)
        before = snapshot(place)
        try: extract(place / 'b', place / 'new')
        except ValueError as e: assert 'is refused and nothing extracted' in str(e)
        else: shutil.rmtree(place / 'new')
        assert snapshot(place) == before
