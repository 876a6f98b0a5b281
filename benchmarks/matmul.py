"""Matrix product, one thread: torch's `@` against numpy's from 512 to 2048, and the rungs of lesson 00 against `@`.

Run it as `python benchmarks/matmul.py`; it takes about a minute and needs torch and numpy.
"""
from operator import matmul

from common import compare, row, save

import numpy as np
import torch

from dlfound.matmul import matmul_broadcast, matmul_einsum, matmul_elementwise, matmul_lists, matmul_loops


def gflops(n: int, k: int, m: int, seconds: float) -> float:
    return 2 * n * k * m / seconds / 1e9


def squares(sizes: tuple[int, ...]) -> list[dict]:
    "torch against numpy, square float32 matrices"
    rows = []
    for n in sizes:
        a, b = torch.randn(n, n), torch.randn(n, n)
        x, y = a.numpy(), b.numpy()
        t = compare({'torch': lambda: a @ b, 'numpy': lambda: x @ y}, repeat=9)
        rates = {f'{name}_gflops': gflops(n, n, n, s.median) for name, s in t.items()}
        rows.append(row(f'torch @, {n} × {n}, against numpy', t['torch'], t['numpy'], **rates))
    return rows


def rungs(n: int, k: int, m: int) -> list[dict]:
    "The products of lesson 00 against `@`"
    a, b = torch.rand(n, k), torch.randn(k, m)
    fs = dict(loops=matmul_loops, lists=matmul_lists, elementwise=matmul_elementwise, broadcast=matmul_broadcast,
              einsum=matmul_einsum)
    t = compare({name: lambda f=f: f(a, b) for name, f in dict(fs, matmul=matmul).items()}, repeat=7)
    def against(name):
        rate = gflops(n, k, m, t[name].median)
        return row(f'matmul_{name}, {n}×{k} by {k}×{m}, against @', t[name], t['matmul'], gflops=rate)
    return [against(name) for name in fs]


if __name__ == '__main__':
    torch.manual_seed(0)
    rows = rungs(5, 784, 10) + squares((512, 1024, 2048))
    numpy_blas = np.show_config(mode='dicts')['Build Dependencies']['blas']['name']
    save('matmul', rows, numpy_blas=numpy_blas, torch_blas='MKL' if torch.backends.mkl.is_available() else 'other')
