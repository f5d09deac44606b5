#!/usr/bin/env bash
# Runs on every worker in a clone: installs gcsfuse, and fluid_jax for TPU into .venv. It is safe to
# run it again.
set -euo pipefail
cd "$(dirname "$0")/.."

if ! command -v gcsfuse >/dev/null; then
  key=/usr/share/keyrings/cloud.google.asc
  packages=https://packages.cloud.google.com/apt
  curl --fail --silent --show-error "$packages/doc/apt-key.gpg" | sudo tee "$key" >/dev/null
  echo "deb [signed-by=$key] $packages gcsfuse-$(lsb_release -cs) main" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
  # A new machine runs its updates first and holds the lock during that time.
  sudo apt-get -qq -o DPkg::Lock::Timeout=600 update
  sudo apt-get -qq -o DPkg::Lock::Timeout=600 install --yes gcsfuse
fi

# The machines have Python 3.10. uv installs the Python version that the packages are pinned for.
python3 -m pip install --quiet --user -c constraints.txt uv
python3 -m uv venv --quiet --allow-existing --python 3.11 .venv
python3 -m uv pip install --quiet --python .venv/bin/python \
  -c constraints.txt -b constraints.txt -e '.[tpu]'

# libtpu starts and stops faster with huge pages; JAX warns without them.
echo always | sudo tee /sys/kernel/mm/transparent_hugepage/enabled >/dev/null
