"What the site adds to Sphinx: formulas without a script, tables of parameters, names in prose as links."
import builtins
import difflib
import importlib
import inspect
import re
import sys
from functools import cache
from html import escape
from pathlib import Path

import numpy
import torch
import torch.utils.data
from docutils import nodes
from fastcore.docments import docments
from math_core import LatexError, LatexToMathML
from myst_nb.sphinx_ import HideCodeCellNode
from sphinx import addnodes
from sphinx.transforms import SphinxTransform
from sphinx.util import logging
from sphinx.util.typing import stringify_annotation

import collect
import common

log = logging.getLogger(__name__)
latex = LatexToMathML(fancy_error=False)
linked = nodes.title, nodes.reference, addnodes.pending_xref, addnodes.download_reference
others = torch, torch.nn, torch.nn.functional, torch.optim, torch.utils.data, builtins # Prose means theirs
theirs = *others, torch.optim.lr_scheduler, torch.Tensor, torch.nn.Module, torch.optim.Optimizer
called = re.compile(r'(\w+(?:\.\w+)*)(?:\(.*\))?', re.S)


# Formulas

def formula(visitor, node: nodes.math | nodes.math_block) -> None:
    block = isinstance(node, nodes.math_block)
    try: made = latex.convert_with_local_state(node.astext(), displaystyle=block)
    except LatexError as e:
        log.warning('no formula: %s (%s)', node.astext(), e, location=node)
        made = ''
    visitor.body.append(f'<div class="formula" tabindex="0">{made}</div>' if block else made)
    raise nodes.SkipNode


# Code that folds

def open_fold(visitor, node: HideCodeCellNode) -> None:
    "MyST-NB's own, less a label that hides the words from screen readers"
    shown, hidden = (f'<p class="{k} admonition-title">{escape(node[v])}</p>'
                     for k, v in (('collapsed', 'prompt_show'), ('expanded', 'prompt_hide')))
    kinds = ' '.join(node['classes'])
    visitor.body.append(f'<details class="admonition hide {kinds}"><summary>{shown}{hidden}</summary>')


# Modules

def rst(text: str) -> str:
    "A line of a docstring or comment, in which code stands between single backticks, as reStructuredText"
    pieces = re.split(r'`+([^`]+)`+', text)
    def kept(m): return m[0] if m[1] else f'\\{m[0]}' # *emphasis* stays
    special = re.compile(r'\*(\w(?:[^*]*\w)?)\*|[\\|_*]')
    return ''.join(f'``{p}``' if i % 2 else special.sub(kept, p) for i, p in enumerate(pieces))


def type_name(x) -> str:
    if x is inspect.Parameter.empty: return ''
    return ':code:`' + re.sub(r'~?(?:[A-Za-z_]\w*\.)+', '', stringify_annotation(x, 'smart')) + '`'


def default(x) -> str:
    if x is inspect.Parameter.empty: return ''
    return f'``{getattr(x, "__name__", None) or repr(x)}``'


def parameters(app, what: str, name: str, obj, options, lines: list[str]) -> None:
    "A docstring, with the comments of parameters as a table below"
    text = [rst(line) for line in lines]
    if what == 'data' and inspect.getdoc(obj) == inspect.getdoc(type(obj)): text = [] # The docstring of dict, say
    if what in ('class', 'function', 'method'):
        try: found = docments(obj, full=True)
        except (TypeError, ValueError, OSError): found = {}
        rows = [(n, p) for n, p in found.items() if n != 'self' and (p['docment'] or n != 'return')]
        if any(p['docment'] for _, p in rows):
            text += ['', '.. list-table::', '   :header-rows: 1', '   :class: parameters', '']
            for line in [['parameter', 'type', 'default', 'what it is'],
                         *([f'``{n}``' if n != 'return' else '*returns*', type_name(p['anno']), default(p['default']),
                            rst(' '.join((p['docment'] or '').split()))] for n, p in rows)]:
                text += [f'   {"  " if i else "* "}- {cell}'.rstrip() for i, cell in enumerate(line)]
            text.append('')
    lines[:] = text


# Names

def home(words: str, document: str) -> tuple[str, str] | None:
    "The kind and the full name of what code in prose names, if it is something of dlfound"
    modules, found = collect.modules(), called.fullmatch(words)
    if not found: return None
    first, _, rest = found[1].partition('.')
    if first == 'dlfound':
        first, _, rest = rest.partition('.')
        if not first: return None
        if first in modules: return ('obj', f'dlfound.{first}.{rest}') if rest else ('mod', f'dlfound.{first}')
    path = source_of(document)
    makes = [m for m, p in collect.explained().items() if p == path]
    bound = collect.bound(path) if path.exists() else {}
    owners = [m for m in [*makes, bound.get(first)] if first in modules.get(m, {})]
    telling = not first.islower() and not any(hasattr(m, first) for m in others) # `fit` may be anything
    if not owners and first not in bound and telling: owners = [m for m, names in modules.items() if first in names]
    if owners and (makes or len(owners) == 1): return 'obj', member(owners[0], first, rest.partition('.')[0])
    if not owners and not rest and first not in bound and not any(hasattr(m, first) for m in theirs):
        methods = {member(m, c, first) for m in makes for c in modules.get(m, {}) if hasattr(thing(m, c), first)}
        if len(methods) == 1 and (one := methods.pop()).endswith(f'.{first}'): return 'obj', one
    return ('obj', found[1]) if words.startswith('dlfound.') and document != 'CHANGELOG' else None


def source_of(document: str) -> Path:
    "The notebook of a page: of a lesson, of a tool, of the module that it makes"
    path = collect.root / f'{document}.ipynb'
    return collect.explained().get(document[4:], path) if document.startswith('api/') else path


def thing(module: str, name: str): return getattr(importlib.import_module(f'dlfound.{module}'), name, None)


def member(module: str, name: str, attribute: str) -> str:
    "The full name of a class's method, of the class if the attribute is no method; one that there is not leads nowhere"
    whole, x = f'dlfound.{module}.{name}', thing(module, name)
    if not attribute or not isinstance(x, type): return whole
    for c in x.__mro__:
        where = c.__module__.removeprefix('dlfound.')
        if attribute not in vars(c): continue
        method = inspect.isroutine(vars(c)[attribute]) and not attribute.startswith('_')
        told = method and inspect.getdoc(getattr(c, attribute))
        listed = told and c.__name__ in collect.modules().get(where, {})
        return f'{c.__module__}.{c.__name__}.{attribute}' if listed else whole
    ours = [inspect.getsource(c) for c in x.__mro__ if c.__module__.startswith('dlfound.')]
    said = hasattr(x, '__getattr__') or any(re.search(rf'\b{attribute}\b', text) for text in ours)
    return whole if said else f'{whole}.{attribute}'


@cache
def known() -> set[str]:
    "Every name that a notebook or the package has in its code, and those of Python, PyTorch and NumPy"
    text = [common.source(c) for p in collect.notebooks() for c in collect.code_cells(collect.read(p))]
    text += [p.read_text('utf-8') for p in (collect.root / 'dlfound').glob('*.py')]
    found = {name for t in text for name in re.findall(r'[^\W\d]\w*', t)} | sys.stdlib_module_names
    return found.union(*(dir(m) for m in (*theirs, numpy)))


def unknown(words: str) -> list[str]:
    "Names in prose that look like ours, CamelCase, snake_case or nearly an exported one, and are in no code"
    if not (found := called.fullmatch(words)): return []
    exported = {n for names in collect.modules().values() for n in names}
    return [n for n in found[1].split('.') if n.isidentifier() and n not in known() and (
        re.search(r'[a-z][A-Z]|\w_\w', n) or difflib.get_close_matches(n, exported, 1, .8))]


def parents(node: nodes.Node):
    while node := node.parent: yield node


class Names(SphinxTransform):
    "`Learner` in prose leads to the page of its module; a name of dlfound that there is not is a fault"
    default_priority = 400

    def apply(self) -> None:
        for node in [*self.document.findall(nodes.literal)]:
            if 'code' in node['classes']: continue # The types of other packages have the same names
            if any(isinstance(p, linked) for p in parents(node)): continue
            if not (found := home(node.astext(), self.env.docname)):
                for n in unknown(node.astext()) if source_of(self.env.docname).exists() else []:
                    log.warning('%s is named, and no code has it', n, location=node)
                continue
            kind, target = found
            link = addnodes.pending_xref('', node.deepcopy(), refdomain='py', reftype=kind, reftarget=target,
                                         refdoc=self.env.docname, refexplicit=True, refwarn=True)
            link.source, link.line = node.source, node.line
            node.replace_self(link)


def search_page(app, pagename: str, templatename: str, context: dict, doctree) -> None:
    "Its own scripts, which show a line of text for what is found"
    if pagename == 'search':
        for name in ('prose.js', 'search.js'): app.add_js_file(name)


def setup(app):
    app.add_html_math_renderer('mathml', (formula, None), (formula, None))
    app.config.html_math_renderer = 'mathml'
    app.add_node(HideCodeCellNode, True, html=(open_fold, lambda visitor, node: visitor.body.append('</details>')))
    app.add_transform(Names)
    app.connect('autodoc-process-docstring', parameters)
    app.connect('html-page-context', search_page)
    return dict(parallel_read_safe=True)
