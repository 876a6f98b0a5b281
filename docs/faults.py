"What is wrong with the built pages: links that lead nowhere, pictures without a description, requests to elsewhere."
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

loaded = dict(img='src', script='src', link='href', iframe='src', source='src', video='src', audio='src', embed='src',
              object='data')
elsewhere = re.compile(r'(?:https?:)?//')
tags = re.compile(rf'<(?:a|{"|".join(loaded)})\s[^>]*>')
styled = re.compile(r'<style.*?</style>|\sstyle="[^"]*"', re.S)
style = re.compile(r'''(?:url\(|@import)\s*["']?((?:https?:)?//[^"')\s]+)''')


class Page(HTMLParser):
    "What a page links to, what it loads, which places it has, and its pictures without words"
    def __init__(self, text: str):
        super().__init__()
        self.links: list[str] = []
        self.silent: list[str] = []
        self.loads = [url for part in styled.findall(text) for url in style.findall(part)]
        self.ids = set(re.findall(r'\s(?:id|name)="([^"]*)"', text))
        for tag in tags.findall(text): # To parse all would take ten times as long
            self.feed(tag)
            self.clear_cdata_mode() # Which the tag of a script begins

    def handle_starttag(self, tag, attrs):
        given = {k: v or '' for k, v in attrs}
        if tag == 'a' and 'href' in given: self.links.append(given['href'])
        if tag == 'link' and given.get('rel') in ('canonical', 'search', 'index', 'next', 'prev'): return
        if given.get(loaded.get(tag, '')): self.loads.append(given[loaded[tag]])
        if 'srcset' in given: self.loads += [part.split()[0] for part in given['srcset'].split(',')]
        alt = given.get('alt', '').strip()
        if tag == 'img' and (not alt or re.fullmatch(r'\S*\.\w{3,4}', alt)): self.silent.append(given.get('src', ''))

    handle_startendtag = handle_starttag


def faults(site: Path) -> dict[str, list[str]]:
    "By page, what is wrong with it"
    pages = {p: Page(p.read_text('utf-8')) for p in sorted(site.rglob('*.html'))
             if '_static' not in p.parts} # There the theme keeps templates
    found: dict[str, list[str]] = {p.relative_to(site).as_posix(): [] for p in pages}
    for path, page in pages.items():
        bad = found[path.relative_to(site).as_posix()]
        bad += [f'the picture {src[-60:]} has no alt text: describe it in #| fig-alt' for src in page.silent]
        for link in page.loads:
            if elsewhere.match(link): bad.append(f'{link} would be fetched from elsewhere: keep it with the site')
        for link in dict.fromkeys(page.links + page.loads):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc: continue
            to = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if to.is_dir(): to = to / 'index.html'
            if not to.exists(): bad.append(f'{link} leads nowhere')
            elif parts.fragment and to in pages and unquote(parts.fragment) not in pages[to].ids:
                bad.append(f'{link} names a place that is not there')
    for css in site.rglob('*.css'):
        found[css.relative_to(site).as_posix()] = [f'{url} would be fetched from elsewhere: keep it with the site'
                                                   for url in style.findall(css.read_text('utf-8'))]
    return found
