#!/bin/sh
# Make or refresh .venv. Does nothing when settings.ini, setup.py and the folder's place are as they were at the last success.
set -eu
cd "$(dirname "$0")/.."
min=$(sed -n 's/^min_python *= *//p' settings.ini)
py=.venv/bin/python
stamp=.venv/stamp
want=$(mktemp)
trap 'rm -f "$want"' EXIT
{ pwd; cat settings.ini setup.py scripts/env.sh; } > "$want"
if cmp -s "$want" "$stamp" && "$py" -c '' 2>/dev/null; then exit 0; fi

fits() { "$1" -c "import sys; sys.exit(sys.version_info < tuple(map(int, '$min'.split('.'))))" 2>/dev/null; }
if ! { [ -x "$py" ] && fits "$py"; }; then
    found=
    for p in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11 python}; do
        if fits "$p"; then found=$p; break; fi
    done
    if [ -z "$found" ]; then
        echo "dlfound needs Python $min or newer, and ${PYTHON:-python3} is $("${PYTHON:-python3}" -V 2>&1 || true): install one from python.org or your system's packages, then run: make PYTHON=/path/to/python3" >&2
        exit 1
    fi
    if ! "$found" -c 'import venv, ensurepip' 2>/dev/null; then
        echo "$found has no venv module: install it (on Debian or Ubuntu: sudo apt install python3-venv), then run make again" >&2
        exit 1
    fi
    echo "Making .venv with $("$found" -V)"
    rm -rf .venv
    "$found" -m venv .venv
fi

rm -f "$stamp"
echo 'Installing dlfound, PyTorch and JupyterLab into .venv: a few minutes and up to 6 GB the first time'
failed() {
    echo "The installation failed${1:-}; run make again when the cause is mended" >&2
    exit 1
}
if [ -t 1 ]; then "$py" -m pip install --disable-pip-version-check -e '.[dev]' || failed
elif ! "$py" -m pip install -qq --disable-pip-version-check -e '.[dev]' > .venv/install.log 2>&1; then
    tail -n 20 .venv/install.log >&2
    failed ', and .venv/install.log has all of it'
fi

# Jupyter in this environment saves notebooks cleaned, shows no news, and touches no file outside .venv for either.
mkdir -p .venv/etc/jupyter .venv/share/jupyter/lab/settings
cat > .venv/etc/jupyter/jupyter_server_config.py <<'PY'
def clean_before_saving(**kwargs):
    from nbdev.clean import clean_jupyter
    clean_jupyter(**kwargs)

c.ContentsManager.pre_save_hook = clean_before_saving
PY
cat > .venv/share/jupyter/lab/settings/overrides.json <<'JSON'
{"@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": false, "doNotDisturbMode": false}}
JSON

# nbdev 3 dropped this spelling, people still type it.
cat > .venv/bin/nbdev_test <<PY
#!/bin/sh
exec "$(pwd)/.venv/bin/nbdev-test" "\$@"
PY
chmod +x .venv/bin/nbdev_test
cp "$want" "$stamp"
