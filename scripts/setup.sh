# Sourced by scripts/run and scripts/test: the virtualenv and Debian's packages.
# shellcheck shell=bash

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv

say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }
die() { say "$@"; exit 1; }

can_apt() { [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; }

# Install Debian packages, asking for the list of packages only once.
apt_install() {
    say "installing $* with apt-get"
    if [ -z "${apt_updated:-}" ]; then
        DEBIAN_FRONTEND=noninteractive apt-get update -qq >&2 || return
        apt_updated=1
    fi
    DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "$@" >&2
}

# Print the first interpreter that is new enough; $PYTHON, when set, is the only candidate.
find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    return 1
}

# Debian keeps the part of Python that makes virtualenvs in a package of its own.
ensure_venv_module() {
    "$1" -c 'import ensurepip, venv' 2>/dev/null && return
    can_apt && apt_install python3-venv || true
    "$1" -c 'import ensurepip, venv' 2>/dev/null ||
        die "$1 cannot make a virtualenv; as root: apt-get install python3-venv"
}

# Make .venv and install the package into it, unless a stamp says that this is done already.
# The one argument is the extra to install, or nothing.
set_up_venv() {
    local extra=${1:-} python stamp sum
    python=$(find_python) || {
        [ -n "${PYTHON:-}" ] && die "PYTHON=$PYTHON is not Python 3.11 or newer"
        can_apt && apt_install python3 python3-venv || true
        python=$(find_python) ||
            die "Python 3.11 or newer is needed; as root: apt-get install python3 python3-venv"
    }
    # The sum changes with the dependencies, the interpreter and the place of the checkout.
    sum=$({ cat "$root/pyproject.toml"; "$python" -VV; printf '%s\n' "$root"; } | cksum)
    stamp=$venv/stamp${extra:+-$extra}
    if [ -x "$venv/bin/python" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$sum" ]; then
        return
    fi
    if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1 ||
        [ "$("$venv/bin/python" -VV)" != "$("$python" -VV)" ]; then
        ensure_venv_module "$python"
        say "making a virtualenv in ${venv#"$PWD"/}"
        "$python" -m venv --clear "$venv"
    fi
    say "installing ws2api${extra:+ and what scripts/${extra} needs}; this takes a minute the first time"
    "$venv/bin/python" -m pip install -qq --disable-pip-version-check \
        --editable "$root${extra:+[$extra]}" ||
        die "pip could not install the package; its message is above"
    printf '%s\n' "$sum" | tee "$stamp" >"$venv/stamp" # the plain package is there in any case
}
