#!/usr/bin/env bash
# Unlearning operators against ten LOGO models of two seeds, on scikit-learn's digits: about two hours of two CPU cores.
#   benchmarks/agreement/digits.sh [FOLDER]
# The same command goes on where it was stopped. The rows end in benchmarks/results/agreement_digits.csv, and what the
# operators did to losses in benchmarks/results/unlearning_digits.csv.
source "$(dirname "$0")/steps.sh" "${1:-runs/agreement/digits}"

base_and_logo digits none --network digits --steps 3000
logo 1
unlearn_and_score retrack base retrack
unlearn_and_score capped base retrack --set mode=capped
unlearn_and_score official-loss base retrack --set mode=official --set weight=0.03
unlearn_and_score siss base siss
unlearn_and_score erasediff base erasediff
evaluate agreement_digits retrack capped official-loss siss erasediff

# How far each operator gets while the loss on what remains stays within 5 %.
unlearn_within retrack base digits --set weight=0.03
unlearn_within siss base digits --set share=1
unlearn_within erasediff base digits --set weight=0.05 --set lr=3e-5
