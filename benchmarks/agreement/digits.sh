#!/usr/bin/env bash
# Every operator against ten LOGO models of two seeds, on scikit-learn's digits: about two hours of two CPU cores.
#   benchmarks/agreement/digits.sh [FOLDER]
# The same command goes on where it was stopped. The rows end in benchmarks/results/agreement_digits.csv.
source "$(dirname "$0")/steps.sh" "${1:-runs/agreement/digits}"

base_and_logo digits --network digits --steps 3000
logo 1
unlearn_and_score retrack base retrack
unlearn_and_score capped base retrack --set mode=capped
unlearn_and_score official base retrack --set mode=official --set weight=0.03
unlearn_and_score siss base siss
unlearn_and_score erasediff base erasediff

# ESD and Redirect need classes. Their base has them, and a null label, under which its scores are taken.
conditional="digits,conditions=labels,null=yes"
guda-fast train --data "$conditional" --network digits --steps 3000 --label-dropout 0.5 --out "$out/base-classes"
null_labels 10
data=$conditional unlearn_and_score esd base-classes esd
data=$conditional unlearn_and_score redirect base-classes redirect --set anchors=uniform

evaluate agreement_digits retrack capped official siss erasediff esd redirect
