"Labels become the right numbers, mistakes are told when a block is built, and each error names its item."
import os
import pickle
import warnings
from functools import partial
from operator import itemgetter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import WeightedRandomSampler

from dlfound.datablock import (BlockLoaders, CategoryProcessor, DataBlock, FloatProcessor, ItemList,
                               MultiCategoryProcessor, collate_items, compose, describe, each, files_from_csv,
                               label_from_csv, split_by_csv)
from dlfound.files import (get_files, parent_label, read_table, split_by_grandparent, split_random,
                           split_stratified)
from dlfound.loader import DataLoader

quick = settings(max_examples=50, deadline=None)
steps = [Image.open, np.array, torch.tensor]


@pytest.fixture
def pictures(tmp_path):
    "Different small pictures of two classes in two parts"
    files = [(p, c, i) for p, m in (('train', 4), ('val', 2)) for c in ('cat', 'dog') for i in range(m)]
    for n, (part, c, i) in enumerate(files):
        to = tmp_path / f'set/{part}/{c}/{i}.png'
        to.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((6, 5), n, np.uint8)).save(to)
    return tmp_path / 'set'


usual = dict(get=get_files, split=split_by_grandparent, label=parent_label, steps=steps)
def block(**changes): return DataBlock(**usual | changes)
def fit(labels, processor=None):
    processor = processor or CategoryProcessor()
    processor.fit(labels)
    return processor


@quick
@given(st.lists(st.one_of(st.integers(-20, 20)), min_size=2, unique=True), st.booleans())
def test_numbers_are_in_their_order(labels, as_text):
    processor = fit([str(x) if as_text else torch.tensor(x).item() for x in labels])
    assert [int(x) for x in processor.vocab] == sorted(labels)
    assert [processor(x) for x in processor.vocab] == [*range(len(labels))] and processor.c_out == len(labels)


@quick
@given(st.lists(st.sets(st.sampled_from('abcde')), min_size=1, max_size=9))
def test_several_labels_equal_a_slow_loop(labels):
    vocab = sorted({x for own in labels for x in own})
    if len(vocab) < 2: return
    processor = fit([sorted(own) for own in labels], MultiCategoryProcessor())
    for own in labels: assert processor(own).tolist() == [float(x in own) for x in vocab]


def test_labels_refuse():
    for labels, word in ((['cat', 'CAT'], 'nearly'), (['a b', 'a  b'], 'nearly'), (['é', 'e\u0301'], 'nearly'),
                         ([1, 'a'], 'types'), ([.5, 1.5], 'FloatProcessor.*vocab'), (['1e3', '2'], 'FloatProcessor'),
                         ([1., 2.], 'FloatProcessor'),
                         (['a'], 'tell apart'), ([], 'tell apart'), ([['a'], ['b']], 'MultiCategory')):
        with pytest.raises(ValueError, match=word): fit(labels)
    assert fit(['1.0', '2.0'], CategoryProcessor(['2.0', '1.0']))('1.0') == 1
    assert fit([False, True]).vocab == [False, True] and fit(['class10', 'class2']).vocab == ['class10', 'class2']
    with pytest.raises(ValueError, match="'fox'.*'cat', 'dog'"): fit(['cat', 'dog'])('fox')
    for label in (float('nan'), 'inf', 'x', (1, 2), ''):
        with pytest.raises(ValueError): fit([1.], FloatProcessor())(label)
    assert fit([np.ones(3)], FloatProcessor())(torch.zeros(3)).shape == (3,)
    with pytest.raises(ValueError, match='a list'): fit(['ab'], MultiCategoryProcessor())


def test_a_class_missing_in_validation_shifts_nothing(pictures):
    for i in range(2): (pictures / f'val/cat/{i}.png').unlink()
    with pytest.raises(ValueError, match='val/cat'): block().build(pictures) # The empty folder, before all
    (pictures / 'val/cat').rmdir()
    _, valid, target = block().build(pictures)
    assert target.vocab == ['cat', 'dog'] and valid.targets == [1, 1]


def test_checkpoints_are_no_class(pictures):
    copy = pictures / 'train/.ipynb_checkpoints/0-checkpoint.png'
    copy.parent.mkdir()
    copy.write_bytes((pictures / 'train/cat/0.png').read_bytes())
    assert block().build(pictures)[2].vocab == ['cat', 'dog']


def test_a_label_of_validation_alone_is_told_at_once(pictures):
    def label(path): return 'fox' if path.parts[-3] == 'val' and path.stem == '1' else parent_label(path)
    with pytest.raises(ValueError, match=r"'fox'.*2 items, the first: .*val/cat/1\.png"):
        block(label=label).dataloaders(pictures)
    def tags(path): return [parent_label(path), label(path)]
    with pytest.raises(ValueError, match="target:.*\n.*'fox'"):
        block(label=tags, target=MultiCategoryProcessor()).build(pictures)
    for wrong in (None, '', ' ', float('nan'), torch.tensor(float('nan'))):
        with pytest.raises(ValueError, match='label:.*\n.*8 items'): block(label=lambda p: wrong).build(pictures)
    with pytest.raises(ValueError, match="label:.*\n.*ZeroDivisionError.*8 items"):
        block(label=lambda p: 1 / 0).build(pictures)
    with pytest.raises(ValueError) as e: block(label=lambda p: 'Cat ' if p.stem == '3' else 'cat').build(pictures)
    assert 'train/cat/3.png' in e.value.__notes__[0]


def test_steps_are_kept_and_one_is_enough(pictures):
    for given in (steps, tuple(steps), (f for f in steps), lambda p: torch.tensor(np.array(Image.open(p)))):
        b = block(steps=given)
        for _ in range(2): # A generator would be used up after the first sample
            train = b.build(pictures)[0]
            assert all(isinstance(x, torch.Tensor) for x, _ in train)
    assert [*ItemList('12', (f for f in [int, float]))] == [(1.,), (2.,)] and ItemList('12', int)[1] == (2,)
    for n in (1, 3):
        with pytest.raises(ValueError, match=f'got {n} for 2'): ItemList('12', int, [0] * n)


def test_a_given_vocab():
    for vocab in ('ba', ['b', 'a'], np.array(['b', 'a']), iter('ba')):
        processor = CategoryProcessor(vocab)
        for _ in range(2): assert fit(['a', 'b', 'a'], processor)('a') == 1
    with pytest.raises(ValueError, match='twice'): fit(['a', 'b'], CategoryProcessor('aba'))
    with pytest.raises(ValueError, match=r"labels \[1, 'b'\]"): fit(['a', 'c'], CategoryProcessor(['a', 1, 'b']))
    assert FloatProcessor()(3).tolist() == [3] and fit([2.], fit([(1., 2.)], FloatProcessor())).c_out == 1


@pytest.mark.parametrize('workers', [0, 1])
def test_rows_are_items(tmp_path, workers):
    table = tmp_path / 't.csv'
    table.write_text('\n'.join(['a;b;kind', *[f'{i};{i * 2};{"xy"[i % 2]}' for i in range(20)]]))
    rows = read_table(table, sep=';')
    def made(source, **changes):
        return DataBlock(**dict(get=read_table, split=partial(split_random, seed=1), label=itemgetter('kind'),
                                steps=[itemgetter('a', 'b'), partial(map, float), list, torch.tensor]) | changes
                         ).dataloaders(source, 4, num_workers=workers)
    for source in (rows, [dict(r) for r in rows]):
        dls = made(source)
        assert (dls.c_in, dls.c_out, dls.target.vocab) == (2, 2, ['x', 'y'])
        for x, y in dls.train: assert torch.equal(x[:, 0] * 2, x[:, 1]) and torch.equal(x[:, 0] % 2, y)
    (x,), = dls.test(rows[:3])
    assert x.tolist() == [[0, 0], [1, 2], [2, 4]]
    with pytest.raises(ValueError) as e: ItemList(rows, [itemgetter('kind'), float])[3]
    assert e.value.__notes__ == ["(item 3: line 5: {'a': '3', 'b': '6', 'kind': 'y'})"]
    with pytest.raises(ValueError, match="no column 'sort'; there are .*16 items, the first: line "):
        made(rows, label=itemgetter('sort'))


def test_each_mistake_once():
    def f(x): return 1 // (x % 2) if x < 9 else int('x')
    with pytest.raises(ValueError) as e: each(f, range(11), 'abcdefghijk', 'counting')
    text = str(e.value)
    assert '(5 items, the first: a)' in text and '(2 items, the first: j)' in text
    assert text.count('ZeroDivisionError') == 1
    assert each(str, [1, 2], 'ab', '') == ['1', '2']


@pytest.mark.parametrize('workers', [0, 1])
def test_a_bad_file_is_named(pictures, workers):
    path = pictures / 'train/dog/2.png'
    path.write_bytes(path.read_bytes()[:44])
    with pytest.raises(Exception) as e:
        for _ in block().dataloaders(pictures, 3, num_workers=workers).train: pass
    assert 'train/dog/2.png' in ' '.join([str(e.value), *getattr(e.value, '__notes__', [])])


def test_a_picture_of_another_size_is_named_unless_the_caller_pads(pictures):
    Image.new('L', (7, 7)).save(pictures / 'train/dog/2.png')
    with pytest.raises(ValueError, match='shapes differ') as e: [*block().dataloaders(pictures, 8).train]
    assert any('train/dog/2.png gives' in note for note in e.value.__notes__)
    padded = block().dataloaders(pictures, 8, collate_fn=list)
    assert {x.shape for batch in padded.train for x, _ in batch} == {(6, 5), (7, 7)}


def test_batches_are_those_of_the_files(pictures):
    dls = block().dataloaders(pictures, 3)
    assert isinstance(dls, BlockLoaders) and (dls.c_in, dls.c_out) == (6, 2)
    seen = {int(x[0, 0]): int(y) for xb, yb in dls.train for x, y in zip(xb, yb)}
    assert seen == {n: n // 4 for n in range(8)}
    with_workers = block().dataloaders(pictures, 3, num_workers=1)
    assert all(torch.equal(a, b) for p, q in zip(dls.valid, with_workers.valid) for a, b in zip(p, q))
    (x,), = dls.test(get_files(pictures / 'val'), 9)
    assert torch.equal(x, torch.cat([xb for xb, _ in dls.valid]))
    train = pickle.loads(pickle.dumps(dls.train.dataset))
    assert torch.equal(train[3][0], dls.train.dataset[3][0]) and len(train) == 8


def test_a_block_keeps_no_state(pictures):
    b = block()
    first = b.dataloaders(pictures)
    b.label = lambda p: p.stem in '01'
    assert b.dataloaders(pictures).target.vocab == [False, True] and first.target.vocab == ['cat', 'dog']
    assert b.target.vocab == []


def test_other_targets(pictures):
    def mask(path): return torch.tensor(np.array(Image.open(path)) > 3)
    masks = block(label=lambda p: p, target=mask).dataloaders(pictures, 8)
    xb, yb = next(iter(masks.train))
    assert torch.equal(xb > 3, yb) and masks.c_out is None
    sizes = block(label=lambda p: float(p.stem), target=FloatProcessor()).dataloaders(pictures, 8)
    assert next(iter(sizes.train))[1].shape == (8, 1) and sizes.c_out == 1
    with pytest.raises(ValueError, match='FloatProcessor.*CategoryProcessor'):
        block(label=lambda p: float(p.stem)).build(pictures)
    train, _, _ = block(split=partial(split_stratified, label=parent_label), target=lambda x: x).build(pictures)
    assert train.targets.count('cat') == train.targets.count('dog')
    sampler = WeightedRandomSampler([1., 0, 0, 0, 0, 0, 0, 0], 4)
    assert torch.cat([y for _, y in DataLoader(block().build(pictures)[0], 2, sampler=sampler)]).tolist() == [0] * 4


def test_copies_and_overlap(pictures):
    (pictures / 'val/dog/9.png').write_bytes((pictures / 'train/cat/1.png').read_bytes())
    with pytest.warns(UserWarning, match=r'train/cat/1\.png and .*val/dog/9\.png'): block().build(pictures)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        block(look_for_copies=False).build(pictures)
        DataBlock(range, split_random, lambda i: i % 2).build(20) # What is no file is not compared
    with pytest.raises(ValueError, match='both sides'): block(split=lambda items: ([0, 1], [1])).build(pictures)
    with pytest.raises(ValueError, match='needs an item'): block(split=lambda items: ([0], [])).build(pictures)


def test_tables(pictures, monkeypatch):
    files = get_files(pictures)
    rows = [f'{p.relative_to(pictures)},{parent_label(p)},{p.parts[-3] == "val"},a b' for p in files]
    table = pictures.parent / 'labels.csv'
    table.write_text('\n'.join(['file,label,is_valid,tags', *rows]))
    where = dict(file='file', root=pictures)
    made = DataBlock(partial(files_from_csv, **where), partial(split_by_csv, table=table, **where),
                     label_from_csv(table, **where), steps).dataloaders(table, 4)
    assert torch.equal(next(iter(made.valid))[0], next(iter(block().dataloaders(pictures, 4).valid))[0])
    assert label_from_csv(table, 'tags', ' ', **where)(files[0]) == ['a', 'b']
    assert label_from_csv(table, **where)(os.path.relpath(files[0])) == 'cat'

    class Frame:
        columns = ['file', 'label', 'is_valid']
        def to_dict(self, orient): return [dict(file=str(p), label=i % 2, is_valid=i > 8) for i, p in enumerate(files)]
    assert split_by_csv(files, Frame(), **where).valid == [9, 10, 11]
    here = pictures.parent / 'semicolons.csv' # Rows that were read before, relative to the current folder or to root
    here.write_text(table.read_text().replace(',', ';'), encoding='utf-16')
    read = read_table(here, encoding='utf-16', sep=';')
    assert files_from_csv(read, **where) == files and label_from_csv(read, **where)(files[0]) == 'cat'
    monkeypatch.chdir(pictures)
    assert files_from_csv(read, 'file') == files_from_csv(Frame(), 'file') == files
    with pytest.raises(ValueError, match='no row'): label_from_csv(table, **where)(pictures / 'other.png')
    with pytest.raises(TypeError, match="got 'cat'"): split_by_csv(files, table, 'label', **where)
    for extra, word in ((rows[0], 'listed twice, the first is train/cat/0.png in line 14'),
                        ('gone.png,cat,False,', 'not there.*line 14')):
        table.write_text('\n'.join(['file,label,is_valid,tags', *rows, extra]))
        with pytest.raises(ValueError, match=word): files_from_csv(table, **where)
    with pytest.raises(ValueError, match="no column \\['path'\\]"): label_from_csv(table)


def test_summary(pictures, capsys):
    block().summary(pictures, i=5)
    lines = capsys.readouterr().out.splitlines()
    names = ['get', 'split', 'label', 'target', 'item', 'open', 'array', 'tensor', 'sample', 'batch of 3']
    assert [line.split(':')[0] for line in lines] == names
    assert 'train/dog/1.png' in lines[4] and lines[5].startswith('open: picture (5, 6)') and lines[7].endswith('5 to 5')
    with pytest.raises(ZeroDivisionError) as e: block(steps=[Image.open, lambda x: 1 / 0]).summary(pictures)
    assert 'train/cat/0.png' in e.value.__notes__[0] and capsys.readouterr().out.splitlines()[-1].startswith('open: ')


def test_describe_and_compose():
    for x in (torch.tensor([True]), torch.zeros(0), np.float32(3), np.array(['a']), {}, None, [None], torch.tensor(2j)):
        assert describe(x)
    assert len(describe('x' * 999)) < 99
    for x in (torch.zeros(2, device='meta'), torch.eye(2).to_sparse(), torch.ones(2, dtype=torch.uint64),
              torch.zeros(2, 0), np.zeros((0, 2)), np.array(['2026'], 'datetime64[D]')):
        assert str(x.dtype) in describe(x)
    frame = type('Frame', (), dict(mode=lambda self: 0, size=4))() # As pandas has them
    assert 'picture' not in describe(frame)
    late, early = lambda x: x + 'b', lambda x: x + 'a'
    late.order, early.order = 5, -1
    assert compose('', [late, lambda x: x + '0', early]) == 'a0b'
    assert collate_items([(1, 2), (3, 4)])[1].tolist() == [2, 4]
    assert ItemList(['ab'], [str.upper])[0] == ('AB',) and Path(repr(ItemList([Path('a')]))[-1]) == Path('a')
