"""Write what Sphinx reads: a page for every notebook, module and Markdown file, and pages that are gathered from them.

Nothing is run or imported here. Pages lie where their files lie in the repository, so that links between them hold.
"""
import ast
import json
import os
import re
import shutil
import sys
from collections import Counter
from functools import cache
from pathlib import Path

here = Path(__file__).resolve().parent
root = here.parent
sys.path.insert(0, str(root / 'scripts'))
import common
from common import code_cells, generated, is_lesson, key, module_of, parsed, source
from export import linked
from tables import hours, pattern, rows, seconds

# Nothing here changes what these give
read, manifest, notebooks = map(cache, (common.read, common.manifest, common.notebooks))

verdict_type = 'application/vnd.dlfound.verdict+json'
longest = 40 # Lines of a cell that are shown without a click


def number(path: Path) -> str:
    "04c of 04c_learner.ipynb, nothing for a tool"
    return path.stem.split('_')[0] if is_lesson(path) else ''


def heading(path: Path) -> tuple[str, str]:
    "A notebook's title, with its number, and its subtitle"
    text = next(source(c) for c in read(path)['cells'] if c['cell_type'] == 'markdown')
    title, subtitle = re.match(r'# (.+)(?:\s+> (.+))?', text).groups()
    return f'{number(path)} {title}'.strip(), subtitle or ''


def groups(tree: Path = root) -> dict[Path, list[Path]]:
    "The lessons, in groups of one number: by the first of each group, all of them"
    found: dict[str, list[Path]] = {}
    for p in notebooks(tree):
        if is_lesson(p): found.setdefault(p.name[:2], []).append(p)
    return {lessons[0]: lessons for lessons in found.values()}


@cache
def modules(tree: Path = root) -> dict[str, dict[str, str]]:
    "By module, what it defines for others: each name with the cell that exports it, as 04c_learner-9f0d1fc4"
    found = {}
    for path in sorted((tree / 'dlfound').glob('*.py')):
        text = path.read_text('utf-8')
        if path.stem.startswith('_') or '\n# %% ../nbs/' not in text: continue
        code, names, cell, line = ast.parse(text), {}, '', 0
        marks = {i: f'{m[1]}-{m[2]}' for i, t in enumerate(text.splitlines(), 1)
                 if (m := re.match(r'# %% \S*?(\w+)\.ipynb #(\w+)', t))}
        for n in code.body:
            line, cell = n.lineno, next((marks[i] for i in reversed(marks) if i <= n.lineno), '')
            for name in defined(n): names[name] = cell
        public = next((ast.literal_eval(n.value) for n in code.body if defined(n) == ['__all__']), [])
        found[path.stem] = {name: names[name] for name in public if name in names}
    return found


def defined(n: ast.stmt) -> list[str]:
    "The names that a statement of a module defines"
    if isinstance(n, (ast.FunctionDef, ast.ClassDef)): return [n.name]
    if isinstance(n, ast.Assign): return [t.id for t in n.targets if isinstance(t, ast.Name)]
    return [n.target.id] if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name) else []


@cache
def explained(tree: Path = root) -> dict[str, Path]:
    "By module, the notebook that makes it"
    return {m: p for p in notebooks(tree) if (m := module_of(read(p)))}


@cache
def bound(path: Path) -> dict[str, str]:
    "What the code of a notebook binds: names with the module of dlfound that they come from, or with nothing"
    found = {}
    every = [n for c in code_cells(read(path)) for n in ast.walk(parsed(c))]
    methods = {id(m) for n in every if isinstance(n, ast.ClassDef) for m in n.body if isinstance(m, ast.FunctionDef)}
    for n in (n for n in every if id(n) not in methods):
        if isinstance(n, ast.ImportFrom):
            home = n.module.removeprefix('dlfound.') if (n.module or '').startswith('dlfound.') else ''
            for a in n.names: found[a.asname or a.name] = home
        elif isinstance(n, ast.Import): found |= {(a.asname or a.name).split('.')[0]: '' for a in n.names}
        elif isinstance(n, ast.stmt): found |= dict.fromkeys(defined(n), '')
    return found


def plain(text: str) -> str:
    "Text that Markdown shows as it is"
    return re.sub(r'([\\`*_{}\[\]<>|$~#])', r'\\\1', text)


def table(head: list[str], lines: list[list[str]]) -> str:
    return ''.join(f'| {" | ".join(line)} |\n' for line in [head, ['---'] * len(head), *lines])


def even(kind: str, head: list[str], lines: list[list[str]]) -> str:
    "One of the tables of a page whose columns are all as wide as each other's"
    return f'```{{table}}\n:class: even {kind}\n\n{table(head, lines)}```\n'


def tocs(*pages: str, **options: str) -> str:
    "A list of pages for the navigation alone"
    given = ''.join(f':{k}: {v}\n' for k, v in options.items())
    return '```{toctree}\n:hidden:\n:titlesonly:\n' + given + '\n' + '\n'.join(pages) + '\n```\n'


def markdown(path: Path, text: str, tree: Path) -> str:
    "Markdown of a file of the repository, with its links for the site"
    def link(m):
        to = (path.parent / m[1]).resolve()
        if to.is_dir(): return f']({m[1].rstrip("/")}/index.md)'
        return f']({m[1].replace("README.md", "start.md").replace("index.ipynb", "index.md")})'
    pieces = re.split(r'^(```.*?^```\n?)', text, flags=re.M | re.S) # A block of code has no links
    text = ''.join(t if t.startswith('```') else linked(t, path, notebooks(tree)) for t in pieces)
    return re.sub(r'\]\((?!\w+:|#|<)([^)#\s]+)(?=[)#])\)', link, text)


# Pages of notebooks

def facts(path: Path, tree: Path) -> str:
    "A line below the title: what the notebook makes, and the time it takes"
    nb, made, name = read(path), [], module_of(read(path))
    if name in modules(tree):
        made.append(f'Makes `dlfound.{name}`')
    if is_lesson(path):
        taken = seconds(manifest(tree).get(key(path, tree), {}).get('seconds', 0))
        made.append(f'{hours(nb)} {"hour" if float(hours(nb)) <= 1 else "hours"} to read, {taken} seconds to run')
    return '{.facts}\n' + ' · '.join(made) if made else ''


def code(c: dict, path: Path, name: str, tree: Path) -> list[dict]:
    "A code cell for the site: without its directives, which become what MyST-NB reads; none for a hidden one"
    lines = source(c).splitlines()
    given = dict(re.match(r'#\|\s*([\w-]+):?\s*(.*)', line).groups() for line in lines if line.startswith('#|'))
    lines = [line for line in lines if not line.startswith('#|')]
    if 'hide' in given or not any(lines): return []
    tags, book, label = [], {}, f'({path.stem}-{c["id"]})=\n'
    cells = []
    if 'fig-alt' in given: book['image'] = dict(alt=given['fig-alt'])
    if 'export' in given:
        tags.append('exported')
        names = [n for n, cell in modules(tree).get(name, {}).items() if cell == f'{path.stem}-{c["id"]}']
        listed = ': ' + ', '.join(f'`{n}`' for n in names) if names else ''
        cells.append(f'{label}{{.exported}}\nIn the package, `dlfound.{name}`{listed}')
    elif any(verdict_type in o.get('data', {}) for o in c['outputs']): cells.append(label)
    shown = [''.join(o.get('text', o.get('data', {}).get('text/plain', ''))) for o in c['outputs']]
    if any(len(line) > 100 for text in shown for line in text.splitlines()): tags.append('long')
    if len(lines) > longest:
        tags.append('hide-input')
        book |= dict(code_prompt_show=f'Show {len(lines)} lines of code', code_prompt_hide='Hide the code')
    outputs = [o | dict(data={k: v for k, v in o['data'].items() if k != verdict_type}) if 'data' in o else o
               for o in c['outputs']]
    cell = dict(c, source='\n'.join(lines).strip('\n'), outputs=outputs, metadata=dict(tags=tags, mystnb=book))
    return [*(text_cell(text, f'{c["id"]}-{i}') for i, text in enumerate(cells)), cell]


def text_cell(text: str, id: str) -> dict:
    return dict(cell_type='markdown', id=id, metadata={}, source=text)


def notebook(path: Path, tree: Path) -> str:
    "The page of a notebook, as a notebook"
    nb, cells, name = read(path), [], module_of(read(path)) or ''
    for c in nb['cells']:
        if generated(c): continue
        if c['cell_type'] == 'code': cells += code(c, path, name, tree)
        else: cells.append(dict(c, source=markdown(path, source(c), tree)))
    title = next(c for c in cells if c['cell_type'] == 'markdown')
    title['source'] = re.sub('^# .*', f'# {heading(path)[0]}', title['source']) + '\n\n' + facts(path, tree)
    inner = groups(tree).get(path, [path])[1:]
    if inner: cells.append(text_cell(tocs(*(p.stem for p in inner)), 'toc'))
    return json.dumps(dict(nb, cells=cells))


# Pages of modules

def module_page(name: str, tree: Path) -> str:
    "What a module defines, for autodoc"
    code, path = ast.parse((tree / f'dlfound/{name}.py').read_text('utf-8')), explained(tree)[name]
    kinds = {x: 'class' if isinstance(n, ast.ClassDef) else 'function' if isinstance(n, ast.FunctionDef) else 'data'
             for n in code.body for x in defined(n)}
    own = modules(tree)[name]
    others = [n for n in next(ast.literal_eval(n.value) for n in code.body if defined(n) == ['__all__'])
              if n not in own]
    title = f'dlfound.{name}'
    where = 'Lesson' if is_lesson(path) else 'The page'
    text = [title, '=' * len(title), '', f'.. automodule:: dlfound.{name}', '',
            f'{where} :doc:`{heading(path)[0]} </{page(path, tree)}>` explains it.', '']
    if others:
        text += ['It also hands on ' + ', '.join(f'``{n}``' for n in others) + ', which other modules define.', '']
    for n, cell in own.items():
        text += [f'.. auto{kinds[n]}:: dlfound.{name}.{n}', '']
        if kinds[n] == 'class': text[-1:] = ['   :members:', '']
        if cell: text += [f'   :ref:`Where it is explained <{cell}>`', '']
    return '\n'.join(text)


def page(path: Path, tree: Path) -> str:
    return path.relative_to(tree).with_suffix('').as_posix()


def summary(name: str, tree: Path) -> str:
    return (ast.get_docstring(ast.parse((tree / f'dlfound/{name}.py').read_text('utf-8'))) or '').split('\n')[0]


def api(tree: Path) -> str:
    "All modules: what each is for, where it is explained, what it exports"
    text = ['# The package', '', 'Every module is made from one notebook and has its name. A page lists what its '
            'module defines; what everybody needs can also be imported from `dlfound` itself.', '']
    for what, chosen in ('Lessons', is_lesson), ('Tools', lambda p: not is_lesson(p)):
        lines = []
        for name, path in explained(tree).items():
            if not chosen(path) or name not in modules(tree): continue
            names = ', '.join(f'{{py:obj}}`{n} <dlfound.{name}.{n}>`' for n in modules(tree)[name])
            lines.append([f'[dlfound.{name}]({name}.rst)', f'[{heading(path)[0]}](../{page(path, tree)}.ipynb)', names])
        if lines: text += [f'## {what}', '', table(['module', 'explained in', 'exports'], lines)]
    return '\n'.join(text) + '\n' + tocs(*(n for n in explained(tree) if n in modules(tree)))


# Pages that are gathered

def lessons(tree: Path, before: str, after: str) -> str:
    "The lessons in their groups, from README's table"
    found = rows((tree / 'README.md').read_text('utf-8'))
    text = ['# Lessons', '', before]
    for first, inside in groups(tree).items():
        lines = []
        for p in inside:
            _, question, gives, *_ = [*found.get(p.stem, []), '', '', ''][:3]
            taken = seconds(manifest(tree).get(key(p, tree), {}).get('seconds', 0))
            lines.append([f'[{heading(p)[0]}]({p.name})', question, gives, hours(read(p)), taken])
        text += [f'## {heading(first)[0]}', '',
                 even('lessons', ['lesson', 'question', 'gives', 'hours to read', 'seconds to run'], lines)]
    return '\n'.join([*text, after])


def tools(tree: Path) -> str:
    "The notebooks that are no lessons"
    inside = [p for p in notebooks(tree) if p.parent.name == 'tools']
    lines = [[f'[{heading(p)[0]}]({p.name})', heading(p)[1]] for p in inside]
    return ('# Tools\n\nWhat the lessons lean on and do not teach. Each tool is a notebook too, with its tests.\n\n'
            + table(['tool', 'what it is for'], lines) + '\n' + tocs(*(p.stem for p in inside)))


def verdicts(path: Path) -> list[tuple[str, dict[str, str]]]:
    "What a notebook's cells say of papers: the id of each cell, and its verdict"
    return [(c['id'], {k: plain(x) for k, x in o['data'][verdict_type].items()}) for c in code_cells(read(path))
            for o in c['outputs'] if verdict_type in o.get('data', {})]


def became(tree: Path, of: str = '') -> str:
    "How many claims there are, and what became of them"
    count = Counter(v['verdict'] for p in notebooks(tree) for _, v in verdicts(p))
    return f'{count.total()} claims{of}: ' + (', '.join(f'{n} {word}' for word, n in count.most_common()) or 'none yet')


def papers(tree: Path) -> str:
    "Every verdict that a notebook has saved, with the figures that decide it"
    text = []
    for p in notebooks(tree):
        lines = [[f'[{v["paper"]}](#{p.stem}-{cell})', v['claim'], v['theirs'], v['ours'], v['verdict']]
                 for cell, v in verdicts(p)]
        head = ['paper', 'claim', 'theirs', 'ours', 'verdict']
        if lines: text += [f'## {heading(p)[0]}', '', even('papers', head, lines)]
    about = ('What papers claim, and what came of it on a small machine. Each row is the output of a cell whose own '
             'numbers decide the verdict, and the paper links to that cell.')
    total = (f'{became(tree)}. *Not at this scale* says that our experiment was too small '
             'to show the effect, not that the paper is wrong.')
    return '\n'.join(['# Papers', '', about, '', total, '', *text])


def figure(x) -> str:
    "A measured value: seconds with their unit, anything else as it is"
    if not isinstance(x, dict): return '' if x is None else f'{x:g}' if isinstance(x, (int, float)) else plain(str(x))
    s = x['median_s']
    units = dict(s=1, ms=1e3, µs=1e6, ns=1e9)
    unit, factor = next(((u, f) for u, f in units.items() if s * f >= 1), ('ns', 1e9))
    return f'{s * factor:.3g}\u00a0{unit}'


def measured(tree: Path) -> str:
    "The ratios of benchmarks/results"
    text = ['# Measured', '', 'What is ours beside what others have, on one machine, in one run. Seconds differ from '
            'machine to machine; the ratio of two that took turns differs less, so it is what we hold ourselves to. '
            'Where a goal is set, the row says whether it is met.', '']
    for path in sorted((tree / 'benchmarks/results').glob('*.json')):
        found, script = read(path), tree / f'benchmarks/{path.stem}.py'
        about = (ast.get_docstring(ast.parse(script.read_text('utf-8'))) or '').split('\n\n')[0].replace('\n', ' ')
        m = found['machine']
        versions = ', '.join(f'{k} {v}' for k, v in m['versions'].items() if v)
        lines = [[plain(r['what']), f'{r["ratio"]:.3g}' if isinstance(r['ratio'], float) else figure(r['ratio']),
                  plain(r['goal'] or '').replace('\\>= ', '≥\u00a0'),
                  {True: 'yes', False: 'no'}.get(r['met'], ''), figure(r['ours']),
                  figure(r['peer'])] for r in found['results']]
        text += [f'## {path.stem}', '', plain(about), '', f'{m["cpu"]}, {m["vector_unit"]}, {m["threads"]} of '
                 f'{m["cores"]} cores, {m["system"]}, Python {m["python"]}, {versions}.', '',
                 even('measured', ['what', 'ratio', 'goal', 'met', 'ours', 'peer'], lines)]
    return '\n'.join(text)


def questions(tree: Path) -> dict[str, str]:
    "For the front page: what each group of lessons asks first, and how much there is"
    found, every = rows((tree / 'README.md').read_text('utf-8')), groups(tree)
    text = []
    for first, inside in every.items():
        title, more = heading(first)[0], f', and {len(inside) - 1} more' if len(inside) > 1 else ''
        question = [*found.get(first.stem, []), '', ''][1] or title
        text.append(f'- [{question}](nbs/{key(first, tree)}) {title}{more}')
    lessons = sum(map(len, every.values()))
    time = sum(float(hours(read(p))) for inside in every.values() for p in inside)
    count = f'{lessons} lessons, {time:.0f} hours to read. The lessons test {became(tree, " of [papers](papers.md)")}.'
    return dict(questions='\n'.join(text), count=count)


def prose(tree: Path, found: dict[str, str]) -> dict[str, list[str]]:
    "By page, or by the place of a name, the paragraphs in which the search looks for something to show"
    def paragraphs(text):
        text = re.sub(r'^(```|:::|\$\$).*?^\1`*$', '', text, flags=re.M | re.S)
        for pattern, to in (r'!?\[([^\]]*)\]\([^)]*\)', r'\1'), (r'\{[\w:]+\}(?=`)', ''), (r'[`*]|\\(?=\W)', ''):
            text = re.sub(pattern, to, text)
        whole = (' '.join(p.split()) for p in re.split(r'\n\s*\n', text))
        return [p for p in whole if re.match(r'\w', p) and not p.startswith('---')]
    text = {}
    for name, page in found.items():
        if name.endswith('.ipynb'):
            cells = [source(c) for c in json.loads(page)['cells'] if c['cell_type'] == 'markdown']
            text[name[:-6]] = paragraphs('\n\n'.join(c for c in cells if not re.match(r'[({`]', c)))
        elif name.endswith('.md'): text[name[:-3]] = paragraphs(page)
    for name in modules(tree):
        code = ast.parse((tree / f'dlfound/{name}.py').read_text('utf-8'))
        text[f'api/{name}'] = [summary(name, tree)]
        for n in (n for n in code.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))):
            for at, x in [(n.name, n), *((f'{n.name}.{m.name}', m) for m in n.body if isinstance(m, ast.FunctionDef))]:
                said = (ast.get_docstring(x) or '').replace('`', '').split()
                if said: text[f'api/{name}#dlfound.{name}.{at}'] = [' '.join(said)]
    return {k: v for k, v in text.items() if v}


def parts(text: str) -> dict[str, str]:
    "The sections of README by heading; what comes before the first is called intro"
    pieces = re.split(r'^## (.+)\n', re.sub(r'^# .*\n', '', text), flags=re.M)
    return dict(zip(['intro', *pieces[1::2]], [pieces[0], *pieces[2::2]]))


def block(text: str, start: str) -> str:
    "The first block of code that begins with these words"
    return re.search(rf'^{start}.*?^```$', text, re.M | re.S)[0]


def others(tree: Path) -> list[Path]:
    "The Markdown files beside README, how to contribute first"
    return sorted((p for p in tree.glob('*.md') if p.stem != 'README'), key=lambda p: (p.stem != 'CONTRIBUTING', p))


def pages(tree: Path) -> dict[str, str]:
    "All pages: the path of each, and its text"
    readme, every = tree / 'README.md', notebooks(tree)
    part = parts(markdown(readme, readme.read_text('utf-8'), tree))
    before, after = pattern.sub('\0', part.pop('Lessons')).replace('](nbs/', '](').split('\0')
    first = next(p for p in every if is_lesson(p))
    lead, rest = part.pop('intro').strip().split('\n\n', 1)
    picture, rest = re.match(r'((?:!\[.*\n+\*.*\n*)?)([\s\S]*)', rest).groups()
    begin = f'[Read it](nbs/{key(first, tree)})'
    front = dict(lead=lead, rest=rest, picture=picture, begin=begin,
                 first=f'[{heading(first)[0]}]({key(first, tree)})'.replace('](', '](nbs/'),
                 run=block(part['Start'], '```'), use=block(part['Using the package'], '```python'))
    front |= questions(tree)
    front['lessons'] = '\n'.join(page(p, tree) for p in groups(tree))
    front['project'] = '\n'.join(p.stem for p in others(tree))
    index = re.sub(r'\{\{(\w+)\}\}', lambda m: front[m[1]].strip(), (here / 'index.md').read_text('utf-8'))
    part.pop('Contributing', None)
    found = {'index.md': index, 'nbs/index.md': lessons(tree, before, after), 'nbs/tools/index.md': tools(tree),
             'start.md': '# Set up\n\n' + '\n'.join(f'## {k}\n{v}' for k, v in part.items()),
             'papers.md': papers(tree), 'measured.md': measured(tree), 'api/index.md': api(tree)}
    for p in others(tree): found[p.name] = markdown(p, p.read_text('utf-8'), tree)
    for p in every:
        if p.stem != 'index': found[f'nbs/{key(p, tree)}'] = notebook(p, tree)
    return found | {f'api/{name}.rst': module_page(name, tree) for name in modules(tree) if name in explained(tree)}


def contents(tree: Path) -> str:
    "llms.txt: what the site is, and the Markdown copy of each page"
    readme = (tree / 'README.md').read_text('utf-8')
    text = ['# dlfound', '', '> ' + re.search(r'^# .*\n+(.+)', readme)[1], '']
    lists = {'Lessons': [(p, 'nbs/') for p in notebooks(tree) if is_lesson(p)],
             'Tools': [(p, 'nbs/tools/') for p in notebooks(tree) if p.parent.name == 'tools']}
    for what, found in lists.items():
        text += [f'## {what}', '', *(f'- [{heading(p)[0]}]({at}{p.stem}.md): {heading(p)[1]}' for p, at in found), '']
    text += ['## The package', '', *(f'- [dlfound.{m}](api/{m}.md): {summary(m, tree)}' for m in modules(tree)), '',
             '## More', '', '- [Papers](papers.md): what papers claim, and what came of it',
             '- [Measured](measured.md): what is ours beside what others have', '- [Set up](start.md)',
             *(f'- [{p.stem.capitalize().replace("_", " ")}]({p.name})' for p in others(tree))]
    return '\n'.join(text) + '\n'


def write(tree: Path, out: Path) -> None:
    "Write all pages to a folder, and the files that they link to or show"
    shutil.rmtree(out, ignore_errors=True)
    found = pages(tree)
    for name, text in found.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(text, encoding='utf-8')
        for link in re.findall(r'\]\(([^()#\s]+)\)', text):
            to = Path(os.path.normpath(Path(name).parent / link))
            if str(to) in found or '..' in to.parts or not (tree / to).is_file(): continue
            (out / to).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(tree / to, out / to)
    static = out.parent / 'static'
    static.mkdir(exist_ok=True)
    (static / 'prose.js').write_text(f'const prose = {json.dumps(prose(tree, found))}\n', encoding='utf-8')
