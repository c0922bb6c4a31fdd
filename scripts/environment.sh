# What the scripts that make environments share; they source it from the repository root. They set `environment`, the
# folder, and `log`, the file that pip's output goes to.
torch_cpu_index=https://download.pytorch.org/whl/cpu

say() { printf '[%3ds] %s\n' "$SECONDS" "$*"; }
die() {
    printf 'setup: %s\n' "$*" >&2
    exit 1
}

find_python() {
    local candidate
    for candidate in "${PYTHON:-python3.11}" python3 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.11*/bin/python; do
        if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    return 1
}

make_environment() {
    local python
    [[ $(uname -sm) == "Linux x86_64" ]] || die "the locked lists are for Linux x86_64, this is $(uname -sm)"
    [[ -x $environment/bin/python ]] && return
    python=$(find_python) || die "needs Python 3.11 with venv: install it ('pyenv install 3.11', or your system's python3.11 and python3.11-venv packages), or set PYTHON to its path"
    say "new environment $environment with $("$python" --version)"
    "$python" -m venv "$environment"
}

pip_install() {
    "$environment/bin/python" -m pip install -qq --disable-pip-version-check --no-compile "$@" >>"$log" 2>&1
}

install() { # install WHAT pip-arguments...
    local what=$1
    shift
    say "$what"
    pip_install "$@" || { tail -n 15 "$log" >&2 && die "could not install $what; the whole log is in $log"; }
}

install_cpu_torch() {
    local pin
    pin=$(grep '^torch==' requirements/cpu.txt)
    say "$pin"
    pip_install --no-deps "$pin" || pip_install --no-deps "$pin" --extra-index-url "$torch_cpu_index" ||
        die "no CPU build $pin, neither on pip's search path nor at $torch_cpu_index; put its wheel in a folder and set PIP_FIND_LINKS to it ($log)"
}

# Every process that imports the packages would compile them again. pip compiles on one core, and nothing is written
# lazily where PYTHONDONTWRITEBYTECODE is set.
compile_bytecode() {
    say "compiling to bytecode"
    "$environment/bin/python" -m compileall -q -j 0 "$environment/lib/python3.11/site-packages" >>"$log" 2>&1 || true # templates do not parse
}
