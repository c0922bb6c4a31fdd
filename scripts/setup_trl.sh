#!/usr/bin/env bash
# Makes .venv-trl from requirements/trl.txt: TRL, for benchmarks/sft_throughput.py alone, which calls this script.
# A stamp holds the hash of what was installed: while it matches, this script does nothing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

environment=.venv-trl log=.venv-trl/setup.log
key=$(sha256sum <requirements/trl.txt)
stamp=$environment/.stamp-${key%% *}
[[ -e $stamp ]] && exit 0

source scripts/environment.sh
make_environment
: >"$log"
rm -f "$environment"/.stamp-*
install_cpu_torch
install "$(grep -c '==' requirements/trl.txt) locked packages" --no-deps -r requirements/trl.txt
compile_bytecode
say "checking that TRL imports"
"$environment/bin/python" -c "from trl import SFTConfig, SFTTrainer" >>"$log" 2>&1 ||
    { tail -n 15 "$log" >&2 && die "installed, but TRL does not import; the whole log is in $log"; }
touch "$stamp"
say "ready: TRL in $environment"
