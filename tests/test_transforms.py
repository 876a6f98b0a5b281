"Transforms of PIL images: what the lesson has no room for: every mode, odd sizes, workers, agreement with Pillow."
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings, strategies as st
from PIL import Image
from torchvision.transforms import functional as TF

from dlfound.images import ImageList
from dlfound.loader import DataLoader, seeded
from dlfound.transforms import (CenterCrop, CenterResizedCrop, ColorJitter, Dihedral, Flip, RandomCrop,
                                RandomResizedCrop, RandomWarp, adjust, dihedral, kernels, perspective_matrix, psnr,
                                random_box, resample_matrix, rotation_matrix, warp)

rng = np.random.default_rng(0)
scene = Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8))
NEAREST, BILINEAR, BICUBIC = Image.Resampling.NEAREST, Image.Resampling.BILINEAR, Image.Resampling.BICUBIC
MODES = '1', 'L', 'LA', 'P', 'RGB', 'RGBA', 'CMYK', 'YCbCr', 'I;16', 'I', 'F'
TRANSFORMS = [Flip(1), Dihedral(), RandomCrop((8, 12)), CenterCrop(9), RandomResizedCrop((8, 12)),
              CenterResizedCrop((8, 12)), RandomWarp(20, .3, .2)]


def in_mode(mode):
    if mode == 'I;16': return Image.fromarray(np.asarray(scene.convert('L')).astype(np.uint16) * 257)
    return scene.convert('L').convert(mode) if mode in ('I', 'F', 'LA') else scene.convert(mode)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.sampled_from([k for k in kernels if k != 'box']))
def test_resample_matrix_is_pillows(n_in, n_out, kernel):
    spikes = Image.fromarray(np.eye(n_in, dtype=np.float32))
    theirs = np.asarray(spikes.resize((n_out, n_in), Image.Resampling[kernel.upper()])).T
    ours = resample_matrix(n_in, n_out, kernel)
    assert ours.shape == (n_out, n_in) and ours.dtype == torch.float64
    assert np.abs(ours.numpy() - theirs).max() < 1e-6


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([*kernels]), st.booleans())
def test_resampling_keeps_what_is_constant(n_in, n_out, kernel, antialias):
    m = resample_matrix(n_in, n_out, kernel, antialias)
    assert torch.allclose(m.sum(1), torch.ones(n_out, dtype=torch.float64))
    assert torch.allclose(m, m.flip(0, 1)) or kernel == 'box'


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 3000), st.integers(1, 3000), st.floats(.001, 1), st.floats(.001, 1), st.floats(.1, 8),
       st.floats(1, 5), st.integers(0, 2**31))
def test_random_box_is_in_the_picture_and_as_asked(width, height, a, b, low, by, seed):
    scale, ratio = (min(a, b), max(a, b)), (low, low * by)
    with seeded(seed): l, t, r, bottom = random_box((width, height), scale, ratio)
    assert 0 <= l < r <= width and 0 <= t < bottom <= height
    share, q = (r - l) * (bottom - t) / width / height, (r - l) / (bottom - t)
    assert ratio[0] * (1 - 1e-6) <= q <= ratio[1] * (1 + 1e-6)
    whole = min(1, ratio[1] / (width / height), width / height / ratio[0]) # The largest share that has such a shape
    assert min(scale[0], whole) * (1 - 1e-6) <= share <= scale[1] * (1 + 1e-6)
    Image.new('L', (width, height)).resize((2, 2), BILINEAR, (l, t, r, bottom)) # Pillow takes it


def test_shapes_are_even_in_the_logarithm():
    with seeded(0): boxes = [random_box((500, 500), (.05, .5)) for _ in range(4000)]
    logs = torch.tensor([math.log((r - l) / (b - t)) for l, t, r, b in boxes])
    assert abs(logs.mean().item()) < .01
    assert abs((logs > 0).float().mean().item() - .5) < .03
    quarters = torch.histc(logs, 4, -math.log(4 / 3), math.log(4 / 3))
    assert quarters.min() > 850


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('transform', TRANSFORMS, ids=lambda t: type(t).__name__)
def test_every_mode_stays_what_it_is(transform, mode):
    image = in_mode(mode)
    with seeded(1): out = transform(image)
    assert out.mode == mode
    if mode == 'P': assert out.getpalette() == image.getpalette()
    with seeded(1): assert transform(image).tobytes() == out.tobytes()
    with seeded(1): assert transform(scene).size == out.size # The same draw, whatever the mode


@pytest.mark.parametrize('transform', [Flip(0), Dihedral(0), RandomWarp(30, .5, .3, p=0),
                                       ColorJitter(1, 1, 1, .5, p=0)], ids=lambda t: type(t).__name__)
def test_p_of_0_leaves_the_picture_itself(transform):
    assert all(transform(scene) is scene for _ in range(50))


@pytest.mark.parametrize('mode', ['L', 'I;16', 'P'])
def test_masks_get_no_new_classes(mode):
    classes = np.array([0, 3, 200 if mode != 'I;16' else 40_000])
    array = classes[rng.integers(0, 3, (20, 30))].astype(np.uint16 if mode == 'I;16' else np.uint8)
    mask = Image.fromarray(array)
    if mode == 'P':
        mask = Image.fromarray(array, 'L')
        mask.putpalette([i % 256 for i in range(768)])
    for transform in RandomResizedCrop(11, resample=NEAREST), RandomWarp(40, .5, .3, resample=NEAREST, fill=77):
        for _ in range(10):
            found = set(np.unique(np.asarray(transform(mask))).tolist())
            assert found <= {*classes.tolist(), 77}


@pytest.mark.parametrize('mode', ['LA', 'RGBA'])
def test_hidden_colours_do_not_come_out(mode):
    "Under what is transparent lies white; around it black: no grey may bleed in, only less opacity"
    array = np.zeros((16, 16, len(mode)), np.uint8)
    array[..., -1] = 255
    array[:, :8, :-1], array[:, :8, -1] = 255, 0
    for out in RandomResizedCrop(7, (1, 1))(Image.fromarray(array)), warp(Image.fromarray(array), rotation_matrix(
            20, (16, 16))):
        seen = np.asarray(out)
        assert seen[seen[..., -1] > 8][:, 0].max() <= 32


def test_sixteen_bits_are_warped_as_floats_are():
    deep = in_mode('I;16')
    as_floats = Image.fromarray(np.asarray(deep, np.float32))
    for resample in NEAREST, BILINEAR, BICUBIC:
        m = rotation_matrix(17, deep.size)
        ours, theirs = (np.asarray(warp(i, m, resample), float) for i in (deep, as_floats))
        assert np.abs(ours - theirs.clip(0, 65535)).max() <= .5
    big = Image.frombytes('I;16B', (2, 2), b'\x01\x02\xff\xfe\0\1\2\3')
    assert np.asarray(warp(big, torch.eye(3))).tolist() == [[0x102, 0xfffe], [1, 0x203]]


@pytest.mark.parametrize('size', [(20, 20), (21, 21)])
@pytest.mark.parametrize('resample', [NEAREST, BILINEAR, BICUBIC])
def test_quarter_turns_are_exact(size, resample):
    image = scene.resize(size)
    turns = {0: None, 90: Image.Transpose.ROTATE_90, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_270,
             -90: Image.Transpose.ROTATE_270, 360: None}
    for degrees, way in turns.items():
        right = image if way is None else image.transpose(way)
        assert warp(image, rotation_matrix(degrees, size), resample).tobytes() == right.tobytes()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(0, .3), st.floats(0, .3)), min_size=4, max_size=4))
def test_perspective_takes_corners_to_corners(inwards):
    result = [(0, 0), (40, 0), (40, 30), (0, 30)]
    source = [(abs(x - 40 * a), abs(y - 30 * b)) for (x, y), (a, b) in zip(result, inwards)]
    m = perspective_matrix(result, source)
    moved = m @ torch.tensor([[x, y, 1.] for x, y in result], dtype=torch.float64).T
    assert torch.allclose((moved[:2] / moved[2]).T, torch.tensor(source, dtype=torch.float64), atol=1e-6)
    back = perspective_matrix(source, result) @ m
    assert torch.allclose(back / back[2, 2], torch.eye(3, dtype=torch.float64), atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.floats(0, .99), st.floats(0, .333), st.integers(0, 2**31))
def test_a_bend_stays_within_the_picture(tilt, perspective, seed):
    corners = torch.tensor([[0, 0, 1], [40, 0, 1], [40, 30, 1], [0, 30, 1.]], dtype=torch.float64).T
    with seeded(seed): x, y, z = RandomWarp(0, tilt, perspective).matrix((40, 30)) @ corners
    assert z.min() > 0
    assert -1e-6 < (x / z).min() and (x / z).max() < 40 + 1e-6
    assert -1e-6 < (y / z).min() and (y / z).max() < 30 + 1e-6


def test_turns_go_as_far_as_was_said_to_both_sides():
    with seeded(0):
        angles = torch.stack([RandomWarp(30).matrix((40, 30))[1, 0].asin().rad2deg() for _ in range(400)])
    assert -30 <= angles.min() < -29 and 29 < angles.max() <= 30 and abs(angles.mean()) < 3


def test_a_tilt_changes_one_side_only():
    corners = torch.tensor([[0, 0, 1], [40, 0, 1], [40, 30, 1], [0, 30, 1.]], dtype=torch.float64).T
    seen = set()
    for _ in range(60):
        x, y, z = RandomWarp(tilt=.5).matrix((40, 30)) @ corners
        x, y = x / z, y / z
        moved = ((x - corners[0]).abs() + (y - corners[1]).abs() > 1e-6).nonzero().flatten().tolist()
        assert len(moved) == 2
        seen.add(tuple(moved))
    assert seen == {(0, 1), (1, 2), (2, 3), (0, 3)}


def test_the_eight_ways_are_a_group():
    every = [dihedral(scene.crop((0, 0, 9, 9)), k) for k in range(8)]
    content = {x.tobytes() for x in every}
    assert len(content) == 8
    assert all({dihedral(x, k).tobytes() for k in range(8)} == content for x in every)


def test_no_random_picture_in_crops_of_the_centre():
    state = torch.get_rng_state()
    out = CenterCrop((10, 20))(scene), CenterResizedCrop(20)(scene)
    assert torch.equal(torch.get_rng_state(), state)
    assert out[0].tobytes() == scene.crop((10, 10, 30, 20)).tobytes()
    assert out[1].tobytes() == scene.resize((20, 20), BILINEAR, (6.875, 1.875, 33.125, 28.125)).tobytes()


def test_a_crop_may_be_the_whole_picture():
    assert RandomCrop((30, 40))(scene).tobytes() == CenterCrop((30, 40))(scene).tobytes() == scene.tobytes()
    for size in 31, (30, 41):
        for kind in RandomCrop, CenterCrop:
            with pytest.raises(ValueError, match='RandomResizedCrop'): kind(size)(scene)


@settings(max_examples=20, deadline=None)
@given(st.floats(0, 3), st.floats(0, 3), st.floats(0, 3))
def test_colours_are_torchvisions(brightness, contrast, saturation):
    pairs = [(adjust(scene, brightness), TF.adjust_brightness(scene, brightness)),
             (adjust(scene, contrast=contrast), TF.adjust_contrast(scene, contrast)),
             (adjust(scene, saturation=saturation), TF.adjust_saturation(scene, saturation))]
    for ours, theirs in pairs: assert np.abs(np.asarray(ours, int) - np.asarray(theirs, int)).max() <= 3


@pytest.mark.parametrize('mode', ['L', 'LA'])
def test_grey_has_no_hue(mode):
    image = in_mode(mode)
    assert adjust(image, hue=.3, saturation=3).tobytes() == image.tobytes()
    assert ColorJitter(0, 0, 1, .5)(image).tobytes() == image.tobytes()
    assert adjust(image, 1.5).mode == mode


@pytest.mark.parametrize('mode', ['1', 'P', 'CMYK', 'I;16', 'I', 'F'])
def test_colours_of_other_modes_are_refused(mode):
    with pytest.raises(ValueError, match=f'{mode} cannot be adjusted'): adjust(in_mode(mode), 1.5)


def test_a_whole_turn_of_the_hue_is_none():
    assert adjust(scene, hue=1).tobytes() == scene.tobytes()
    back = adjust(adjust(scene, hue=.3), hue=-.3)
    assert np.abs(np.asarray(back, int) - np.asarray(scene, int)).mean() < 6


def test_psnr():
    assert psnr(scene, scene) == math.inf
    other = adjust(scene, .8)
    assert psnr(scene, other) == psnr(other, scene)
    assert psnr(torch.zeros(3), torch.ones(3), peak=1) == 0


def test_bad_arguments_are_named():
    for bad in lambda: RandomResizedCrop(8, (0, 1)), lambda: RandomResizedCrop(8, ratio=(2, 1)), \
            lambda: RandomResizedCrop(0), lambda: RandomWarp(tilt=-.1), lambda: ColorJitter(-1), \
            lambda: Dihedral(1.5), lambda: perspective_matrix([(0, 0)] * 4, [(0, 0), (1, 0), (1, 1), (0, 1)]):
        with pytest.raises(ValueError): bad()


EVERY = {'flip': Flip, 'dihedral': Dihedral, 'crop': lambda p: RandomCrop(4), 'middle': lambda p: CenterCrop(4),
         'resized': lambda p: RandomResizedCrop(4), 'resized middle': lambda p: CenterResizedCrop(4),
         'warp': lambda p: RandomWarp(9, .1, .1, p=p), 'colours': lambda p: ColorJitter(.2, .2, .2, .1, p=p)}


@pytest.mark.parametrize('p', [0, 1])
@pytest.mark.parametrize('kind', EVERY)
def test_what_is_no_picture_is_refused_whatever_is_drawn(kind, p):
    transform = EVERY[kind](p)
    for bad in torch.zeros(3, 8, 8), np.zeros((8, 8, 3)), 'a.png', Path('a.png'), None, Image.new('RGB', (0, 5)):
        for _ in range(4):
            with pytest.raises(TypeError, match='a PIL picture with pixels, no .*; first open_image'): transform(bad)


MADE = {'p': [lambda p: Flip(p), lambda p: Dihedral(p), lambda p: RandomWarp(9, p=p), lambda p: ColorJitter(.1, p=p)],
        'share': [lambda x: CenterResizedCrop(8, x)], 'rotate': [lambda x: RandomWarp(x)],
        'tilt': [lambda x: RandomWarp(0, x)], 'perspective': [lambda x: RandomWarp(0, 0, x)],
        'brightness': [lambda x: ColorJitter(x), lambda x: adjust(scene, x)],
        'contrast': [lambda x: ColorJitter(0, x), lambda x: adjust(scene, 1, x)],
        'saturation': [lambda x: ColorJitter(0, 0, x), lambda x: adjust(scene, saturation=x)],
        'hue': [lambda x: ColorJitter(hue=x), lambda x: adjust(scene, hue=x)]}


@pytest.mark.parametrize('bad', [math.nan, math.inf, -math.inf, '0.5', None, (.1, .2), [], {}, torch.ones(2), -1e9,
                                 1e9], ids=repr)
@pytest.mark.parametrize('name', MADE)
def test_a_parameter_that_is_no_such_number_is_named_where_it_is_given(name, bad):
    for make in MADE[name]:
        with pytest.raises(ValueError, match=f'^{name} is 1 number from .* to .*; got '): make(bad)


@pytest.mark.parametrize('bad', [.5, '0.5', (.5,), (.1, .2, .3), (1, .5), (math.nan, 1), (.1, math.nan), (0, 1),
                                 (.1, math.inf), ('.1', '1'), None, (-1, 1)], ids=repr)
def test_two_numbers_in_order(bad):
    for name in 'scale', 'ratio':
        with pytest.raises(ValueError, match=f'^{name} is 2 numbers, in order, from'):
            RandomResizedCrop(8, **{name: bad})
    with pytest.raises(ValueError, match='^scale'): RandomResizedCrop(8, (.1, 1.1))


def test_numbers_of_any_kind_are_taken():
    low = torch.tensor(.5, dtype=torch.bfloat16)
    for half in .5, np.float32(.5), np.array(.5), torch.tensor(.5), low, np.array([.5]):
        assert Flip(half).p == RandomWarp(half, p=half).p == ColorJitter(half).spread[0] == .5
        assert type(CenterResizedCrop(8, half).share) is float
    assert Flip(True).p == 1 and ColorJitter(1, p=0).p == 0
    for two in (.5, 1), [.5, 1], np.array([.5, 1]), torch.tensor([.5, 1]):
        assert RandomResizedCrop(8, two, two).scale == [.5, 1]
    assert adjust(scene, hue=torch.tensor(.25)).tobytes() == adjust(scene, hue=.25).tobytes()
    bent = RandomWarp(perspective=torch.tensor(.1), tilt=np.float32(.1))(scene)
    assert bent.size == scene.size


@pytest.mark.parametrize('bad', ['bilinear', 9, None, -1])
def test_a_filter_that_there_is_not_is_refused_at_once(bad):
    for make in RandomResizedCrop, CenterResizedCrop:
        with pytest.raises(ValueError, match='not a valid Resampling'): make(8, resample=bad)
    with pytest.raises(ValueError, match='not a valid Resampling'): RandomWarp(9, resample=bad, p=0)


@pytest.mark.parametrize('known', ['BOX', 'HAMMING', 'LANCZOS'])
def test_a_warp_has_three_filters(known):
    resample = Image.Resampling[known]
    for fits in RandomResizedCrop(8, resample=resample), CenterResizedCrop(8, .9, resample):
        assert fits(scene).size == (8, 8)
    for make in lambda: RandomWarp(9, resample=resample, p=0), lambda: warp(scene, torch.eye(3), resample):
        with pytest.raises(ValueError, match='Use .*BILINEAR'): make()


@pytest.mark.parametrize('mode,fill', [*((mode, (1, 2, 3)) for mode in ('L', 'LA', '1', 'P', 'F', 'I', 'I;16')),
                                       ('RGB', (1, 2)), ('RGB', math.nan), ('I;16', math.nan), ('L', .5),
                                       ('RGB', 'nocolour')])
def test_a_fill_that_is_no_colour_of_the_mode(mode, fill):
    for p in 0, 1:
        with pytest.raises(ValueError, match=f'mode {mode} is fill=.* open all pictures in one mode'):
            RandomWarp(9, fill=fill, p=p)(in_mode(mode))
    with pytest.raises(ValueError, match='open all pictures in one mode'): warp(in_mode(mode), torch.eye(3), fill=fill)


@pytest.mark.parametrize('matrix', [torch.zeros(3, 3), torch.full((3, 3), math.nan), rotation_matrix(math.nan, (4, 4)),
                                    torch.eye(3) * math.inf, torch.eye(2), torch.zeros(2, 3), torch.eye(4)])
def test_a_matrix_that_leads_nowhere(matrix):
    with pytest.raises(ValueError, match=r'a matrix is \(3, 3\), of finite numbers'): warp(scene, matrix)


def test_points_that_make_no_perspective():
    square = [(0, 0), (1, 0), (1, 1), (0, 1)]
    for result, source in (square[:3], square), (square, square[:3]), (square * 2, square * 2), (square, square * 2), \
            ([(0, 0), (1, 1), (2, 2), (0, 5)], square):
        with pytest.raises(ValueError, match='four points each, no three of them on a line'):
            perspective_matrix(result, source)


def test_a_crop_that_does_not_fit_says_what_enlarges():
    for kind in RandomCrop, CenterCrop:
        with pytest.raises(ValueError, match='no 31 × 9 pixels in 30 × 40; RandomResizedCrop also enlarges'):
            kind((31, 9))(scene)


def test_sixteen_bits_are_not_said_to_become_rgb_by_convert():
    with pytest.raises(ValueError, match="open_image.path, 'RGB'"): adjust(in_mode('I;16'), 1.5)
    with pytest.raises(ValueError, match='cannot be adjusted'): ColorJitter(.5, p=0)(in_mode('I;16'))


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 40), st.integers(1, 40), st.floats(.01, 1))
def test_the_middle_is_the_largest_of_its_shape(width, height, wide, high, share):
    image = Image.frombytes('L', (width, height), bytes(i * 7 % 251 for i in range(width * height)))
    by = share * min(width / wide, height / high) / 2
    box = [max(width / 2 - by * wide, 0), max(height / 2 - by * high, 0),
           min(width / 2 + by * wide, width), min(height / 2 + by * high, height)]
    ours = np.asarray(CenterResizedCrop((high, wide), share)(image), int)
    assert np.abs(ours - np.asarray(image.resize((wide, high), BILINEAR, box), int)).max() <= 1


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float64])
def test_any_default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        for transform in [*TRANSFORMS, ColorJitter(.2, .2, .2, .1)]: assert transform(scene).mode == 'RGB'
        assert psnr(torch.zeros(3), torch.ones(3), peak=1) == 0
    finally: torch.set_default_dtype(before)


def test_psnr_of_other_tensors():
    for dtype in torch.bfloat16, torch.float16, torch.uint8, torch.int64:
        assert psnr(torch.zeros(3, dtype=dtype), torch.ones(3, dtype=dtype), peak=1) == 0
    assert psnr(torch.zeros(3, requires_grad=True), torch.ones(3), peak=1) == 0
    assert psnr(np.zeros(3), torch.ones(3), peak=1) == 0
    assert psnr(in_mode('I;16'), in_mode('I;16')) == psnr(in_mode('1'), in_mode('1')) == math.inf


def test_a_fixed_seed_replays_from_any_number_of_workers(tmp_path):
    paths = []
    for i in range(6):
        scene.rotate(i).save(path := tmp_path / f'{i}.png')
        paths.append(path)
    steps = [RandomResizedCrop(16), Flip(), Dihedral(.5), RandomWarp(10, .2, .1, p=.8), ColorJitter(.3, .3, .3, .1)]
    assert [type(t) for t in pickle.loads(pickle.dumps(steps))] == [type(t) for t in steps]
    same = ImageList([paths[0]] * 12, steps)

    def epoch(workers, seed):
        torch.manual_seed(seed)
        return torch.cat([x for x, in DataLoader(same, 4, num_workers=workers, seeded=True)])
    none, two = epoch(0, 3), epoch(2, 3)
    assert torch.equal(none, two)
    assert len({x.numpy().tobytes() for x in none}) == 12 # Each picture has a draw of its own
    assert not torch.equal(none, epoch(0, 4))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 50), st.integers(1, 50), st.integers(0, 2**31))
def test_pictures_of_any_size(width, height, seed):
    assume(width * height)
    image = Image.new('RGB', (width, height), (9, 90, 200))
    with seeded(seed):
        assert RandomResizedCrop((5, 7))(image).getcolors() == [(35, (9, 90, 200))]
        assert CenterResizedCrop((5, 7))(image).getcolors() == [(35, (9, 90, 200))]
        assert RandomWarp(0, .5, .3)(image).size == (width, height)
        assert {*Dihedral()(image).size} == {width, height}
