"What is installed fits together, imports do nothing else, and the targets of make do what they say."
import re
import subprocess
import sys
from pathlib import Path

import pytest
from small import needs_git, run

root = Path(__file__).resolve().parent.parent


def test_torch_and_torchvision_match():
    import torch
    nms = pytest.importorskip('torchvision.ops').nms
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


@needs_git
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
