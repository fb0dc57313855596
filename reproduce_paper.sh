#!/bin/sh
# The whole paper as one chain: regression; masked language modeling, then regression; influence scores, selection and
# regression on the union; BitFit, (IA)³ and LoRA. Every step that is finished is skipped, an interrupted one continues.
# Ends in paper_tables.md and paper_tables.json, the paper's three tables with ours beside them: in results/ for the
# embedded checkpoint, beside the runs for any other model, external molecules, EXTRA flags and the quick form.
#
#   ./reproduce_paper.sh                                  # the embedded checkpoint, three seeds; hours on two cores
#   ./reproduce_paper.sh --quick                          # a look at the chain in minutes; its numbers mean little
#   ./reproduce_paper.sh ibm/MoLFormer-XL-both-10pct      # with a network, and better with a GPU
#   EXTERNAL_FILE=external.csv ./reproduce_paper.sh       # your external molecules in place of the corrupted pool
#   SEEDS="0 1 2 3 4" OUT=outputs/five ./reproduce_paper.sh
#   EXTRA="--split scaffold" OUT=outputs/scaffold ./reproduce_paper.sh     # flags of all steps
set -eu
if [ "${EXTRA:-}" ] && [ -z "${OUT:-}" ]; then
    echo "EXTRA makes other runs than those of the tables: give them an OUT of their own." >&2 && exit 2
fi
if [ "${EXTERNAL_FILE:-}" ] && [ ! -f "$EXTERNAL_FILE" ]; then
    echo "There is no file $EXTERNAL_FILE. Correct EXTERNAL_FILE." >&2 && exit 2
fi
EXTERNAL_FILE=${EXTERNAL_FILE:+$(realpath "$EXTERNAL_FILE")}
HERE=$PWD
cd "$(dirname "$0")"

EMBEDDED=models/molformer-mini
MODEL=$EMBEDDED
QUICK=
for argument in "$@"; do
    case $argument in
    --quick) QUICK=1 ;;
    -*) echo "unknown: $argument; there is --quick" >&2 && exit 2 ;;
    *) MODEL=$argument ;;
    esac
done
name=paper${QUICK:+-quick}${EXTERNAL_FILE:+-external}
[ "$MODEL" = $EMBEDDED ] || name=$name-$(basename "$MODEL")
if [ "$MODEL" != $EMBEDDED ] && [ -d "$HERE/$MODEL" ]; then MODEL=$(realpath "$HERE/$MODEL"); fi # as seen by the caller
OUT=${OUT:-outputs/$name}
[ "$name${EXTRA:-}" = paper ] && RESULTS=${RESULTS:-results} || RESULTS=${RESULTS:-$OUT}
[ "$QUICK" ] && SEEDS=${SEEDS:-0} || SEEDS=${SEEDS:-0 1 2}
EXTRA=${EXTRA:-}
INFLUENCE="--controls none random"
CUT=
if [ "$QUICK" ]; then
    CUT="--max_train_samples 256 --max_eval_samples 64 --max_predict_samples 128"
    EXTRA="$EXTRA --num_train_epochs 2"
    INFLUENCE="$INFLUENCE --influence_params head --recursion_depth 50"
    [ "$EXTERNAL_FILE" ] || INFLUENCE="$INFLUENCE --pool_size 60"
fi
. studies/run_once.sh

# Writes the tables of the steps that are finished.
tables() {
    "$PYTHON" studies/paper_tables.py --folder "$OUT" --output "$RESULTS/paper_tables.json"
}

trap 'tables || true' EXIT # where a step fails
for seed in $SEEDS; do
    whole="--seed $seed $EXTRA"
    cell="$whole $CUT"
    plain="$cell --learning_rate $RATE"
    # shellcheck disable=SC2086
    {
        run "$OUT/regression-$seed" run_regression.py --model_name_or_path "$MODEL" $plain
        run "$OUT/mlm-$seed" run_mlm.py --model_name_or_path "$MODEL" $plain
        run "$OUT/mlm_regression-$seed" run_regression.py --model_name_or_path "$OUT/mlm-$seed" $plain
        run "$OUT/influence-$seed" run_influence.py --model_name_or_path "$MODEL" $INFLUENCE $plain \
            ${EXTERNAL_FILE:+--external_file "$EXTERNAL_FILE"}
        union=$OUT/influence-$seed # its files are cut already, and a second cut would take the selected molecules off
        run "$OUT/selected-$seed" run_regression.py --model_name_or_path "$MODEL" $whole --learning_rate $RATE \
            --split file --smiles_column SMILES --label_column label --train_file "$union/merged_train.csv" \
            --validation_file "$union/validation.csv" --test_file "$union/test.csv"
        for method in bitfit ia3 lora; do
            run "$OUT/$method-$seed" run_peft.py --model_name_or_path "$MODEL" --peft_method $method $cell \
                ${PEFT_RATE:+--learning_rate $PEFT_RATE}
        done
    }
done
trap - EXIT
tables
