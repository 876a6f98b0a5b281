#!/bin/sh
# Make or refresh .venv. Does nothing when settings.ini, setup.py and the folder's place are as they were at the last success.
set -eu
cd "$(dirname "$0")/.."
here=$(pwd -P)
min=$(sed -n 's/^min_python *= *//p' settings.ini)
py=.venv/bin/python
stamp=.venv/stamp

fail() { printf '%s\n' "$1" >&2; exit 1; }

fits() { "$1" -c "import sys; sys.exit(sys.version_info < tuple(map(int, '$min'.split('.'))))" 2>/dev/null; }

# The commands in .venv/bin hold the path of the folder in which they were made, which pyvenv.cfg holds as well.
moved() {
    made=$(sed -n 's/^command = //p' .venv/pyvenv.cfg 2>/dev/null) || return 1
    case "$made" in ''|*" $here/.venv") return 1;; esac
    printf '%s\n' "This folder was moved or copied: its .venv was made as ${made##* -m venv }, and is made anew"
}

make_venv() {
    found=
    if [ -n "${PYTHON:-}" ]; then set -- "$PYTHON"
    else set -- python3 python3.14 python3.13 python3.12 python3.11 python; fi
    for p in "$@"; do
        if fits "$p"; then found=$p; break; fi
    done
    [ -n "$found" ] || fail "dlfound needs Python $min or newer, and $1 is $("$1" -V 2>&1 || true): install one from python.org or your system's packages, then run: make PYTHON=/path/to/python3"
    "$found" -c 'import venv, ensurepip' 2>/dev/null ||
        fail "$found has no venv module: install it (on Debian or Ubuntu: sudo apt install python3-venv), then run make again"
    echo "Making .venv with $("$found" -V)"
    rm -rf .venv && "$found" -m venv .venv ||
        fail "No .venv could be made in $here (the lines above say why): is the folder yours, and is there room on the disk?"
}

want=$(printf '%s\n' "$here"; cat settings.ini setup.py)
if ! { [ "$want" = "$(cat "$stamp" 2>/dev/null)" ] && "$py" -c '' 2>/dev/null; }; then
    if moved || ! { [ -x "$py" ] && fits "$py" && "$py" -c 'import pip' 2>/dev/null; }; then make_venv; fi
    [ -w .venv ] || fail "$here/.venv belongs to another user (was it made with sudo?): let that user remove it, then run make again"
    rm -f "$stamp"
    "$py" scripts/install.py
    # nbdev 3 dropped this spelling, people still type it.
    cp .venv/bin/nbdev-test .venv/bin/nbdev_test
    printf '%s\n' "$want" > "$stamp"
fi

# Jupyter in this environment saves notebooks clean, shows no news, and touches no file outside .venv for either; its
# pictures are the same from run to run.
lab=.venv/share/jupyter/lab
give() { cmp -s "scripts/jupyter/$1" "$2/$1" || { mkdir -p "$2" && cp "scripts/jupyter/$1" "$2"; }; }
give jupyter_server_config.py .venv/etc/jupyter
give ipython_kernel_config.py .venv/etc/ipython
give overrides.json $lab/settings
# JupyterLab writes the third itself, as people open and close things: it gets the first one only, with the side bar closed.
layout=default-37a8.jupyterlab-workspace
[ -e $lab/workspaces/$layout ] || give $layout $lab/workspaces
