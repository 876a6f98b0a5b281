"Small fits that schedules, sweeps and checkpoints are tried on."
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn, optim

from dlfound.learner import Callback, DataLoaders, Learner
from dlfound.loader import DataLoader
from dlfound.minibatch import Dataset, accuracy
from dlfound.state import map_tensors, module_state, random_state


def data(n=40, **kwargs):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, 4, generator=g)
    train, valid = Dataset(x, x.argmax(1) % 3), Dataset(x[:20], x[:20].argmax(1) % 3)
    return DataLoaders.from_datasets(train, valid, 8, generator=g, **kwargs)


def learner(opt=optim.SGD, cbs=(), dls=None, model=None, **kwargs):
    torch.manual_seed(0)
    model = model or nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(.2), nn.Linear(8, 3))
    kwargs = dict(metrics=accuracy, progress=False) | kwargs
    return Learner(dls or data(), model, F.cross_entropy, opt, lr=.1, cbs=cbs, **kwargs)


class Stop(Callback):
    "An exception at a place, once"
    def __init__(self, epoch, batch, event='train'): self.place = epoch, batch, event
    def after_backward(self, learn): self.strike(learn, 'train')
    def after_pred(self, learn):
        if not learn.training: self.strike(learn, 'valid')
    def strike(self, learn, event):
        if self.place == (learn.epoch, learn.iter, event):
            self.place = None
            raise RuntimeError('stop')


class Rows(Callback):
    "Puts numbers in the rows"
    order = 55
    def __init__(self, values): self.values = values
    def after_epoch(self, learn): learn.row['made'] = self.values[learn.epoch]


def messages(log): return '\n'.join(str(w.message) for w in log)
def state(learn): return map_tensors(torch.clone, module_state(learn.module))
def drawn(learn): return random_state(learn.dls.train, learn.dls.valid, *learn.generators)
def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# State in odd places: each gives loaders, and the generators that have to be named

class Wrapped:
    "A loader of others around one with a generator"
    def __init__(self, dl): self.inner = dict(dl=[dl])
    def __len__(self): return len(self.inner['dl'][0])
    def __iter__(self): yield from self.inner['dl'][0]


class Shaken(torch.utils.data.Dataset):
    "Samples that are changed by a generator in a transform"
    def __init__(self, rng): self.transform = partial(self.shake, rng=rng)
    def shake(self, x, rng): return x + float(rng.normal())
    def __len__(self): return 20
    def __getitem__(self, i): return self.transform(torch.full((4,), i / 10)), torch.tensor(i % 3)


class Masters(optim.Optimizer):
    "SGD on exact copies of rounded weights"
    def __init__(self, params, lr): super().__init__(params, dict(lr=lr))
    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group['params']:
                exact = self.state[p].setdefault('exact', p.float())
                p.copy_(exact.sub_(group['lr'] * p.grad.float()))


def wrapped():
    rng, g = np.random.default_rng(0), torch.Generator().manual_seed(1)
    inner = torch.utils.data.DataLoader(Shaken(rng), 8, shuffle=True, generator=g)
    return DataLoaders(Wrapped(inner), data().valid), [rng, g]


def joined():
    rng = np.random.default_rng(0)
    both = torch.utils.data.ConcatDataset([Shaken(rng), Shaken(rng)])
    return DataLoaders(DataLoader(both, 8), data().valid), [rng]


def rounded():
    return DataLoaders(*([(x.bfloat16(), y) for x, y in dl] for dl in (data().train, data().valid))), []


odd_places = [(wrapped, optim.SGD, torch.float32), (joined, optim.SGD, torch.float32),
              (rounded, Masters, torch.bfloat16)]
