"""What the benchmarks share: one thread, interleaved repeats, a description of the machine, a table, a JSON file.

A script imports this module before torch and numpy, so that the number of threads is set before they start:

    from common import compare, row, save
    t = compare({'ours': f, 'peer': g})
    save('topic', [row('a step', t['ours'], t['peer'], goal='<= 1.05')])
"""
import os

for _name in ('OMP', 'MKL', 'OPENBLAS', 'NUMEXPR', 'VECLIB_MAXIMUM'): os.environ.setdefault(f'{_name}_NUM_THREADS', '1')

import json
import platform
import re
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from math import isnan
from pathlib import Path
from statistics import median, quantiles

import torch

from dlfound.matmul import Timing, _block

results_folder = Path(__file__).resolve().parent / 'results'


def compare(
    fs: dict[str, Callable[[], object]], # What to time, by name; each is called without arguments
    repeat: int = 9, # Blocks of each; they take turns, so that a disturbance hits them all
    min_time: float = .05, # Seconds a block takes at least; one call where a call takes longer
) -> dict[str, Timing]: # Median and half the interquartile range, in seconds a call
    "Time several functions in interleaved blocks, after a warm-up that also finds out how many calls make a block"
    calls = {}
    for name, f in fs.items():
        _block(f, 1)
        n = 1
        while (took := _block(f, n)) * n < min_time: n = max(2 * n, int(1.2 * min_time / max(took, 1e-9)))
        calls[name] = n
    blocks = {name: [] for name in fs}
    for i in range(repeat):
        for name in list(fs)[::-1 if i % 2 else 1]: blocks[name].append(_block(fs[name], calls[name]))
    def spread(b):
        if len(b) < 2: return float('nan')
        low, _, high = quantiles(b, n=4, method='inclusive')
        return (high - low) / 2
    return {name: Timing(median(b), spread(b)) for name, b in blocks.items()}


def cpu_model() -> str:
    "The processor's name for itself"
    try: found = re.search(r'^model name\s*:\s*(.+)$', Path('/proc/cpuinfo').read_text(), re.M)
    except OSError: found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def machine(*packages: str) -> dict:
    "The machine and the versions, with nothing that names its owner; `packages` are the peers measured"
    def installed(name):
        try: return version(name)
        except PackageNotFoundError: return None
    gpu = {'gpu': torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return dict(cpu=cpu_model(), vector_unit=torch.backends.cpu.get_cpu_capability(), cores=os.cpu_count(),
                threads=torch.get_num_threads(), **gpu,
                system=f'{platform.system()} {platform.machine()}', python=platform.python_version(),
                versions={name: installed(name) for name in ('torch', 'numpy', *packages)})


def row(
    what: str, # What is measured
    ours: Timing | float, # Our figure: seconds from `compare`, or any number
    peer: Timing | float, # The peer's, of the same kind
    goal: str = '', # As in '<= 1.05' or '>= 4', about the ratio; empty: none
    invert: bool = False, # Make the ratio a speed-up, the peer's over ours
    **details, # Anything that helps to read the figure: sizes, rates
) -> dict:
    "One line of a result: both figures, their ratio, the goal and whether it is met"
    x, y = (t.median if isinstance(t, Timing) else float(t) for t in (ours, peer))
    ratio = y / x if invert else x / y
    met = None
    if goal:
        m = re.fullmatch(r'(<=|>=)\s*([\d.]+)', goal)
        if not m: raise ValueError(f"a goal reads '<= 1.05' or '>= 4', got {goal!r}")
        met = ratio <= float(m[2]) if m[1] == '<=' else ratio >= float(m[2])
    def figures(t):
        if not isinstance(t, Timing): return float(t)
        return dict(median_s=t.median, spread_s=None if isnan(t.spread) else t.spread)
    return dict(what=what, ours=figures(ours), peer=figures(peer), ratio=ratio, goal=goal or None, met=met, **details)


def show(rows: list[dict]) -> None:
    "Print what was measured as a small table"
    def text(v):
        if not isinstance(v, dict): return f'{v:.4g}'
        return repr(Timing(v['median_s'], float('nan') if v['spread_s'] is None else v['spread_s']))
    lines = [('what', 'ours', 'peer', 'ratio', 'goal', '')]
    for r in rows:
        met = {True: 'met', False: 'MISSED', None: ''}[r['met']]
        lines.append((r['what'], text(r['ours']), text(r['peer']), f'{r["ratio"]:.3g}', r['goal'] or '-', met))
    first, *widths = [max(map(len, column)) for column in zip(*lines)]
    for what, *cells in lines:
        print('  '.join([what.ljust(first), *(cell.rjust(w) for cell, w in zip(cells, widths))]).rstrip())


def save(
    name: str, # The script's name; results go to results/<name>.json
    rows: list[dict], # From `row`
    packages: tuple[str, ...] = (), # Peers whose versions to record beside torch and numpy
    **extra, # Whatever else the reader of the file should have
) -> Path: # The file written
    "Print the rows, and write them with the machine's description"
    show(rows)
    results_folder.mkdir(exist_ok=True)
    path = results_folder / f'{name}.json'
    def rounded(v):
        if isinstance(v, float): return float(f'{v:.4g}')
        if isinstance(v, dict): return {k: rounded(x) for k, x in v.items()}
        return [rounded(x) for x in v] if isinstance(v, (list, tuple)) else v
    text = json.dumps(rounded(dict(machine=machine(*packages), results=rows, **extra)), indent=1, ensure_ascii=False)
    path.write_text(text + '\n', encoding='utf-8')
    return path
