"""Run all that must hold, two jobs at a time, and count: notebooks, pytest, types, and the checks of committed files.

Committed files are checked in a copy of HEAD, so that what a learner changed and has not committed disturbs nothing.
"""
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from xml.etree import ElementTree

import check
from common import code_cells, environment, key, manifest, notebooks, read, root, source

def run(command: list, env: dict) -> tuple[int, str]:
    done = subprocess.run(command, cwd=root, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          stdin=subprocess.DEVNULL, text=True, errors='replace')
    return done.returncode, done.stdout


def notebook(path: Path, env: dict, *options: str):
    "The notebook as Run All runs it in JupyterLab: every cell, in a kernel of its own"
    code, out = run([sys.executable, 'scripts/run.py', '--check', *options, key(path)], env)
    said = out.replace('IOStream.flush timed out\n', '') # By a worker's copy of the kernel, on a busy machine; harmless
    ok = code == 0 and said.startswith('passed')
    return [(ok, ' '.join(['notebook', key(path), *options]), '' if ok else out)]


def starts_workers(path: Path) -> bool:
    return any('num_workers=' in source(c) and '#| export' not in source(c) for c in code_cells(read(path)))


def pytest(env: dict, tmp: Path):
    report = tmp / 'pytest.xml'
    options = ['-q', '-p', 'no:cacheprovider', f'--junitxml={report}', f'--basetemp={tmp / "pytest"}']
    code, out = run([sys.executable, '-m', 'pytest', *options], env)
    if not report.exists(): return [(False, 'pytest', out)]
    cases = [(not (c.findall('failure') + c.findall('error')), f'{c.get("classname")}::{c.get("name")}',
              None if c.findall('skipped') else '') for c in ElementTree.parse(report).iter('testcase')]
    if code not in (0, 1) or not cases or (code == 1 and all(ok for ok, *_ in cases)):
        cases.append((False, f'pytest ended with {code}', ''))
    return cases + [(None, 'pytest', out)]


def types(env: dict):
    code, out = run([sys.executable, '-m', 'pyright', 'dlfound'], env)
    ok = code == 0 and '0 errors, 0 warnings' in out
    return [(ok, 'pyright finds nothing in dlfound/', '' if ok else out)]


def committed(tmp: Path) -> Path:
    "A copy of HEAD; of the files here where there is no git"
    tree = tmp / 'head'
    tree.mkdir()
    head = ['git', 'rev-parse', '--verify', '-q', 'HEAD']
    ours = (root / '.git').exists() and shutil.which('git') # Not a repository in which somebody unpacked this one
    if ours and subprocess.run(head, cwd=root, capture_output=True).returncode == 0:
        archive = subprocess.run(['git', 'archive', 'HEAD'], cwd=root, capture_output=True, check=True).stdout
        subprocess.run(['tar', '-x', '-C', tree], input=archive, check=True)
    else:
        ignore = shutil.ignore_patterns(*check.apart)
        shutil.copytree(root, tree, dirs_exist_ok=True, ignore=ignore)
    return tree


def lint(f, tree: Path):
    bad = f(tree)
    return [(not bad, f.__doc__, '\n'.join(bad))]


def main() -> int:
    with tempfile.TemporaryDirectory(prefix='dlfound-') as folder:
        tmp = Path(folder).resolve()
        env = environment(DLFOUND_HOME=str(tmp / 'home'), MPLCONFIGDIR=os.environ.get('MPLCONFIGDIR', str(tmp / 'mpl')))
        took = {k: v['seconds'] for k, v in manifest().items()}
        tree = committed(tmp)
        every = sorted(notebooks(), key=lambda p: -took.get(key(p), 0))
        methods = set(multiprocessing.get_all_start_methods()) - {multiprocessing.get_start_method()}
        if os.environ.get('DLFOUND_ONE_START'): methods = set() # .ci/run has had them in its first pass
        jobs = [lambda p=p, m=m: notebook(p, env, '--start-method', m)
                for p in every if starts_workers(p) for m in sorted(methods)] # They take longest, so they go first
        jobs += [lambda p=p: notebook(p, env) for p in every]
        jobs.insert(1, lambda: pytest(env, tmp))
        jobs += [lambda: types(env)] + [lambda f=f: lint(f, tree) for f in check.checks]
        passed = failed = skipped = 0

        def timed(job):
            start = time.time()
            return job(), time.time() - start

        with ThreadPoolExecutor(2) as pool:
            for future in [pool.submit(timed, j) for j in jobs]:
                results, seconds = future.result()
                for ok, name, text in results:
                    if ok is None:
                        if any(not good for good, *_ in results): print(text)
                        continue
                    skip = ok and text is None
                    passed, failed, skipped = passed + (ok and not skip), failed + (not ok), skipped + skip
                    if not ok: print(f'FAILED  {name}\n{text or ""}'.rstrip())
                    elif len(results) == 1: print(f'passed  {name}' + (f' ({seconds:.0f} s)' if seconds > 1 else ''))
                good = sum(bool(ok) and text is not None for ok, _, text in results)
                if len(results) > 1: print(f'pytest: {good} tests passed ({seconds:.0f} s)')
                sys.stdout.flush()
    print(f'{passed} passed, {failed} failed' + (f', {skipped} skipped' if skipped else ''))
    return min(failed, 1)


if __name__ == '__main__': sys.exit(main())
