"Notebooks and commands for tests of the frame."
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fastcore.nbio import dict2nb, write_nb

needs_git = pytest.mark.skipif(not shutil.which('git'), reason='needs git')


def lesson(module: str, cells: list[str], outputs: bool = True) -> dict:
    "A notebook that exports to `module`; its last cell has an output"
    blank = dict(metadata={}, execution_count=None)
    made = [dict(cell_type='code', id=f'{module}{i:02d}', outputs=[], source=c.splitlines(keepends=True), **blank)
            for i, c in enumerate([f'#| default_exp {module}', *cells])]
    if outputs: made[-1]['outputs'] = [dict(output_type='execute_result', data={'text/plain': ['1']}, **blank)]
    head = dict(cell_type='markdown', id=f'{module}md', metadata={}, source=[f'# {module}\n', '\n', '> small'])
    kernel = dict(display_name='python3', language='python', name='python3')
    return dict(cells=[head, *made], metadata=dict(kernelspec=kernel), nbformat=4, nbformat_minor=5)


def write(path: Path, nb: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_nb(dict2nb(nb), path)


def edit(path: Path, f) -> None:
    "Change the notebook at `path` by `f`, which may alter it in place or return another"
    nb = json.loads(path.read_text())
    write(path, f(nb) or nb)


def run(*command, cwd: Path, **env) -> subprocess.CompletedProcess:
    "Run a command without the data modes of the surrounding run"
    clean = {k: v for k, v in os.environ.items() if not k.startswith('DLFOUND_')} | {k: v for k, v in env.items()}
    command = [str(c) for c in command]
    return subprocess.run(command, cwd=cwd, env=clean, capture_output=True, text=True, stdin=subprocess.DEVNULL)


def script(tree: Path, name: str, *args, **env) -> subprocess.CompletedProcess:
    return run(sys.executable, tree / 'scripts' / name, *args, cwd=tree, PYTHONPATH=str(tree), **env)
