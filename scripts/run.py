"""Run notebooks from top to bottom, as Run All does, and save their outputs, cleaned.

Or save nothing: with --seeds they run under other seeds, with --check as they are, with --start-method as on systems
where worker processes begin in another way. A notebook that fails, or that ran on stand-in data, is left as it was.
With DLFOUND_FULL=1 stored results are computed anew, except under other seeds.
"""
import argparse
import ast
import base64
import multiprocessing
import os
import re
import sys
import time
from pathlib import Path

import nbformat
from fastcore.nbio import dict2nb, write_nb
from IPython.core.inputtransformer2 import TransformerManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbdev.clean import clean_nb

from common import environment, hashes, key, manifest, notebooks, read, root, save_manifest
from tables import write_tables

stood_in = '''
import sys
_data = sys.modules.get('dlfound.data')
if _data: print(*(name for name, standin in _data.used().items() if standin))
'''
seeders = {'manual_seed', 'seed', 'default_rng', 'RandomState', 'Random'}


class Reseed(ast.NodeTransformer):
    "Add an offset to every seed: `manual_seed(n)`, `seed(n)`, `default_rng(n)`, and any argument `seed=n`"
    def __init__(self, offset: int): self.offset, self.n = offset, 0

    def shift(self, node: ast.expr) -> ast.expr:
        if isinstance(node, ast.Constant) and node.value is None: return node
        self.n += 1
        return ast.BinOp(node, ast.Add(), ast.Constant(self.offset))

    def visit_Call(self, node: ast.Call) -> ast.Call:
        self.generic_visit(node)
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, 'id', '')
        if name in seeders and node.args: node.args[0] = self.shift(node.args[0])
        for k in node.keywords:
            if k.arg == 'seed': k.value = self.shift(k.value)
        return node


def reseed(code: str, offset: int) -> tuple[str, int]:
    "`code` with its seeds shifted by `offset`, and how many there were; directives at the top are kept"
    directives = [line for line in code.splitlines() if re.match(r'\s*#\s*\|', line)]
    change = Reseed(offset)
    tree = change.visit(ast.parse(TransformerManager().transform_cell(code)))
    if not change.n: return code, 0
    end = ';' if code.rstrip().endswith(';') else ''
    return '\n'.join([*directives, ast.unparse(ast.fix_missing_locations(tree)) + end]), change.n


def find(wanted: list[str]) -> list[Path]:
    "Notebooks by number, name or path"
    every = notebooks()
    if not wanted: sys.exit('say which notebooks: make run NB=00, or NB="00 01", or NB=all')
    if wanted == ['all']: return every
    found = []
    for w in wanted:
        stem = w.removesuffix('.ipynb').removeprefix('nbs/')
        hits = [p for p in every if stem in (key(p).removesuffix('.ipynb'), p.stem, p.stem.split('_')[0])]
        there = ', '.join(key(p).removesuffix('.ipynb') for p in every)
        if not hits: sys.exit(f'no notebook is called {w!r}; there are: {there}')
        found += hits
    return found


def execute(path: Path, offset: int = 0, start_method: str | None = None) -> tuple[dict, float, int, list[str]]:
    "The executed notebook, the seconds it took, the number of seeds shifted, and the sets that had stand-ins"
    nb = nbformat.read(path, as_version=4)
    seeds = 0
    for c in nb.cells if offset else ():
        if c.cell_type == 'code' and not re.search(r'^#\|\s*export', c.source, re.M): # The library's seeds stay
            c.source, n = reseed(c.source, offset)
            seeds += n
    client = NotebookClient(nb, timeout=7200, kernel_name='python3', resources={'metadata': {'path': str(path.parent)}},
                            extra_arguments=['--log-level=ERROR']) # No word about its sockets for every notebook

    def extra(code: str) -> str:
        nb.cells.append(nbformat.v4.new_code_cell(code))
        client.execute_cell(nb.cells[-1], len(nb.cells) - 1)
        return ''.join(o.get('text', '') for o in nb.cells.pop().outputs)

    start = time.time()
    with client.setup_kernel(env=environment(DLFOUND_FULL='0') if offset else environment()):
        if start_method: extra(f'__import__("multiprocessing").set_start_method({start_method!r}, force=True)')
        for i, c in enumerate(nb.cells): client.execute_cell(c, i)
        seconds = time.time() - start
        stood = extra(stood_in).split()
    return nb, seconds, seeds, stood


def joined(outputs: list[dict]) -> list[dict]:
    "As JupyterLab would save them: neighbouring pieces of a stream are one, and an empty stream is none"
    kept = []
    for o in outputs:
        if kept and o.get('name') == kept[-1].get('name') and {o['output_type'], kept[-1]['output_type']} == {'stream'}:
            kept[-1] = kept[-1] | {'text': ''.join(kept[-1]['text']) + ''.join(o['text'])}
        elif o.get('text') != '': kept.append(o)
    return kept


def save(path: Path, nb: dict, seconds: float) -> None:
    "Write the cleaned notebook, its labelled figures and its line in the manifest, whose seconds are of a plain run"
    clean_nb(nb)
    for c in nb['cells']:
        if 'outputs' in c: c['outputs'] = joined(c['outputs'])
    write_nb(dict2nb(nb), path)
    record = {k: v for k, v in manifest().items() if (root / 'nbs' / k).exists()}
    old = record.get(key(path), {})
    if is_set('DLFOUND_FULL'): seconds = old.get('seconds', seconds)
    save_manifest(record | {key(path): dict(seconds=round(seconds), cells=hashes(read(path)))})
    for c in nb['cells']:
        label = re.search(r'^#\|\s*label:\s*(fig-[\w-]+)', c['source'], re.M)
        for o in c.get('outputs', []) if label else ():
            if png := o.get('data', {}).get('image/png'):
                (root / 'nbs/images').mkdir(exist_ok=True)
                (root / f'nbs/images/{label[1]}.png').write_bytes(base64.b64decode(png))


def is_set(name: str) -> bool:
    return os.environ.get(name, '').lower() not in ('', '0', 'false')


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--seeds', type=int, default=0, help='run under this many other seeds, save nothing')
    p.add_argument('--check', action='store_true', help='run as they are, save nothing')
    p.add_argument('--start-method', choices=multiprocessing.get_all_start_methods(),
                   help='how worker processes begin; save nothing')
    p.add_argument('notebooks', nargs='*')
    a = p.parse_args()
    saving = not (a.seeds or a.check or a.start_method)
    if is_set('DLFOUND_STANDIN') and saving:
        sys.exit('DLFOUND_STANDIN is set, and saved outputs come from real data only: unset it '
                 '(make seeds and make test work with it)')
    failed = 0
    for path in find(a.notebooks):
        for offset in [1000 * (i + 1) for i in range(a.seeds)] or [0]:
            what = key(path) + (f', seeds + {offset}' if offset else '')
            if a.start_method: what += f', workers by {a.start_method}'
            try: nb, seconds, seeds, stood = execute(path, offset, a.start_method)
            except CellExecutionError as e:
                failed += 1
                print(f'FAILED  {what}; nothing saved\n{e}', file=sys.stderr)
                continue
            if saving and stood:
                failed += 1
                print(f'REFUSED {what}: it ran on the stand-in for {", ".join(stood)}; '
                      'saved outputs come from real data only: set DLFOUND_MIRROR to a folder that has the archives, '
                      'or connect to the network. Nothing saved', file=sys.stderr)
                continue
            if saving:
                save(path, nb, seconds)
                write_tables()
            shifted = f', {seeds} seeds shifted' if offset else ''
            print(f'{"saved" if saving else "passed"}  {what}: {seconds:.0f} s{shifted}')
    return min(failed, 1)


if __name__ == '__main__': sys.exit(main())
