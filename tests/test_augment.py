"What the pages about augmentation cannot show: any shape, order, restart, and the loop's other features"
import math
from copy import deepcopy
from dataclasses import replace
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Generator, nn

from dlfound.augment import Augment, Draw, augment_batch, dihedral, flip, for_some, places, rotate, warp, zoom
from dlfound.checkpoint import Checkpoint, resume
from dlfound.colour import RandomErasing, brightness, contrast, hue, saturation
from dlfound.hooks import BatchTransform
from dlfound.images import Normalize
from dlfound.learner import DataLoaders, Learner
from dlfound.minibatch import Dataset
from dlfound.search import lr_find

sides = st.integers(1, 9)


def all_of_them(**kwargs):
    geometry = flip(), rotate(20), zoom(.7, 1.4), warp(.2)
    return augment_batch(*geometry, brightness(), contrast(), saturation(), hue(), **kwargs)


def learner(*cbs, n=32, valid=True):
    g = Generator().manual_seed(0)
    x, y = torch.rand(n, 3, 8, 8, generator=g), torch.randint(4, (n,), generator=g)
    torch.manual_seed(1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    valid_ds = Dataset(x, y) if valid else None
    dls = DataLoaders.from_datasets(Dataset(x, y), valid_ds, 8, generator=Generator().manual_seed(2))
    return Learner(dls, model, nn.CrossEntropyLoss(), lr=.1, cbs=cbs, progress=False)


@settings(deadline=None, max_examples=60)
@given(sides, sides, st.integers(1, 4), st.sampled_from([torch.uint8, torch.float32, torch.float16]),
       st.integers(0, 99))
def test_mirrors_and_turns_are_exact_in_any_size(h, w, c, dtype, seed):
    x = torch.randint(256, (4, c, h, w), generator=Generator().manual_seed(seed)).to(dtype)
    y = flip()(x, Generator().manual_seed(seed))
    assert y.dtype == dtype and all(torch.equal(b, a) or torch.equal(b, a.flip(-1)) for a, b in zip(x, y))
    x = x[:, :, :min(h, w), :min(h, w)]
    y = dihedral()(x, Generator().manual_seed(seed))
    eight = [z.rot90(k, (-2, -1)) for z in (x, x.flip(-1)) for k in range(4)]
    assert all(any(torch.equal(y[i], e[i]) for e in eight) for i in range(4))


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 12), st.integers(2, 12), st.integers(0, 999))
def test_masks_are_where_the_eight_ways_put_pictures(h, w, seed):
    g = Generator().manual_seed(seed)
    m = torch.randint(2**40, (3, h, w), generator=g)
    draw = augment_batch(flip()).draw(3, (h, w), g)
    as_floats = draw.images(m[:, None].double())[:, 0]
    assert torch.equal(draw.masks(m), as_floats.long())
    assert torch.equal(draw.masks(m[:, None].expand(-1, 2, -1, -1))[:, 1], draw.masks(m))


@settings(deadline=None, max_examples=40)
@given(st.integers(8, 40), st.integers(8, 40), st.integers(0, 999), st.sampled_from([None, 16, (12, 20)]))
def test_points_go_and_come_back_and_boxes_hold_them(h, w, seed, size):
    g = Generator().manual_seed(seed)
    draw = augment_batch(flip(), rotate(30), zoom(.8, 1.5), warp(.2), size=size).draw(5, (h, w), g)
    xy = torch.rand(5, 7, 2, generator=g, dtype=torch.float64) * torch.tensor([w, h])
    there = draw.points(xy)
    torch.testing.assert_close(draw.points(there, back=True), xy)
    box = torch.cat([xy.amin(1), xy.amax(1)], -1)[:, None]
    cut, left = draw.boxes(box)
    assert ((left >= 0) & (left <= 1 + 1e-6)).all()
    out = torch.tensor(draw.out[::-1])
    inside = ((there >= 0) & (there <= out)).all(-1)
    fits = ((there >= cut[..., :2] - 1e-4) & (there <= cut[..., 2:] + 1e-4)).all(-1)
    assert fits[inside].all()


def test_a_bright_pixel_is_where_its_point_is():
    x = torch.zeros(6, 1, 40, 60)
    x[:, :, 14:17, 29:32] = 1 # Around (30.5, 15.5)
    draw = augment_batch(flip(), rotate(30, 1), zoom(.8, 1.2, 1), warp(.2, 1), padding='zeros').draw(
        6, (40, 60), Generator().manual_seed(0))
    y, at = draw.images(x), draw.points(torch.tensor([[30.5, 15.5]]).expand(6, 1, 2))[:, 0]
    weights = y[:, 0] / y.sum((1, 2, 3))[:, None, None]
    columns, rows = [(weights.sum(d) * (torch.arange(k) + .5)).sum(1) for d, k in ((1, 60), (2, 40))]
    centre = torch.stack([columns, rows], 1)
    torch.testing.assert_close(centre, at, atol=.3, rtol=0)


@pytest.mark.parametrize('padding', ['reflection', 'border', 'zeros'])
def test_masks_and_pictures_agree_outside(padding):
    m = torch.arange(35).view(1, 5, 7).repeat(4, 1, 1)
    matrix = torch.eye(3, dtype=torch.float64).repeat(4, 1, 1)
    matrix[:, 0, 2], matrix[:, 1, 2] = torch.tensor([9., -3, 4, 0]), torch.tensor([0., 6, -8, 2]) # Whole pixels
    draw = Draw(matrix, (5, 7), (5, 7), padding, fill=0 if padding == 'zeros' else None)
    assert torch.equal(draw.masks(m), draw.images(m[:, None].float())[:, 0].round().long())


def test_masks_keep_large_labels_and_small_types():
    draw = augment_batch(rotate(40, 1)).draw(2, (16, 16), Generator().manual_seed(0))
    for m in torch.randint(2**60, (2, 16, 16)), torch.rand(2, 16, 16) > .5, torch.rand(2, 16, 16).half():
        y = draw.masks(m)
        assert y.dtype == m.dtype and {*y.unique().tolist()} <= {*m.unique().tolist()}


def test_antialias_leaves_alone_what_does_not_shrink():
    x = torch.rand(8, 3, 32, 32)
    for t in zoom(1, 2, 1), rotate(45, 1):
        draws = [augment_batch(t, antialias=a).draw(8, (32, 32), Generator().manual_seed(0)) for a in (True, False)]
        assert torch.equal(*[d.images(x) for d in draws])


def test_size_without_a_draw_is_near_a_filtered_resize():
    x = torch.rand(2, 3, 64, 64)
    by_torch = torch.nn.functional.interpolate(x, (16, 16), mode='bilinear', antialias=True)
    draw = augment_batch(flip(), size=16).draw(2, (64, 64), training=False)
    torch.testing.assert_close(draw.images(x), by_torch, atol=1e-4, rtol=0)


def test_bilinear_stays_in_range_and_bytes_do_not_wrap():
    x = (torch.rand(16, 3, 24, 24) > .5).float()
    y = augment_batch(rotate(45, 1), zoom(.5, 2, 1), warp(.4, 1))(x, Generator().manual_seed(0))
    assert y.min() >= 0 and y.max() <= 1
    white, black = torch.full((16, 3, 4, 4), 255, dtype=torch.uint8), torch.zeros(16, 3, 4, 4, dtype=torch.uint8)
    up, down = [brightness(.5, 1)(i, Generator().manual_seed(0)).float() for i in (white, black)]
    assert ((up == 255) | (down == 0)).all() and (up.amin() > 120) and (down.amax() < 135)


def test_each_picture_is_drawn_alone():
    x = torch.rand(1, 3, 16, 16).expand(12, -1, -1, -1)
    colours = brightness(.3, 1), saturation(.9, 1), hue(90, 1)
    for t in rotate(20, 1), zoom(.6, 1.5, 1), warp(.3, 1), *colours, RandomErasing(1):
        assert len({tuple(i.flatten().tolist()) for i in t(x)}) == 12


def test_gradients_pass():
    x = torch.rand(4, 3, 8, 8, requires_grad=True)
    all_of_them(seed=0)(x).sum().backward()
    assert x.grad is not None and x.grad.isfinite().all() and x.grad.abs().sum() > 0


def test_the_input_is_never_changed():
    for dtype in torch.float32, torch.uint8:
        x = (torch.rand(4, 3, 8, 8) * 200).to(dtype)
        before = x.clone()
        for t in brightness(p=1), contrast(p=1), hue(p=1), all_of_them(), RandomErasing(1, fill=0.): t(x)
        assert torch.equal(x, before)


def test_channels_last_and_slices_give_the_same():
    x = torch.rand(4, 3, 8, 10)
    for other in x.to(memory_format=torch.channels_last), torch.cat([x, x], -1)[..., :10]:
        for t in all_of_them(), flip(), brightness(p=1):
            torch.testing.assert_close(t(other, Generator().manual_seed(0)), t(x, Generator().manual_seed(0)))


def test_resuming_draws_as_an_uninterrupted_fit():
    def make(folder): return learner(all_of_them(seed=3), RandomErasing(seed=4), Checkpoint(folder, 1, 'batch', keep=9))
    with TemporaryDirectory() as folder, TemporaryDirectory() as other:
        whole = make(other)
        whole.fit(2)
        half = make(folder)
        def forward():
            if (half.epoch, half.iter, half.training) == (1, 1, True): raise KeyboardInterrupt
            Learner.forward(half)
        half.forward = forward
        with pytest.raises(KeyboardInterrupt): half.fit(2)
        again = make(folder)
        resume(again, folder)
        for a, b in zip(whole.model.parameters(), again.model.parameters()): assert torch.equal(a, b)


def test_lr_find_leaves_the_draws_where_they_were():
    aug = all_of_them(seed=0)
    learn = learner(aug)
    before = aug.state_dict()
    lr_find(learn)
    assert aug.state_dict() == before


def test_augmentation_before_and_erasing_after_normalising():
    class See(BatchTransform):
        def __init__(self): super().__init__(self.look); self.seen = []
        def look(self, x): self.seen.append(x); return x
    see = See()
    normalise, eraser = BatchTransform(Normalize([.5] * 3, [.25] * 3)), RandomErasing(1, fill=-9., seed=0)
    learn = learner(all_of_them(seed=0), normalise, eraser, see)
    learn.fit(1)
    train, valid = torch.cat(see.seen[:4]), torch.cat(see.seen[4:])
    assert (train == -9).any() and not (valid == -9).any() and valid.min() >= -2 and valid.max() <= 2


def test_copies_draw_on_their_own():
    aug = all_of_them(seed=0)
    x, other = torch.rand(4, 3, 8, 8), deepcopy(aug)
    assert torch.equal(aug(x), other(x)) and aug.count == other.count == 1


def test_a_seed_is_drawn_from_the_global_generator():
    torch.manual_seed(5)
    a, b = all_of_them(), all_of_them()
    torch.manual_seed(5)
    assert all_of_them().start == a.start != b.start


def test_empty_and_single_pictures():
    for t in all_of_them(), dihedral(), RandomErasing():
        assert t(torch.rand(1, 3, 1, 1)).shape == (1, 3, 1, 1)


def test_places_are_those_of_affine_grid():
    theta = torch.tensor([[[.8, -.3, .1], [.2, 1.1, -.2]]])
    to = torch.tensor([10., 6, 1]).diag()
    matrix = to @ torch.cat([theta[0], torch.tensor([[0., 0, 1]])]) @ to.inverse()
    theirs = nn.functional.affine_grid(theta, [1, 1, 12, 20], align_corners=False)
    ours = places(matrix[None], (12, 20)).permute(0, 2, 3, 1) / torch.tensor([10., 6])
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize('make', [
    lambda: for_some(-1, lambda n, size, g: None), lambda: zoom(0, 1), lambda: Augment(padding='wrap'),
    lambda: brightness(2), lambda: RandomErasing(area=(.5, .2)), lambda: augment_batch(rotate(), target='mask')])
def test_settings_that_make_no_sense(make):
    with pytest.raises(ValueError): make()


def test_the_hidden_area_is_even_in_long_pictures():
    r = RandomErasing(1, (.5, .9), ratio=10.)
    _, _, h, w = r.rectangles(20000, (30, 300), Generator().manual_seed(0))
    assert math.isclose((h * w).double().mean() / 9000, .7, rel_tol=.01)


@pytest.mark.skipif(not torch.accelerator.is_available(), reason='needs an accelerator')
def test_the_same_draws_on_an_accelerator():
    x, device = torch.rand(8, 3, 32, 32), torch.accelerator.current_accelerator()
    for t in all_of_them(), RandomErasing(1, fill='even'):
        there = t(x.to(device), Generator().manual_seed(0)).cpu()
        torch.testing.assert_close(there, t(x, Generator().manual_seed(0)), atol=1e-3, rtol=0)


def test_a_batch_of_no_pictures():
    t = all_of_them(size=8, target='masks', fill=3)
    x, m = t((torch.rand(0, 3, 16, 12), torch.zeros(0, 16, 12, dtype=torch.long)))
    assert x.shape == (0, 3, 8, 8) and m.shape == (0, 8, 8)


def test_options_of_an_inner_transform_are_not_lost_in_silence():
    for options in dict(size=8), dict(padding='zeros'), dict(target='boxes'):
        inner = augment_batch(flip(), **options)
        with pytest.raises(ValueError, match='outer'): augment_batch(inner, rotate())
    assert augment_batch(augment_batch(flip(), rotate(), seed=3), zoom()).geometry


def test_nothing_lies_behind_the_horizon():
    t = augment_batch(warp(.49, 1), zoom(.3, .3, 1), seed=0)
    for size in (64, 64), (40, 90):
        m = t.draw(1000, size).matrix
        corners = torch.tensor([[a * size[1] / 2, b * size[0] / 2, 1.] for a in (-1, 1) for b in (-1, 1)]).double()
        assert (m[:, 2] @ corners.T > 0).all()
    usual = augment_batch(warp(.2, 1), zoom(p=1), seed=0).draw(1000, (64, 64)).matrix
    assert usual[:, 2, :2].abs().max() > .2 / 64


@pytest.mark.parametrize('dtype, fill', [(torch.uint8, -1), (torch.uint8, 300), (torch.bool, 2), (torch.int8, 255)])
def test_a_class_that_masks_cannot_hold(dtype, fill):
    draw = augment_batch(rotate(p=1), fill=fill, seed=0).draw(2, (8, 8))
    with pytest.raises(ValueError, match='hold'): draw.masks(torch.zeros(2, 8, 8, dtype=dtype))


@pytest.mark.parametrize('size', [0, 8., -3, (8, 0), (8, 4.5), '8'])
def test_sizes_that_make_no_sense(size):
    with pytest.raises((ValueError, TypeError)): augment_batch(rotate(), size=size)


def test_sizes_of_numpy():
    x = torch.rand(2, 3, 16, 12)
    for size in np.int64(8), [8, 8], (np.int32(8), 8): assert augment_batch(rotate(), size=size)(x).shape[2:] == (8, 8)


def test_what_is_no_batch_of_pictures():
    t = augment_batch(rotate(), target='masks')
    with pytest.raises(ValueError, match='masks'): t(torch.rand(2, 3, 8, 8))
    with pytest.raises(TypeError, match='tensors'): augment_batch(rotate())(np.zeros((2, 3, 8, 8), 'float32'))


@pytest.mark.parametrize('degrees', [-1, 181, float('nan')])
def test_angles_that_make_no_sense(degrees):
    with pytest.raises(ValueError): rotate(degrees)


@pytest.mark.parametrize('n, shape', [(1, (3, 8, 8)), (7, (3, 200, 210)), (40, (1, 90, 90)), (9, (4, 128, 128))])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.uint8])
def test_pieces_give_what_one_picture_at_a_time_gives(n, shape, dtype):
    x = torch.rand(n, *shape, dtype=torch.float64)
    x = (x * 255).byte() if dtype == torch.uint8 else x.to(dtype)
    draw = all_of_them(seed=0).draw(n, shape[1:])
    y = draw.images(x)
    for i in range(n):
        colour = draw.colour and type(draw.colour)(draw.colour.matrix[i:i + 1])
        one = replace(draw, matrix=draw.matrix[i:i + 1], colour=colour).images(x[i:i + 1])
        torch.testing.assert_close(y[i:i + 1], one, atol=1e-6, rtol=0)


def test_gradients_pass_through():
    x = torch.rand(6, 3, 16, 16, dtype=torch.float64, requires_grad=True)
    draw = all_of_them(seed=0).draw(6, (16, 16))
    assert torch.autograd.gradcheck(lambda t: draw.images(t).sum((1, 2, 3)), (x,), atol=1e-4)
