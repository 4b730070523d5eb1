#!/usr/bin/env bash
cd "$(dirname "$0")"; PATH=/tmp/buildtools/bin:$PATH GUDA_FAST_WERROR=ON PYTHONPATH=/tmp/buildtools .venv/bin/python -m pip install -q --no-deps --no-build-isolation -e . 2>&1 | grep -v "is ignored"
