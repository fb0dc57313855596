# Sourced by the chains of runs, which have set MODEL and OUT. Sets PYTHON, RATE and PEFT_RATE where the user has not:
# the rate of MoLFormer-XL is that of its authors, the other one was found on validation for the embedded checkpoint.
[ -x .venv/bin/python ] && PYTHON=${PYTHON:-.venv/bin/python} || PYTHON=${PYTHON:-python}
case $MODEL in
*MoLFormer-XL*) RATE=${RATE:-3e-5} PEFT_RATE=${PEFT_RATE:-5e-4} ;;
*) RATE=${RATE:-6e-4} PEFT_RATE=${PEFT_RATE:-} ;; # each method's own
esac

# `run FOLDER SCRIPT FLAGS…` runs a script into a folder, as far as that is not done.
run() {
    "$PYTHON" studies/run_once.py "$@"
}
