"""The table of lessons: README's is written by hand but for hours and seconds; that of nbs/index.ipynb is made from it.

Hours are an estimate: 120 words and ten lines of code a minute. Seconds are those of the last `make run`.
"""
import re
from pathlib import Path

from fastcore.nbio import dict2nb, write_nb

from common import code_cells, is_lesson, key, manifest, notebooks, read, root, source

head = ['lesson', 'question', 'gives', 'hours to read', 'seconds to run']
pattern = re.compile(r'^\| lesson \|.*\n(?:\|.*\n?)+', re.M)


def hours(nb: dict) -> str:
    "The estimate for a notebook, in halves of an hour"
    words = sum(len(source(c).split()) for c in nb['cells'] if c['cell_type'] == 'markdown')
    lines = sum(bool(line.strip()) for c in code_cells(nb) for line in source(c).splitlines())
    return f'{max(1, round((words / 120 + lines / 10) / 30)) / 2:g}'


def seconds(taken: float) -> str:
    "To the nearest ten, so that a table does not change with every run"
    return f'{max(10, round(taken, -1))}'


def rows(text: str) -> dict[str, list[str]]:
    "The cells of the table's rows by lesson"
    return {m[1]: [c.strip() for c in line.strip().strip('|').split('|')] for line in text.splitlines()
            if line.startswith('|') and (m := re.search(r'\((?:nbs/)?(\w+)\.ipynb\)', line))}


def table(text: str, tree: Path, folder: str) -> str:
    "The table of `text` with generated links, hours and seconds; a lesson without a row gets an empty one"
    by_hand, record, lines = rows(text), manifest(tree), [head, ['---'] * len(head)]
    for path in notebooks(tree):
        if not is_lesson(path): continue
        _, question, gives, *_ = [*by_hand.get(path.stem, []), '', '', ''][:3]
        link = f'[{path.stem.replace("_", " ")}]({folder}{path.name})'
        taken = record.get(key(path, tree), {}).get('seconds', 0)
        lines.append([link, question, gives, hours(read(path)), seconds(taken)])
    return ''.join(f'| {" | ".join(line)} |\n' for line in lines)


def tables(tree: Path) -> tuple[str, dict]:
    "README and the index as they should be"
    readme = (tree / 'README.md').read_text(encoding='utf-8')
    found, index = pattern.search(readme), read(tree / 'nbs/index.ipynb')
    if not found: return readme, index
    readme = pattern.sub(lambda m: table(m[0], tree, 'nbs/'), readme, count=1)
    for c in index['cells']:
        c['source'] = pattern.sub(lambda m: table(found[0], tree, ''), source(c) + '\n').removesuffix('\n')
    return readme, index


def write_tables(tree: Path = root) -> None:
    if not (tree / 'nbs/index.ipynb').exists(): return
    readme, index = tables(tree)
    (tree / 'README.md').write_text(readme, encoding='utf-8')
    old = read(tree / 'nbs/index.ipynb')
    if [source(c) for c in old['cells']] != [c['source'] for c in index['cells']]:
        write_nb(dict2nb(index), tree / 'nbs/index.ipynb')
