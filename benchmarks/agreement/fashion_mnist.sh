#!/usr/bin/env bash
# ReTrack and EraseDiff against ten LOGO models, on Fashion-MNIST at 16x16: about half an hour of two CPU cores.
#   benchmarks/agreement/fashion_mnist.sh [FOLDER]
# As digits.sh, with one LOGO seed: the oracle's own noise is not measured here.
source "$(dirname "$0")/steps.sh" "${1:-runs/agreement/fashion_mnist}"

base_and_logo fashion-mnist,size=16 none --network small --steps 800
unlearn_and_score retrack base retrack --steps 100
unlearn_and_score erasediff base erasediff --steps 100
evaluate agreement_fashion_mnist retrack erasediff
