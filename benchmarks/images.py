"""An epoch of photographs from their files, one thread: ours against fastai's and torchvision's, with 0 and 2 workers.

Every way reads the training files of Imagenette in a new random order, resizes them to 64 pixels with the same kind of
filter, and gives batches of normalised floats with labels. The peers are as their documentation shows them: fastai's
DataBlock; torchvision's ImageFolder with its transforms for Pillow's pictures; and the same with torchvision's own
decoder and its transforms for tensors. Run it as `python benchmarks/images.py`; it takes some minutes, with 150 files
of each class. fastai is measured where it is installed.
"""
from common import compare, row, save

import os
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torchvision.transforms as T
from torchvision.datasets import ImageFolder
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2

from dlfound.data import fetch
from dlfound.datablock import DataBlock
from dlfound.files import get_files, parent_label, split_by_grandparent
from dlfound.images import ImageList, Normalize, ResizeFixed, image_extensions
from dlfound.loader import DataLoader

try: import fastai.vision.all as fastai
except ImportError: fastai = None

mean, std, size, batch_size, each = [.46, .45, .42], [.27, .27, .29], 64, 64, 150


def part_of(path: Path, to: Path) -> Path:
    "A folder with links to some files of each class, training and validation"
    for folder in sorted(path.glob('*/*/')):
        (here := to / folder.parent.name / folder.name).mkdir(parents=True)
        for file in sorted(folder.iterdir())[:each]: (here / file.name).symlink_to(file)
    return to


def through(batches, prepare=None) -> int:
    "Read an epoch, and count its pictures"
    seen = 0
    for x, y in batches:
        if prepare: x = prepare(x)
        assert x.shape == (len(y), 3, size, size) and x.dtype == torch.float32
        seen += len(y)
    return seen


def ours(path, workers: int):
    block = DataBlock(lambda folder: get_files(folder, image_extensions()), split_by_grandparent, parent_label,
                      look_for_copies=False)
    train, _, _ = block.build(path)
    ds = ImageList(train.items, [ResizeFixed(size)], train.targets)
    loader, first = DataLoader(ds, batch_size, shuffle=True, num_workers=workers), Normalize(mean, std)
    return lambda: through(loader, first)


def with_torchvision(path, workers: int):
    steps = T.Compose([T.Resize((size, size)), T.ToTensor(), T.Normalize(mean, std)])
    ds = ImageFolder(str(path / 'train'), steps)
    loader = torch.utils.data.DataLoader(ds, batch_size, shuffle=True, num_workers=workers)
    return lambda: through(loader)


def decoded(path: str): return decode_image(path, ImageReadMode.RGB)


def with_its_decoder(path, workers: int):
    steps = v2.Compose([v2.Resize((size, size)), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])
    ds = ImageFolder(str(path / 'train'), steps, loader=decoded)
    loader = torch.utils.data.DataLoader(ds, batch_size, shuffle=True, num_workers=workers)
    return lambda: through(loader)


def with_fastai(path, workers: int):
    block = fastai.DataBlock(
        (fastai.ImageBlock, fastai.CategoryBlock), get_items=fastai.get_image_files, get_y=fastai.parent_label,
        splitter=fastai.GrandparentSplitter('train', 'val'),
        item_tfms=fastai.Resize(size, method=fastai.ResizeMethod.Squish),
        batch_tfms=fastai.Normalize.from_stats(mean, std))
    dls = block.dataloaders(path, bs=batch_size, num_workers=workers, device=torch.device('cpu'))
    loader = dls.train.new(drop_last=False)
    return lambda: through(loader)


def measure(path: Path) -> list[dict]:
    peers = {'torchvision': with_torchvision, "torchvision with its decoder": with_its_decoder}
    if fastai: peers['fastai'] = with_fastai
    else: print('fastai is not installed, so it is left out: pip install fastai')
    rows = []
    for workers in 0, 2:
        epochs = {name: make(path, workers) for name, make in {'ours': ours, **peers}.items()}
        counts = {name: epoch() for name, epoch in epochs.items()}
        assert len(set(counts.values())) == 1, counts
        n, t = counts['ours'], compare(epochs, repeat=7)
        for name in peers:
            rows.append(row(f'{n} files to {size} pixels, {workers} workers, against {name}', t['ours'], t[name],
                            '>= 0.95', invert=True, files_per_s=n / t['ours'].median,
                            peer_files_per_s=n / t[name].median))
    return rows


if __name__ == '__main__':
    torch.manual_seed(0)
    load = os.getloadavg()[0] if hasattr(os, 'getloadavg') else None
    with TemporaryDirectory() as folder: rows = measure(part_of(fetch('imagenette', standin=False), Path(folder)))
    save('images', rows, packages=('torchvision', 'pillow', 'fastai'), load_at_start=load)
