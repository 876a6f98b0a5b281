"No result is ever cut, reports say the same everywhere, and a verdict follows from its conditions."
import json
from contextlib import redirect_stdout
from io import StringIO

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from dlfound import show
from dlfound.show import Report, Table, format_number, picture, verdict

values = st.one_of(st.floats(allow_nan=True), st.integers(), st.text('abc', max_size=30), st.none())
rows = st.lists(st.dictionaries(st.text('abcdefgh_', min_size=1, max_size=25), values, max_size=14), max_size=5)


@given(rows, st.integers(20, 120))
@settings(max_examples=150, deadline=None)
def test_results_are_whole_and_columns_aligned(rows, width):
    table = Table(width)
    table.rows += rows
    header, *lines = table.lines()
    assert len(lines) == len(rows) and len({len(line) for line in (header, *lines)}) == 1
    for row, line in zip(rows, lines):
        assert line.split() == [t for name in table.names() if (t := format_number(row.get(name)))]
    n = len(table.names())
    if all(len(c) <= 8 for line in table.cells()[1:] for c in line) and 9 * n - 1 <= width:
        assert len(header) <= width # Only results make a table wider than it may be
    assert table._repr_html_().count('<tr>') == len(rows) + 1


@pytest.mark.parametrize('value, text', [
    (np.float32(.25), '0.2500'), (np.float64(1e-5), '1.00e-05'), (np.int64(3), '3'), (np.array([.5]), '0.5000'),
    (torch.tensor(.25), '0.2500'), (torch.tensor([7]), '7'), (torch.tensor(.5, dtype=torch.bfloat16), '0.5000'),
    (np.bool_(True), 'True'), (np.zeros(2), '[0. 0.]'), (torch.zeros(0), 'tensor([])')])
def test_numbers_of_other_libraries(value, text):
    assert format_number(value) == text


def test_names_that_differ_at_one_end_differ_when_cut():
    for form in 'valid_accuracy_of_{}', '{}_of_valid_accuracy':
        table = Table()
        table.rows.append({form.format(i): 1. for i in range(8)})
        assert len(set(table.lines()[0].split())) == 8 and len(table.lines()[0]) <= 80


def test_text_stands_on_the_left_of_a_page():
    table = Table()
    table.rows += [dict(name='a', n=1), dict(n=2)]
    assert table._repr_html_().count('left') == 3 # Header and two rows


def test_a_table_without_rows():
    assert repr(Table()) == '' and '<tbody></tbody>' in Table()._repr_html_()


def printed(use):
    with redirect_stdout(StringIO()) as out: use(report := Report())
    return report, out.getvalue().splitlines()


def test_a_log_has_each_row_once_and_all_of_them_again_when_a_column_comes():
    def use(report):
        for row in dict(epoch=0, loss=1.), dict(epoch=1, loss=.5), dict(epoch=2, loss=.25, accuracy=.9):
            report.start(10)
            report.advance(3)
            report.say('in between', draw=lambda ax: 1 / 0)
            report.stop()
            report.add(row)
        report.say('done', last=True)
    report, lines = printed(use)
    assert [line.split() for line in lines] == [
        ['epoch', 'loss'], ['0', '1.0000'], ['1', '0.5000'],
        ['epoch', 'loss', 'accuracy'], ['0', '1.0000'], ['1', '0.5000'], ['2', '0.2500', '0.9000'], ['done']]
    assert len(report.table.rows) == 3


def test_a_status_goes_with_what_it_tells_of(monkeypatch):
    shown = []
    class Shown:
        def __init__(self, x): self.update(x)
        def update(self, x): shown.append(repr(x))
    monkeypatch.setattr(show, 'Live', Shown)
    report = Report()
    report.page = True
    report.start(10)
    report.say('batch 3')
    report.stop()
    report.stop()
    assert [text.strip() for text in shown] == ['batch 3', '']


def test_a_picture_is_a_png_and_leaves_pyplot_alone():
    import matplotlib.pyplot as plt
    before = plt.get_fignums()
    image = picture(lambda ax: ax.plot([1, 2]), (3, 2))
    assert image.data.startswith(b'\x89PNG') and plt.get_fignums() == before


def judge(holds): return verdict(paper='p', claim='c', theirs=1, ours=[2, 3], holds=holds)


@pytest.mark.parametrize('yes, no', [
    (True, False), (np.bool_(True), np.bool_(False)), (torch.tensor(True), torch.tensor(False)),
    (np.float64(2) > 1, np.float64(0) > 1)])
def test_any_truth_will_do(yes, no):
    words = [judge(h)['verdict'] for h in (yes, [yes, yes], (yes, no), [no, no], no)]
    assert words == ['reproduced', 'reproduced', 'in part', 'not at this scale', 'not at this scale']


def test_a_verdict_is_text_and_json():
    v = judge([True, False])
    data = v._repr_mimebundle_()
    assert json.loads(json.dumps(data['application/vnd.dlfound.verdict+json'])) == v
    assert data['text/plain'] == repr(v) == 'in part: p, "c"; theirs: 1, ours: [2, 3]'


@pytest.mark.parametrize('make', [
    lambda hs: dict(enumerate(hs)), set, iter, lambda hs: (h for h in hs), np.array, torch.tensor])
def test_conditions_in_anything_that_holds_them(make):
    words = {(True,): 'reproduced', (False,): 'not at this scale', (True, False): 'in part'}
    for holds, word in words.items():
        assert judge(make(holds))['verdict'] == word


@pytest.mark.parametrize('holds', [[], (), {}, np.array([], bool)])
def test_no_condition_is_refused(holds):
    with pytest.raises(ValueError, match='at least one'): judge(holds)


@pytest.mark.parametrize('holds', ['no', 1, .3, None, ['no'], [1], [None], np.float64(2), torch.tensor(2.), {'a': 'b'},
                                   [[True]]])
def test_what_is_neither_true_nor_false_is_refused(holds):
    with pytest.raises(TypeError, match='a condition is True or False, got'): judge(holds)
