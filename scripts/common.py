"What the scripts share: where things are, the environment of child processes, notebooks, the record of their outputs."
import ast
import hashlib
import json
import os
import re
from pathlib import Path

root = Path(__file__).resolve().parent.parent


def environment(threads: int | None = 1, **extra) -> dict[str, str]:
    "The environment for notebooks and tests: the mirror absolute, `threads` threads a process (`None`: all there are)"
    env = dict(os.environ)
    env.pop('MPLBACKEND', None) # With another than the notebook's own there would be no pictures
    if env.get('DLFOUND_MIRROR'): env['DLFOUND_MIRROR'] = os.path.abspath(os.path.expanduser(env['DLFOUND_MIRROR']))
    else: env.pop('DLFOUND_MIRROR', None)
    if threads:
        for name in ('OMP', 'MKL', 'OPENBLAS', 'NUMEXPR', 'VECLIB_MAXIMUM'): env[f'{name}_NUM_THREADS'] = str(threads)
    return env | extra


def notebooks(tree: Path = root) -> list[Path]:
    "All notebooks of `tree`, lessons first"
    nbs = tree / 'nbs'
    found = {p: p.relative_to(nbs).parts for p in nbs.rglob('*.ipynb')}
    shown = [p for p, parts in found.items() if not any(part.startswith(('.', '_')) for part in parts)]
    return sorted(shown, key=lambda p: (len(found[p]), p))


def key(path: Path, tree: Path = root) -> str:
    return path.relative_to(tree / 'nbs').as_posix()


def is_lesson(path: Path) -> bool:
    "Lessons begin with two digits: 00_matmul, 04a_schedule"
    return path.name[:2].isdigit()


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding='utf-8'))


def source(cell: dict) -> str:
    return ''.join(cell['source'])


def code_cells(nb: dict) -> list[dict]:
    "The cells of code that somebody wrote: not the install line that make export puts there"
    return [c for c in nb['cells'] if c['cell_type'] == 'code' and source(c).strip() and not generated(c)]


def generated(cell: dict) -> str | None:
    "What `make export` calls the cell, if it made it"
    return cell['metadata'].get('nbdev', {}).get('generated')


def parsed(cell: dict) -> ast.Module:
    "The syntax tree of a code cell without its magics; an empty one if the rest is no Python"
    try: return ast.parse(re.sub(r'^[ \t]*[%!].*', '', source(cell), flags=re.M))
    except SyntaxError: return ast.Module([], [])


def module_of(nb: dict) -> str | None:
    "The module that a notebook exports to"
    for c in code_cells(nb):
        if m := re.search(r'^#\|\s*default_exp:?\s+(\w+)', source(c), re.M): return m[1]
    return None


def hashes(nb: dict) -> dict[str, str]:
    "A hash of each code cell, by cell id"
    return {c['id']: hashlib.sha256(source(c).encode()).hexdigest()[:12] for c in code_cells(nb)}


def manifest(tree: Path = root) -> dict:
    "What `make run` recorded when it saved outputs: by notebook, the cells' hashes and the seconds it took"
    path = tree / 'nbs/outputs.json'
    return read(path) if path.exists() else {}


def save_manifest(record: dict, tree: Path = root) -> None:
    text = json.dumps(dict(sorted(record.items())), indent=1) + '\n'
    (tree / 'nbs/outputs.json').write_text(text, encoding='utf-8')
