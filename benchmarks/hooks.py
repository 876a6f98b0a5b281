"""What it costs to watch a small CNN train: `ActivationStats` in our loop, beside fastai's in its own.

Run it as `python benchmarks/hooks.py`; it takes about two minutes. fastai is measured where it is installed
(`pip install fastai`). Each row is a fit of ten batches of 128 pictures of 28×28, with the telemetry against the same
fit without it, in interleaved blocks. Ours takes mean, deviation, dead share and non-finite share of all eleven layers
of the CNN of lesson 05; fastai's takes mean, deviation and the share near zero, of the same eleven layers
(`include_paramless=True`), and by default of the five that have parameters. Histograms have 80 bins here, 40 there.
"""
from common import compare, row, save

import contextlib
import io
import os
import warnings

import torch
import torch.nn.functional as F
from torch import nn

from dlfound.hooks import ActivationStats, cnn_layers
from dlfound.learner import DataLoaders, TrainingLoop

n_batches, size, lr = 10, 128, .01
warnings.filterwarnings('ignore')


class Batches:
    "Batches made beforehand, so that no loader is measured"
    def __init__(self, n): self.batches = [(torch.randn(size, 1, 28, 28), torch.randint(10, (size,))) for _ in range(n)]
    def __len__(self): return len(self.batches)
    def __iter__(self): return iter(self.batches)


train = Batches(n_batches)
def cnn() -> nn.Module: return nn.Sequential(*cnn_layers())


def ours(**options):
    "A fit of our loop, without telemetry if there are no options"
    def fit():
        TrainingLoop(DataLoaders(train), model, F.cross_entropy, torch.optim.SGD, lr,
                     [ActivationStats(**options)] * bool(options)).fit(1)
    model = cnn()
    return fit


def fastai(**options):
    "The same of fastai's"
    import fastai.callback.progress
    from fastai.callback.hook import ActivationStats as Theirs
    from fastai.data.core import DataLoaders as Loaders
    from fastai.learner import Learner
    from fastai.optimizer import OptimWrapper
    def opt(params, lr, **kw): return OptimWrapper(params, torch.optim.SGD, lr=lr)
    model, dls = cnn(), Loaders(train, [])
    def fit():
        learn = Learner(dls, model, F.cross_entropy, opt_func=opt, lr=lr, cbs=[Theirs(**options)] * bool(options))
        with learn.no_bar(), learn.no_logging(), contextlib.redirect_stdout(io.StringIO()): learn.fit(1)
    return fit


def measured() -> list[dict]:
    fs = {'ours, without': ours(), 'ours, all layers': ours(every=1), 'ours, histograms': ours(bins=80),
          'ours, histograms of every tenth batch': ours(bins=80, every=10)}
    try:
        theirs = {'fastai, without': fastai(), 'fastai, all layers': fastai(include_paramless=True),
                  'fastai, default': fastai(every=None),
                  'fastai, histograms': fastai(include_paramless=True, with_hist=True)}
        theirs['fastai, histograms']()
        fs |= theirs
    except Exception as e: print(f'fastai is left out ({type(e).__name__}: {str(e)[:90]})')
    t = compare(fs, repeat=31, min_time=.25)
    goals = {'ours, all layers': '<= 1.3'}
    def against(name):
        base = name.split(',')[0] + ', without'
        rates = dict(ms_per_step=t[name].median / n_batches * 1e3, without_ms_per_step=t[base].median / n_batches * 1e3)
        return row(f'{name}: against none', t[name], t[base], goals.get(name, ''), **rates)
    return [against(name) for name in fs if 'without' not in name]


if __name__ == '__main__':
    torch.manual_seed(0)
    load = os.getloadavg()[0] if hasattr(os, 'getloadavg') else None
    save('hooks', measured(), packages=('fastai',), batches=n_batches, load_at_start=load)
