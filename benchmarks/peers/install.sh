#!/usr/bin/env bash
# Installs the tools of this comparison into .tools, which git ignores. Nothing else needs them.
# PYTHON: the interpreter that runs rafce_ray. fer's MTCNN uses its PyTorch; the rest is installed apart from it.
set -euo pipefail
cd "$(dirname "$0")"
python=${PYTHON:-python}
"$python" -c "import torch, torchvision" || { echo "PYTHON=$python has no PyTorch. Activate the environment of rafce_ray, or set PYTHON to its interpreter." >&2; exit 2; }

"$python" -m venv --clear .tools/python
.tools/python/bin/pip install --quiet -r requirements.txt
# As they ask, fer and facex would be installed with OpenCV 5 and setuptools 82, which they cannot use, and with moviepy,
# which they do not need for a photograph. requirements.txt has what they import.
.tools/python/bin/pip install --quiet --no-deps fer==25.10.3 facex==1.1.0 facenet-pytorch==2.6.0
"$python" -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
    > "$(.tools/python/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/zz_torch.pth"

# No package's script is run: sharp and tfjs-backend-wasm ship their binaries.
mkdir -p .tools/node
cp package.json .tools/node/
npm install --prefix .tools/node --ignore-scripts --no-audit --no-fund --loglevel=error
echo "Installed. Next: python benchmarks/peers/run.py --bundle runs/first/bundle"
