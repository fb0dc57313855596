#!/bin/sh
# Table 1 of the paper and this project's rows beside it. Trains every cell that is not finished, continues the
# interrupted ones, and writes results/table1.json, results/table1.md and results/table1.png.
#
#   ./reproduce_table1.sh                                # the embedded checkpoint; hours on two cores
#   ./reproduce_table1.sh ibm/MoLFormer-XL-both-10pct    # with a network, and better with a GPU
#   ROWS="regression mlm_regression" SPLITS=random SEEDS="0 1" ./reproduce_table1.sh
#   JOBS=2 OMP_NUM_THREADS=1 ./reproduce_table1.sh       # two cells at a time, one thread each: faster on two cores
#   EXTRA="--max_train_samples 64 --num_train_epochs 1" OUT=outputs/trial RESULTS=outputs/trial ./reproduce_table1.sh
#                                                        # a quick look at the chain; its numbers mean nothing
#   CHEMPROP=chemprop_env/bin/chemprop ./reproduce_table1.sh    # with the row of chemprop (see studies/peers.py)
set -eu

MODEL=${1:-models/molformer-mini}
OUT=${OUT:-outputs/table1}
SEEDS=${SEEDS:-0 1 2 3 4}
SPLITS=${SPLITS:-random scaffold}
ROWS=${ROWS:-regression mlm_regression ensemble from_scratch descriptor_boosting${CHEMPROP:+ chemprop}}
JOBS=${JOBS:-1}
RESULTS=${RESULTS:-results}
[ -x .venv/bin/python ] && PYTHON=${PYTHON:-.venv/bin/python} || PYTHON=${PYTHON:-python}
export PYTHON OUT CHEMPROP=${CHEMPROP:-} EXTRA=${EXTRA:-}

# The rates of MoLFormer-XL are those of its authors, the small checkpoint's were found on validation.
case $MODEL in
models/molformer-mini) RATE=3e-4 ;;
*) RATE=3e-5 ;;
esac
RECIPE="--augment_smiles 4 --predict_augment 10 --num_seeds 5"

# Runs a script into a folder, unless it is finished; continues what was interrupted.
run() {
    target=$1
    shift
    if [ -f "$target/all_results.json" ] && [ ! -e "$target/unfinished" ]; then return; fi
    mode=--overwrite_output_dir
    for begun in "$target"/checkpoint-* "$target"/member-*; do
        if [ -d "$begun" ] && [ -e "$target/unfinished" ]; then mode="--resume_from_checkpoint true"; fi
    done
    mkdir -p "$OUT"
    echo "python $* --output_dir $target" >"$target.command"
    echo "$(date +%H:%M:%S) $target"
    # shellcheck disable=SC2086
    "$PYTHON" "$@" --output_dir "$target" $mode --disable_tqdm true >"$target.log" 2>&1 ||
        { tail -n 5 "$target.log"; return 1; }
}

# Trains one cell of the table.
cell() {
    row=$1 split=$2 seed=$3
    folder=$OUT/$row-$split-$seed
    where="--split $split --seed $seed $EXTRA"
    # shellcheck disable=SC2086
    case $row in
    regression) run "$folder" run_regression.py --model_name_or_path "$MODEL" --learning_rate $RATE $where ;;
    mlm_regression)
        run "$folder-mlm" run_mlm.py --model_name_or_path "$MODEL" --learning_rate $RATE $where
        run "$folder" run_regression.py --model_name_or_path "$folder-mlm" --learning_rate $RATE $where
        ;;
    ensemble) run "$folder" run_regression.py --model_name_or_path "$MODEL" --learning_rate $RATE $RECIPE $where ;;
    from_scratch) run "$folder" run_regression.py --config_name configs/molformer-mini.json $where ;;
    descriptor_boosting) run "$folder" studies/peers.py --peer $row $where ;;
    chemprop) run "$folder" studies/peers.py --peer $row --chemprop "$CHEMPROP" $where ;;
    *) echo "There is no row $row." && return 1 ;;
    esac
}

if [ "${CELL:-}" ]; then
    # shellcheck disable=SC2086
    cell $CELL
    exit
fi
for row in $ROWS; do
    for split in $SPLITS; do
        for seed in $SEEDS; do echo "$row $split $seed"; done
    done
done | xargs -P "$JOBS" -I {} env CELL={} sh "$0" "$MODEL"
"$PYTHON" studies/table1.py --folder "$OUT" --output "$RESULTS/table1.json"
