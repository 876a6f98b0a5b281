"What the page about colours cannot show: any order, shape and type"

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Generator

from dlfound.augment import augment_batch
from dlfound.colour import Colour, RandomErasing, brightness, contrast, hue, saturation

kinds = brightness, contrast, saturation, hue
grey = torch.tensor([.299, .587, .114])


def seeded(seed=0): return Generator().manual_seed(seed)


def drawn(kind, n=4, size=(8, 8), seed=0, **kwargs): return kind(p=1, **kwargs).draw(n, size, seeded(seed)).colour


@settings(deadline=None, max_examples=60)
@given(st.permutations(kinds), st.integers(1, 4), st.integers(1, 70), st.integers(1, 20), st.integers(0, 99))
def test_a_product_is_one_change_after_another(order, c, h, w, seed):
    x = torch.rand(4, c, h, w, generator=seeded(seed), dtype=torch.float64)
    colours = [drawn(k, seed=seed + i) for i, k in enumerate(order)]
    one, in_turn, product = x.clone(), x.clone(), colours[0]
    for colour in colours[1:]: product = colour @ product
    product(one)
    for colour in colours: colour(in_turn)
    torch.testing.assert_close(one, in_turn)
    assert c % 2 or torch.equal(one[:, -1], x[:, -1]) # Opacity


@pytest.mark.parametrize('top', [1., 255.])
def test_what_each_change_keeps(top):
    x = top * torch.rand(4, 3, 8, 8, dtype=torch.float64)
    def changed(kind, **kwargs):
        y = x.clone()
        drawn(kind, **kwargs)(y, top)
        return y
    def luma(i): return torch.einsum('c,nchw->nhw', grey.double(), i)
    up = changed(brightness) - x
    torch.testing.assert_close(up, up[:, :1, :1, :1].expand_as(up))
    assert (up.abs() <= .2 * top).all() and len(up[:, 0, 0, 0].unique()) == 4
    torch.testing.assert_close(luma(changed(contrast)).mean((1, 2)), luma(x).mean((1, 2)))
    torch.testing.assert_close(luma(changed(saturation)), luma(x))
    torch.testing.assert_close(changed(hue).mean(1), x.mean(1))


def test_a_hue_is_a_turn_around_grey():
    mix = drawn(hue, 50, degrees=180).matrix[:, :3, :3]
    torch.testing.assert_close(mix @ mix.mT, torch.eye(3).double().expand(50, 3, 3))
    torch.testing.assert_close(torch.linalg.det(mix), torch.ones(50).double())
    torch.testing.assert_close(mix.sum(2), torch.ones(50, 3).double())
    cosines = (mix.diagonal(dim1=1, dim2=2).sum(1) - 1) / 2 # The trace of a turn is 1 + 2 cos
    assert cosines.min() < -.9 and cosines.max() > .9
    assert (drawn(hue, 50, degrees=20).matrix[:, 0, 0] > .95).all()


def test_grey_stays_grey_and_full_saturation_can_be_lost():
    x = torch.rand(4, 1, 8, 8).expand(-1, 3, -1, -1).clone()
    for kind in hue, saturation:
        y = x.clone()
        drawn(kind)(y)
        torch.testing.assert_close(y, x)
    none = torch.cat([torch.zeros(3, 3), torch.zeros(3, 4)], 1)
    none[:, :3] = grey
    m = torch.eye(7)
    m[:3] = none
    y = torch.rand(1, 3, 8, 8)
    Colour(m[None])(y)
    torch.testing.assert_close(y[:, 0], y[:, 2])


def test_memory_formats_and_slices_change_in_place():
    x = torch.rand(4, 4, 8, 10)
    whole = x[:, :3].clone()
    for kind in contrast, hue:
        wanted = whole.clone()
        drawn(kind)(wanted)
        last, part = whole.to(memory_format=torch.channels_last), x.clone()
        for i in last, part[:, :3]:
            drawn(kind)(i)
            torch.testing.assert_close(i, wanted.to(i))
        assert torch.equal(part[:, 3], x[:, 3])


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64, torch.uint8])
def test_types_stay_and_draws_do_not_depend_on_them(dtype):
    x = torch.randint(256, (4, 3, 8, 8), generator=seeded())
    given = x.to(dtype) if dtype == torch.uint8 else (x / 255).to(dtype)
    y = augment_batch(*[k(p=1) for k in kinds])(given, seeded(1))
    wanted = augment_batch(*[k(p=1) for k in kinds])(x.float() / 255, seeded(1))
    assert y.dtype == dtype
    if dtype == torch.uint8: y, wanted = y / 255, wanted.clamp(0, 1)
    torch.testing.assert_close(y.float(), wanted, atol=.02, rtol=0)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 30), st.integers(1, 30), st.integers(0, 99),
       st.sampled_from([(.02, .33), (.5, .9), (1., 1.)]), st.sampled_from([torch.uint8, torch.float32, torch.float16]))
def test_what_is_hidden_is_one_rectangle_in_any_size(n, c, h, w, seed, area, dtype):
    x = torch.ones(n, c, h, w, dtype=dtype)
    y = RandomErasing(1, area, fill=0.)(x, seeded(seed))
    assert y.dtype == dtype and torch.equal(x, torch.ones_like(x))
    for picture in y:
        hidden = picture[0] == 0
        assert torch.equal(picture == 0, hidden.expand_as(picture))
        rows, columns = hidden.any(1), hidden.any(0)
        assert torch.equal(hidden, rows[:, None] & columns) and rows.any()
        for line in rows, columns: assert int(line.int().diff().abs().sum()) + int(line[0]) + int(line[-1]) == 2
        assert area != (1., 1.) or hidden.all()


def test_the_same_rectangles_for_bytes_and_floats_and_any_fill():
    x = torch.full((8, 3, 20, 30), 100, dtype=torch.uint8)
    hidden = [(RandomErasing(.7, fill=fill)(i, seeded(3)) != i).any(1) for i, fill in (
        (x, 0), (x.float(), 0.), (x, (1, 2, 3)), (x.float(), 'normal'), (x.double(), 'even'))]
    for h in hidden[1:]: assert torch.equal(h, hidden[0])
    assert 0 < hidden[0].any((1, 2)).sum() < 8


def test_every_channel_gets_its_own_fill_and_noise_its_range():
    x = torch.full((8, 3, 20, 30), 7.)
    y = RandomErasing(1, fill=(1., 2., 3.))(x, seeded())
    assert [{*y[:, c].unique().tolist()} for c in range(3)] == [{1., 7.}, {2., 7.}, {3., 7.}]
    even = RandomErasing(1, (1., 1.), fill='even')
    floats, data = even(x, seeded()), even(x.byte(), seeded())
    assert floats.min() >= 0 and floats.max() < 1 and abs(floats.mean() - .5) < .02
    assert data.min() == 0 and data.max() == 255 and abs(data.double().mean() - 127.5) < 3
    noise = RandomErasing(1, (1., 1.))(x, seeded())
    assert abs(noise.mean()) < .05 and abs(noise.std() - 1) < .05
    assert not torch.equal(noise[0], noise[1]) and not torch.equal(noise[0, 0], noise[0, 1])


@pytest.mark.parametrize('make', [lambda: hue(181), lambda: hue(-1), lambda: saturation(1.1), lambda: brightness(p=2),
                                  lambda: RandomErasing(-.1), lambda: RandomErasing(ratio=.5),
                                  lambda: RandomErasing(area=(0., .3)), lambda: RandomErasing(fill='white')])
def test_settings_that_make_no_sense(make):
    with pytest.raises(ValueError): make()


def test_contrast_keeps_the_mean_of_thin_stripes():
    x = torch.tensor([1., 0]).repeat(64)[:, None].expand(4, 3, 128, 128).clone()
    drawn(contrast, change=1.)(x)
    torch.testing.assert_close(x.mean((1, 2, 3)), torch.full((4,), .5))


@pytest.mark.parametrize('fill', [300, -1, .5, (1, 2), (1, 2, 3, 4), (1, 2, 999)])
def test_a_fill_that_bytes_or_channels_cannot_hold(fill):
    with pytest.raises(ValueError, match='does not fit 3'): RandomErasing(1, fill=fill)(torch.zeros(2, 3, 8, 8).byte())


def test_what_is_no_batch_of_pictures():
    with pytest.raises(ValueError, match='height, width'): RandomErasing(1)(torch.zeros(3, 8, 8))
    with pytest.raises(ValueError, match='one for each'): RandomErasing(fill=None)
    with pytest.raises(ValueError, match='0 to 180'): hue(200)
    with pytest.raises(ValueError, match='does not fit 1'): RandomErasing(1, fill=(1, 2, 3))(torch.zeros(2, 1, 8, 8))
