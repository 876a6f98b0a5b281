"""Write dlfound/ from the notebooks, and what is made from the list of notebooks: install lines, links, tables.

A module that was edited by hand is not overwritten: nothing is written then, and the way to keep the edit is said.
"""
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

from fastcore.nbio import dict2nb, write_nb

from common import is_lesson, key, notebooks, read, root, source
from tables import write_tables

record = root / '.venv/exported.json'


def digest(text: bytes) -> str:
    return hashlib.sha256(text.replace(b'\r\n', b'\n')).hexdigest()


def modules() -> dict[str, Path]:
    "What nbdev-export writes, by name"
    found = {p.name: p for p in sorted((root / 'dlfound').glob('*.py'))}
    return {name: p for name, p in found.items() if name != '__init__.py'}


def committed(path: Path) -> bytes | None:
    "The file as HEAD has it; None where there is no git, or no such file in it"
    if not shutil.which('git'): return None
    done = subprocess.run(['git', 'show', f'HEAD:./{path.relative_to(root).as_posix()}'], cwd=root, capture_output=True)
    return done.stdout if done.returncode == 0 else None


def edited() -> list[str]:
    "Modules that equal neither HEAD's nor what the last export wrote, with what to do"
    last = json.loads(record.read_text()) if record.exists() else {}
    bad = []
    for name, path in modules().items():
        known = {last.get(name), *(digest(text) for text in [committed(path)] if text is not None)} - {None}
        if not known or digest(path.read_bytes()) in known: continue
        made_from = re.search(r'File to edit: \.\./(\S+\.ipynb)', path.read_text(encoding='utf-8'))
        place = made_from[1] if made_from else 'its notebook'
        bad.append(f'dlfound/{name} was edited by hand, and an export would overwrite that. Move the edit to {place}, '
                   f'then run: git restore dlfound/{name}')
    return bad


def install_line(path: Path, git_url: str) -> str:
    "A comment, since whoever runs make lab has dlfound already"
    up = '/'.join(['..'] * len(path.relative_to(root / 'nbs').parts))
    what = f'"dlfound[lessons] @ git+{git_url}"' if git_url else f'-e "{up}[lessons]"'
    return f'# Where dlfound is not installed, run this line without its mark:\n# %pip install -q {what}'


def navigation(path: Path, every: list[Path], git_url: str) -> str:
    "Links to the page before and after, among the lessons or among the tools"
    series = [p for p in every if p.parent == path.parent and p.stem != 'index']
    i = series.index(path)
    before, after = series[i - 1:i], series[i + 1:i + 2]
    links = [f'[← {p.stem.replace("_", " ")}]({p.name})' for p in before]
    links.append(f'[all lessons]({"" if is_lesson(path) else "../"}index.ipynb)')
    links += [f'[{p.stem.replace("_", " ")} →]({p.name})' for p in after]
    if m := re.match(r'https://github\.com/(.+?)(\.git)?/?$', git_url):
        links.append(f'[open in Colab](https://colab.research.google.com/github/{m[1]}/blob/main/nbs/{key(path)})')
    return ' · '.join(links)


def linked(text: str, path: Path, every: list[Path]) -> str:
    "`text` with the lessons that it names as links, those that there are: lesson 03, lessons 03 and 04"
    pages = {p.stem.split('_')[0]: p for p in every if is_lesson(p) and p != path}

    def link(words: str, number: str) -> str:
        if number not in pages: return words
        return f'[{words}]({Path(os.path.relpath(pages[number], path.parent)).as_posix()})'

    def several(m: re.Match) -> str:
        return m[1] + re.sub(r'\d\d[a-z]?', lambda n: link(n[0], n[0]), m[2])

    lines = text.split('\n')
    for i, line in enumerate(lines):
        if line.startswith('#'): continue
        line = re.sub(r'(?<!\[)\b([Ll]esson (\d\d[a-z]?))\b', lambda m: link(m[1], m[2]), line)
        lines[i] = re.sub(r'(?<!\[)\b([Ll]essons )(\d\d[a-z]?(?:(?:, | and | to )\d\d[a-z]?)+)\b', several, line)
    return '\n'.join(lines)


def put(cells: list[dict], kind: str, what: str, text: str, place: int) -> None:
    "Set the generated cell, or insert it: the cell is known by its metadata"
    for c in cells:
        if c['metadata'].get('nbdev', {}).get('generated') == what:
            c['source'] = text
            return
    extra = dict(execution_count=None, outputs=[]) if kind == 'code' else {}
    cell = dict(cell_type=kind, id=what, metadata=dict(nbdev=dict(generated=what)), source=text, **extra)
    cells.insert(place, cell)


def write_cells(path: Path, every: list[Path], git_url: str) -> None:
    nb = read(path)
    before = [source(c) for c in nb['cells']]
    for c in nb['cells']:
        if c['cell_type'] == 'markdown': c['source'] = linked(source(c), path, every)
    put(nb['cells'], 'code', 'install', install_line(path, git_url), 1)
    put(nb['cells'], 'markdown', 'navigation', navigation(path, every, git_url), len(nb['cells']))
    if [source(c) for c in nb['cells']] != before: write_nb(dict2nb(nb), path)


def main() -> int:
    if bad := edited():
        print('\n'.join(bad), file=sys.stderr)
        return 1
    config = ConfigParser(delimiters=['='], interpolation=None)
    config.read(root / 'settings.ini', encoding='utf-8')
    git_url, every = config['DEFAULT'].get('git_url', '').strip(), notebooks()
    for path in every:
        if path.stem != 'index': write_cells(path, every, git_url)
    before = {name: p.read_bytes() for name, p in modules().items()}
    done = subprocess.run([Path(sys.executable).parent / 'nbdev-export'], cwd=root)
    if done.returncode: return done.returncode
    write_tables()
    if record.parent.exists():
        record.write_text(json.dumps({name: digest(p.read_bytes()) for name, p in modules().items()}, indent=1))
    names = [name for name, p in modules().items() if p.read_bytes() != before.get(name) and name != '_modidx.py']
    print(f'written: {", ".join(names)}. A running kernel has the old code: restart it to import the new' if names else
          'dlfound/ holds what the notebooks say already')
    return 0


if __name__ == '__main__': sys.exit(main())
