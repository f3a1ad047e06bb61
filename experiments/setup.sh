# Sourced by tests/run.sh and by the shell scripts of experiments/:  source experiments/setup.sh EXTRA...
# (with "" for no extra: without any argument bash would hand on those of the caller).
#
# Makes .venv in the root of the repository and installs this project into it with the named extras of
# pyproject.toml, in the versions of constraints.txt. Where that is done already, it goes straight on. Afterwards the
# shell stands in the root, and `python`, `pytest` and `fabric` are those of .venv. $PYTHON names another interpreter
# than python3 to make .venv with.

cd "$(dirname "${BASH_SOURCE[0]}")/.."

setup_fail() {
    echo "setup: $*" >&2
    exit 2
}

setup_venv() {
    local base=${PYTHON:-python3}
    command -v "$base" >/dev/null || setup_fail "no $base on this machine; install Python 3.10 or later, or set PYTHON"
    "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        setup_fail "$base is $("$base" --version 2>&1), older than Python 3.10; set PYTHON to a later one"
    echo "setup: making .venv with $("$base" --version)"
    "$base" -m venv .venv || {
        rm -rf .venv
        setup_fail "$base -m venv failed; on Debian and Ubuntu it needs the package python3-venv"
    }
}

# What an installation depends on: the declared dependencies, their tested versions, and the place of the checkout.
setup_state() {
    python -c 'import hashlib, os, pathlib as p
files = [p.Path(name).read_bytes() for name in ("pyproject.toml", "constraints.txt")]
print(hashlib.sha256(b"\0".join([*files, os.getcwd().encode()])).hexdigest())'
}

setup_install() {
    local extras state stamp torch
    extras=$(IFS=,; echo "$*")
    stamp=.venv/installed-${extras//,/-}
    state=$(setup_state)
    if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$state" ]; then
        return
    fi
    python -m pip --version >/dev/null 2>&1 || python -m ensurepip >/dev/null
    # Before the rest: a looser requirement may choose a build of torch that brings gigabytes of CUDA packages.
    torch=$(sed -n 's/^\(torch==[^ ;]*\).*/\1/p' constraints.txt)
    echo "setup: installing $torch"
    python -m pip install --quiet --disable-pip-version-check "$torch"
    echo "setup: installing this project${extras:+ with its extras $extras} (a minute or two)"
    python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".${extras:+[$extras]}"
    echo "$state" >"$stamp"
}

# The last release of TRL that has PPO stands beside the current one, in a folder of its own: what compares with it
# puts that folder first on PYTHONPATH.
setup_trl_with_ppo() {
    local peer=.peers/trl-1.12.0
    [ ! -d "$peer" ] || return 0
    echo "setup: installing TRL 1.12.0 into $peer"
    rm -rf "$peer.part"
    python -m pip install --quiet --disable-pip-version-check --no-deps --target "$peer.part" trl==1.12.0
    mv "$peer.part" "$peer"
}

[ -x .venv/bin/python ] || setup_venv
export VIRTUAL_ENV=$PWD/.venv PATH=$PWD/.venv/bin:$PATH
setup_install "$@"
