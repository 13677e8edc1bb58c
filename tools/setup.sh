# SPDX-License-Identifier: MIT
# Sourced by test.sh and demo.sh: installs what a build needs and this machine lacks, and sets $jobs. What no package
# manager can give, CMake downloads.
export PATH HOME="${HOME:-/tmp}"  # ccache wants one

have_header() {
    local root
    for root in /usr/include /usr/local/include /opt/homebrew/include; do
        [ -e "$root/$1" ] && return
    done
    return 1
}

missing() {
    local tool
    for tool in "${CXX:-c++}" cmake make python3; do
        command -v "${tool%% *}" >/dev/null || echo "$tool"
    done
    have_header eigen3/Eigen/Core || echo Eigen
    have_header xsimd/xsimd.hpp || echo xsimd
    have_header nlohmann/json.hpp || echo nlohmann/json
    have_header CLI/CLI.hpp || echo CLI11
    have_header catch2 || echo Catch2
}

install_packages() {
    local sudo=
    [ "$(id -u)" -eq 0 ] || sudo=sudo
    if command -v apt-get >/dev/null; then
        $sudo apt-get update -q &&
            $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends \
                g++ cmake make git ca-certificates python3 python3-venv \
                libeigen3-dev libxsimd-dev nlohmann-json3-dev libcli11-dev catch2
    elif command -v dnf >/dev/null; then
        $sudo dnf install -y --setopt=strict=0 \
            gcc-c++ cmake make git python3 eigen3-devel xsimd-devel json-devel cli11-devel catch-devel
    elif command -v pacman >/dev/null; then
        $sudo pacman -S --needed --noconfirm gcc cmake make git python eigen xsimd nlohmann-json cli11 catch2
    elif command -v brew >/dev/null; then
        brew install cmake eigen xsimd nlohmann-json cli11 catch2
    else
        echo "no apt-get, dnf, pacman or brew here" >&2
        return 1
    fi
}

wanted=$(missing | paste -sd ' ' -)
if [ -n "$wanted" ]; then
    echo "Installing what is missing: $wanted"
    install_packages </dev/null || echo "That did not work; going on, because CMake can download libraries." >&2
fi

# Old distributions have an old CMake; PyPI has the current one.
if ! cmake -E true 2>/dev/null || ! printf '3.25\n%s\n' "$(cmake --version | awk 'NR == 1 {print $3}')" | sort -VC; then
    python3 -m venv build/venv && build/venv/bin/pip install -q 'cmake>=3.25,<4'
    PATH="$PWD/build/venv/bin:$PATH"
fi

jobs=$(getconf _NPROCESSORS_ONLN)
