"What the scripts share: where things are, the environment of child processes, notebooks and the record of their outputs."
import hashlib
import json
import os
from pathlib import Path

root = Path(__file__).resolve().parent.parent
skip_flags = ('notest', 'slow', 'cuda')


def environment(threads: int | None = 1, **extra) -> dict[str, str]:
    "The environment for notebooks and tests: a relative mirror made absolute, `threads` threads a process (`None`: as many as there are)"
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
    found = [p for p in nbs.rglob('*.ipynb') if not any(part.startswith(('.', '_')) for part in p.relative_to(nbs).parts)]
    return sorted(found, key=lambda p: (len(p.relative_to(nbs).parts), p))


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
    return [c for c in nb['cells'] if c['cell_type'] == 'code' and source(c).strip()]


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
