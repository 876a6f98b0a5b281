"Averages by what batches count, results of all examples at once, what is recorded, and what is shown."
import os
import re
import subprocess
import sys
from collections import namedtuple
from functools import partial

import pytest
import torch
from loops import at, batches, learner, loss_func, net, raiser
from torch import nn
from torch.nn import functional as F

from dlfound.learner import CancelEpoch, CancelFit, DataLoaders, Learner, Metric, Metrics, Progress, Recorder
from dlfound.metrics import check_weight, concat, label_weight
from dlfound.minibatch import accuracy

pytestmark = pytest.mark.filterwarnings('ignore::UserWarning')


# Results of several batches

Pair = namedtuple('Pair', 'a b')


def test_structures_are_joined_part_by_part():
    parts = [Pair(torch.ones(n, 2), dict(h=[torch.ones(n), torch.zeros(n, 1)])) for n in (4, 4, 2)]
    joined = concat(parts, [4, 4, 2])
    assert type(joined) is Pair and joined.a.shape == (10, 2) and [len(t) for t in joined.b['h']] == [10, 10]


@pytest.mark.parametrize('sizes', [(4, 4, 2), (4, 4), (2, 2, 1), (1,)])
def test_lists_of_examples_stay_lists(sizes):
    parts = [[dict(boxes=torch.ones(i % 3, 4)) for i in range(n)] for n in sizes]
    assert len(concat(parts, sizes)) == sum(sizes)
    texts = [[f'{i}' for i in range(n)] for n in sizes]
    assert concat(texts, sizes) == [t for part in texts for t in part]
    ragged = [[torch.ones(i + 1) for i in range(n)] for n in sizes if n > 1]
    assert not ragged or len(concat(ragged, [len(p) for p in ragged])) == sum(len(p) for p in ragged)


def test_two_heads_and_a_batch_of_two():
    "A list of as many tensors as examples is still one of heads, if all batches agree"
    heads = [[torch.ones(n, 3), torch.zeros(n, 3)] for n in (2, 2)]
    assert [t.shape for t in concat(heads, [2, 2])] == [(4, 3), (4, 3)]


def test_no_example_at_all():
    assert concat([[]], [0]) == []


@pytest.mark.parametrize('parts, sizes', [([torch.ones(3), torch.ones(3)], [4, 4]), ([torch.tensor(1.)] * 2, [4, 4]),
                                          ([[torch.ones(4), torch.ones(3)]], [4]), ([None], [4]), ([['a']], [2])])
def test_results_are_counted_against_examples(parts, sizes):
    with pytest.raises(ValueError, match='give one result for each example'): concat(parts, sizes)


# Metrics

def test_metrics_are_averaged_by_size_or_computed_from_all():
    worst = Metric(lambda p, t: (p.argmax(1) == t).float().min(), 'worst', average=False)
    count = Metric(lambda p, t: len(t), 'count', average=False)
    learn = learner(metrics=[accuracy, worst, count], valid=(7, 2))
    learn.fit(1)
    (x1, y1), (x2, y2) = learn.dls.valid
    x, y = torch.cat([x1, x2]), torch.cat([y1, y2])
    right, row = (learn.model(x).argmax(1) == y).float(), learn[Recorder].rows[0]
    assert row['accuracy'] == pytest.approx(right.mean().item()) and row['worst'] == right.min() and row['count'] == 9
    assert row['valid_loss'] == pytest.approx(loss_func(learn.model(x), y).item())


def test_averages_take_the_weight():
    learn = learner(metrics=accuracy, valid=(4, 4), weight=lambda learn: 1 + 2 * (learn.iter == 0))
    learn.fit(1)
    a, b = (accuracy(learn.model(x), y).item() for x, y in learn.dls.valid)
    assert learn.row['accuracy'] == pytest.approx((3 * a + b) / 4)


@pytest.mark.parametrize('loss', [nn.CrossEntropyLoss(weight=torch.tensor([1., 50., 1.])),
                                  nn.CrossEntropyLoss(reduction='sum'), nn.MSELoss(reduction='sum')], ids=str)
def test_metrics_know_no_class_weights_and_no_sums(loss):
    "The weight that is right for the loss, as check_weight advises it"
    data, values = batches(7, 2), Metric(lambda p, t: p.sum() / len(p), 'values')
    if isinstance(loss, nn.MSELoss): data = [(x, x[:, :3]) for x, _ in data]
    def weight(learn): return label_weight(learn.loss_func, learn.target())
    learn = Learner(DataLoaders(data, data), net(), loss, metrics=values, weight=weight)
    got, x = learn.validate()['values'], torch.cat([x for x, _ in data])
    assert got == pytest.approx(float(learn.model(x).sum() / 9), abs=1e-6)


def test_a_sum_is_told_also_of_a_target_that_is_no_tensor():
    with pytest.warns(UserWarning, match='take no sums'): check_weight(nn.MSELoss(reduction='sum'), dict(y=1), 4)


def test_a_batch_that_counts_nothing_is_left_out():
    (x, y), (x2, y2) = batches(4, 4)
    kept = Metric(lambda p, t: (p.argmax(1) == t)[t != -100].float().mean(), 'kept')
    dls = DataLoaders([(x, y)], [(x, y), (x2, torch.full_like(y2, -100))])
    def weight(learn): return label_weight(learn.loss_func, learn.target())
    learn = Learner(dls, net(), F.cross_entropy, metrics=kept, weight=weight)
    row = learn.validate()
    assert row['valid_loss'] == pytest.approx(float(F.cross_entropy(learn.model(x), y)))
    assert row['kept'] == pytest.approx(float(accuracy(learn.model(x), y)))


def f1(p, t):
    p, t = p.argmax(1) == 1, t == 1
    return 2 * (p & t).sum() / max(int(p.sum() + t.sum()), 1)


def test_f1_of_all_predictions_is_not_the_mean_of_the_batches():
    learn = learner(metrics=Metric(f1, average=False), valid=(9, 3, 5))
    learn.fit(1)
    preds, targets = learn.get_preds()
    assert learn[Recorder].rows[0]['f1'] == pytest.approx(float(f1(preds, targets)))


class F1:
    "An object as torchmetrics and torcheval have them (case F21)"
    moved = None
    def __init__(self): self.reset()
    def reset(self): self.parts = []
    def update(self, pred, target): self.parts.append((pred, target))
    def compute(self): return f1(*(torch.cat(t) for t in zip(*self.parts)))
    def to(self, device): self.moved = device
    def __call__(self, pred, target): return f1(pred, target)


def test_objects_with_update_and_compute_are_asked_once():
    metric = F1()
    learn = learner(metrics=metric, valid=(9, 3, 5))
    learn.fit(2)
    assert metric.moved == torch.device('cpu') and len(metric.parts) == 3
    assert learn[Recorder].rows[1]['F1'] == pytest.approx(float(f1(*learn.get_preds())))


def test_torchmetrics_itself():
    torchmetrics = pytest.importorskip('torchmetrics')
    metric = torchmetrics.F1Score('multiclass', num_classes=3, average='macro')
    learn = learner(metrics=metric, valid=(9, 3, 5))
    learn.fit(1)
    got, (preds, targets) = learn.row[type(metric).__name__], learn.get_preds()
    metric.reset()
    assert got == pytest.approx(float(metric(preds, targets)))


def test_metrics_need_validation_and_names_of_their_own():
    with pytest.raises(ValueError, match='validation set'): learner(valid=None, metrics=accuracy).fit(1)
    with pytest.raises(ValueError, match='accuracy'): learner(metrics=[accuracy, accuracy])
    with pytest.raises(ValueError, match='time'): learner(metrics=Metric(accuracy, 'time'))
    learn = learner(valid=None)
    learn.fit(2)
    assert [set(r) for r in learn[Recorder].rows] == [{'epoch', 'train_loss'}] * 2


class Half:
    "An object that nothing can be asked of"
    def update(self, pred, target): pass


@pytest.mark.parametrize('wrong', ['accuracy', ['accuracy'], 3, F1, [None], [dict(a=accuracy)], [{1}], Half()])
def test_what_is_no_metric(wrong):
    told = 'a metric is a function.*make an object' if wrong is F1 else 'a metric is a function.*pass the function'
    with pytest.raises(TypeError, match=told): learner(metrics=wrong)


def test_names_and_shapes_of_metrics():
    assert Metric(partial(f1, t=5)).name == 'f1'
    learn = learner(metrics=Metric(lambda p, t: accuracy(p, t)[None], 'one'))
    assert learn.validate()['one'] == pytest.approx(learn.validate(cbs=Metrics(accuracy))['accuracy'])


def test_numbers_that_are_none():
    right = Metric(lambda p, t: (p.argmax(1) == t).float(), 'right')
    with pytest.raises(ValueError, match='take its mean') as info: learner(metrics=right).fit(1)
    assert '(in the metric right)' in info.value.__notes__
    late = Metric(lambda p, t: 1 / 0, 'late', average=False)
    with pytest.raises(ZeroDivisionError) as info: learner(metrics=late).fit(1)
    assert '(in the metric late)' in info.value.__notes__


# What is recorded

def test_learning_rates_in_a_tensor_are_recorded_one_by_one():
    learn = learner(opt=lambda p, lr: torch.optim.SGD(p, lr=torch.tensor(lr)))
    learn.fit(1, cbs=at('after_step', lambda learn: learn.opt.param_groups[0]['lr'].mul_(.5)))
    assert learn[Recorder].lrs == pytest.approx([.1, .05, .025])


def test_learning_rates_are_those_of_the_steps():
    "Also if a scheduler of PyTorch moves on after each step"
    learn = learner(train=[4] * 5)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(learn.opt, .5)
    used = []
    class Step(torch.nn.Module): pass
    learn.opt.register_step_pre_hook(lambda opt, *_: used.append(opt.param_groups[0]['lr']))
    learn.fit(1, cbs=at('after_step', lambda learn: scheduler.step()))
    assert learn[Recorder].lrs == used == pytest.approx([.1 * .5**i for i in range(5)])


def test_the_learning_rate_is_that_of_the_last_group():
    learn = learner(opt=lambda p, lr: torch.optim.SGD([dict(params=[q], lr=lr * (1 + (q.ndim < 2))) for q in p]))
    learn.fit(1, lr=.05)
    assert learn[Recorder].lrs == pytest.approx([.05] * 3) and learn.opt.param_groups[0]['lr'] != .05


def test_parts_that_are_no_numbers_are_left_out():
    def parts(p, t): return dict(loss=F.cross_entropy(p, t), logits=p, none=None, one=p.mean()[None], two=2)
    learn = learner(loss=parts)
    learn.fit(1)
    assert set(learn.row) == {f'{k}_{name}' for k in ('train', 'valid') for name in ('loss', 'one', 'two')}


def test_losses_are_numbers_after_an_epoch():
    learn = learner()
    learn.fit(1)
    assert all(type(v) is float for v in learn[Recorder].seen)


def test_the_record_comes_back():
    one, two = learner(), learner()
    one.fit(2)
    two[Recorder].load_state_dict(one[Recorder].state_dict())
    for name in 'losses', 'lrs', 'rows', 'ends': assert getattr(two[Recorder], name) == getattr(one[Recorder], name)
    assert all(type(v) is float for v in two[Recorder].losses)


@pytest.mark.parametrize('event, has', [('before_epoch', set()), ('before_train', set()),
                                        ('before_validate', {'train_loss'})])
def test_a_pass_that_never_ran_has_no_loss(event, has):
    "Neither that of the epoch before, nor that of the other pass, nor that of a fit that was left"
    def leave(learn):
        if learn.epoch == 1: raise CancelEpoch
    learn = learner()
    learn.fit(2, cbs=at(event, leave))
    assert [set(row) - {'epoch'} for row in learn[Recorder].rows] == [{'train_loss', 'valid_loss'}, has]
    learn.fit(1, cbs=at('after_batch', raiser(CancelFit)))
    learn.fit(2, cbs=at(event, leave), start=(1, 0))
    assert set(learn[Recorder].rows[-1]) - {'epoch'} == has


def test_the_plot_has_losses_and_validation():
    import matplotlib
    matplotlib.use('agg')
    learn = learner(train=[4] * 100)
    learn.fit(2)
    ax = learn[Recorder].plot()
    raw, smooth, valid = ax.lines
    assert list(valid.get_xdata()) == [100, 200] and len(raw.get_ydata()) == 200
    assert torch.tensor(smooth.get_ydata()).diff().abs().mean() < torch.tensor(raw.get_ydata()).diff().abs().mean()
    assert list(valid.get_ydata()) == [row['valid_loss'] for row in learn[Recorder].rows]
    Recorder().plot()


# Progress

fitting = '''
import time, torch
from torch import nn
from dlfound.learner import *
from dlfound.minibatch import accuracy
data = [(torch.randn(4, 6), torch.randint(3, (4,)))] * 6
class Slow(Callback):
    def after_batch(self, learn): time.sleep(.03)
learn = Learner(DataLoaders(data, data), nn.Linear(6, 3), nn.CrossEntropyLoss(), metrics=accuracy,
                cbs=[Slow(), Progress({args})])
learn.fit(3)
'''
columns = ['epoch', 'train_loss', 'valid_loss', 'accuracy', 'time']


def check_table(lines):
    assert lines[0].split() == columns and [line.split()[0] for line in lines[1:]] == ['0', '1', '2'], lines
    assert all(len(line) <= 80 for line in lines)
    assert all(re.fullmatch(r'\d\.\ds', line.split()[-1]) for line in lines[1:])


def test_progress_in_a_pipe_is_plain_lines():
    command = [sys.executable, '-W', 'ignore', '-c', fitting.format(args='')]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr and '\r' not in done.stdout and '\x1b' not in done.stdout, done
    check_table(done.stdout.splitlines())


def test_progress_in_a_terminal_is_a_bar_that_goes_away():
    pty = pytest.importorskip('pty')
    import fcntl
    import struct
    import termios
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack('4H', 24, 80, 0, 0)) # a new one has no columns at all
    command = [sys.executable, '-W', 'ignore', '-c', fitting.format(args='')]
    child = subprocess.Popen(command, stdout=theirs, stderr=theirs, stdin=theirs)
    os.close(theirs)
    out = b''
    while True:
        try: part = os.read(ours, 4096)
        except OSError: break
        if not part: break
        out += part
    assert child.wait() == 0
    os.close(ours)
    text = out.decode()
    assert '%|' in text
    shown = [line.split('\r')[-1].replace('\x1b[A', '') for line in text.replace('\r\n', '\n').split('\n')]
    check_table([line for line in shown if line.strip()])


@pytest.mark.parametrize('plot', [False, True])
def test_progress_on_a_page_leaves_one_table(plot):
    nbformat, nbclient = pytest.importorskip('nbformat'), pytest.importorskip('nbclient')
    source = 'import warnings; warnings.simplefilter("ignore")\n' + fitting.format(args=f'plot={plot}, every=.05')
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    nbclient.NotebookClient(nb, timeout=60, kernel_name='python3').execute()
    outputs = nb.cells[0].outputs
    tables, pictures = ([o for o in outputs if kind in o.get('data', {})] for kind in ('text/html', 'image/png'))
    kinds = [o.output_type for o in outputs]
    assert len(tables) == 1 and len(pictures) == plot and len(outputs) == 1 + plot, kinds
    assert 'batch' not in tables[0]['data']['text/html']
    check_table(tables[0]['data']['text/plain'].splitlines())


def test_a_plot_needs_a_recorder():
    learn = learner(cbs=Progress(plot=True))
    learn.remove_cb(Recorder)
    with pytest.raises(ValueError, match='plot=True needs a Recorder'): learn.fit(1)


def test_the_time_of_an_epoch(monkeypatch):
    for seconds, shown in (.26, '0.3s'), (59.97, '1:00'), (119.9, '1:59'), (3661, '61:01'):
        learn = learner()
        def late(learn, seconds=seconds): learn[Progress].began -= seconds
        monkeypatch.setattr('time.monotonic', lambda: 0.)
        learn.fit(1, cbs=at('after_validate', late))
        assert learn[Progress].report.table.rows[0]['time'] == shown


def test_without_a_pause_every_batch_is_shown(monkeypatch):
    "Also by a clock that is coarser than a batch is long"
    said = []
    monkeypatch.setattr('time.monotonic', lambda: 0.)
    monkeypatch.setattr(Progress, 'place', lambda self, learn: said.append((learn.training, learn.iter)))
    learner(cbs=Progress(every=0)).fit(1)
    assert said == [(True, 0), (True, 1), (True, 2), (False, 0), (False, 1)]


def test_no_progress(capsys):
    learn = learner(progress=False)
    learn.fit(1)
    assert not capsys.readouterr().out and not any(isinstance(cb, Progress) for cb in learn.cbs)


def test_many_columns_cut_no_number(capsys):
    metrics = [Metric(lambda p, t, i=i: -12345.678 * 10**i, f'a_metric_of_a_long_name_{i}') for i in range(14)]
    learn = learner(metrics=metrics)
    learn.fit(1)
    header, row = capsys.readouterr().out.splitlines()[-2:]
    assert row.split()[3:-1] == [f'{learn.row[m.name]:.2e}' for m in metrics] and len(header) == len(row)


def test_metrics_alone_in_a_loop():
    from dlfound.loop import TrainingLoop
    loop = TrainingLoop(DataLoaders(batches(4), batches(4)), net(), loss_func, cbs=Metrics(accuracy))
    loop.fit(1)
    assert set(loop.row) == {'accuracy'}


def test_validation_alone_shows_nothing(capsys):
    learn = Learner(DataLoaders([], batches(4)), nn.Linear(6, 3), loss_func)
    assert set(learn.validate()) == {'valid_loss'} and not capsys.readouterr().out


@pytest.mark.parametrize('dtype', [torch.uint8, torch.int16, torch.int32])
def test_labels_of_any_whole_type_are_looked_up(dtype):
    weight, labels = torch.rand(200), torch.tensor([3, 1, 1, 0, 156 if dtype == torch.uint8 else 199])
    for f in nn.CrossEntropyLoss(weight), nn.NLLLoss(weight, ignore_index=1):
        assert label_weight(f, labels.to(dtype)) == label_weight(f, labels)
        assert label_weight(f, labels.to(dtype), each=True) == label_weight(f, labels, each=True)
    assert label_weight(F.cross_entropy, labels.to(dtype)) == 5 # As a byte, −100 would be 156
    pixels = labels.view(5, 1, 1).expand(5, 2, 2)
    assert label_weight(nn.CrossEntropyLoss(weight), pixels.to(dtype)) == pytest.approx(4 * float(weight[labels].sum()))
