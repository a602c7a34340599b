#!/usr/bin/env bash
# Makes .venv with proxynorm and its extras, and installs the system packages that FFCV and Fashion-MNIST need, where it may.
# Safe to run again: it does nothing when nothing has changed. PYTHON= chooses the interpreter (3.10 or newer).
set -euo pipefail
cd "$(dirname "$0")/.."

system_packages=(build-essential pkg-config python3-dev python3-venv libopencv-dev libturbojpeg0-dev dataset-fashion-mnist)
stamp=.venv/.proxynorm-setup

say() { printf 'setup: %s\n' "$*"; }

has_ffcv_libraries() { command -v pkg-config >/dev/null && command -v c++ >/dev/null &&
    pkg-config --exists opencv4 && pkg-config --exists libturbojpeg; }

has_fashion_mnist() { [ -d /usr/share/datasets/fashion-mnist ]; }

find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3 python3.13 python3.12 python3.11 python3.10; do
        if [ -n "$candidate" ] && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    say "no Python 3.10 or newer found; install one, or name it: PYTHON=/path/to/python3" >&2
    exit 2
}

install_system_packages() {
    if has_ffcv_libraries && has_fashion_mnist; then return; fi
    if ! command -v apt-get >/dev/null; then
        say "not Debian or Ubuntu: FFCV needs OpenCV 4 and libturbojpeg with headers, pkg-config and a C++ compiler; going on without"
        return
    fi
    local as_root=()
    if [ "$(id -u)" -ne 0 ]; then
        if command -v sudo >/dev/null && sudo -n true 2>/dev/null; then
            as_root=(sudo)
        else
            say "to get FFCV and Fashion-MNIST, run: sudo apt-get install -y --no-install-recommends ${system_packages[*]}"
            return
        fi
    fi
    say "installing system packages: ${system_packages[*]}"
    "${as_root[@]}" apt-get update -qq || true
    local package
    for package in "${system_packages[@]}"; do
        "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$package" >/dev/null ||
            say "$package could not be installed; going on without"
    done
}

fingerprint() {
    { cat pyproject.toml scripts/setup.sh; if has_ffcv_libraries; then echo ffcv; fi; } | cksum
}

make_environment() {
    local python
    if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
        rm -rf .venv
        python=$(find_python)
        say "making .venv with $("$python" --version)"
        if ! "$python" -m venv .venv; then
            rm -rf .venv
            say "$python cannot make virtual environments; on Debian or Ubuntu run: sudo apt-get install -y python3-venv" >&2
            exit 2
        fi
    fi
    say "installing proxynorm and what it needs (a few minutes the first time)"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
    if has_ffcv_libraries; then
        say "building FFCV"
        if ! .venv/bin/python -m pip install --quiet --disable-pip-version-check -e '.[ffcv]'; then
            say "FFCV did not build; the torchvision loader serves instead; the next run of this script tries again"
            return
        fi
    fi
    fingerprint > "$stamp"
}

if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$(fingerprint)" ]; then exit 0; fi
install_system_packages
make_environment
say "ready: source .venv/bin/activate"
