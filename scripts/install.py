"""Install dlfound and what it needs into .venv; when that fails, say in a sentence or two what to do about it.

scripts/env.sh runs this, at a time when there is nothing but Python and pip.
"""
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

root = Path(__file__).resolve().parent.parent
python = root / '.venv/bin/python'
log = root / '.venv/install.log'

# What pip says, and what to do about it. The first pattern that fits counts, so causes stand before their effects.
reasons = {
    r'No space left on device|Disk quota exceeded|Not enough free disk space':
        'The disk is full: .venv takes about {stays} GB where {free} are free, the downloads {passes} GB in '
        '{tmp} where {tmp_free} are free. Make room; TMPDIR=/another/folder moves the downloads.',
    r'CERTIFICATE_VERIFY_FAILED|certificate verify failed':
        'The certificate of the package index is not trusted. Behind a proxy that reads encrypted traffic, ask for its '
        'certificate and run: PIP_CERT=/path/to/certificate.pem make lab.',
    r'ProxyError|Cannot connect to proxy|Tunnel connection failed|407 Proxy':
        'The proxy does not let pip through: see what the variables https_proxy and http_proxy say.',
    r'Name or service not known|name resolution|nodename nor servname|getaddrinfo failed|NameResolutionError':
        'The package index cannot be found: is there a network? {proxy} Where another index is to be '
        'used, set PIP_INDEX_URL.',
    r'Connection refused|is unreachable|No route to host|timed out|Connection reset|NewConnectionError|SSLError|'
    r'Connection aborted|RemoteDisconnected|Connection broken|IncompleteRead|ProtocolError':
        'The package index does not answer, or not to the end. Run make again, which keeps what was downloaded. '
        '{proxy} Where another index is to be used, set PIP_INDEX_URL.',
    r'\b[45]\d\d (?:Client|Server) Error|HTTP error [45]\d\d':
        'The package index answers with an error ({0}): is its address in PIP_INDEX_URL right?',
    r'DO NOT MATCH THE HASHES':
        'A download was damaged on the way: run PIP_NO_CACHE_DIR=1 make lab.',
    r'Permission denied|Read-only file system|Operation not permitted':
        'A file may not be written (the lines above name it). If .venv belongs to another user, as after sudo make, '
        'let that user remove it, and run make as yourself.',
    r'this version of pip|[Uu]nsupported wheel|newer pip|newer version of pip':
        'pip is too old for one of the packages. Run: .venv/bin/python -m pip install -U pip.',
    r'ResolutionImpossible|conflicting dependencies':
        'Some requirements exclude each other. Are there constraints in PIP_CONSTRAINT or in a pip.conf?',
    r'No matching distribution found for setuptools':
        'The package index cannot be reached, or has not even setuptools: is its address right, in PIP_INDEX_URL or '
        'in a pip.conf?',
    r'No matching distribution found for (?P<name>[^\s\x1b]+)':
        'The package index has no {name} for {machine}.{unfit} Try another Python, such as 3.12 (make '
        'PYTHON=/path/to/python3.12), or a newer pip (.venv/bin/python -m pip install -U pip); or does PIP_INDEX_URL '
        'name an index that lacks it?',
    r'Failed building wheel for \S+|Failed to build|subprocess-exited-with-error':
        'A package is not there ready-made for {machine}, and could not be built. Try another Python, such as 3.12: '
        'make PYTHON=/path/to/python3.12.',
}


def cuda() -> bool:
    "Whether PyTorch comes with its CUDA libraries: on Linux, unless an index of CPU builds is named"
    indexes = os.environ.get('PIP_INDEX_URL', '') + os.environ.get('PIP_EXTRA_INDEX_URL', '')
    return sys.platform == 'linux' and '/cpu' not in indexes


def sizes() -> tuple[float, float]:
    "GB that .venv takes in the end, GB of downloads on the way"
    return (6, 3.2) if cuda() else (1.5, .4)


def free(folder: Path) -> float:
    "GB that are free where `folder` is, or will be"
    while not folder.exists(): folder = folder.parent
    return shutil.disk_usage(folder).free / 1e9


def unfit() -> str:
    "What PyTorch is not built for, if that is what we are on"
    if sys.maxsize < 2 ** 32: return ' PyTorch needs a 64-bit Python, and this one has 32.'
    if sys.platform == 'darwin' and platform.machine() == 'x86_64':
        return ' There is no new PyTorch for Intel Macs; on a Mac with an M chip, this Python is one for Intel.'
    if sys.platform == 'linux' and platform.libc_ver()[0] != 'glibc':
        return ' PyTorch needs a Linux with glibc (not Alpine, for instance).'
    return ''


def reason(output: str, code: int = 1) -> str:
    "Why the installation failed, from the end of what pip said"
    if code == -signal.SIGKILL: return 'The system stopped pip, most likely for want of memory: close other programs.'
    tmp, (stays, passes) = Path(tempfile.gettempdir()), sizes()
    proxy = any(os.environ.get(name) for name in ('https_proxy', 'HTTPS_PROXY', 'all_proxy', 'ALL_PROXY'))
    facts = dict(stays=stays, passes=passes, tmp=tmp, free=f'{free(root):.1f} GB', tmp_free=f'{free(tmp):.1f} GB',
                 machine=f'Python {platform.python_version()} on {platform.system()} {platform.machine()}',
                 unfit=unfit(),
                 proxy='Is the proxy in https_proxy right?' if proxy else 'Behind a proxy, set https_proxy.')
    end = '\n'.join(output.splitlines()[-100:])
    for pattern, sentence in reasons.items():
        if m := re.search(pattern, end): return sentence.format(m[0], **facts, **m.groupdict())
    return 'The lines above say why.'


def warnings() -> list[str]:
    "One for each disk that may be too small"
    stays, passes = sizes()
    needs = [(root, stays), (Path(tempfile.gettempdir()), passes)]
    if not os.environ.get('PIP_NO_CACHE_DIR'): needs.append((Path(os.path.expanduser('~')), passes)) # pip's own cache
    disks = {}
    for folder, need in needs:
        device = folder.stat().st_dev if folder.exists() else None
        first, total = disks.get(device, (folder, 0))
        disks[device] = first, total + need
    return [f'Warning: up to {need:.3g} GB are needed on the disk of {folder}, where {free(folder):.1f} GB are free. '
            'PIP_NO_CACHE_DIR=1 saves some of it, TMPDIR=/another/folder moves the downloads'
            for folder, need in disks.values() if free(folder) < need]


def pip(*args: str) -> tuple[int, str]:
    "Run pip, with its progress bars on a terminal, else in silence: its exit status and what it said, also in `log`"
    env = os.environ | {'COLUMNS': str(shutil.get_terminal_size().columns), 'PIP_DISABLE_PIP_VERSION_CHECK': '1'}
    shown = sys.stdout.isatty()
    ours, its = os.openpty() if shown else os.pipe()
    process = subprocess.Popen([python, '-m', 'pip', *args], cwd=root, env=env, stdout=its, stderr=its)
    os.close(its)
    said = b''
    while text := read(ours):
        with suppress(OSError), log.open('ab' if said else 'wb') as file: file.write(text) # The disk may be full
        if shown: os.write(1, text)
        said += text
    return process.wait(), said.decode(errors='replace').replace('\r\n', '\n')


def read(fd: int) -> bytes:
    try: return os.read(fd, 65536)
    except OSError: return b'' # So a terminal ends on Linux


def main() -> int:
    new = not any((root / '.venv/lib').glob('python*/site-packages/torch'))
    stays, passes = sizes()
    size = f': a few minutes, {passes} GB to download, {stays} GB on the disk' if new else ''
    print(f'Installing dlfound, PyTorch and JupyterLab into .venv{size}', flush=True)
    if new and cuda() and not shutil.which('nvidia-smi'):
        print('without an NVIDIA GPU, PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make lab '
              'needs about 1.2 GB instead of 6', flush=True)
    for line in warnings() if new else []: print(line, file=sys.stderr)
    code, output = pip('install', '-e', '.[dev]')
    if code == 0: return 0
    if not sys.stdout.isatty(): print(*output.splitlines()[-20:], sep='\n', file=sys.stderr)
    print(f'\nThe installation failed. {reason(output, code)}', file=sys.stderr)
    if log.exists() and log.stat().st_size: print('.venv/install.log has all that pip said.', file=sys.stderr)
    return 1


if __name__ == '__main__':
    try: sys.exit(main())
    except KeyboardInterrupt: sys.exit(130)
