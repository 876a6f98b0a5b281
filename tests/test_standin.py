"Stand-in digits and the files they come in: what is damaged is named, seeds and fonts stay apart, a folder is whole."
import gzip
import shutil
import threading

import dlfound.standin as module
import numpy as np
import pytest
import torch
from dlfound.data import load_mnist
from dlfound.standin import make_digits, mnist_files, read_digits, read_idx, whole_folder


@pytest.fixture
def digits(tmp_path, monkeypatch):
    monkeypatch.setenv('DLFOUND_STANDIN', '1')
    monkeypatch.setenv('DLFOUND_HOME', str(tmp_path))
    return make_digits(tmp_path / 'standin/mnist', 60, 12, 20, seed=1)


def test_load_mnist_reads_the_idx_files(digits):
    x, y, xv, yv, xt, yt = load_mnist(test=True)
    assert [len(a) for a in (x, y, xv, yv, xt, yt)] == [60, 60, 12, 12, 20, 20]
    assert x.dtype == xt.dtype == torch.float32 and y.dtype == torch.int64
    assert x.shape[1] == 784 and 0 <= x.min() and x.max() <= 1
    raw = gzip.decompress((digits / 'train-images-idx3-ubyte.gz').read_bytes())
    assert torch.equal((xv[-1] * 255).round().byte(), torch.tensor(list(raw[-784:]), dtype=torch.uint8))
    assert len(load_mnist()) == 4 and yt.bincount().tolist() == [2] * 10
    assert torch.equal(read_digits(str(digits), test=True)[0], xt)


@pytest.mark.parametrize('change, words', [
    (lambda b: b[:-1], 'holds'), (lambda b: b + b'x', 'holds'), (lambda b: b'\0\0\x08\x01' + b[4:], '0x801'),
    (lambda b: b[:3], 'begins'), (lambda b: b'', 'begins'), (lambda b: b[:16], 'holds 0'),
    (lambda b: b[:4] + b'\0\0\0\x01' + b[8:12] + b[12:16] + b[16:16 + 784], r'\[1, 28, 28\] and 72 labels'),
    (lambda b: b[:4] + b'\0\0\0\x48\0\0\0\x0e\0\0\0\x0e' + b[16:16 + 72 * 196], r'\[72, 14, 14\] and 72 labels'),
])
def test_damaged_idx(digits, change, words):
    path = digits / 'train-images-idx3-ubyte.gz'
    path.write_bytes(gzip.compress(change(gzip.decompress(path.read_bytes()))))
    with pytest.raises(ValueError, match=words): load_mnist()


def test_damaged_gz(digits):
    path = digits / 'train-images-idx3-ubyte.gz'
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match='fetch the set again'): load_mnist()


def test_the_remedy_for_a_damaged_file_works(digits):
    path = digits / 'train-images-idx3-ubyte.gz'
    path.write_bytes(b'damaged')
    with pytest.raises(ValueError, match='cannot be read .*: remove the folder') as e: load_mnist()
    assert f'remove the folder {digits} and' in str(e.value)
    shutil.rmtree(digits)
    assert len(load_mnist()[0]) == 10_000


def test_label_outside_the_classes(digits):
    path = digits / 'train-labels-idx1-ubyte.gz'
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-1] + b'\x0a'))
    with pytest.raises(ValueError, match='72 labels, the largest 10: remove it'): load_mnist()


def test_an_empty_set_can_be_read(tmp_path):
    for name, sizes in zip(mnist_files, ((0, 28, 28), (0,))):
        head = np.array([0x800 + len(sizes), *sizes], '>u4').tobytes()
        (tmp_path / name).write_bytes(gzip.compress(head))
    assert [tuple(a.shape) for a in read_digits(tmp_path)] == [(0, 784), (0,)]
    assert read_idx(tmp_path / 'train-labels-idx1-ubyte.gz', 1).dtype == torch.uint8


def test_make_digits_leaves_the_global_generator_alone(tmp_path):
    torch.manual_seed(3)
    np.random.seed(3)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    make_digits(tmp_path / 'a', 20, 10, 10)
    assert torch.equal(before[0], torch.get_rng_state()) and (before[1] == np.random.get_state()[1]).all()


def test_defaults_of_pytorch_change_nothing(tmp_path):
    before = make_digits(tmp_path / 'a', 20, 10, 10)
    torch.set_default_dtype(torch.float64)
    torch.set_default_device('meta')
    try: after = make_digits(tmp_path / 'b', 20, 10, 10)
    finally: torch.set_default_device(None), torch.set_default_dtype(torch.float32)
    assert all((before / name).read_bytes() == (after / name).read_bytes() for name in mnist_files)


def test_the_home_of_the_user(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.setenv('USERPROFILE', str(tmp_path))
    assert make_digits('~/a', 20, 10, 10) == tmp_path / 'a' and len(read_digits('~/a')[0]) == 30


@pytest.mark.parametrize('seed', [42, 43, 44])
def test_no_font_is_in_two_parts(tmp_path, monkeypatch, seed):
    used, draw = [], module._draw
    monkeypatch.setattr(module, '_draw', lambda glyphs, n, g: used.append(glyphs) or draw(glyphs, n, g))
    make_digits(tmp_path / 'a', 20, 10, 10, seed)
    fonts = [{f.numpy().tobytes() for f in part} for part in used]
    a, b, c = fonts
    assert all(len(f) >= 4 for f in fonts) and not (a & b | a & c | b & c)


@pytest.mark.parametrize('sizes', [(0, 1, 1), (1, 0, 1), (1, 1, 0), (5, -1, 5)])
def test_every_part_needs_an_image(tmp_path, sizes):
    with pytest.raises(ValueError, match=f'n_valid={sizes[1]}'): make_digits(tmp_path / 'a', *sizes)
    assert left(tmp_path) == []


def test_no_fonts(tmp_path, monkeypatch):
    fonts = module.digit_fonts()
    for n in 0, 3:
        monkeypatch.setattr(module, 'digit_fonts', lambda: fonts[:n])
        with pytest.raises(ValueError, match=f'four fonts with digits are needed, got {n}'): make_digits(tmp_path / 'a')
    monkeypatch.setattr(module, 'digit_fonts', lambda: fonts[:4])
    make_digits(tmp_path / 'a', 10, 10, 10)


def left(folder): return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize('error', [ValueError, KeyboardInterrupt, SystemExit])
def test_a_folder_is_whole_or_not_there(tmp_path, error):
    for empty in False, True:
        if empty: (tmp_path / 'set').mkdir()
        with pytest.raises(error), whole_folder(tmp_path / 'set') as new:
            (new / 'half').touch()
            raise error
        assert left(tmp_path) == ['.lock-set', 'set'][:1 + empty]
    with whole_folder(tmp_path / 'set') as new: (new / 'x').touch()
    assert left(tmp_path) == ['.lock-set', 'set'] and left(tmp_path / 'set') == ['x']
    with whole_folder(tmp_path / 'set') as new: assert new is None
    assert left(tmp_path / 'set') == ['x']


def test_a_link_to_another_disk_stays_one(tmp_path):
    for there in True, False:
        place, link = tmp_path / f'disk{there}', tmp_path / f'set{there}'
        place.mkdir()
        if there: (place / 'set').mkdir()
        link.symlink_to(place / 'set')
        with whole_folder(link) as new: (new / 'x').touch()
        assert link.is_symlink() and left(link) == ['x'] and left(place) == ['.lock-set', 'set']
        with whole_folder(link) as new: assert new is None


def test_what_a_killed_process_left_is_cleared(tmp_path):
    (tmp_path / '.work-set/new').mkdir(parents=True)
    (tmp_path / '.work-set/new/half').touch()
    with whole_folder(tmp_path / 'set') as new: assert left(new) == []


@pytest.mark.parametrize('kind', ['file', 'hidden file'])
def test_what_is_in_the_way_is_told_before_any_work(tmp_path, kind):
    if kind == 'file': (tmp_path / 'set').touch()
    else: (tmp_path / 'set').mkdir(), (tmp_path / 'set/.DS_Store').touch() # As a Mac may leave
    with pytest.raises(FileExistsError, match='set is in the way: remove it'), whole_folder(tmp_path / 'set'): 1 / 0
    assert left(tmp_path) == ['.lock-set', 'set']


def test_one_at_a_time(tmp_path):
    inside, made = [], []
    def fill():
        with whole_folder(tmp_path / 'set') as new:
            inside.append(1)
            assert len(inside) == 1
            made.append(new)
            if new: (new / 'x').touch()
            inside.pop()
    threads = [threading.Thread(target=fill) for _ in range(8)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert len(made) == 8 and sum(new is not None for new in made) == 1
