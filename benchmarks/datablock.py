"""Listing the files of a folder, one thread: ours against fastai's and torchvision's, and Python's ways beside them.

Two folders: four thousand empty files made here, and Imagenette where it can be had. All lists are of the same files.
Ours is also sorted, without hidden files and double links, and checked for empty folders; fastai's is in the order of
the disk, and torchvision's holds strings in place of paths. Run it as `python benchmarks/datablock.py`; it takes about
a minute. Peers are measured where they are installed.
"""
from common import compare, row, save

import os
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from dlfound.data import fetch
from dlfound.files import get_files

try: from fastai.data.transforms import get_image_files
except ImportError: get_image_files = None
try: from torchvision.datasets.folder import ImageFolder
except ImportError: ImageFolder = None

endings = '.jpg', '.jpeg'


def by_scandir(root: str) -> list[Path]:
    "Paths in the order of the file system"
    found = []
    with os.scandir(root) as entries:
        for e in entries:
            if e.is_dir(): found += by_scandir(e.path)
            elif e.name.lower().endswith(endings): found.append(Path(e.path))
    return found


def by_walk(root: str) -> list[Path]:
    return [Path(folder, name) for folder, _, names in os.walk(root)
            for name in names if name.lower().endswith(endings)]


def by_rglob(root: str) -> list[Path]:
    return [p for p in Path(root).rglob('*') if p.suffix.lower() in endings and p.is_file()]


def by_imagefolder(root: str) -> list[str]:
    "Both parts, as an ImageFolder lists one part at a time; strings and not paths"
    return [path for part in ('train', 'val') for path, _ in ImageFolder(os.path.join(root, part)).samples]


def listing(what: str, root: Path) -> list[dict]:
    "All ways over one folder, in one run"
    ways = dict(ours=partial(get_files, extensions=endings), scandir=by_scandir, walk=by_walk, rglob=by_rglob)
    if get_image_files: ways['fastai get_image_files'] = get_image_files
    if ImageFolder: ways['torchvision ImageFolder'] = by_imagefolder
    lists = {name: sorted(map(str, way(str(root)))) for name, way in ways.items()}
    assert all(found == lists['ours'] for found in lists.values()), {name: len(found) for name, found in lists.items()}
    t = compare({name: partial(way, str(root)) for name, way in ways.items()}, repeat=9)
    n = len(lists['ours'])
    return [row(f'{what}, {n} files, against {name}', t['ours'], t[name], invert=True,
                files_per_s=n / t['ours'].median) for name in ways if name != 'ours']


if __name__ == '__main__':
    for name, peer in (('fastai', get_image_files), ('torchvision', ImageFolder)):
        if not peer: print(f'{name} is not installed, so it is not measured')
    with TemporaryDirectory() as folder:
        for part, n in (('train', 150), ('val', 50)):
            for c in range(20):
                own = Path(folder, part, f'class{c:02}')
                own.mkdir(parents=True)
                for i in range(n): (own / f'{part[0]}{i}.jpg').touch()
        rows = listing('a folder made here', Path(folder))
    try: rows += listing('Imagenette', fetch('imagenette', standin=False))
    except ConnectionError as e: print(e, 'So it is not measured')
    save('datablock', rows, ('fastai', 'torchvision'))
