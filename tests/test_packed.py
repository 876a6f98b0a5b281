"""The format of checkpoints, where a page has no room."""
import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dlfound import packed
from dlfound.packed import Damaged, load_packed, pack, save_packed, unpack

leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
keys = st.text(max_size=3) | st.integers() | st.booleans()
trees = st.recursive(leaves, lambda x: st.lists(x, max_size=3) | st.tuples(x, x) | st.dictionaries(keys, x, max_size=3),
                     max_leaves=12)


def equal(a, b):
    if type(a) is not type(b): return False
    if isinstance(a, float): return a == b and math.copysign(1, a) == math.copysign(1, b) or a != a and b != b
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, dict): return list(a) == list(b) and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, torch.Tensor):
        alike = a.dtype == b.dtype and a.stride() == b.stride() and a.shape == b.shape
        return alike and torch.equal(a.cpu(), b.cpu())
    if isinstance(a, np.ndarray): return a.dtype == b.dtype and np.array_equal(a, b)
    return a == b


def back(x): return unpack(*pack(x))


@settings(max_examples=150)
@given(trees)
def test_everything_comes_back(x): assert equal(back(x), x)


@pytest.mark.parametrize('x', [{'$tensor': 1}, {'$items': [], 2: 3}, {1: {'a': (1, 2)}, '1': 2},
                               {True: 0, 'b': {None: 1}}], ids=str)
def test_dollars_and_odd_keys(x): assert equal(back(x), x)


@pytest.mark.parametrize('dtype', [
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.complex64,
    torch.complex128, torch.float8_e4m3fn])
def test_tensors_come_back(dtype, tmp_path):
    made = torch.randn(2, 3, 4, 4, dtype=torch.float64).to(dtype)
    narrow = torch.zeros(4, 3, 1, 1).to(dtype).to(memory_format=torch.channels_last)
    tensors = [made, made.to(memory_format=torch.channels_last), made[:, 1], made[..., ::2], made.transpose(0, 1),
               made[0, 0, 0, 0], made[:0], torch.zeros(3, 0, 2, dtype=dtype), narrow]
    save_packed(tmp_path / 'x', tensors)
    wide = torch.Tensor.float if 'float8' in str(dtype) else lambda t: t
    for a, b in zip(tensors, load_packed(tmp_path / 'x')):
        assert (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())
        assert torch.equal(wide(a), wide(b))
    expanded = made[:, :1].expand(2, 3, 4, 4)
    assert torch.equal(wide(back(expanded)), wide(expanded)) and back(expanded).is_contiguous()


def test_numpy_and_generators_come_back():
    states = np.random.get_state(), np.random.default_rng(3).bit_generator.state, random.getstate()
    for x in *states, np.float32(.1).item(), np.arange(3, dtype='uint32'): assert equal(back(x), x)
    assert back(np.float64(.1)) == .1 and back(np.int64(3)) == 3 and back(torch.Size([1, 2])) == (1, 2)
    for bad in {1, 2}, object(), torch.float32, torch.eye(2).to_sparse():
        with pytest.raises(TypeError, match='state.a'): pack(dict(state=dict(a=bad)))


def test_tied_tensors_are_stored_once():
    t = torch.randn(5)
    text, tensors = pack(dict(a=t, b=t, c=t.view(5), d=t[1:]))
    assert list(tensors) == ['a', 'd'] and text.count('"$tensor": "a"') == 3


def test_names_do_not_clash():
    a, b, z = torch.zeros(2), torch.ones(2), torch.tensor([1 + 1j])
    own = {'$content': a, 'b': b}, {'__metadata__': a}
    for x in *own, {1: a, '1': b}, {'a.b': a, 'a': {'b': b}}, {'.a': a, 'a': b}, [z, z.conj()]:
        assert str(back(x)) == str(x)
    assert '__metadata__' not in pack({'__metadata__': a})[1]


def test_arrays():
    for x in np.zeros((0, 3)), np.arange(6.).reshape(2, 3), np.array(['a', 'bc']), np.array(True):
        assert np.array_equal(back(x), x) and back(x).shape == x.shape and back(x).dtype == x.dtype
    dates, long = np.array(['2026-01-01'], 'M8[D]'), np.zeros(2, 'longdouble')
    for x in np.array([1j]), dates, np.array([b'a']), np.zeros(2, 'f4,i4'), np.array([{}]), long:
        with pytest.raises(TypeError, match='state.x is'): pack(dict(state=dict(x=x)))
        assert packed.fingerprint(x) is None


@pytest.mark.filterwarnings('ignore:The PyTorch API of nested tensors')
def test_tensors_without_numbers():
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    for x in nested, torch.empty(2, device='meta'), torch.eye(2).to_sparse(): assert packed.fingerprint(x) is None


def test_one_bit_anywhere(tmp_path):
    "Is `Damaged`, but in the two places that say whose file it is"
    save_packed(tmp_path / 'x', dict(a=torch.arange(3.), b='é'))
    raw, told = (tmp_path / 'x').read_bytes(), []
    for i in range(len(raw)):
        for bit in 1, 128:
            (tmp_path / 'x').write_bytes(raw[:i] + bytes([raw[i] ^ bit]) + raw[i + 1:])
            with pytest.raises(ValueError) as e: load_packed(tmp_path / 'x')
            if e.type is not Damaged: told.append(str(e.value))
    assert all('is no checkpoint' in text or 'has format' in text for text in told) and len(told) < 30


def test_a_long_record(tmp_path):
    "Losses of a long fit are a tensor in the file, and its header stays small"
    losses = [i / 7 for i in range(300_000)] + [math.inf, math.nan]
    save_packed(tmp_path / 'x', dict(losses=losses, text='x' * 200_000))
    got, raw = load_packed(tmp_path / 'x'), (tmp_path / 'x').read_bytes()
    assert equal(got['losses'], losses) and got['text'] == 'x' * 200_000
    assert int.from_bytes(raw[:8], 'little') < 1000
