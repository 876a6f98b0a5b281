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

setup(
    name=s['name'],
    version=re.search(r'^__version__ = "(.+)"', (here / s['name'] / '__init__.py').read_text(encoding='utf-8'), re.M)[1],
    description=s['description'],
    long_description=(here / 'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    author=s['author'],
    license=s['license'],
    license_files=['LICENSE'],
    keywords=s['keywords'],
    classifiers=s['classifiers'].split('\n')[1:],
    python_requires='>=' + s['min_python'],
    install_requires=s['requirements'].split(),
    extras_require={k.removesuffix(suffix): v.split() for k, v in s.items() if k.endswith(suffix)},
    packages=find_packages(include=[s['name'], s['name'] + '.*']),
    package_data={s['name']: ['py.typed', 'results/*.json']},
    zip_safe=False,
)
