"What a Learner adds: validation, predictions, files, and answers to the first mistakes."
import copy
import os
import re
from collections import namedtuple

import pytest
import torch
from loops import at, batches, learner, loss_func, net, same
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.data import IterableDataset

import dlfound.learner as L
from dlfound import callbacks, loader, loop, metrics
from dlfound.learner import Callback, DataLoaders, Device, Learner, Metrics, Recorder
from dlfound.loader import DataLoader
from dlfound.minibatch import Dataset, accuracy

pytestmark = pytest.mark.filterwarnings('ignore::UserWarning')


def test_one_import_line_serves_a_user():
    ours = {'Learner', 'DataLoaders', 'label_weight', *(n for m in (loop, callbacks) for n in m.__all__),
            'Metric', 'Metrics', 'Recorder', 'Progress'}
    assert set(L.__all__) - {'failing_layer'} == ours - {'Step', 'Cbs', 'nonfinite_grads', 'check_finite_grads'}
    for name in L.__all__: assert getattr(L, name) is not None
    assert L.DataLoaders is loader.DataLoaders and L.Metric is metrics.Metric


# Batches of other shapes, predictions

def test_dicts_and_several_inputs():
    class Dicts(Learner):
        def inputs(self): return self.batch['a'], self.batch['b']
        def target(self): return self.batch['y']
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = net()
        def forward(self, a, b): return self.fc(a + b)
    data = batches(5, 4)
    dicts, tuples = Sum(), Sum()
    tuples.load_state_dict(dicts.state_dict())
    as_dicts = [dict(a=x, b=x * 2, y=y) for x, y in data]
    learn = Dicts(DataLoaders(as_dicts, as_dicts), dicts, loss_func, lr=.1, metrics=accuracy)
    learn.fit(2)
    Learner(DataLoaders([(x, x * 2, y) for x, y in data]), tuples, loss_func, lr=.1).fit(2)
    assert same(dicts, tuples) and learn.get_preds()[0].shape == (9, 3)
    x = data[0][0][0]
    torch.testing.assert_close(learn.predict(dict(a=x, b=x * 2)), dicts(x, x * 2))
    with pytest.raises(TypeError, match='override inputs and target'):
        Learner(DataLoaders(as_dicts), Sum(), loss_func).fit(1)


def test_predictions():
    learn = learner(net(0, nn.Dropout()))
    preds, targets = learn.get_preds()
    x, y = (torch.cat(t) for t in zip(*learn.dls.valid))
    with torch.no_grad(): wanted = learn.model.eval()(x)
    torch.testing.assert_close(preds, wanted)
    assert torch.equal(targets, y) and not preds.requires_grad
    torch.testing.assert_close(learn.predict(x[0]), wanted[0])
    assert learn.get_preds([(x,)])[1] is None


class Nested(nn.Module):
    out = namedtuple('Out', 'logits hidden')
    def __init__(self):
        super().__init__()
        self.fc = net()
    def forward(self, x): return self.out(self.fc(x), dict(h=[x, x * 2]))


def test_nested_predictions():
    learn = learner(Nested())
    preds, _ = learn.get_preds()
    x = torch.cat([x for x, _ in learn.dls.valid])
    assert preds[0].shape == (6, 3) and torch.equal(preds[1]['h'][1], x * 2) and type(preds) is Nested.out
    alone = learn.predict(x[0])
    assert torch.equal(alone.hidden['h'][1], x[0] * 2) and alone.logits.shape == (3,)


class Heads(nn.Module):
    "Two inputs, and a list of two outputs"
    def __init__(self):
        super().__init__()
        self.fc = net()
    def forward(self, a, b): return [self.fc(a), self.fc(a + b)[:, :2]]


def test_one_sample_of_two_inputs_and_two_heads():
    data = [(x, x * 2, y) for x, y in batches(5)]
    learn = Learner(DataLoaders(data, data), Heads(), lambda p, t: F.cross_entropy(p[0], t))
    one, other = learn.predict((data[0][0][0], data[0][1][0]))
    assert one.shape == (3,) and other.shape == (2,)
    torch.testing.assert_close([one, other], [p[0] for p in learn.get_preds()[0]])


def test_metric_objects_are_left_alone_by_predictions():
    class Count:
        n = 0
        def reset(self): self.n = 0
        def update(self, pred, target): self.n += len(target)
        def compute(self): return self.n
    learn = learner(metrics=(count := Count()))
    learn.validate()
    learn.get_preds()
    learn.predict(torch.zeros(6))
    assert count.n == 6 and learn.validate()['Count'] == 6


class Detector(nn.Module):
    "One dict for each image, as torchvision's detectors give"
    def forward(self, images):
        return [dict(image=i.mean()[None], boxes=torch.zeros(int(i[0, 0, 0]) % 3, 4)) for i in images]


@pytest.mark.parametrize('bs', [4, 5, 3, 1])
def test_a_list_of_examples_stays_one(bs):
    "Case F01: ten images in batches of any size are ten predictions"
    data = [(torch.full((3, 4, 4), float(i)), dict(id=torch.tensor([i]))) for i in range(10)]
    dl = DataLoader(data, bs, collate_fn=lambda b: tuple(map(list, zip(*b))))
    class Frozen(Detector):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(1))
    learn = Learner(DataLoaders([], dl), Frozen(), None)
    preds, targets = learn.get_preds()
    assert len(preds) == len(targets) == 10
    assert [p['image'].item() for p in preds] == [t['id'].item() for t in targets] == list(range(10))
    assert [len(p['boxes']) for p in preds] == [i % 3 for i in range(10)]


def test_results_that_do_not_count_the_examples_are_refused():
    class Short(nn.Linear):
        def forward(self, x): return super().forward(x)[:-1]
    with pytest.raises(ValueError, match='one result for each example'): learner(Short(6, 3)).get_preds()


class Accelerator(TorchFunctionMode):
    "Copies to the CPU that are non_blocking arrive only after a synchronisation"
    def __torch_function__(self, f, types, args=(), kw=None):
        if f is torch.Tensor.to and args[0].is_meta and torch.device(args[1]).type == 'cpu':
            return torch.full(args[0].shape, float('nan') if (kw or {}).get('non_blocking') else 1.)
        return f(*args, **(kw or {}))


def test_predictions_have_arrived():
    "Case F02"
    valid = [(torch.zeros(2, 4), torch.zeros(2))]
    learn = Learner(DataLoaders([], valid), nn.Linear(4, 3), None, cbs=Device('meta'))
    with Accelerator(): got = *learn.get_preds(), learn.predict(torch.zeros(4))
    assert all((t == 1).all() for t in got) and got[2].shape == (3,)


def test_predictions_are_what_other_callbacks_made_of_them():
    def soften(learn): learn.pred = learn.pred.softmax(-1)
    preds, _ = learner(cbs=at('after_pred', soften, order=3)).get_preds()
    torch.testing.assert_close(preds.sum(-1), torch.ones(6))


def test_nothing_to_predict_for():
    learn = learner()
    learn.remove_cb(callbacks.SanityCheck)
    with pytest.raises(ValueError, match='there was no batch'): learn.get_preds([])


def test_validate_fires_its_events_only():
    seen = []
    events = [e for e in vars(Callback) if e.startswith(('before_', 'after_'))]
    log = type('Log', (Callback,), {e: lambda self, learn, e=e: seen.append(e) for e in events})()
    learn = learner(valid=(4, 2), metrics=accuracy)
    learn.model.train()
    results = learn.validate(cbs=log)
    batch = ['before_batch', 'after_pred', 'after_loss', 'after_batch']
    assert seen == ['before_validate', *batch, *batch, 'after_validate'] and set(results) == {'valid_loss', 'accuracy'}
    assert learn.model.training and learn[Recorder].rows == []
    alone = learner(valid=None)
    alone.fit(1)
    with pytest.raises(ValueError, match='dls.valid is None'): alone.validate()
    assert set(alone.row) == {'train_loss'}


def test_a_data_set_is_no_loader_and_a_stream_is_one():
    learn, (x, y) = learner(metrics=accuracy), batches(6)[0]
    ds = Dataset(x, y)
    for f in learn.validate, learn.get_preds:
        with pytest.raises(TypeError, match='a data set is no loader; pass DataLoader'): f(ds)
    class Stream(IterableDataset):
        def __iter__(self): return iter([(x, y)])
    assert learn.validate(Stream()) == learn.validate([(x, y)]) == learn.validate(DataLoader(ds, 6))


# The first mistakes (case F17)

x, y = torch.randn(8, 4), torch.zeros(8).long()


def three(): return nn.Linear(4, 3)
def loaders(*data): return DataLoaders(list(data) or [(x, y)])


@pytest.mark.parametrize('make, error, message', [
    (lambda: Learner(three(), loaders(), F.cross_entropy), TypeError, 'loaders come first'),
    (lambda: Learner(([(x, y)], [(x, y)]), three(), F.cross_entropy), TypeError, r'DataLoaders\(train, valid\)'),
    (lambda: Learner([(x, y)], three(), F.cross_entropy), TypeError, r'DataLoaders\(train, valid\)'),
    (lambda: Learner(DataLoaders(Dataset(x, y)), three(), F.cross_entropy), TypeError, 'from_datasets'),
    (lambda: Learner(DataLoaders([(x, y)], Dataset(x, y)), three(), F.cross_entropy), TypeError, 'from_datasets'),
    (lambda: Learner(loaders(), lambda x: x, F.cross_entropy), TypeError, 'nn.Module'),
    (lambda: Learner(loaders(), nn.Linear, F.cross_entropy), TypeError, r'nn.Module object, such as Net\(\)'),
    (lambda: Learner(loaders(), three(), 'cross_entropy'), TypeError, 'called with predictions and targets'),
    (lambda: Learner(loaders(), three(), nn.CrossEntropyLoss), TypeError, r'CrossEntropyLoss\(\)'),
    (lambda: Learner(loaders(), m := three(), F.cross_entropy, torch.optim.Adam(m.parameters())), TypeError,
     'learn.opt'),
    (lambda: Learner(loaders(), three(), F.cross_entropy, metrics='accuracy'), TypeError, 'a metric is a function'),
    (lambda: Learner(loaders(), three(), F.cross_entropy, cbs=['progress']), TypeError, 'made from Callback'),
    (lambda: Learner(loaders(), three(), lambda p, t: None).fit(1), TypeError, 'single number, got None'),
    (lambda: Learner(loaders(), nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(8, 3)), F.cross_entropy).fit(1),
     RuntimeError, r"layer 2, a Linear with .*weight.*\(3, 8\).* got \[\(8, 9\)\]")])
def test_the_first_mistakes_get_an_answer(make, error, message):
    with pytest.raises(error) as info: make()
    told = ' '.join([str(info.value), *getattr(info.value, '__notes__', [])])
    assert re.search(message, told), told


def test_the_layer_names_what_it_was_given_and_nothing_else():
    "No weights that it hands on, no values of its own, and no note where no layer is found"
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 8, 3)
        def forward(self, x):
            flat = x.flatten(1)
            return self.conv(x) if x.shape[1] > 1 else flat @ flat
    for given, wanted in (((2, 3, 8, 8), 'layer conv, a Conv2d'), ((2, 1, 8, 8), 'the model, a Net')):
        with pytest.raises(RuntimeError) as info: Learner(loaders((torch.zeros(given), y[:2])), Net(), None).get_preds(
            [(torch.zeros(given),)])
        note, = info.value.__notes__
        assert note.startswith(f'(in {wanted} with') and note.endswith(f'which got [{given}])')
    with pytest.raises(TypeError) as info: Learner(loaders(x), three(), F.cross_entropy).fit(1)
    assert '' not in getattr(info.value, '__notes__', [])


def test_what_is_no_mistake():
    "A dict of losses, arrays in a data set, a target without dimensions"
    Learner(loaders(), three(), lambda p, t: dict(loss=F.cross_entropy(p, t))).fit(1)
    Learner(DataLoaders(DataLoader(Dataset(x.numpy(), y.numpy()), 4)), three(), F.cross_entropy).fit(1)
    Learner(loaders((x, torch.tensor(1.))), three(), lambda p, t: (p.mean() - t)**2).fit(1)


def test_another_model_in_the_learner():
    learn = Learner(loaders(), three(), F.cross_entropy)
    learn.fit(1)
    learn.model = three()
    with pytest.raises(ValueError, match='the optimizer lacks.*reset_opt=True'): learn.fit(1)
    learn.fit(1, reset_opt=True)


@pytest.mark.parametrize('deep', [False, True])
def test_the_layer_is_named_in_a_model_of_parts(deep):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(4, 4), nn.Linear(5, 4))
        def forward(self, x): return self.inner(x) if deep else x.view(7, -1)
    learn = Learner(loaders(), nn.Sequential(nn.Linear(4, 4), Block()), F.cross_entropy)
    with pytest.raises(RuntimeError) as info: learn.fit(1)
    assert ('layer 1.inner.1, a Linear' if deep else 'layer 1, a Block') in ' '.join(info.value.__notes__)


# Files

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        self.emb, self.out, self.norm = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False), nn.BatchNorm1d(4)
        self.out.weight = self.emb.weight


def test_weights_come_back(tmp_path):
    a, b = Tied(), Tied()
    learner(a).save(tmp_path / 'm.safetensors')
    learner(b).load(tmp_path / 'm.safetensors')
    assert same(a, b) and b.out.weight is b.emb.weight
    assert b.conv.weight.is_contiguous(memory_format=torch.channels_last) and os.listdir(tmp_path) == ['m.safetensors']


def test_the_file_is_as_others_expect_it(tmp_path, monkeypatch):
    "Case F08: usual permissions, a link stays one, folders are made, `~` is home; plain names inside"
    from safetensors.torch import load_file
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.chdir(tmp_path)
    before = os.umask(0o022)
    try:
        learn = learner(loss=nn.CrossEntropyLoss())
        learn.save('w.safetensors')
        assert os.stat('w.safetensors').st_mode & 0o777 == 0o644
        os.mkdir('disk')
        os.symlink('disk/w', 'link')
        learn.save('link')
        assert os.path.islink('link') and os.stat('disk/w').st_size
        learn.save('~/models/a/w.safetensors')
        learn.load('~/models/a/w.safetensors')
        assert set(load_file('models/a/w.safetensors')) == set(learn.model.state_dict())
    finally: os.umask(before)


@pytest.mark.parametrize('other', [lambda: nn.Linear(3, 2), lambda: nn.Sequential(nn.Linear(6, 8)),
                                   lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))])
def test_another_model_is_refused_and_nothing_changes(tmp_path, other):
    learner(other()).save(tmp_path / 'm.safetensors')
    learn = learner(net())
    before = copy.deepcopy(learn.model)
    with pytest.raises(ValueError, match='does not hold the weights of this model'):
        learn.load(tmp_path / 'm.safetensors')
    assert same(learn.model, before)


@pytest.mark.parametrize('saved, own', [(True, False), (False, True)])
def test_tied_or_not_is_another_model(tmp_path, saved, own):
    def made(tied):
        model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
        if tied: model[1].weight = model[0].weight
        return learner(model)
    made(saved).save(tmp_path / 'w.safetensors')
    other = made(own)
    before = copy.deepcopy(other.model)
    with pytest.raises(ValueError, match='does not hold'): other.load(tmp_path / 'w.safetensors')
    assert same(other.model, before)


@pytest.mark.parametrize('keep', [0, 5, 100, -1])
def test_a_truncated_file_is_refused(tmp_path, keep):
    learn, path = learner(net()), tmp_path / 'm.safetensors'
    learn.save(path)
    path.write_bytes(path.read_bytes()[:keep])
    before = copy.deepcopy(learn.model)
    with pytest.raises(ValueError, match='does not hold'): learn.load(path)
    assert same(learn.model, before)
    with pytest.raises(FileNotFoundError): learn.load(tmp_path / 'none')


def test_the_old_file_is_kept_when_writing_fails(tmp_path, monkeypatch):
    learn, path = learner(net()), tmp_path / 'm.safetensors'
    learn.save(path)
    before = path.read_bytes()
    def broken(model, file):
        open(file, 'wb').write(b'half')
        raise OSError('no space left')
    monkeypatch.setattr(L, 'save_model', broken)
    with pytest.raises(OSError, match='no space'): learn.save(path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ['m.safetensors']


def test_ones_own_callbacks_stand_in_for_the_usual_ones():
    mine = Recorder()
    learn = learner(cbs=[mine, Metrics(accuracy)], metrics=())
    assert learn[Recorder] is mine and sum(isinstance(cb, Recorder) for cb in learn.cbs) == 1
