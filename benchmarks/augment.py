"""A batch of 64 pictures of 128 pixels changed at random, one thread: ours against kornia, fastai and torchvision.

All ways mirror, turn, zoom, tilt and change brightness and contrast, with the same probabilities and ranges as near as
their settings allow. kornia and fastai draw for each picture, torchvision once for the batch, and fastai resamples
once as we do. `grid_sample` alone gets the very grid that ours has drawn, made beforehand. Run it as
`python benchmarks/augment.py`; peers that are not installed are left out.
"""
from common import compare, row, save

import os
import warnings

import torch
import torch.nn.functional as F
from torch import Generator
from torchvision.transforms import InterpolationMode, v2

from dlfound.augment import augment_batch, flip, places, rotate, warp, zoom
from dlfound.colour import RandomErasing, brightness, contrast, hue, saturation

try: import kornia.augmentation as kornia
except ImportError: kornia = None
try: import fastai.vision.all as fastai
except ImportError: fastai = None

n, side = 64, 128


def make(*more, **kwargs):
    geometry = flip(), rotate(10), zoom(.9, 1.1), warp(.2)
    return augment_batch(*geometry, brightness(.2), contrast(.2), *more, seed=0, **kwargs)


def with_kornia():
    return torch.nn.Sequential(
        kornia.RandomHorizontalFlip(p=.5), kornia.RandomAffine(10., scale=(.9, 1.1), p=.75, padding_mode='reflection'),
        kornia.RandomPerspective(.2, p=.75), kornia.RandomBrightness((.8, 1.2), p=.75),
        kornia.RandomContrast((.8, 1.2), p=.75))


def with_fastai():
    change = fastai.Pipeline(fastai.aug_transforms(size=side), split_idx=0)
    return lambda x: change(fastai.TensorImage(x))


def with_torchvision():
    linear = InterpolationMode.BILINEAR
    return v2.Compose([v2.RandomHorizontalFlip(), v2.RandomAffine(10, scale=(.9, 1.1), interpolation=linear),
                       v2.RandomPerspective(.2, p=.75, interpolation=linear), v2.ColorJitter(.2, .2)])


def grid_of(aug):
    "The grid that `aug` draws with the seed 0, as `grid_sample` wants it"
    matrix = aug.draw(n, (side, side), Generator().manual_seed(0)).matrix
    shares = matrix / torch.tensor([side / 2, side / 2, 1])[:, None]
    return places(shares.float(), (side, side)).permute(0, 2, 3, 1).contiguous()


def measure(x) -> list[dict]:
    plain = make()
    grid, ours = grid_of(plain), lambda: plain(x, Generator().manual_seed(0))
    sample = lambda: F.grid_sample(x, grid, padding_mode='reflection', align_corners=False)
    peers = {'torchvision, one draw a batch': with_torchvision()}
    if fastai: peers['fastai'] = with_fastai()
    if kornia: peers['kornia'] = with_kornia()
    for name in {'kornia', 'fastai'} - {*peers}: print(f'{name} is not installed: left out')
    ways = {'ours': ours, 'grid_sample': sample} | {k: lambda f=f: f(x) for k, f in peers.items()}
    t, goals = compare(ways, repeat=15, min_time=.02), {'kornia': '>= 5', 'fastai': '>= 3'}
    def line(what, mine, peer, goal='', **kwargs):
        return row(what, t[mine], t[peer], goal, invert=True, images_per_s=n / t[mine].median,
                   peer_images_per_s=n / t[peer].median, **kwargs)
    rows = [line(f'the composite against {k}', 'ours', k, goals.get(k, '')) for k in peers]
    rows += [line('the composite against grid_sample on its grid', 'ours', 'grid_sample', '>= 0.85')]
    smaller = [augment_batch(zoom(.4, .7, 1), seed=0, antialias=a) for a in (True, False)]
    all_colours, eraser = make(saturation(), hue()), RandomErasing(seed=0)
    in_bytes, mirrors = (x * 255).byte(), augment_batch(flip(), seed=0)
    t |= compare({'filtered': lambda: smaller[0](x, Generator().manual_seed(0)),
                  'not filtered': lambda: smaller[1](x, Generator().manual_seed(0)), 'hue too': lambda: all_colours(x),
                  'bytes': lambda: plain(in_bytes, Generator().manual_seed(0)), 'mirrors': lambda: mirrors(x),
                  'erasing': lambda: eraser(x), 'a copy': x.clone}, repeat=9, min_time=.02)
    rows += [line('1.4 to 2.5 times smaller: filtered first, against bilinear alone', 'filtered', 'not filtered'),
             line('saturation and hue too, against the composite', 'hue too', 'ours'),
             line('the composite of bytes, against that of floats', 'bytes', 'ours'),
             line('mirrors alone, against a copy', 'mirrors', 'a copy'),
             line('a part hidden by noise, against a copy', 'erasing', 'a copy')]
    return rows


if __name__ == '__main__':
    torch.manual_seed(0)
    load = os.getloadavg()[0] if hasattr(os, 'getloadavg') else None
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        rows = measure(torch.rand(n, 3, side, side))
    save('augment', rows, packages=('torchvision', 'kornia', 'fastai'), load_at_start=load)
