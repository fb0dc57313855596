# Sourced by the chains of runs, which have set MODEL and OUT. Sets PYTHON and RATE where the user has not: the rate of
# MoLFormer-XL is that of its authors, the other one was found on validation for the embedded checkpoint.
[ -x .venv/bin/python ] && PYTHON=${PYTHON:-.venv/bin/python} || PYTHON=${PYTHON:-python}
case $MODEL in
*MoLFormer-XL*) RATE=${RATE:-3e-5} ;;
*) RATE=${RATE:-3e-4} ;;
esac

# `run FOLDER SCRIPT FLAGS…` runs a script into a folder. Nothing is done if the same command, with the same models and
# files, has finished there; an interrupted run continues; another one is replaced. The command and the log stand beside
# the folder.
run() {
    target=$1
    shift
    mkdir -p "$OUT"
    {
        echo "python $* --output_dir $target"
        for word in "$@"; do
            for file in "$word" "$word/model.safetensors"; do
                if [ -f "$file" ]; then echo "# $file: $(cksum <"$file")"; fi
            done
        done
    } >"$target.new"
    mode=--overwrite_output_dir
    if cmp -s "$target.new" "$target.command"; then
        if [ -f "$target/all_results.json" ] && [ ! -e "$target/unfinished" ]; then
            rm "$target.new"
            return
        fi
        for begun in "$target"/checkpoint-*/trainer_state.json "$target"/member-* "$target"/finetune-*; do
            if [ -e "$begun" ] && [ -e "$target/unfinished" ]; then mode="--resume_from_checkpoint true"; fi
        done
    fi
    mv "$target.new" "$target.command"
    echo "$(date +%H:%M:%S) $target"
    # shellcheck disable=SC2086
    "$PYTHON" "$@" --output_dir "$target" $mode --disable_tqdm true >"$target.log" 2>&1 || {
        tail -n 5 "$target.log"
        return 1
    }
}
