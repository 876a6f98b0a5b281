"Lists, splits and tables are the same on every machine, keep what they promise, and say what is wrong with a file."
import copy
import csv
import os
import pickle
import random
import subprocess
import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dlfound.files import (Split, check_split, find_copies, find_leaks, get_files, parent_label, read_table,
                           split_by_func, split_by_grandparent, split_by_group, split_fold, split_random,
                           split_stratified)

root = Path(__file__).resolve().parent.parent
names = st.lists(st.tuples(st.sampled_from('abc'), st.integers(0, 99)), min_size=4, max_size=40, unique=True)
quick = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def paths(pairs, base='data'): return [Path(base, c, f'{i}.jpg') for c, i in pairs]
def sides(items, split): return [{items[i].parts[-2:] for i in side} for side in split]


def make(folder, *files, text=''):
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text or name)
    return folder


ways = {'random': split_random,
        'stratified': lambda items, **k: split_stratified(items, lambda p: p.parts[-2] < 'b', **k),
        'group': lambda items, **k: split_by_group(items, lambda p: int(p.stem) % 5, **k),
        'fold': lambda items, **k: split_fold(items, 1, 3, **k)}


@pytest.mark.parametrize('way', ways)
@quick
@given(names, st.randoms(use_true_random=False), st.integers(0, 2**40))
def test_splits_do_not_depend_on_order_place_or_global_seed(way, pairs, rand, seed):
    again = rand.sample(pairs, len(pairs))
    items, others = paths(pairs), paths(again, '/elsewhere/and/deeper')
    try: split = ways[way](items, seed=seed)
    except ValueError as e: # A class of one item, or one group
        assert 'two' in str(e) or 'folds go' in str(e)
        return
    random.seed(rand.random()), torch.manual_seed(rand.randrange(99))
    before = random.getstate(), torch.get_rng_state()
    assert sides(items, split) == sides(others, ways[way](others, seed=seed))
    assert random.getstate() == before[0] and torch.equal(torch.get_rng_state(), before[1])
    assert all(split) and sorted(split.train + split.valid) == [*range(len(items))]
    assert split.train == sorted(split.train) and split.valid == sorted(split.valid)


@quick
@given(st.lists(st.integers(0, 5), min_size=2, max_size=60), st.floats(.01, .99), st.integers(0, 9))
def test_promises_of_groups_and_classes(values, share, seed):
    n, counts = len(values), Counter(values)
    items = range(n)
    if len(counts) > 1:
        split = split_by_group(items, values.__getitem__, share, seed)
        assert not {values[i] for i in split.train} & {values[i] for i in split.valid}
        as_tensors = split_by_group(items, lambda i: torch.tensor(values[i]), share, seed)
        as_names = split_by_group(items, lambda i: f'patient {values[i]}', share, seed)
        assert split == as_tensors == as_names == split_by_group(items, lambda i: np.int64(values[i]), share, seed)
        assert abs(len(split.valid) - share * n) <= max(counts.values()) # No farther off than a group
        folds = [split_fold(items, f, 2, seed, values.__getitem__) for f in range(2)]
        assert sorted(folds[0].valid + folds[1].valid) == [*items]
        assert all(not {values[i] for i in f.train} & {values[i] for i in f.valid} for f in folds)
    if min(counts.values()) > 1:
        held = Counter(values[i] for i in split_stratified(items, values.__getitem__, share, seed).valid)
        assert all(1 <= held[v] < c and abs(held[v] - share * c) <= 1 for v, c in counts.items())
    held = len(split_random(items, share, seed).valid)
    assert 1 <= held < n and abs(held - share * n) <= 1


def test_splits_are_those_of_other_versions_and_processes():
    assert split_random(range(10), .3, seed=1) == ([1, 2, 3, 4, 5, 6, 7], [0, 8, 9]) # random() is promised to stay
    code = ('from dlfound.files import *; print(split_by_group([f"{c}/{i}" for c in "abcdef" for i in range(3)], '
            'parent_label, seed=3).valid)')
    run = [subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=root, check=True,
                          env=os.environ | dict(PYTHONHASHSEED=str(n), RANK=str(n))).stdout for n in (1, 2)]
    assert run[0] == run[1] != ''


def test_splits_refuse():
    for share in (0, 1, 20, -.1, float('nan')):
        for f in (split_random, lambda items, s: split_by_group(items, lambda i: i, s),
                  lambda items, s: split_stratified(items, lambda i: 0, s)):
            with pytest.raises(ValueError, match='share between 0 and 1'): f(range(9), share)
    for seed in (None, .5, '1'):
        with pytest.raises(TypeError, match='whole number'): split_random(range(9), seed=seed)
    for items in ([], [1]):
        with pytest.raises(ValueError, match='two items'): split_random(items)
    for answer in ('valid', 1, 0., [True], 'False'):
        with pytest.raises(TypeError): split_by_func(range(3), lambda i: answer)
    for group in (lambda i: None, lambda i: float('nan'), lambda i: torch.ones(2), lambda i: [i]):
        with pytest.raises((ValueError, TypeError, RuntimeError)) as e: split_by_group(range(3), group)
        assert '(asked about 0)' in e.value.__notes__
    with pytest.raises(ValueError, match='no others'): split_by_grandparent(['train/a/1', 'val/a/1', 'test/a/1'])
    for fold, k in ((-1, 3), (3, 3), (0, 1), (0, 9)):
        with pytest.raises(ValueError, match='folds go'): split_fold(range(8), fold, k)
    with pytest.raises(TypeError, match='from 0 on, got -1'): split_random(range(9), seed=-1) # Would be that of 1
    for split in (([0], [0]), ([0], []), ([0], [5]), ([-1], [0]), ([0], [4]), ([0], [1.7]), ([False], [True]),
                  (torch.tensor([True, False]), torch.tensor([False, True])), (np.array([True]), np.array([False]))):
        with pytest.raises(ValueError): check_split(['a', 'b', 'c', 'd', 'a'], split)
    assert check_split('ab', (torch.tensor([0]), np.array([1]))) == Split([0], [1])
    assert split_by_func(range(3), lambda i: np.bool_(i == 1)) == ([0, 2], [1])
    assert split_random(range(9), seed=np.int64(3)) == split_random(range(9), seed=3)


@contextmanager
def other_order(monkeypatch, seed):
    real = os.scandir
    @contextmanager
    def scandir(path):
        with real(path) as entries: found = sorted(entries, key=lambda e: e.name)
        random.Random(seed).shuffle(found)
        yield iter(found)
    with monkeypatch.context() as m:
        m.setattr(os, 'scandir', scandir)
        yield


def test_listing_is_the_same_everywhere(tmp_path, monkeypatch):
    make(tmp_path, *[f'{c}/{d}{i}.jpg' for c in ('b', 'a', 'a.b') for d in ('', 'x/', '.hidden/') for i in (10, 2)])
    (tmp_path / 'a/link').symlink_to(tmp_path / 'b')
    (tmp_path / 'c').mkdir()
    make(tmp_path / '.store', 'deep/3.jpg')
    (tmp_path / 'c/one').symlink_to(tmp_path / '.store/deep')
    (tmp_path / 'c/two').symlink_to(tmp_path / '.store/deep')
    (tmp_path / 'c/up').symlink_to(tmp_path)
    (tmp_path / 'a/z.jpg').symlink_to(tmp_path / 'b/2.jpg')
    (tmp_path / 'a/y.jpg').symlink_to(tmp_path / '.store/deep/3.jpg')
    lists = []
    for seed in range(6):
        with other_order(monkeypatch, seed): lists.append(get_files(tmp_path, '.jpg'))
    assert all(found == lists[0] for found in lists)
    shown = [str(p.relative_to(tmp_path)) for p in lists[0]]
    assert shown == sorted(shown, key=lambda p: p.split('/'))
    plain = {f'{c}/{d}{i}.jpg' for c in ('b', 'a', 'a.b') for d in ('', 'x/') for i in (10, 2)}
    assert set(shown) == plain | {'c/one/3.jpg'}


def test_listing_looks_where_it_should(tmp_path, monkeypatch):
    base = make(tmp_path / '.hidden root', 'train/a/1.JPG', 'train/a/2.tar.gz', 'val/a/3.jpg', '5.jpg',
                '.ipynb_checkpoints/a/4.jpg')
    def found(*args, **kwargs): return [p.name for p in get_files(*args, **kwargs)]
    assert found(base) == ['5.jpg', '1.JPG', '2.tar.gz', '3.jpg'] # A hidden folder above plays no part
    assert found(base, 'jpg') == found(base, ['.JPG']) == ['5.jpg', '1.JPG', '3.jpg']
    assert found(base, ('tar.gz',), allow_empty=True) == ['2.tar.gz']
    assert found(base, recurse=False) == ['5.jpg']
    assert found(base, include='val') == found(base, include=['val']) == ['3.jpg']
    assert found(base, include=('val', 'train')) == ['1.JPG', '2.tar.gz', '3.jpg']
    assert found(base / 'train/a', recurse=False) == ['1.JPG', '2.tar.gz']
    monkeypatch.chdir(base)
    assert get_files('train', '.jpg') == [Path('train/a/1.JPG')] and get_files('.', recurse=False) == [Path('5.jpg')]
    monkeypatch.setenv('HOME', str(base))
    assert get_files('~/val') == [base / 'val/a/3.jpg']
    for args in (('nowhere',), ('5.jpg',), ('.', None, True, 'tain'), ('.', None, True, ['train', 'test'])):
        with pytest.raises(NotADirectoryError, match='has \\['): get_files(*args)
    with pytest.raises(ValueError, match="'.jpg': 1"): get_files('val', '.png')
    (base / 'val/b').mkdir()
    with pytest.raises(ValueError, match='val/b.*allow_empty'): get_files('val')
    assert found('val', allow_empty=True) == ['3.jpg'] and parent_label('val/a/3.jpg') == 'a'


@quick
@given(st.lists(st.tuples(st.text('aé"\n,; ', max_size=4), st.text('ab,\r\n"', max_size=4)), min_size=1, max_size=6),
       st.booleans())
def test_tables_are_read_as_written(tmp_path, rows, mark):
    path = tmp_path / 't.csv'
    with open(path, 'w', newline='', encoding='utf-8-sig' if mark else 'utf-8') as f:
        csv.writer(f).writerows([('x', 'y'), *rows])
    found = read_table(path, ['x', 'y'])
    assert [(r['x'], r['y']) for r in found] == rows
    assert found[0].where == 'line 2' and len({r.where for r in found}) == len(rows)


def test_tables_refuse(tmp_path):
    path = tmp_path / 't.csv'
    for text, word in ((b'a,b\n1,2\n3\n', 'line 3 with 1'), (b'a,b\n\n1,2,3\n', 'line 3 with 3'),
                       (b'a,a\n1,2\n', "\\['a'\\]"),
                       (b'a,c\n1,2\n', "no column \\['b'\\]; there are \\['a', 'c'\\]"),
                       (b'a,b\n', 'no row'), (b'', 'no column'),
                       (b'a,b\n1,"2\n3,4\n', 'from line 2 on'), (b'a,b\n1,2\n3,"4"5\n', 'from line 3 on'),
                       (b'a,b\n1,2\n\xff,3\n', 'line 3')):
        path.write_bytes(text)
        with pytest.raises(ValueError, match=word): read_table(path, ('a', 'b'))
    path.write_bytes(b'a,b\n1,\xe9\n')
    assert read_table(path, 'b', encoding='latin-1')[0]['b'] == 'é'


def test_rows_know_their_line_and_columns(tmp_path):
    path = tmp_path / 'a table.csv'
    for sep, text in ((';', 'a;b\n1,5;x\n2,5;y\n'), ('\t', 'a\tb\n1,5\tx\n2,5\ty\n')):
        path.write_text(text)
        rows = read_table(path, 'b', sep=sep)
        assert [(r['a'], r['b']) for r in rows] == [('1,5', 'x'), ('2,5', 'y')]
        with pytest.raises(ValueError, match='say sep='): read_table(path, 'b') # More fields than the header has
        path.write_text(text.replace(',', '.'))
        with pytest.raises(ValueError, match='say sep='): read_table(path, 'b')
    for again in (rows, copy.deepcopy(rows), pickle.loads(pickle.dumps(rows)), iter(rows)):
        assert [r.where for r in read_table(again, ('a', 'b'))] == ['line 2', 'line 3']
    plain = read_table([dict(a=1), dict(a=2)], 'a')
    assert plain == [dict(a=1), dict(a=2)] and str(plain[1]) == "row 1: {'a': 2}" and plain[0].get('b') is None
    with pytest.raises(KeyError, match="no column 'c'; there are \\['a', 'b'\\]"): rows[0]['c']
    for source, word in (([dict(a=1)], "no column \\['b'\\]"), ([], 'no column')):
        with pytest.raises(ValueError, match=word): read_table(source, 'b')
    with pytest.raises(ValueError, match='no row'): read_table([])
    with pytest.raises(ValueError) as e: split_by_group(rows, lambda r: None)
    assert e.value.__notes__ == ["(asked about line 2: {'a': '1,5', 'b': 'x'})"]


def test_data_frames(tmp_path):
    pandas = pytest.importorskip('pandas')
    frame = pandas.DataFrame(dict(path=['1.jpg', '2.jpg'], label=[3, 4]))
    assert [dict(r) for r in read_table(frame, 'label')] == frame.to_dict('records')
    with pytest.raises(ValueError, match='more than once'): read_table(pandas.concat([frame, frame], axis=1))


@quick
@given(st.lists(st.sampled_from([b'', b'x' * 5000, b'x' * 4999 + b'y', b'y' + b'x' * 4999, b'ab', b'ba']), max_size=8))
def test_copies(tmp_path, contents):
    items = [tmp_path / str(i) for i in range(len(contents))]
    for path, content in zip(items, contents): path.write_bytes(content)
    expected = [own for c in dict.fromkeys(contents) if len(own := [i for i, d in enumerate(contents) if d == c]) > 1]
    assert sorted(find_copies(items)) == sorted(expected)
    arrays = [np.frombuffer(c, np.uint8) for c in contents]
    assert sorted(find_copies(arrays)) == sorted(find_copies([torch.tensor(a) for a in arrays])) == sorted(expected)
    split = Split([*range(0, len(items), 2)], [*range(1, len(items), 2)])
    both = {contents[i] for i in split.train} & {contents[i] for i in split.valid}
    leaks = find_leaks(items, split)
    assert leaks == find_leaks(items, (split.train, split.valid))
    assert {contents[a] for a, _ in leaks} == both and len(leaks) == len(both)
    assert all(a in split.train and b in split.valid and contents[a] == contents[b] for a, b in leaks)


def test_copies_of_what_cannot_be_compared():
    with pytest.raises(AttributeError, match="dict.*shape"): find_copies([{}, {}])
    tensors = torch.ones(2, requires_grad=True), torch.ones(2), torch.ones(2, dtype=torch.float64)
    assert find_copies(tensors) == [[0, 1]]
