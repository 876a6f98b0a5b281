"""Shuffled batches, one thread: ours against PyTorch's loader, with fastai's beside them.

Three kinds of data set: tensors in memory, a part of them as `random_split` gives it, and one that makes its samples
one at a time; the last with unseeded and with seeded batches. Run it as `python benchmarks/dataloader.py`; it takes
about two minutes. fastai is measured where it is installed.
"""
from common import compare, row, save

import torch
from torch.utils.data import TensorDataset, random_split

from dlfound.loader import DataLoader
from dlfound.minibatch import Dataset

try: from fastai.data.load import DataLoader as FastaiLoader
except ImportError: FastaiLoader = None


def through(loader) -> int:
    "Read an epoch"
    n = 0
    for _ in loader: n += 1
    return n


def selected(ds: Dataset, batch_size: int) -> int:
    "The rows alone, without a loader: what is left to gain"
    n = 0
    for i in torch.randperm(len(ds)).split(batch_size):
        ds.x.index_select(0, i), ds.y.index_select(0, i)
        n += 1
    return n


class Spelled(Dataset):
    "The same data one sample at a time, as a data set with work to do for each"
    def __getitem__(self, i): return self.x[i], self.y[i]


def batches(ds: Dataset, batch_size: int) -> list[dict]:
    "Each loader over the data set that comes with it; PyTorch's loader over ours, too"
    plain, torch_loader = TensorDataset(ds.x, ds.y), torch.utils.data.DataLoader
    loaders = dict(ours=DataLoader(ds, batch_size, shuffle=True), torch=torch_loader(plain, batch_size, shuffle=True),
                   mixed=torch_loader(ds, batch_size, shuffle=True))
    if FastaiLoader: loaders['fastai'] = FastaiLoader(plain, bs=batch_size, shuffle=True, num_workers=0)
    counts = {name: through(loader) for name, loader in loaders.items()}
    assert len(set(counts.values())) == 1 and set(next(iter(loaders['ours']))[1].tolist()) <= set(range(10)), counts
    fs = {name: lambda loader=loader: through(loader) for name, loader in loaders.items()}
    t = compare(fs | dict(index_select=lambda: selected(ds, batch_size)), repeat=9)
    def rates(name): return dict(samples_per_s=len(ds) / t['ours'].median, peer_samples_per_s=len(ds) / t[name].median)
    what = f'{len(ds)} × {ds.x.shape[1]}, batches of {batch_size}, against '
    rows = [row(what + "PyTorch's loader", t['ours'], t['torch'], '>= 6', invert=True, **rates('torch'))]
    rows.append(row(what + "PyTorch's over our Dataset", t['ours'], t['mixed'], invert=True, **rates('mixed')))
    if FastaiLoader: rows.append(row(what + "fastai's loader", t['ours'], t['fastai'], invert=True, **rates('fastai')))
    return rows + [row(what + 'index_select alone', t['ours'], t['index_select'], invert=True, **rates('index_select'))]


def against(what: str, goal: str, makers: dict, batch_size: int) -> list[dict]:
    "Each of our loaders against PyTorch's, which is the last of `makers`"
    t = compare({name: lambda make=make: through(make()) for name, make in makers.items()}, repeat=9)
    *ours, theirs = makers
    return [row(f"{what}, batches of {batch_size}, {name}, against PyTorch's loader", t[name], t[theirs],
                goal if name == ours[0] else '', invert=True) for name in ours]


def samples(ds: Spelled, batch_size: int) -> list[dict]:
    "Where samples are made one at a time: what is gained without seeds, and the price of a seed for every batch"
    makers = {'unseeded': lambda: DataLoader(ds, batch_size, shuffle=True),
              'seeded': lambda: DataLoader(ds, batch_size, shuffle=True, seeded=True),
              'torch': lambda: torch.utils.data.DataLoader(ds, batch_size, shuffle=True)}
    return against(f'{len(ds)} samples one at a time', '>= 1.0', makers, batch_size)


def split(ds: Dataset, batch_size: int) -> list[dict]:
    "A part of our data set, against PyTorch's loader over a part of PyTorch's"
    ours, theirs = (random_split(d, [.8, .2])[0] for d in (ds, TensorDataset(ds.x, ds.y)))
    makers = {'ours': lambda: DataLoader(ours, batch_size, shuffle=True),
              'torch': lambda: torch.utils.data.DataLoader(theirs, batch_size, shuffle=True)}
    return against(f'{len(ours)} rows through random_split', '>= 3', makers, batch_size)


if __name__ == '__main__':
    torch.manual_seed(0)
    x, y = torch.rand(50_000, 784), torch.randint(10, (50_000,))
    if not FastaiLoader: print('fastai is not installed, so it is left out: pip install fastai')
    rows = [r for batch_size in (64, 512) for r in batches(Dataset(x, y), batch_size)]
    rows += [r for batch_size in (64, 512) for r in split(Dataset(x, y), batch_size)]
    for batch_size, n in (1, 2_000), (8, 5_000), (64, 10_000), (512, 20_000):
        rows += samples(Spelled(x[:n], y[:n]), batch_size)
    save('dataloader', rows, packages=('fastai',))
