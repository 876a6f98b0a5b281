"""Lint the notebooks and what is generated from them: python scripts/check.py FOLDER.

Each check is a function of a checkout's root that returns a list of complaints, each naming the fix.
"""
import ast
import difflib
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from common import code_cells, hashes, is_lesson, key, manifest, notebooks, read, root, source

bin = Path(sys.executable).parent
directive = re.compile(r'^\s*#\s*\|\s*([\w-]+)')
known = {  # nbdev's, our flags, and those of Quarto that a page may want
    'default_exp', 'export', 'exporti', 'exports', 'exportd', 'exec_doc', 'hide', 'hide_line', 'hide_input', 'hide_output', 'eval', 'filter_stream',
    'notest', 'slow', 'cuda', 'fig-alt', 'fig-cap', 'label', 'echo', 'output', 'warning', 'code-fold',
}


def check_directives(tree: Path) -> list[str]:
    "Directives are spelt right and stand at the top of their cell"
    bad = []
    for path in notebooks(tree):
        for cell in code_cells(read(path)):
            in_code = False
            for line in source(cell).splitlines():
                if m := directive.match(line):
                    where = f'{key(path, tree)}, cell {cell.get("id")}: #| {m[1]}'
                    near = difflib.get_close_matches(m[1], known, 1)
                    if m[1] not in known: bad.append(f'{where} is no directive' + (f'; did you mean {near[0]}?' if near else ''))
                    elif in_code: bad.append(f'{where} stands below the first line of code, where nbdev ignores it: move it to the top')
                elif line.strip(): in_code = True
    return bad


def check_format(tree: Path) -> list[str]:
    "Notebooks have unique cell ids, nbformat 4.5 and the python3 kernel"
    bad = []
    for path in notebooks(tree):
        nb, name = read(path), key(path, tree)
        ids = [c.get('id') for c in nb['cells']]
        if None in ids or len(ids) != len(set(ids)): bad.append(f'{name}: cells without ids, or with the same id: run make clean')
        if (nb['nbformat'], nb['nbformat_minor']) < (4, 5): bad.append(f'{name}: nbformat {nb["nbformat"]}.{nb["nbformat_minor"]} has no cell ids: run make clean')
        if nb['metadata'].get('kernelspec', {}).get('name') != 'python3': bad.append(f'{name}: its kernel is not python3: set it in JupyterLab and run make clean')
    return bad


def check_width(tree: Path) -> list[str]:
    "No exported line is wider than 120 columns, unless a hash makes it so"
    bad = []
    for path in notebooks(tree):
        for cell in code_cells(read(path)):
            if not re.search(r'^#\|\s*export', source(cell), re.M): continue
            for line in source(cell).splitlines():
                if len(line) <= 120 or re.search(r'[0-9a-f]{40}', line): continue
                bad.append(f'{key(path, tree)}, cell {cell.get("id")}: {len(line)} columns, wrap it at 120: {line.strip()[:60]}…')
    return bad


def check_outputs(tree: Path) -> list[str]:
    "Saved outputs are there, whole, and were made by the code that stands above them"
    bad, record = [], manifest(tree)
    for path in notebooks(tree):
        nb, name = read(path), key(path, tree)
        cells = {c['id']: c for c in code_cells(nb) if 'id' in c}
        if not cells: continue
        saved, again = record.get(name, {}).get('cells'), f'run make run NB={path.stem.split("_")[0] if is_lesson(path) else path.stem}'
        if saved is None: bad.append(f'{name}: nothing records that its outputs were saved by make run: {again}'); continue
        stale = [i for i, h in hashes(nb).items() if saved.get(i) != h]
        if stale: bad.append(f'{name}: cells {", ".join(stale)} have changed since their outputs were saved: {again}')
        if gone := set(saved) - set(cells): bad.append(f'{name}: cells {", ".join(sorted(gone))} were removed since the outputs were saved: {again}')
        if not any(c['outputs'] for c in cells.values()): bad.append(f'{name}: no cell has an output: {again}')
        for i, c in cells.items():
            if re.search(r'^#\|\s*slow', source(c), re.M) and not c['outputs']: bad.append(f'{name}: slow cell {i} has no output: run make full')
            pictures = any(kind.startswith('image/') for o in c['outputs'] for kind in o.get('data', {}))
            if re.search(r'^#\|\s*fig-alt', source(c), re.M) and not pictures: bad.append(f'{name}: cell {i} describes a picture and has none: {again}')
            if any(o['output_type'] == 'error' for o in c['outputs']): bad.append(f'{name}: the saved output of cell {i} is an error: {again}')
    return bad + [f'outputs.json names {n}, which is no notebook: run make run for any notebook' for n in record if not (tree / 'nbs' / n).exists()]


def module_of(nb: dict) -> str | None:
    for c in code_cells(nb):
        if m := re.search(r'^#\|\s*default_exp:?\s+(\w+)', source(c), re.M): return m[1]
    return None


def check_names(tree: Path) -> list[str]:
    "Lesson NN_topic exports to dlfound/topic.py, and no module outlives its notebook"
    bad = []
    for path in notebooks(tree):
        topic = path.stem.split('_', 1)[-1] if is_lesson(path) else path.stem
        module = module_of(read(path))
        if module and module != topic: bad.append(f'{key(path, tree)}: exports to {module}, and by its name should to {topic}: change #| default_exp')
    for path in sorted((tree / 'dlfound').glob('*.py')):
        if path.name in ('__init__.py', '_modidx.py'): continue
        m = re.search(r'File to edit: \.\./(\S+\.ipynb)', path.read_text(encoding='utf-8'))
        if not m: bad.append(f'dlfound/{path.name}: names no notebook it was made from: remove it')
        elif not (tree / m[1]).exists(): bad.append(f'dlfound/{path.name}: made from {m[1]}, which is gone: remove it')
    return bad


def imported(nb: dict) -> set[str]:
    "Modules of dlfound that the notebook's cells import, those flagged to be skipped included"
    found = set()
    for c in code_cells(nb):
        code = '\n'.join('' if re.match(r'\s*[%!]', line) else line for line in source(c).splitlines())
        try: tree = ast.parse(code)
        except SyntaxError: continue
        for n in ast.walk(tree):
            if isinstance(n, ast.Import): found |= {a.name.split('.')[1] for a in n.names if a.name.startswith('dlfound.')}
            elif isinstance(n, ast.ImportFrom) and n.module == 'dlfound': found |= {a.name for a in n.names}
            elif isinstance(n, ast.ImportFrom) and (n.module or '').startswith('dlfound.'): found.add(n.module.split('.')[1])
    return found


def check_staircase(tree: Path) -> list[str]:
    "A lesson imports from tools and from lessons with a smaller number only, so every prefix of the course stands alone"
    bad, made_by = [], {m: p for p in notebooks(tree) if (m := module_of(read(p)))}
    for path in notebooks(tree):
        for module in sorted(imported(read(path))):
            other = made_by.get(module)
            if other is None or other == path or not (is_lesson(path) or is_lesson(other) or key(path, tree) != 'index.ipynb'): continue
            if is_lesson(other) and is_lesson(path) and other.stem > path.stem:
                bad.append(f'{key(path, tree)} imports dlfound.{module}, which the later {key(other, tree)} makes: move what it needs to an earlier lesson')
            if is_lesson(other) and path.parent.name == 'tools':
                bad.append(f'{key(path, tree)} is a tool and imports dlfound.{module} of a lesson: tools import tools only')
    return bad


def generated(tree: Path, command: str, folder: str) -> list[str]:
    "What `command` would change in `folder`, found out in a copy"
    with tempfile.TemporaryDirectory() as tmp:
        copy = Path(tmp, 'copy')
        shutil.copytree(tree, copy, ignore=shutil.ignore_patterns('.venv', '.git', '__pycache__', '.hypothesis', '.ipynb_checkpoints'))
        before = {p: p.read_bytes() for p in copy.rglob('*') if p.is_file()}
        done = subprocess.run([bin / command], cwd=copy, capture_output=True, text=True)
        if done.returncode: return [f'{command} fails: {done.stderr.strip()[-1500:]}']
        after = {p: p.read_bytes() for p in copy.rglob('*') if p.is_file() and p.name != '.last_checked' and '__pycache__' not in p.parts}
        changed = sorted(str(p.relative_to(copy)) for p in before.keys() | after.keys() if before.get(p) != after.get(p))
        return [f'{command} would change {p}: run make {folder} and commit' for p in changed]


def check_export(tree: Path) -> list[str]:
    "nbdev-export would change nothing"
    return generated(tree, 'nbdev-export', 'export')


def check_clean(tree: Path) -> list[str]:
    "nbdev-clean would change nothing"
    return generated(tree, 'nbdev-clean', 'clean')


def check_places(tree: Path) -> list[str]:
    "No file holds a path of somebody's machine"
    bad, path_like = [], re.compile(r'(?<![\w.])/(?:home|Users|root|tmp|work)/[\w.-]+/')
    for path in [*notebooks(tree), *sorted((tree / 'dlfound').glob('*.py')), *sorted((tree / 'benchmarks').rglob('*.*'))]:
        text = re.sub(r'"image/png": "[^"]*"', '', path.read_text(encoding='utf-8')) if path.suffix in ('.py', '.ipynb', '.json') else ''
        if m := path_like.search(text): bad.append(f'{path.relative_to(tree)} holds the path {m[0]}…: print something that is the same on every machine')
    return bad


def table(text: str) -> dict[str, list[str]]:
    "Rows of the lessons' table by notebook name"
    return {m[1]: [c.strip() for c in line.strip().strip('|').split('|')] for line in text.splitlines()
            if line.startswith('|') and (m := re.search(r'\((?:nbs/)?(\w+)\.ipynb\)', line))}


def check_front_page(tree: Path) -> list[str]:
    "README and index list every lesson, with names that it exports and a time that is about right; the picture is lesson 00's own"
    bad, record = [], manifest(tree)
    index = '\n'.join(source(c) for c in read(tree / 'nbs/index.ipynb')['cells'])
    for name, rows in ('README.md', table((tree / 'README.md').read_text(encoding='utf-8'))), ('nbs/index.ipynb', table(index)):
        for path in notebooks(tree):
            if not is_lesson(path): continue
            row = rows.pop(path.stem, None)
            if row is None or len(row) != 4: bad.append(f'{name}: its table has no row (lesson, question, exports, seconds) for {path.stem}: add one'); continue
            module = tree / f'dlfound/{module_of(read(path))}.py'
            public = set(re.findall(r"'(\w+)'", re.search(r'__all__ = \[(.*?)\]', module.read_text(encoding='utf-8'), re.S)[1])) if module.exists() else set()
            listed = set(re.findall(r'`(\w+)`', row[2]))
            if listed != public: bad.append(f'{name}: the row of {path.stem} differs from what it exports by {", ".join(sorted(listed ^ public))}')
            seconds, stated = record.get(key(path, tree), {}).get('seconds', 0), re.search(r'\d+', row[3])
            if not stated or not seconds / 2 - 5 <= int(stated[0]) <= 2 * seconds + 5: bad.append(f'{name}: {path.stem} says {row[3]} s, and took {seconds} s')
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
