"Open JupyterLab on the first lesson; arguments are passed on."
import os
import sys
from pathlib import Path

from common import environment, root

# Where the lab's programs write outside .venv: the variable that moves it, and the place in the user's home without it.
places = {'JUPYTER_CONFIG_DIR': '.jupyter', 'JUPYTER_DATA_DIR': '.local/share/jupyter', 'IPYTHONDIR': '.ipython',
          'MPLCONFIGDIR': '.config/matplotlib', 'DLFOUND_HOME': '.dlfound'}


def writable(folder: Path) -> bool:
    "Whether `folder` can be written, or made"
    while not folder.exists() and folder != folder.parent: folder = folder.parent
    return folder.is_absolute() and folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)


def replacements() -> dict[str, str]:
    "Folders in .venv for those in a home that cannot be written"
    return {variable: str(root / '.venv/home' / place) for variable, place in places.items()
            if not os.environ.get(variable) and not writable(Path(os.path.expanduser('~'), place))}


def main() -> None:
    python = root / '.venv/bin/python'
    args = [f'--ServerApp.root_dir={root}', '--LabApp.default_url=/lab/tree/nbs/00_matmul.ipynb',
            '--KernelSpecManager.ensure_native_kernel=True']
    if hasattr(os, 'geteuid') and os.geteuid() == 0: args.append('--allow-root')
    moved = replacements()
    if moved: print(f'Your home cannot be written: settings, caches and data go to {root / ".venv/home"}', flush=True)
    os.chdir(root)
    os.execve(python, [str(python), '-m', 'jupyterlab', *args, *sys.argv[1:]], environment(threads=None, **moved))


if __name__ == '__main__': main()
