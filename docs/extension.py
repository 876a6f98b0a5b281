"What the site adds to Sphinx: formulas without a script, tables of parameters, names in prose as links."
import builtins
import inspect
import re
from html import escape

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

log = logging.getLogger(__name__)
latex = LatexToMathML(fancy_error=False)
linked = nodes.title, nodes.reference, addnodes.pending_xref, addnodes.download_reference
others = torch, torch.nn, torch.nn.functional, torch.optim, torch.utils.data, builtins # Prose means theirs
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
    path = collect.root / f'{document}.ipynb'
    if document.startswith('api/'): path = collect.explained().get(document[4:], path)
    first, _, rest = found[1].partition('.')
    if first == 'dlfound':
        first, _, rest = rest.partition('.')
        if not first: return None
        if first in modules: return ('obj', f'dlfound.{first}.{rest}') if rest else ('mod', f'dlfound.{first}')
    makes = [m for m, p in collect.explained().items() if p == path]
    bound = collect.bound(path) if path.exists() else {}
    owners = [m for m in [*makes, bound.get(first)] if first in modules.get(m, {})]
    telling = not first.islower() and not any(hasattr(m, first) for m in others) # `fit` may be anything
    if not owners and first not in bound and telling: owners = [m for m, names in modules.items() if first in names]
    if owners and (makes or len(owners) == 1): return 'obj', f'dlfound.{owners[0]}.{first}'
    gone = document == 'CHANGELOG' # It tells of names that there were
    return ('obj', found[1]) if words.startswith('dlfound.') and not gone else None


def parents(node: nodes.Node):
    while node := node.parent: yield node


class Names(SphinxTransform):
    "`Learner` in prose leads to the page of its module; a name of dlfound that there is not is a fault"
    default_priority = 400

    def apply(self) -> None:
        for node in [*self.document.findall(nodes.literal)]:
            if 'code' in node['classes']: continue # The types of other packages have the same names
            if any(isinstance(p, linked) for p in parents(node)): continue
            if not (found := home(node.astext(), self.env.docname)): continue
            kind, target = found
            link = addnodes.pending_xref('', node.deepcopy(), refdomain='py', reftype=kind, reftarget=target,
                                         refdoc=self.env.docname, refexplicit=True, refwarn=True)
            link.source, link.line = node.source, node.line
            node.replace_self(link)


def setup(app):
    app.add_html_math_renderer('mathml', (formula, None), (formula, None))
    app.config.html_math_renderer = 'mathml'
    app.add_node(HideCodeCellNode, True, html=(open_fold, lambda visitor, node: visitor.body.append('</details>')))
    app.add_transform(Names)
    app.connect('autodoc-process-docstring', parameters)
    return dict(parallel_read_safe=True)
