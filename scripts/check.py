"""Lint the notebooks, the code and what is generated from them: python scripts/check.py FOLDER.

Each check is a function of a checkout's root that returns a list of complaints, each naming the fix.
"""
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from common import is_lesson, key, manifest, module_of, notebooks, read, root, source
from lint_code import check_bases, check_module_sizes, check_private, check_times, check_widths
from lint_notebooks import (check_cell_widths, check_directives, check_format, check_lesson_imports, check_lesson_sizes,
                            check_names, check_outputs, check_staircase, check_stored)

bin = Path(sys.executable).parent


def generated(tree: Path, command: str, folder: str) -> list[str]:
    "What `command` would change in `folder`, found out in a copy"
    with tempfile.TemporaryDirectory() as tmp:
        copy = Path(tmp, 'copy')
        ignore = shutil.ignore_patterns('.venv', '.git', '__pycache__', '.hypothesis', '.ipynb_checkpoints')
        shutil.copytree(tree, copy, ignore=ignore)
        before = {p: p.read_bytes() for p in copy.rglob('*') if p.is_file()}
        done = subprocess.run([bin / command], cwd=copy, capture_output=True, text=True)
        if done.returncode: return [f'{command} fails: {done.stderr.strip()[-1500:]}']
        after = {p: p.read_bytes() for p in copy.rglob('*')
                 if p.is_file() and p.name != '.last_checked' and '__pycache__' not in p.parts}
        changed = sorted(p for p in before.keys() | after.keys() if before.get(p) != after.get(p))
        return [f'{command} would change {p.relative_to(copy)}: run make {folder} and commit' for p in changed]


def check_export(tree: Path) -> list[str]:
    "nbdev-export would change nothing"
    return generated(tree, 'nbdev-export', 'export')


def check_clean(tree: Path) -> list[str]:
    "nbdev-clean would change nothing"
    return generated(tree, 'nbdev-clean', 'clean')


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


def table(text: str) -> dict[str, list[str]]:
    "Rows of the lessons' table by notebook name"
    return {m[1]: [c.strip() for c in line.strip().strip('|').split('|')] for line in text.splitlines()
            if line.startswith('|') and (m := re.search(r'\((?:nbs/)?(\w+)\.ipynb\)', line))}


def exports(tree: Path, module: str | None) -> set[str]:
    "The names in `__all__` that a module of dlfound defines, not those that it passes on"
    path = tree / f'dlfound/{module}.py'
    text = path.read_text(encoding='utf-8') if path.exists() else ''
    found = re.search(r'__all__ = \[(.*?)\]', text, re.S)
    own = set(re.findall(r'^(?:(?:async )?def |class )?(\w+)', text, re.M))
    return set(re.findall(r"'(\w+)'", found[1])) & own if found else set()


def check_front_page(tree: Path) -> list[str]:
    "README and index list every lesson, with the names that it exports and a time that is about right"
    bad, record = [], manifest(tree)
    index = '\n'.join(source(c) for c in read(tree / 'nbs/index.ipynb')['cells'])
    for name, text in ('README.md', (tree / 'README.md').read_text(encoding='utf-8')), ('nbs/index.ipynb', index):
        rows = table(text)
        for path in notebooks(tree):
            if not is_lesson(path): continue
            row = rows.pop(path.stem, None)
            if row is None or len(row) != 4:
                bad.append(f'{name}: its table has no row for {path.stem}: add lesson, question, exports, seconds')
                continue
            differ = ', '.join(sorted(set(re.findall(r'`(\w+)`', row[2])) ^ exports(tree, module_of(read(path)))))
            if differ: bad.append(f'{name}: the row of {path.stem} differs from what it exports by {differ}')
            seconds, stated = record.get(key(path, tree), {}).get('seconds', 0), re.search(r'\d+', row[3])
            if not stated or not seconds / 2 - 5 <= int(stated[0]) <= 2 * seconds + 5:
                bad.append(f'{name}: {path.stem} says {row[3]} s, and took {seconds} s')
        bad += [f'{name}: {stem} is listed and is no lesson' for stem in rows]
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
