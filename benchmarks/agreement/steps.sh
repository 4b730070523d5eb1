# The steps that the experiments share; sourced with the folder that gets everything.
set -euo pipefail
out=$1
mkdir -p "$out"
# Two processes of one thread each; small networks gain little from more threads.
export OMP_NUM_THREADS=1
devices=(--device cpu --device cpu)

base_and_logo() { # DATA LABELS [options of train]: the base, its queries, and what they score without each group retrained
    data=$1
    guda-fast train --data "$data" --out "$out/base" "${@:3}"
    if [ ! -d "$out/queries" ]; then
        local labels=()
        if [ "$2" != none ]; then
            labels=(--labels "$2")
        fi
        python -m benchmarks.sample_queries "$out/base" "$out/queries" --count 256 "${labels[@]}"
    fi
    logo 0
}

logo() { # SEED: the oracle of another seed
    guda-fast logo --base "$out/base" --data "$data" --groups all --seed "$1" --out "$out/logo-$1" "${devices[@]}"
    score base "logo-$1"
}

unlearn_and_score() { # NAME BASE OPERATOR [options of unlearn]
    guda-fast unlearn "$3" --base "$out/$2" --data "$data" --groups all --out "$out/$1" "${@:4}" "${devices[@]}"
    score "$2" "$1"
}

score() { # BASE NAME
    local given=()
    if [ -f "$out/queries.jsonl" ]; then
        given=(--conditions "$out/queries.jsonl")
    fi
    if [ ! -f "$out/scores/$2/run.json" ]; then
        guda-fast score "$out/queries" --base "$out/$1" --groups "$out/$2" "${given[@]}" --out "$out/scores/$2"
    fi
}

unlearn_within() { # OPERATOR BASE DATA [options of unlearn]: 100 steps, or fewer where the retain loss rises by 3 % on a few draws
    guda-fast unlearn "$1" --base "$out/$2" --data "$3" --groups all --out "$out/within/$1" --steps 100 \
        --set retain_bound=1.03 --set bound_every=5 "${@:4}" "${devices[@]}"
    python -m benchmarks.unlearning_losses "benchmarks/results/unlearning_$(basename "$out").csv" \
        --base "$out/$2" --data "$3" "$1=$out/within/$1"
}

evaluate() { # NAME METHODS...: against all oracles that are there
    local oracles=() methods=()
    for scores in "$out"/scores/logo-*; do
        oracles+=(--oracle "$scores")
    done
    for method in "${@:2}"; do
        methods+=("$method=$out/scores/$method")
    done
    guda-fast evaluate "${methods[@]}" "${oracles[@]}" --data "$data" --queries "$out/queries" --out "$out/evaluation" --force
    cp "$out/evaluation/agreement.csv" "benchmarks/results/$1.csv"
}
