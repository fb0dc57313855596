#!/bin/sh
# Table 1 of the paper and this project's rows beside it. Trains every cell that is not finished, continues the
# interrupted ones, replaces those that other flags or files have made (another OUT keeps them), and writes
# table1.json, table1.md and table1.png: into results/ for the embedded checkpoint, beside the cells for any other
# model or with EXTRA flags, and for a part where the table in results/ has more.
#
#   ./reproduce_table1.sh                                # the embedded checkpoint; hours on two cores
#   ./reproduce_table1.sh ibm/MoLFormer-XL-both-10pct    # with a network, and better with a GPU
#   ROWS="regression mlm_regression" SPLITS=random SEEDS="0 1" ./reproduce_table1.sh
#   JOBS=2 OMP_NUM_THREADS=1 ./reproduce_table1.sh       # two cells at a time, one thread each: faster on two cores
#   EXTRA="--max_train_samples 64 --num_train_epochs 1" OUT=outputs/trial ./reproduce_table1.sh
#                                                        # a quick look at the chain; its numbers mean nothing
#   CHEMPROP=chemprop_env/bin/chemprop ./reproduce_table1.sh    # with the row of chemprop (see studies/peers.py)
set -eu
HERE=$PWD
case ${CHEMPROP:-} in /*) ;; */*) CHEMPROP=$HERE/$CHEMPROP ;; esac # as seen by the caller
cd "$(dirname "$0")"

if [ "${EXTRA:-}" ] && [ -z "${OUT:-}" ]; then
    echo "EXTRA makes other runs than those of the table: give them an OUT of their own." >&2
    exit 2
fi
case ${1:-} in -*) echo "unknown: $1; the top of this file has what can be set" >&2 && exit 2 ;; esac
EMBEDDED=models/molformer-mini
MODEL=${1:-$EMBEDDED}
if [ "$MODEL" != $EMBEDDED ] && [ -d "$HERE/$MODEL" ]; then MODEL=$(realpath "$HERE/$MODEL"); fi # as seen by the caller
if [ "$MODEL" = $EMBEDDED ]; then DEFAULT_OUT=outputs/table1; else DEFAULT_OUT=outputs/table1-$(basename "$MODEL"); fi
OUT=${OUT:-$DEFAULT_OUT}
if [ "$MODEL" = $EMBEDDED ] && [ -z "${EXTRA:-}" ]; then RESULTS=${RESULTS:-results}; else RESULTS=${RESULTS:-$OUT}; fi
# of the row from scratch: as the model it is compared with
if [ "$MODEL" = $EMBEDDED ]; then SHAPE=configs/molformer-mini.json POOLING="--pooling mean"; else SHAPE=$MODEL POOLING=; fi
SEEDS=${SEEDS:-0 1 2 3 4}
SPLITS=${SPLITS:-random scaffold}
ROWS=${ROWS:-regression mlm_regression ensemble from_scratch descriptor_boosting${CHEMPROP:+ chemprop}}
JOBS=${JOBS:-1}
ADAPT=${ADAPT:-} # objective by which the ensemble's start is first adapted to the training molecules, if any
# the best on validation (results/recipes.md), then trained on the validation molecules too
RECIPE=${RECIPE:---augment_smiles 3 --layer_rate_decay 0.8 --validation_fraction 0}
. studies/run_once.sh
MLM_RATE=${MLM_RATE:-$RATE}
export PYTHON OUT RATE MLM_RATE ADAPT RECIPE CHEMPROP=${CHEMPROP:-} EXTRA=${EXTRA:-}

# Trains one cell of the table.
cell() {
    row=$1 split=$2 seed=$3
    folder=$OUT/$row-$split-$seed
    where="--split $split --seed $seed $EXTRA"
    # shellcheck disable=SC2086
    case $row in
    regression) run "$folder" run_regression.py --model_name_or_path "$MODEL" --learning_rate $RATE $where ;;
    mlm_regression)
        run "$folder-mlm" run_mlm.py --model_name_or_path "$MODEL" --learning_rate $MLM_RATE $where
        run "$folder" run_regression.py --model_name_or_path "$folder-mlm" --learning_rate $RATE $where
        ;;
    ensemble)
        start=$MODEL
        if [ "$ADAPT" ]; then
            start=$folder-mlm
            run "$start" run_mlm.py --model_name_or_path "$MODEL" --objective "$ADAPT" --learning_rate $MLM_RATE $where
            where="$where --ignore_split_mismatch" # the same test molecules; others were held out of the first
        fi
        run "$folder" run_regression.py --model_name_or_path "$start" --learning_rate $RATE $RECIPE --num_seeds 5 $where
        ;;
    from_scratch) run "$folder" run_regression.py --config_name "$SHAPE" $POOLING --learning_rate 3e-4 $where ;;
    descriptor_boosting) run "$folder" studies/peers.py --peer $row --refit true $where ;;
    chemprop) run "$folder" studies/peers.py --peer $row $where ;; # CHEMPROP is exported
    *) echo "There is no row $row (best_recipe comes with ensemble, fingerprint_ridge by itself)." && return 1 ;;
    esac
}

if [ "${CELL:-}" ]; then
    # shellcheck disable=SC2086
    cell $CELL
    exit
fi
status=0
for row in $ROWS; do
    for split in $SPLITS; do
        for seed in $SEEDS; do echo "$row $split $seed"; done
    done
done | xargs -P "$JOBS" -I {} env CELL={} sh ./reproduce_table1.sh "$MODEL" || status=$?
"$PYTHON" studies/table1.py --folder "$OUT" --output "$RESULTS/table1.json" # of the cells that are finished
exit $status
