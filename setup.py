"The package's metadata, read from settings.ini; the version, read from dlfound/__init__.py."
import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=['='], interpolation=None)
config.read(here / 'settings.ini', encoding='utf-8')
s = config['DEFAULT']
suffix = '_requirements'
repo, docs = (s.get(name, '').rstrip('/') for name in ('git_url', 'doc_url'))
urls = {'Homepage': docs or repo, 'Documentation': docs, 'Source': repo}
if repo: urls |= {'Changelog': f'{repo}/blob/HEAD/CHANGELOG.md', 'Issues': f'{repo}/issues'}
code_or_relative_link = re.compile(r'```.*?```|`[^`]*`|(\]\(|(?:href|src|srcset)=")(?!\w+:|[/#])([^)"\s]+)', re.S)


def text(*path): return here.joinpath(*path).read_text(encoding='utf-8')


def absolute(found):
    "A relative link of the README with its place in the repository, since PyPI has nothing beside it"
    start, path = found.groups()
    if not (repo and path): return found[0]
    kind = 'raw' if path.endswith(('.png', '.svg', '.gif', '.jpg', '.webp')) else 'blob'
    return f'{start}{repo}/{kind}/HEAD/{path.removeprefix("./")}'


setup(
    name=s['name'],
    version=re.search(r'^__version__ = "(.+)"', text(s['name'], '__init__.py'), re.M)[1],
    description=s['description'],
    long_description=code_or_relative_link.sub(absolute, text('README.md')),
    long_description_content_type='text/markdown',
    author=s['author'],
    license=s['license'],
    license_files=['LICENSE'],
    keywords=s['keywords'],
    classifiers=s['classifiers'].split('\n')[1:],
    project_urls={name: url for name, url in urls.items() if url},
    python_requires='>=' + s['min_python'],
    install_requires=s['requirements'].split(),
    extras_require={k.removesuffix(suffix): v.split() for k, v in s.items() if k.endswith(suffix)},
    packages=find_packages(include=[s['name'], s['name'] + '.*']),
    package_data={s['name']: ['py.typed', 'results/*.json']},
    zip_safe=False,
)
