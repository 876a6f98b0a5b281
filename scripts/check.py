"""Lint the notebooks, the code and what is generated from them: python scripts/check.py FOLDER.

Each check is a function of a checkout's root that returns a list of complaints, each naming the fix.
"""
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from common import is_lesson, notebooks, read, root, source
from lint_code import check_bases, check_idle, check_module_sizes, check_private, check_times, check_widths
from lint_notebooks import (check_cell_widths, check_directives, check_format, check_lesson_imports, check_lesson_sizes,
                            check_names, check_outputs, check_staircase, check_stored)
from tables import rows

bin = Path(sys.executable).parent
apart = '.venv', '.git', '__pycache__', '.hypothesis', '.ipynb_checkpoints', 'my', '_build', '_work'


def generated(tree: Path, command: list, target: str) -> list[str]:
    "What `command`, which make calls `target`, would change, found out in a copy"
    with tempfile.TemporaryDirectory() as tmp:
        copy = Path(tmp, 'copy')
        shutil.copytree(tree, copy, ignore=shutil.ignore_patterns(*apart))
        before = contents(copy)
        done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
        if done.returncode: return [f'make {target} fails: {done.stderr.strip()[-1500:]}']
        after = contents(copy)
        changed = sorted(p for p in before.keys() | after.keys() if before.get(p) != after.get(p))
        return [f'make {target} would change {p.relative_to(copy)}: run it and commit' for p in changed]


def contents(folder: Path) -> dict[Path, bytes]:
    "What every file holds, but for those that come and go by themselves"
    return {p: p.read_bytes() for p in folder.rglob('*')
            if p.is_file() and p.name != '.last_checked' and '__pycache__' not in p.parts}


def check_export(tree: Path) -> list[str]:
    "make export would change nothing"
    return generated(tree, [sys.executable, 'scripts/export.py'], 'export')


def check_clean(tree: Path) -> list[str]:
    "make clean would change nothing"
    return generated(tree, [bin / 'nbdev-clean'], 'clean')


def check_places(tree: Path) -> list[str]:
    "No file holds a path of somebody's machine"
    bad, path_like = [], re.compile(r'(?<![\w.])/(?:home|Users|root|tmp|work)/[\w.-]+/')
    places = [p for folder in ('dlfound', 'benchmarks') for p in sorted((tree / folder).rglob('*.*'))]
    for path in [*notebooks(tree), *(p for p in places if p.suffix in ('.py', '.json'))]:
        text = re.sub(r'"image/png": "[^"]*"', '', path.read_text(encoding='utf-8'))
        if m := path_like.search(text):
            bad.append(f'{path.relative_to(tree)} holds the path {m[0]}…: '
                       'print something that is the same on every machine')
    return bad


def check_front_page(tree: Path) -> list[str]:
    "README's table says what every lesson asks, and in five words what it gives; the index has the same rows"
    bad, readme = [], rows((tree / 'README.md').read_text(encoding='utf-8'))
    lessons = [p.stem for p in notebooks(tree) if is_lesson(p)]
    for name in lessons:
        _, question, gives, *_ = [*readme.get(name, []), '', '', ''][:3]
        if not question or not 1 <= len(gives.split()) <= 5:
            bad.append(f'README.md: the row of {name} lacks its question, or what it gives in one to five words')
    index = rows('\n'.join(source(c) for c in read(tree / 'nbs/index.ipynb')['cells']))
    if [*index] != lessons: bad.append('nbs/index.ipynb: its table lists other lessons than there are: run make export')
    return bad


checks = [f for name, f in globals().items() if name.startswith('check_')]


def main() -> int:
    tree, failed = Path(sys.argv[1] if len(sys.argv) > 1 else root).resolve(), 0
    for f in checks:
        bad = f(tree)
        failed += bool(bad)
        print(f'{"FAILED" if bad else "passed"}  {f.__doc__}')
        for b in bad: print('        ' + b)
    print(f'{len(checks) - failed} passed, {failed} failed')
    return min(failed, 1)


if __name__ == '__main__': sys.exit(main())
