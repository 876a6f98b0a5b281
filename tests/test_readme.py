"The script of README trains with the installed package alone."
import os
import re
import subprocess
import sys
from pathlib import Path

root = Path(__file__).parent.parent


def test_the_script_of_readme_learns_digits(tmp_path):
    blocks = re.findall(r'```python\n(.*?)```', (root / 'README.md').read_text(encoding='utf-8'), re.S)
    script, = [block for block in blocks if 'Learner(' in block]
    assert len(script.strip().splitlines()) <= 15
    (tmp_path / 'train.py').write_text('import torch\ntorch.manual_seed(0)\n' + script, encoding='utf-8')
    done = subprocess.run([sys.executable, 'train.py'], cwd=tmp_path, env=os.environ, capture_output=True, text=True,
                          timeout=500)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    *_, header, a, b, c = done.stdout.splitlines()
    assert header.split() == ['epoch', 'train_loss', 'valid_loss', 'accuracy', 'time']
    assert max(map(len, (header, a, b, c))) <= 80
    accuracy = float(c.split()[3])
    assert accuracy >= (.95 if 'STAND-IN' in done.stdout else .98), done.stdout
