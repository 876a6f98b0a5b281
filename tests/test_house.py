"The package builds to the same metadata in every way, and its commands explain themselves."
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from configparser import ConfigParser
from email import message_from_string
from pathlib import Path

import pytest
from small import run

root = Path(__file__).resolve().parent.parent
config = ConfigParser(delimiters=['='], interpolation=None)
config.read(root / 'settings.ini')
s = config['DEFAULT']
made = shutil.ignore_patterns('.venv', '.git', '*.egg-info', 'build', 'dist', '__pycache__', '.hypothesis',
                              '.ipynb_checkpoints')


def facts(text):
    m = message_from_string(text)
    names = ('Name', 'Version', 'Summary', 'Author', 'Requires-Python', 'Requires-Dist', 'Provides-Extra',
             'License-Expression', 'License', 'Classifier', 'Keywords')
    return {k: sorted(m.get_all(k) or []) for k in names}


def install(what, site, *options):
    pip = [sys.executable, '-m', 'pip', 'install', '-q', '--no-deps', *options]
    done = run(*pip, '--target', site, what, cwd=site.parent)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope='module')
def built(tmp_path_factory):
    "A wheel made from the sdist, which was made from a copy of the tree without its git history"
    tmp = tmp_path_factory.mktemp('build')
    shutil.copytree(root, tmp / 'src', ignore=made)
    done = run(sys.executable, '-m', 'build', '--no-isolation', '--outdir', tmp / 'out', tmp / 'src', cwd=tmp)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return tmp / 'out'


def test_one_set_of_facts(built, tmp_path):
    [wheel], [sdist] = built.glob('*.whl'), built.glob('*.tar.gz')
    with zipfile.ZipFile(wheel) as z:
        from_wheel = facts(z.read(next(n for n in z.namelist() if n.endswith('/METADATA'))).decode())
    with tarfile.open(sdist) as t:
        info = next(m for m in t if m.name.count('/') == 1 and m.name.endswith('PKG-INFO'))
        from_sdist = facts(t.extractfile(info).read().decode())
    shutil.copytree(root, tmp_path / 'src', ignore=made)
    install(tmp_path / 'src', tmp_path / 'direct', '--no-build-isolation')
    direct = facts(next((tmp_path / 'direct').glob('*.dist-info/METADATA')).read_text())
    installed = facts(next(Path(sysconfig.get_path('purelib')).glob('dlfound-*.dist-info/METADATA')).read_text())
    assert from_wheel == from_sdist == direct == installed
    assert from_wheel['Name'] == [s['name']] and from_wheel['Requires-Python'] == ['>=' + s['min_python']]
    assert {d for d in from_wheel['Requires-Dist'] if 'extra' not in d} == set(s['requirements'].split())


def test_wheel_works_outside_the_repository(built, tmp_path):
    [wheel] = built.glob('*.whl')
    install(wheel, tmp_path / 'site')
    code = ('import dlfound, dlfound.data, torch; from dlfound.matmul import matmul_einsum as f; '
            'print(dlfound.__file__, dlfound.__version__, f(torch.ones(2, 3), torch.ones(3, 1)).sum().item())')
    done = run(sys.executable, '-c', code, cwd=tmp_path, PYTHONPATH=str(tmp_path / 'site'))
    assert done.returncode == 0, done.stderr
    file, version, total = done.stdout.split()
    assert Path(file).is_relative_to(tmp_path) and total == '6.0'
    assert f'__version__ = "{version}"' in (root / 'dlfound/__init__.py').read_text()
    assert (tmp_path / 'site/dlfound/py.typed').exists() and not (tmp_path / 'site/nbs').exists()


def test_no_requirement_is_written_twice():
    text = (root / 'pyproject.toml').read_text()
    assert not re.search(r'^\[project\]', text, re.M) and not any(r in text for r in s['requirements'].split())


def test_torch_and_torchvision_match():
    import torch
    from torchvision.ops import nms
    boxes = torch.tensor([[0., 0, 10, 10], [1, 1, 11, 11], [20, 20, 30, 30]])
    assert nms(boxes, torch.tensor([.9, .8, .7]), .5).tolist() == [0, 2]


def test_import_does_nothing_else(tmp_path):
    code = ('import torch, sys; state = lambda: (torch.get_num_threads(), torch.initial_seed()); before = state(); '
            'import dlfound.data, dlfound.matmul; '
            'assert state() == before and "matplotlib.pyplot" not in sys.modules')
    done = run(sys.executable, '-c', code, cwd=tmp_path, PYTHONPATH=str(root), DLFOUND_HOME=str(tmp_path / 'home'))
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_make_lists_every_target():
    text = (root / 'Makefile').read_text()
    targets = re.search(r'\.PHONY: (.*)', text)[1].split()
    done = run('make', '--no-print-directory', cwd=root, MAKEFLAGS='', MAKELEVEL='0')
    assert done.returncode == 0 and all(len(line) <= 150 for line in done.stdout.splitlines())
    assert sorted(line.split()[1] for line in done.stdout.splitlines()) == sorted(targets)
    assert {'lab', 'test', 'export', 'clean', 'run', 'bench', 'full', 'seeds', 'hooks'} <= set(targets)


def test_hooks_stay_in_the_clone(tree):
    subprocess.run(['git', 'init', '-q'], cwd=tree, check=True)
    home = tree / 'home'
    home.mkdir()
    for _ in range(2):
        done = run('sh', 'scripts/hooks.sh', cwd=tree, HOME=str(home))
        assert done.returncode == 0, done.stderr
    assert list(home.iterdir()) == [] and 'nbdev-merge' in (tree / '.git/config').read_text()
    hook = tree / '.git/hooks/post-merge'
    assert 'nbdev-trust' in hook.read_text()
    hook.write_text('#!/bin/sh\necho mine\n')
    done = run('sh', 'scripts/hooks.sh', cwd=tree)
    assert done.returncode == 1 and 'by hand' in done.stderr and 'mine' in hook.read_text()
