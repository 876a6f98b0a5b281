"""Build the site: docs/_build from the notebooks as they were saved. Every fault is printed, and all are counted.

python scripts/pages.py builds it, with `open` serves it too, with `pdf` prints it into one file.
"""
import functools
import http.server
import re
import shutil
import subprocess
import sys
import webbrowser
from configparser import ConfigParser
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.requirements import Requirement

from common import environment, root

docs = root / 'docs'
work, site = docs / '_work', docs / '_build'
browsers = 'chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable'


def missing() -> list[str]:
    "The requirements of the extra `docs` that are not installed"
    config = ConfigParser(delimiters=['='], interpolation=None)
    config.read(root / 'settings.ini', encoding='utf-8')
    found = []
    for r in map(Requirement, config['DEFAULT']['docs_requirements'].split()):
        try: there = version(r.name) in r.specifier
        except PackageNotFoundError: there = False
        if not there: found.append(str(r))
    return found


def sphinx(*forms: str) -> list[str]:
    "Let Sphinx read the collected pages and write them in these forms; what it warns of, or why it ended"
    done = subprocess.run([sys.executable, docs / 'render.py', work, *forms], cwd=root, text=True, env=environment(),
                          stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    found = [work / f'{said}.txt' for said in ('dummy', forms[0])] # Other forms would say the same once more
    text = re.sub('\x1b.*?m', '', ''.join(p.read_text('utf-8') for p in found if p.exists()))
    bad = [line.replace(f'{work}/', '').replace(f'{root}/', '') for line in text.splitlines() if line.strip()]
    return bad if not done.returncode or bad else [f'Sphinx ended with {done.returncode}: {done.stderr[-3000:]}']


def build() -> dict[str, list[str]]:
    "Make docs/_build; by page, what is wrong with it"
    import collect
    import faults
    shutil.rmtree(work, ignore_errors=True)
    collect.write(root, work / 'pages')
    said = sphinx('html', 'markdown')
    if not (work / 'html/search.html').exists(): return {'all pages': said}
    copies = [*(work / 'markdown').rglob('*.md')]
    if not copies: said.append('there are no Markdown copies')
    for p in copies: shutil.copy(p, work / 'html' / p.relative_to(work / 'markdown'))
    (work / 'html/llms.txt').write_text(collect.contents(root), encoding='utf-8')
    shutil.rmtree(site, ignore_errors=True)
    (work / 'html').rename(site)
    return {'what Sphinx says': said} | faults.faults(site)


def serve() -> None:
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=site)
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
        address = f'http://127.0.0.1:{server.server_port}/'
        print(f'The site is at {address} until you press Ctrl-C', flush=True)
        webbrowser.open(address)
        try: server.serve_forever()
        except KeyboardInterrupt: pass


def pdf() -> int:
    "One page of everything, printed by Chromium"
    browser = next(filter(None, map(shutil.which, browsers)), None)
    if not browser: sys.exit('make pdf prints with Chromium, which is not there: install it (chromium), or Chrome')
    sphinx('singlehtml')
    done = subprocess.run([browser, '--headless', '--no-sandbox', '--disable-gpu', '--no-pdf-header-footer',
                           '--generate-pdf-document-outline', f'--print-to-pdf={site / "dlfound.pdf"}',
                           work / 'singlehtml/index.html'], stderr=subprocess.PIPE, text=True)
    if done.returncode: print(done.stderr[-2000:], file=sys.stderr)
    else: print(f'{(site / "dlfound.pdf").relative_to(root)}: {(site / "dlfound.pdf").stat().st_size / 1e6:.1f} MB')
    return done.returncode


def main() -> int:
    if lacks := missing():
        import install
        print(f'Installing what the site is built with: {", ".join(lacks)}', flush=True)
        code, said = install.pip('install', *lacks)
        if code:
            print(f'{said[-2000:]}\nThe installation failed. {install.reason(said, code)}\n0 passed, 1 failed')
            return 1
    sys.path.insert(0, str(docs))
    found = build()
    for page, bad in found.items():
        for b in dict.fromkeys(bad): print(f'FAILED  {page}: {b}')
    failed = sum(len(set(bad)) for bad in found.values())
    size = sum(p.stat().st_size for p in site.rglob('*') if p.is_file()) / 1e6 if site.exists() else 0
    print(f'docs/_build: {size:.0f} MB, open docs/_build/index.html')
    if 'pdf' in sys.argv: failed += pdf()
    print(f'{sum(not bad for bad in found.values())} passed, {failed} failed')
    if 'open' in sys.argv: serve()
    return min(failed, 1)


if __name__ == '__main__': sys.exit(main())
