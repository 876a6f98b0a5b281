"Image files: what the lesson has no room for: every orientation, mode and fault, in this process and in a worker."
import os
import struct
import warnings

import matplotlib
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image

from dlfound.datablock import ItemList
from dlfound.images import (ImageError, ImageList, Normalize, ResizeFixed, check_images, open_image, pixel_statistics,
                            show_batch, to_float, to_tensor)
from dlfound.loader import DataLoader

scene = np.random.default_rng(0).integers(0, 256, (6, 4, 3), dtype=np.uint8)


@pytest.mark.parametrize('suffix', ['png', 'tif', 'webp'])
@pytest.mark.parametrize('number, stored', [
    (1, scene), (2, scene[:, ::-1]), (3, scene[::-1, ::-1]), (4, scene[::-1]),
    (5, scene.transpose(1, 0, 2)), (6, np.rot90(scene, 1)), (7, np.rot90(scene, 2).transpose(1, 0, 2)),
    (8, np.rot90(scene, -1))])
def test_every_orientation(tmp_path, suffix, number, stored):
    note = Image.Exif()
    note[274] = number
    options = dict(lossless=True) if suffix == 'webp' else {}
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / f'x.{suffix}', exif=note, **options)
    assert np.array_equal(np.asarray(open_image(tmp_path / f'x.{suffix}')), scene)


@pytest.mark.parametrize('mode', ['1', 'L', 'LA', 'P', 'RGB', 'RGBA', 'CMYK', 'YCbCr', 'LAB', 'I;16', 'I', 'F'])
@pytest.mark.parametrize('wanted', ['RGB', 'L', 'RGBA', None])
def test_every_mode_is_converted_or_reported(tmp_path, mode, wanted):
    Image.new(mode, (5, 3)).save(path := tmp_path / 'x.tif')
    if wanted and mode in ('I', 'F'):
        with pytest.raises(ImageError, match='x.tif cannot become'): open_image(path, wanted)
        return
    try: image = open_image(path, wanted)
    except ImageError as e: assert mode == 'LAB' and 'x.tif cannot become' in str(e)
    else: assert image.size == (5, 3) and image.mode == (wanted or mode)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 65535), min_size=1, max_size=20))
def test_16_bits_keep_their_range(tmp_path_factory, values):
    path = tmp_path_factory.mktemp('deep') / 'x.png'
    Image.fromarray(np.array([values], np.uint16)).save(path)
    exact = torch.tensor(values, dtype=torch.float64) / 65535
    assert torch.allclose(to_float(to_tensor(open_image(path, None))).flatten().double(), exact, atol=1e-7)
    eight = to_float(to_tensor(open_image(path, 'L'))).flatten().double()
    assert (eight - exact).abs().max() <= .5 / 255 + 1e-6
    assert open_image(path).getchannel(0).tobytes() == open_image(path, 'L').tobytes()


def test_big_endian_16_bits(tmp_path):
    image = Image.frombytes('I;16B', (2, 1), b'\x01\x02\xff\xfe')
    image.save(path := tmp_path / 'x.tif')
    assert to_tensor(open_image(path, None)).flatten().tolist() == [0x102, 0xfffe]
    assert to_tensor(open_image(path, 'L')).flatten().tolist() == [1, 255]


@pytest.mark.parametrize('background, value', [('white', 255), ('black', 0)])
@pytest.mark.parametrize('mode', ['RGBA', 'LA', 'PA'])
def test_half_transparent(tmp_path, mode, background, value):
    image = Image.new('RGBA', (2, 1), (100, 100, 100, 255))
    image.putpixel((1, 0), (100, 100, 100, 51))
    image = image.convert('RGBA' if mode == 'PA' else mode)
    if mode == 'PA': image = image.quantize(4)
    image.save(path := tmp_path / 'x.png')
    got = np.asarray(open_image(path, 'L', background=background))[0].tolist()
    assert abs(got[0] - 100) <= 2 and abs(got[1] - (.2 * 100 + .8 * value)) <= 2


def exif(*entries):
    "The bytes of a note with entries `(tag, kind, count, value)`, which may be wrong"
    body = b''.join(struct.pack('<HHI4s', *entry) for entry in entries)
    return b'Exif\0\0II*\0' + struct.pack('<IH', 8, len(entries)) + body + bytes(4)


@pytest.mark.parametrize('wrong', [(282, 2, 4, b'abc'), (273, 2, 4, b'abc'), (40965, 2, 4, b'abc'), (258, 2, 4, b'abc'),
                                   (34665, 4, 1, b'\xff\xff\1'), (282, 5, 1, b'\4'), (270, 2, 40000, b'\xff\xff')])
def test_a_damaged_note_neither_stops_nor_keeps_the_turn(tmp_path, wrong):
    stored = Image.fromarray(np.ascontiguousarray(np.rot90(scene, 1))).resize((60, 40), 0)
    entries = sorted([(274, 3, 1, b'\6'), wrong])
    stored.save(path := tmp_path / 'x.jpg', exif=exif(*entries), quality=100, subsampling=0)
    image = open_image(path)
    assert image.size == (40, 60)
    assert np.array_equal(np.asarray(image), np.rot90(np.asarray(Image.open(path)), -1))
    report = check_images([path])
    assert report.good == report.kinds['turned by EXIF'] == [path]
    image.save(again := tmp_path / 'again.png') # Not turned a second time
    assert open_image(again).size == (40, 60)


def test_nonsense_for_a_note(tmp_path):
    Image.new('RGB', (4, 6)).save(path := tmp_path / 'x.jpg', exif=b'Exif\0\0nonsense')
    assert open_image(path).size == (4, 6)
    for number in 0, 9:
        Image.new('RGB', (4, 6)).save(path, exif=exif((274, 3, 1, bytes([number]))))
        assert open_image(path).size == (4, 6)


def test_mistakes_of_the_caller_are_no_image_error(tmp_path):
    Image.new('RGB', (4, 4)).save(path := tmp_path / 'a b ü.png')
    for options in dict(mode='rgb'), dict(at_least=-1):
        with pytest.raises(ValueError, match="mode is 'RGB'") as e: open_image(path, **options)
        assert e.type is ValueError
    with pytest.raises(TypeError): open_image(path, at_least='x')
    assert open_image(str(path)).size == (4, 4)


def test_a_transparent_colour_of_rgb(tmp_path):
    Image.new('RGB', (2, 2), (1, 2, 3)).save(path := tmp_path / 'x.png', transparency=(1, 2, 3))
    assert set(open_image(path).tobytes()) == {255}


def test_the_wanted_pixels_are_there(tmp_path):
    Image.new('RGB', (1000, 400), 'red').save(path := tmp_path / 'x.jpg')
    for n in 1, 50, 51, 100, 101, 200, 399, 400, 401, 2000:
        small = open_image(path, at_least=n)
        assert min(small.size) >= min(n, 400), n
        assert small.width / small.height == 2.5
    assert open_image(path, 'L', 50).size == (125, 50)
    assert open_image(path, at_least=50).getpixel((9, 9)) == open_image(path).getpixel((9, 9))


@pytest.mark.skipif(not hasattr(os, 'geteuid') or os.geteuid() == 0, reason='root may read everything')
def test_no_permission(tmp_path):
    Image.new('L', (2, 2)).save(path := tmp_path / 'x.png')
    path.chmod(0)
    with pytest.raises(ImageError, match='x.png is out of reach: Permission denied'): open_image(path)


def test_no_permission_even_for_root(tmp_path, monkeypatch):
    Image.new('L', (2, 2)).save(path := tmp_path / 'x.png')
    def refuse(*args, **kwargs): raise PermissionError(13, 'Permission denied', str(path))
    monkeypatch.setattr(Image, 'open', refuse)
    with pytest.raises(ImageError, match='x.png is out of reach: Permission denied'): open_image(path)
    report = check_images([path])
    assert [*report.kinds] == ['is out of reach'] and not report.good


def test_cut_anywhere_is_never_half_a_picture(tmp_path):
    noise = np.random.default_rng(1).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    for suffix in 'jpg', 'png', 'gif', 'tif', 'webp', 'bmp':
        Image.fromarray(noise).save(path := tmp_path / f'x.{suffix}')
        whole = path.read_bytes()
        for share in 0, .01, .1, .5, .9:
            path.write_bytes(whole[:int(len(whole) * share)])
            with pytest.raises(ImageError, match=f'x.{suffix} is '): open_image(path)
            assert [*check_images([path]).errors] == [path]


def test_report_goes_on(tmp_path):
    for i in range(5): Image.new('RGB', (4, 4)).save(tmp_path / f'{i}.png')
    (tmp_path / '2.png').write_bytes(b'')
    (tmp_path / '3.png').unlink()
    (tmp_path / '3.png').mkdir()
    Image.new('RGB', (4, 4)).save(tmp_path / '4.png', 'JPEG')
    report = check_images(tmp_path / f'{i}.png' for i in (0, 1, 2, 3, 4, 9))
    assert [p.stem for p in report.good] == ['0', '1', '4']
    assert [p.stem for p in report.errors] == ['2', '3', '9']
    assert {k: [p.stem for p in v] for k, v in report.kinds.items()} == {
        'is empty': ['2'], 'is out of reach': ['3', '9'], 'named as PNG, is JPEG': ['4']}
    assert '3 of 6 files' in repr(report) and 'sides of 4 to 4' in report._repr_html_()
    assert '0 of 0' in repr(check_images([]))


@pytest.mark.parametrize('mode', ['I', 'F', 'LAB'])
def test_good_is_what_opens_in_the_mode_asked_for(tmp_path, mode):
    Image.new(mode, (4, 4)).save(path := tmp_path / 'x.tif')
    report = check_images([path])
    assert not report.good and [*report.kinds] == [f'cannot become RGB from {mode}']
    with pytest.raises(ImageError, match=f'x.tif cannot become RGB from {mode}: use mode=None'): open_image(path)
    assert check_images([path], mode=None).good == [path] and open_image(path, None).mode == mode


def test_16_bits_a_colour_and_no_ending(tmp_path):
    Image.new('RGB', (4, 4)).save(tmp_path / 'x.png')
    (tmp_path / 'x.png').rename(bare := tmp_path / 'x')
    assert not check_images([bare]).kinds
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(path := tmp_path / 'grey.png')
    assert [*check_images([path]).kinds] == ['mode I;16']


def test_large_is_found(tmp_path, monkeypatch):
    Image.new('1', (90, 90)).save(path := tmp_path / 'x.png')
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 5000)
    kinds = check_images([path]).kinds
    assert any('exceeds limit' in kind for kind in kinds) and check_images([path]).good
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 4000)
    with pytest.raises(ImageError, match='x.png is very large: .*MAX_IMAGE_PIXELS'): open_image(path)
    assert [*check_images([path]).kinds] == ['is very large']


def test_frames_are_said_once(tmp_path):
    frames = [Image.new('RGB', (4, 4), c) for c in ('red', 'green')]
    for i in range(3): frames[0].save(tmp_path / f'{i}.gif', save_all=True, append_images=frames[1:])
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter('default')
        images = [open_image(tmp_path / f'{i}.gif') for i in range(3)]
    assert len(heard) == 1 and {i.getpixel((0, 0)) for i in images} == {(255, 0, 0)}


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from(['1', 'L', 'P', 'RGB', 'RGBA', 'I;16']))
def test_sizes_and_types(height, width, mode):
    x = to_tensor(ResizeFixed((height, width))(Image.new(mode, (5, 7))))
    assert x.shape == (len(Image.new(mode, (1, 1)).getbands()), height, width)
    assert x.dtype == {'1': torch.bool, 'I;16': torch.uint16}.get(mode, torch.uint8)
    x[0, 0, 0] = 1 # Writable
    assert 0 <= to_float(x).min() and to_float(x).max() <= 1


@pytest.mark.parametrize('size', [0, (4, 0), (1, 2, 3), -1, [5], np.int64(0), torch.tensor([4, -1])])
def test_sizes_that_are_none(size):
    with pytest.raises(ValueError, match='number of pixels, or .height, width.'): ResizeFixed(size)


@pytest.mark.parametrize('size', [True, 8., (8., 8), None, '8', (), np.float32(8), torch.tensor(8.), torch.tensor(True),
                                  1e30, float('nan'), ('8', '8'), (True, False)], ids=repr)
def test_sizes_that_are_no_whole_numbers(size):
    with pytest.raises(TypeError, match='size is in whole pixels, got '): ResizeFixed(size)


@pytest.mark.parametrize('size', [8, np.int64(8), np.uint8(8), np.array(8), torch.tensor(8), (8, 8), [8, 8],
                                  np.array([8, 8]), torch.tensor([8, 8]), torch.Size([8, 8]),
                                  (np.int64(8), torch.tensor(8))], ids=repr)
def test_sizes_that_are_whole_numbers_of_any_kind(size):
    resize = ResizeFixed(size)
    assert resize.size == (8, 8) and {*map(type, resize.size)} == {int}
    assert resize(Image.new('L', (5, 7))).size == (8, 8)


def test_the_first_side_is_the_height():
    assert ResizeFixed(np.array([3, 5]))(Image.new('L', (9, 9))).size == (5, 3)


@pytest.mark.parametrize('bad', ['bilinear', 9, None])
def test_a_filter_that_there_is_not_is_refused_at_once(bad):
    with pytest.raises(ValueError, match='not a valid Resampling'): ResizeFixed(8, bad)


def test_what_is_a_tensor_already(tmp_path):
    Image.new('RGB', (8, 10)).save(path := tmp_path / 'x.png')
    def step(image): return torch.zeros(3, 10, 8)
    with pytest.raises(TypeError, match='but a Tensor; leave out the step'): ImageList([path], [step])[0]
    with pytest.raises(TypeError, match='but a ndarray'): to_tensor(np.zeros((3, 4)))


def test_a_crop_counts_in_pixels_of_the_file(tmp_path):
    big = Image.new('RGB', (2000, 1500))
    big.paste('red', (0, 0, 100, 100))
    big.save(path := tmp_path / 'x.jpg')
    def crop(image): return image.crop((0, 0, 100, 100))
    (x,), (whole,) = ImageList([path], [crop, ResizeFixed(32)])[0], ImageList([path], [ResizeFixed(32)])[0]
    assert x[0].float().mean() > 240 and x.shape == whole.shape == (3, 32, 32)


@pytest.fixture
def folder(tmp_path):
    "Ten pictures whose grey is 20 times their number, the fourth one cut off"
    for i in range(10): Image.new('RGB', (12, 8), (20 * i,) * 3).save(tmp_path / f'{i}.png')
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(tmp_path / '4.png')
    (tmp_path / '4.png').write_bytes((tmp_path / '4.png').read_bytes()[:2000])
    return [tmp_path / f'{i}.png' for i in range(10)]


@pytest.mark.parametrize('loader', [DataLoader, torch.utils.data.DataLoader])
@pytest.mark.parametrize('workers', [0, 2])
def test_skip_in_any_loader(folder, loader, workers):
    files = ImageList(folder, [ResizeFixed(4)], range(10), on_error='skip')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        batches = [*loader(files, 3, num_workers=workers)]
    assert [y.tolist() for x, y in batches] == [[0, 1, 2], [3, 5], [6, 7, 8], [9]]
    for x, y in batches:
        assert x.dtype == torch.uint8 and x.shape[1:] == (3, 4, 4)
        assert torch.equal(x[:, 0, 0, 0], 20 * y)


@pytest.mark.parametrize('workers', [0, 2])
def test_raise_names_the_file(folder, workers):
    with pytest.raises(ImageError, match='4.png is damaged'):
        for _ in DataLoader(ImageList(folder, [ResizeFixed(4)]), 3, num_workers=workers): pass


def test_no_batch_is_left(folder):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        with pytest.raises(ImageError, match='none of 1 pictures can be read, such as .*4.png'):
            ImageList(folder, on_error='skip').__getitems__([4])


def test_without_targets_and_as_an_item_list(folder):
    files = ImageList(folder[:4], [ResizeFixed((4, 6))])
    (x,), = DataLoader(files, 4)
    assert x.shape == (4, 3, 4, 6) and x.is_contiguous(memory_format=torch.channels_last)
    again, = DataLoader(ItemList(files.items, files.steps), 4)
    assert torch.equal(again[0], x) and len(files[0]) == 1


def test_masks_are_made_late_and_keep_their_classes(folder, tmp_path):
    for i in range(3):
        mask = Image.fromarray(np.repeat(np.uint8([[0, 9, 200]]), 6, 0))
        mask.save(tmp_path / f'mask{i}.png')
    nearest = ResizeFixed(9, Image.Resampling.NEAREST)
    def mask(path): return to_tensor(nearest(open_image(path, None)))[0].long()
    files = ImageList(folder[:3], [ResizeFixed(9)], [tmp_path / f'mask{i}.png' for i in range(3)], mask)
    (x, y), = DataLoader(files, 3)
    assert x.shape == (3, 3, 9, 9) and y.shape == (3, 9, 9) and y.unique().tolist() == [0, 9, 200]


def test_sizes_that_differ_are_named(folder, tmp_path):
    Image.new('RGB', (5, 5)).save(tmp_path / 'other.png')
    from dlfound.datablock import collate_items
    files = ImageList([*folder[:3], tmp_path / 'other.png'], [], range(4))
    with pytest.raises(ValueError, match='shapes differ') as e: [*DataLoader(files, 4, collate_fn=collate_items)]
    assert any('other.png' in note for note in e.value.__notes__)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=5), st.sampled_from([1, 3]), st.integers(0, 9))
def test_statistics_are_those_of_all_pixels(sizes, channels, seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 256, (sum(sizes), channels, 3, 4), generator=g, dtype=torch.uint8)
    mean, std = pixel_statistics((b, 'label') for b in x.split(sizes))
    exact = x.double() / 255
    assert torch.allclose(mean.double(), exact.mean((0, 2, 3)), atol=1e-6)
    assert torch.allclose(std.double(), exact.std((0, 2, 3)), atol=1e-6)
    out = Normalize(mean, std)(x)
    assert out.mean((0, 2, 3)).abs().max() < 1e-5 and (out.std((0, 2, 3)) - 1).abs().max() < 1e-5


def test_normalize_is_saved():
    layer, other = Normalize([.1, .2, .3], [1, 2, 3]), Normalize([0] * 3, [1] * 3)
    other.load_state_dict(layer.state_dict())
    x = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    assert torch.equal(other(x), layer(x)) and not [*layer.parameters()]


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_normalize_in_a_network_of_another_type(dtype):
    net = torch.nn.Sequential(Normalize([.1, .2, .3], [1, 2, 3]), torch.nn.Flatten(), torch.nn.Linear(12, 2)).to(dtype)
    assert net(torch.zeros(2, 3, 2, 2, dtype=torch.uint8)).dtype == dtype


def test_normalize_takes_its_channels_only():
    x = torch.rand(2, 1, 4, 4)
    with pytest.raises(ValueError, match='of 3 channels cannot normalise .2, 1, 4, 4.'): Normalize([0] * 3, [1] * 3)(x)
    assert torch.equal(Normalize([0], [1])(x.expand(2, 3, 4, 4)), x.expand(2, 3, 4, 4))
    assert torch.equal(Normalize([0], [1])(x[0]), x[0])


@pytest.mark.parametrize('batch', [
    [torch.zeros(2, 3, 4, 4), torch.tensor([1, 0])], (torch.zeros(2, 3, 4, 4, requires_grad=True), [1, 0]),
    [torch.zeros(2, 3, 4, 4, dtype=torch.uint8), (1, 0)]])
def test_batches_of_other_loaders(batch):
    matplotlib.use('agg')
    assert [ax.get_title() for ax in show_batch(batch, 'ab', columns=2).axes] == ['b', 'a']


def test_batches_without_labels_or_with_masks(folder):
    matplotlib.use('agg')
    batch, = DataLoader(ImageList(folder[:2]), 2)
    assert [ax.get_title() for ax in show_batch(batch, 'ab', columns=2).axes] == ['a', 'b']
    masks = torch.zeros(2, 3, 4, 4), torch.zeros(2, 4, 4)
    assert [ax.get_title() for ax in show_batch(masks, 'ab', columns=2).axes] == ['', '']
    with pytest.raises(ValueError, match='before they are normalised'): show_batch(torch.full((1, 3, 4, 4), torch.nan))


@pytest.mark.parametrize('batch, names, titles', [
    (torch.zeros(3, 1, 4, 4), (), ['', '', '']), (torch.zeros(3, 3, 4, 4), 'abc', ['a', 'b', 'c']),
    ((torch.zeros(3, 3, 4, 4, dtype=torch.uint8), torch.tensor([2, 0, 1])), 'abc', ['c', 'a', 'b']),
    ((torch.zeros(3, 1, 4, 4), torch.tensor([2, 0, 1])), (), ['2', '0', '1'])])
def test_titles(batch, names, titles):
    matplotlib.use('agg')
    figure = show_batch(batch, names, columns=2)
    assert [ax.get_title() for ax in figure.axes] == titles + ['']
    assert len(show_batch(batch, names, 2, columns=2).axes) == 2
