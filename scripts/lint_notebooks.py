"Lints of notebooks: each is a function of a checkout's root that returns a list of complaints, each naming the fix."
import ast
import difflib
import re
from pathlib import Path

from IPython.core.inputtransformer2 import TransformerManager

from common import code_cells, hashes, is_lesson, key, manifest, module_of, notebooks, parsed, read, source

directive = re.compile(r'^\s*#\s*\|\s*([\w-]+)')
known = { # nbdev's, and those of Quarto that a page may want
    'default_exp', 'export', 'exporti', 'exports', 'exportd', 'exec_doc', 'hide', 'hide_line', 'hide_input',
    'hide_output', 'filter_stream', 'fig-alt', 'fig-cap', 'label', 'echo', 'output', 'warning',
    'code-fold',
}
gone = {
    'slow': 'keep a long result with stored(name, run) of dlfound.stored, and run a small version',
    'cuda': 'ask for a GPU in Python, and keep what it gave with stored(name, run) of dlfound.stored',
    'eval': 'Run All knows no such thing: show what the cell would do in Markdown, or ask in Python whether it can run',
    'notest': 'make test runs every cell, as Run All does: ask in Python whether it can run',
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
                    hint = ''.join(f'; did you mean {near}?' for near in difflib.get_close_matches(m[1], known, 1))
                    if m[1] in gone: bad.append(f'{where} is not for these pages: {gone[m[1]]}')
                    elif m[1] not in known: bad.append(f'{where} is no directive{hint}')
                    elif in_code: bad.append(f'{where} is below the first line of code, where nbdev ignores it: '
                                             'move it to the top')
                elif line.strip(): in_code = True
    return bad


def check_format(tree: Path) -> list[str]:
    "Notebooks have unique cell ids, nbformat 4.5 and the python3 kernel"
    bad = []
    for path in notebooks(tree):
        nb, name = read(path), key(path, tree)
        ids = [c.get('id') for c in nb['cells']]
        if None in ids or len(ids) != len(set(ids)):
            bad.append(f'{name}: cells without ids, or with the same id: run make clean')
        if (nb['nbformat'], nb['nbformat_minor']) < (4, 5):
            bad.append(f'{name}: nbformat {nb["nbformat"]}.{nb["nbformat_minor"]} has no cell ids: run make clean')
        if nb['metadata'].get('kernelspec', {}).get('name') != 'python3':
            bad.append(f'{name}: its kernel is not python3: set it in JupyterLab and run make clean')
    return bad


def check_lesson_sizes(tree: Path) -> list[str]:
    "No lesson has more than 205 cells"
    sizes = {p: len(read(p)['cells']) for p in notebooks(tree) if is_lesson(p)}
    return [f'{key(p, tree)}: {n} cells, more than 205: cut it into two lessons with two questions'
            for p, n in sizes.items() if n > 205]


def check_cell_widths(tree: Path) -> list[str]:
    "No line of a code cell is wider than 100 columns, but for a figure's description or a hash"
    bad = []
    for path in notebooks(tree):
        for cell in code_cells(read(path)):
            for line in source(cell).splitlines():
                if len(line) <= 100 or re.match(r'#\|\s*fig-alt', line) or re.search(r'[0-9a-f]{40}', line): continue
                where = f'{key(path, tree)}, cell {cell.get("id")}'
                bad.append(f'{where}: {len(line)} columns, wrap it at 100: {line.strip()[:60]}…')
    return bad


def check_outputs(tree: Path) -> list[str]:
    "Saved outputs are there, whole, and were made by the code that stands above them"
    bad, record = [], manifest(tree)
    for path in notebooks(tree):
        nb, name = read(path), key(path, tree)
        cells = {c['id']: c for c in code_cells(nb) if 'id' in c}
        if not cells: continue
        saved = record.get(name, {}).get('cells')
        again = f'run make run NB={path.stem.split("_")[0] if is_lesson(path) else path.stem}'
        if saved is None:
            bad.append(f'{name}: nothing records that its outputs were saved by make run: {again}')
            continue
        stale = [i for i, h in hashes(nb).items() if saved.get(i) != h]
        if stale: bad.append(f'{name}: cells {", ".join(stale)} have changed since their outputs were saved: {again}')
        lost = ', '.join(sorted(set(saved) - set(cells)))
        if lost: bad.append(f'{name}: cells {lost} were removed since the outputs were saved: {again}')
        if not any(c['outputs'] for c in cells.values()): bad.append(f'{name}: no cell has an output: {again}')
        for i, c in cells.items():
            pictures = any(kind.startswith('image/') for o in c['outputs'] for kind in o.get('data', {}))
            if re.search(r'^#\|\s*fig-alt', source(c), re.M) and not pictures:
                bad.append(f'{name}: cell {i} describes a picture and has none: {again}')
            if any(o['output_type'] == 'error' for o in c['outputs']):
                bad.append(f'{name}: the saved output of cell {i} is an error: {again}')
    return bad + [f'outputs.json names {n}, which is no notebook: run make run for any notebook'
                  for n in record if not (tree / 'nbs' / n).exists()]


def check_stored(tree: Path) -> list[str]:
    "Every stored result was computed by the code that stands on its page, and belongs to one"
    bad, wanted = [], set()
    for path in notebooks(tree):
        cells, run = code_cells(read(path)), []
        for cell in cells:
            run.append(TransformerManager().transform_cell(source(cell))) # As the kernel keeps it
            for call in ast.walk(parsed(cell)):
                match call:
                    case ast.Call(ast.Name('stored'), [ast.Constant(str(name)), ast.Name(f), *_]): pass
                    case _: continue
                from dlfound.stored import code_hash # Which costs an import of torch
                wanted.add(name)
                file, where = tree / f'dlfound/results/{name}.json', f'{key(path, tree)}: {name}.json'
                try: code = code_hash(run, f)
                except ValueError as e: bad.append(f'{where}: {e}'); continue
                if not file.exists(): bad.append(f'{where} is not in dlfound/results: run make full')
                elif read(file)['code'] != code:
                    bad.append(f'{where} was computed by another {f} than stands on the page: run make full')
    return bad + [f'dlfound/results/{p.name} belongs to no notebook: remove it'
                  for p in sorted((tree / 'dlfound/results').glob('*')) if p.stem not in wanted]


def check_names(tree: Path) -> list[str]:
    "Lesson NN_topic exports to dlfound/topic.py, and no module outlives its notebook"
    bad = []
    for path in notebooks(tree):
        topic = path.stem.split('_', 1)[-1] if is_lesson(path) else path.stem
        module = module_of(read(path))
        if module and module != topic:
            bad.append(f'{key(path, tree)}: exports to {module}, and by its name should to {topic}: '
                       'change #| default_exp')
    for path in sorted((tree / 'dlfound').glob('*.py')):
        if path.name in ('__init__.py', '_modidx.py'): continue
        m = re.search(r'File to edit: \.\./(\S+\.ipynb)', path.read_text(encoding='utf-8'))
        if not m: bad.append(f'dlfound/{path.name}: names no notebook it was made from: remove it')
        elif not (tree / m[1]).exists(): bad.append(f'dlfound/{path.name}: made from {m[1]}, which is gone: remove it')
    return bad


def imported(nb: dict) -> set[str]:
    "Modules of dlfound that the notebook's cells import, those that are never run included"
    found = []
    for n in (n for c in code_cells(nb) for n in ast.walk(parsed(c))):
        if isinstance(n, ast.Import): found += [a.name for a in n.names]
        elif isinstance(n, ast.ImportFrom) and n.module == 'dlfound': found += [f'dlfound.{a.name}' for a in n.names]
        elif isinstance(n, ast.ImportFrom): found.append(n.module or '')
    return {name.split('.')[1] for name in found if name.startswith('dlfound.')}


def check_staircase(tree: Path) -> list[str]:
    "A lesson imports from tools and earlier lessons only, so every prefix of the course stands alone"
    bad, made_by = [], {m: p for p in notebooks(tree) if (m := module_of(read(p)))}
    for path in notebooks(tree):
        for module in sorted(imported(read(path))):
            other = made_by.get(module)
            if other is None or not is_lesson(other): continue
            if is_lesson(path) and other.stem > path.stem:
                bad.append(f'{key(path, tree)} imports dlfound.{module}, which the later {key(other, tree)} makes: '
                           'move what it needs to an earlier lesson')
            if path.parent.name == 'tools':
                bad.append(f'{key(path, tree)} is a tool and imports dlfound.{module} of a lesson: '
                           'tools import tools only')
    return bad


def check_lesson_imports(tree: Path) -> list[str]:
    "Notebooks import from modules, which tell where a name was made, not from the package"
    bad, modules = [], {p.stem for p in (tree / 'dlfound').glob('*.py')}
    for path in notebooks(tree):
        for cell in code_cells(read(path)):
            for n in ast.walk(parsed(cell)):
                if not isinstance(n, ast.ImportFrom) or n.module != 'dlfound': continue
                names = ', '.join(a.name for a in n.names if a.name not in modules)
                if names: bad.append(f'{key(path, tree)}, cell {cell.get("id")} imports {names} from dlfound: '
                                     'import it from the module that makes it')
    return bad
