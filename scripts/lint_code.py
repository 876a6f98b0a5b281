"Lints of Python code: each is a function of a checkout's root that returns a list of complaints, each naming the fix."
import ast
from collections.abc import Iterator
from pathlib import Path

from common import code_cells, key, notebooks, parsed, read

longest = {'loop': 300} # And 270 lines for every other module
clocks = {'time', 'monotonic', 'perf_counter', 'process_time'}
time_words = {'seconds', 'secs', 'took', 'elapsed', 'duration'}
orders = {'lt', 'le', 'gt', 'ge'}


def modules(tree: Path) -> dict[str, ast.Module]:
    "The syntax trees of the modules in dlfound/, by name"
    paths = [p for p in sorted((tree / 'dlfound').glob('*.py')) if p.name not in ('__init__.py', '_modidx.py')]
    return {p.stem: ast.parse(p.read_text('utf-8')) for p in paths}


def check_module_sizes(tree: Path) -> list[str]:
    "No module has more than 270 lines, but for loop with its 300"
    bad = []
    for name in modules(tree):
        lines = len((tree / f'dlfound/{name}.py').read_text('utf-8').splitlines())
        most = longest.get(name, 270)
        if lines > most: bad.append(f'dlfound/{name}.py: {lines} lines, more than {most}: cut its notebook in two')
    return bad


def families(tree: Path) -> Iterator[tuple[str, ast.ClassDef, list[ast.ClassDef]]]:
    "Each class of dlfound with its module and all its ancestors in the package"
    trees = modules(tree)
    classes = {(m, n.name): n for m, t in trees.items() for n in t.body if isinstance(n, ast.ClassDef)}
    home = {(m, a.asname or a.name): (n.module, a.name) for m, t in trees.items() for n in ast.walk(t)
            if isinstance(n, ast.ImportFrom) and n.level for a in n.names} # nbdev writes all of ours as relative
    for (module, _), cls in classes.items():
        todo, found = [(module, cls)], []
        for where, c in todo:
            for base in (b.id for b in c.bases if isinstance(b, ast.Name)):
                place = home.get((where, base), (where, base))
                if place in classes and classes[place] not in found:
                    found.append(classes[place])
                    todo.append((place[0], classes[place]))
        yield module, cls, found


def attributes(cls: ast.ClassDef) -> tuple[set[str], set[str]]:
    "The attributes that a class has, by its body or by `self.x = …` in a method, and those that its methods read"
    has, reads = set(), set()
    for n in cls.body:
        if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)): has.add(n.name)
        elif isinstance(n, ast.Assign): has |= {x.id for t in n.targets for x in ast.walk(t) if isinstance(x, ast.Name)}
        elif isinstance(n, ast.AnnAssign) and (n.value or cls.decorator_list): has.add(ast.unparse(n.target))
    for n in ast.walk(cls):
        if isinstance(n, ast.Attribute) and ast.unparse(n.value) == 'self':
            (reads if isinstance(n.ctx, ast.Load) else has).add(n.attr)
    return has, reads


def check_bases(tree: Path) -> list[str]:
    "No class of dlfound stands on more than two others, or reads what only its subclasses have"
    bad, classes = [], list(families(tree))
    for module, cls, above in classes:
        where = f'dlfound/{module}.py: {cls.name}'
        if len(above) > 2:
            tower = ', '.join(c.name for c in above)
            bad.append(f'{where} stands on {tower}: make parts of them, each with a job of its own')
        (has, reads), below = attributes(cls), [c for _, c, bases in classes if cls in bases]
        own = has.union(*(attributes(c)[0] for c in above))
        only_below = reads & set().union(*(attributes(c)[0] for c in below)) - own
        if only_below: bad.append(f'{where} reads {", ".join(sorted(only_below))}, which only a subclass sets: '
                                  'set it here, or take it as an argument')
    return bad


def is_private(name: str) -> bool:
    return name.startswith('_') and not name.startswith('__') and name != '_'


def bound(code: ast.Module) -> set[str]:
    "The private names that code defines or sets, attributes included"
    names = set()
    for n in ast.walk(code):
        match n:
            case ast.FunctionDef(name) | ast.ClassDef(name): names.add(name)
            case ast.Name(name, ast.Store()) | ast.Attribute(_, name, ast.Store()): names.add(name)
    return {n for n in names if is_private(n)}


def check_private(tree: Path) -> list[str]:
    "No private name of a module is used in another, or in a lesson"
    bad, codes = [], {f'dlfound/{m}.py': t for m, t in modules(tree).items()}
    private = {where: bound(code) for where, code in codes.items()}
    for path in notebooks(tree):
        codes[key(path, tree)] = ast.Module([n for c in code_cells(read(path)) for n in parsed(c).body], [])
    for where, code in codes.items():
        own, used = bound(code), set()
        for n in ast.walk(code):
            if isinstance(n, ast.ImportFrom): used |= {a.name for a in n.names}
            elif isinstance(n, ast.Attribute): used.add(n.attr)
        for name in sorted(n for n in used - own if is_private(n)):
            owners = [other for other, names in private.items() if name in names]
            if owners: bad.append(f'{where} uses {name}, which is private to {owners[0]}: make it public there')
    return bad


def is_time(node: ast.AST) -> bool:
    "Is an expression in seconds? A name that says so, a clock's reading, what is computed from these; a ratio is not"
    match node:
        case ast.Name(name) | ast.Constant(str(name)): return not time_words.isdisjoint(name.split('_'))
        case ast.Attribute(value, name): return not time_words.isdisjoint(name.split('_')) or is_time(value)
        case ast.Subscript(value, key): return is_time(value) or is_time(key)
        case ast.Call(ast.Name(name) | ast.Attribute(_, name), args):
            return name in clocks or name in ('min', 'max', 'sum', 'median', 'abs') and any(map(is_time, args))
        case ast.BinOp(a, ast.Div(), b): return is_time(a) != is_time(b)
        case ast.BinOp(a, _, b): return is_time(a) or is_time(b)
    return False


def is_number(node: ast.AST) -> bool:
    "A number written out, but for 0, which every time exceeds"
    match node:
        case ast.Constant(int() | float() as x): return x != 0
        case ast.UnaryOp(_, x): return is_number(x)
        case ast.BinOp(a, _, b): return is_number(a) and is_number(b)
    return False


def compared(code: ast.AST) -> Iterator[tuple[ast.expr, ast.expr]]:
    "What assertions order, two by two: `assert a < b`, `test(a, b, lt)`, `test_close(a, b)`"
    for n in ast.walk(code):
        match n:
            case ast.Assert(condition):
                for c in ast.walk(condition):
                    if not isinstance(c, ast.Compare): continue
                    for a, op, b in zip([c.left, *c.comparators], c.ops, c.comparators):
                        if isinstance(op, (ast.Lt, ast.LtE, ast.Gt, ast.GtE)): yield a, b
            case ast.Call(ast.Name('test'), [a, b, ast.Name(op) | ast.Attribute(_, op)]) if op in orders: yield a, b
            case ast.Call(ast.Name('test_close'), [a, b, *_]): yield a, b


def check_times(tree: Path) -> list[str]:
    "No assertion of a notebook or test compares a time with a number: machines differ, and are busy"
    codes = [(f'{key(p, tree)}, cell {c.get("id")}', parsed(c)) for p in notebooks(tree) for c in code_cells(read(p))]
    for p in sorted((tree / 'tests').glob('*.py')): codes.append((f'tests/{p.name}', ast.parse(p.read_text('utf-8'))))
    return [f'{where}, line {a.lineno}: {ast.unparse(a)} is held against {ast.unparse(b)}: '
            'compare it with another time of the same run' for where, code in codes for a, b in compared(code)
            if is_time(a) and is_number(b) or is_number(a) and is_time(b)]


def check_idle(tree: Path) -> list[str]:
    "No `expect_fail(…)` of a notebook stands alone: without `with` its block is never entered, and nothing is checked"
    return [f'{key(p, tree)}, cell {c.get("id")}, line {n.lineno}: expect_fail checks nothing alone: write '
            'with expect_fail(…): and what is to fail' for p in notebooks(tree) for c in code_cells(read(p))
            for n in ast.walk(parsed(c)) if isinstance(n, ast.Expr) and isinstance(n.value, ast.Call)
            and ast.unparse(n.value.func) == 'expect_fail']


def check_widths(tree: Path) -> list[str]:
    "No line of a script, test, benchmark or of the site's code is wider than 120 columns"
    paths = [p for folder in ('scripts', 'tests', 'benchmarks', 'docs') for p in sorted((tree / folder).glob('*.py'))]
    return [f'{p.relative_to(tree)}, line {i}: {len(line)} columns, wrap it at 120: {line.strip()[:60]}…' for p in paths
            for i, line in enumerate(p.read_text('utf-8').splitlines(), 1) if len(line) > 120]
