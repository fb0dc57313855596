"""Fine-tunes MoLFormer to predict lipophilicity (logD7.4), or another number, from SMILES.

    python run_regression.py                        # embedded checkpoint, embedded data, random 80/20 split
    python run_regression.py --protocol paper       # the paper's protocol: no validation part, optimistic numbers
    python run_regression.py --num_seeds 5 --augment_smiles 4 --predict_augment 10 --output_dir outputs/ensemble
    python run_regression.py --train_file my.csv --label_column y --output_dir outputs/mine
    python run_regression.py --do_predict --model_name_or_path outputs/mine --test_file new.csv

A tenth of the training side is held out to choose the best epoch (--validation_fraction), and a fifth of all molecules
is the test set (--test_fraction), which is read once, at the end. Writes to --output_dir the model (safetensors,
config, tokenizer), all_results.json, predictions.csv (SMILES as given, label, prediction, error, split), splits.json,
a parity plot and loss curves. With --num_seeds above 1 the models are in member-0, member-1 and so on, and predictions
are means over them. With --do_predict alone, predictions.csv has a line for every row of --test_file: its own columns,
prediction, status; by default in outputs/predictions.

Ross et al., Large-scale chemical language representations capture molecular structure and properties, 2022,
https://arxiv.org/abs/2106.09553. Wu et al., MoleculeNet, 2018, https://arxiv.org/abs/1703.00564.
"""

import logging
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np

from arguments import (
    DataTrainingArguments,
    InputError,
    ModelArguments,
    TrainingArguments,
    check_positive,
    usable_cores,
)
from utils_runs import (
    begin_writing,
    end_writing,
    is_finished,
    last_complete_checkpoint,
    member_arguments,
    member_folders,
    read_json,
    run_script,
    setup_run,
    update_results,
    write_json,
)


DEFAULTS = {"output_dir": "outputs/regression"}

logger = logging.getLogger("molformer.regression")


@dataclass
class RegressionArguments:
    """How many models are trained, and of how many SMILES a prediction is the mean."""

    _argument_group_name = "ensembles and prediction"

    num_seeds: int = field(
        default=1,
        metadata={
            "help": "Models that are trained, with the seeds --seed, --seed + 1 and so on, on one split; the mean of "
            "their predictions is reported, and their standard deviation as prediction_sd."
        },
    )
    predict_augment: int = field(
        default=0,
        metadata={
            "help": "Random SMILES of every molecule that are predicted beside its own; the mean is reported, and the "
            "standard deviation as augment_sd."
        },
    )

    export_embeddings: str | None = field(
        default=None,
        metadata={
            "help": "File for what the head reads of each molecule that --do_predict alone predicts: .parquet, or "
            ".safetensors, which takes memory for all of them."
        },
    )
    preprocessing_num_workers: int | None = field(
        default=None,
        metadata={"help": "Processes that check the SMILES of a prediction. Default: one a core, at most 8."},
    )

    def __post_init__(self):
        check_positive(self, "preprocessing_num_workers", "num_seeds")
        self.preprocessing_num_workers = self.preprocessing_num_workers or min(usable_cores(), 8)
        if self.export_embeddings is not None and not self.export_embeddings.endswith((".parquet", ".safetensors")):
            raise ValueError(f"--export_embeddings {self.export_embeddings} must end in .parquet or .safetensors.")
        if self.predict_augment < 0:
            raise ValueError(f"--predict_augment is {self.predict_augment}; give a number from 0 up.")


ARGUMENTS = (ModelArguments, DataTrainingArguments, RegressionArguments, TrainingArguments)


def plan_members(model_args, training_args, num_seeds, checkpoint):
    """Returns for each model that will predict: where it starts from, its arguments, and what it resumes from.

    Members of an interrupted ensemble that are finished are not trained again. A folder of an ensemble that is only
    evaluated gives its members.

    Raises:
        InputError: if training is to start from an ensemble, or the last seed is too large.
    """
    from utils_checkpoints import find_members

    members = find_members(model_args)
    if members and training_args.do_train:
        raise InputError(
            f"{model_args.model_name_or_path} holds an ensemble of {len(members)} models; training starts from one. "
            f"Pass one of them, such as {members[0]}, or --do_predict without --do_train."
        )
    if members:
        return [(_from_folder(model_args, folder), training_args, None) for folder in members]
    if num_seeds > 1 and not training_args.do_train:
        logger.warning("--num_seeds %d trains several models; %s is one, and nothing is trained", num_seeds,
                       model_args.model_name_or_path or model_args.config_name)  # fmt: skip
    if num_seeds == 1 or not training_args.do_train:
        return [(model_args, training_args, checkpoint)]
    if training_args.seed + num_seeds > 2**32:
        raise InputError(f"--seed {training_args.seed} leaves no room for {num_seeds} seeds below 2**32.")
    plan = []
    for number in range(num_seeds):
        member_args = member_arguments(training_args, number)
        start = None if checkpoint is None else last_complete_checkpoint(member_args.output_dir)
        if checkpoint is not None and is_finished(member_args.output_dir):
            # in float32, as after a training; it predicts, so that it has something to do without held-out molecules
            member_args.do_train = member_args.bf16 = member_args.fp16 = False
            member_args.do_predict = True
            plan.append((_from_folder(model_args, member_args.output_dir), member_args, None))
        else:
            plan.append((model_args, member_args, None if start is None else str(start)))
    return plan


def _from_folder(model_args, folder):
    # without the configuration that the user named: the folder's own knows the scale of the labels
    return replace(model_args, model_name_or_path=str(folder), config_name=None)


def predict_new(model_args, data_args, regression_args, training_args):
    """Predicts the molecules of `--test_file`, labels or not, and writes predictions.csv or standard output."""
    to_output = data_args.test_file == "-"
    # the default is where the model is
    if "output_dir" not in training_args.given and training_args.output_dir == DEFAULTS["output_dir"]:
        training_args.output_dir = "outputs/predictions"
    if data_args.max_predict_samples is not None:
        raise InputError("--max_predict_samples shortens the parts of a split. All rows of --test_file are predicted.")
    if to_output and training_args.world_size > 1:
        raise InputError("Several processes cannot share standard input. Give --test_file a name, or use one process.")
    setup_run(training_args, None if to_output else data_args)

    from modeling_molformer_reg import MolformerForRegression
    from trainer_regression import prepare_head
    from utils_checkpoints import load_model, load_tokenizer, settle_smiles_form
    from utils_predict import predict_file, summary_line

    plan = plan_members(model_args, training_args, 1, None)
    tokenizer = load_tokenizer(plan[0][0])
    models = [load_model(MolformerForRegression, member_args, tokenizer) for member_args, _, _ in plan]
    prepare_head(models[0], None, None, data_args, training_args)  # refuses one that has learned nothing
    settle_smiles_form(models[0].config, data_args)
    output_dir = Path(training_args.output_dir)
    path = None if to_output else output_dir / "predictions.csv"
    report = predict_file(models, tokenizer, data_args, regression_args, training_args, path)
    logger.info("%s", summary_line(report))
    if not to_output:
        if training_args.should_save:
            update_results(output_dir, "predict", report)
        end_writing(training_args)


def main(model_args, data_args, regression_args, training_args):
    if data_args.only_test_file and training_args.do_predict and not (training_args.do_train or training_args.do_eval):
        return predict_new(model_args, data_args, regression_args, training_args)
    if regression_args.export_embeddings is not None:
        raise InputError("--export_embeddings goes with --do_predict alone, and --test_file.")
    in_pieces = regression_args.num_seeds > 1 and training_args.do_train
    checkpoint = setup_run(training_args, data_args, in_pieces=in_pieces)

    # Imported here, so that --help does not wait for RDKit and the data libraries
    from trainer_regression import (
        begin_run,
        build_trainer,
        check_evaluated,
        evaluate_regression,
        held_out_name,
        order_labels,
        select_parts,
        set_learning_rate,
        train_regression,
    )
    from utils_checkpoints import check_split, load_config, load_tokenizer, settle_smiles_form
    from utils_molecules import label_metrics, label_names, labels_of, load_molecules
    from utils_report import finish_run, write_reports, write_splits

    # Data
    set_learning_rate(training_args, data_args)
    plan = plan_members(model_args, training_args, regression_args.num_seeds, checkpoint)
    tokenizer, config = load_tokenizer(plan[0][0]), load_config(plan[0][0])
    settle_smiles_form(config, data_args)
    molecules, digest, dropped = load_molecules(tokenizer, model_args, data_args, training_args)
    check_evaluated(training_args, digest)
    molecules = order_labels(molecules, config, training_args)
    parts = select_parts(molecules, data_args)
    held_out, names = held_out_name(parts, data_args), label_names(molecules)

    predictions = {name: [] for name in parts}
    for number, (member_model_args, member_args, start) in enumerate(plan):
        # Model and trainer
        check_split(load_config(member_model_args), digest, data_args, start)
        trainer = build_trainer(member_model_args, data_args, member_args, tokenizer, parts, digest)
        if number == 0:  # all input is checked
            check = partial(trainer.check_resumed, start)
            begin_run(training_args, checkpoint, model_args.model_name_or_path, dropped, check=check)
        if len(plan) > 1:
            logger.info("Model %d of %d, seed %d", number + 1, len(plan), member_args.seed)

        # Train and evaluate
        if member_args.do_train:
            if member_args is not training_args:
                begin_writing(member_args, start)
            train_regression(trainer, parts, start)
        own_folder = len(plan) == 1 or member_args is not training_args
        if training_args.do_eval and own_folder:
            evaluate_regression(trainer)

        # Predict
        if training_args.do_predict or len(plan) > 1 or regression_args.predict_augment:
            metrics = {}
            for name in parts if training_args.do_predict else {held_out} & set(parts):
                part = parts[name]
                predicted = trainer.predict_molecules(
                    part, regression_args.predict_augment, data_args.max_length, training_args.seed
                )
                predictions[name].append(predicted)
                values = label_metrics(predicted.mean(axis=1), labels_of(part), names)
                metrics |= {f"{name}_{key}": value for key, value in values.items()}
            if metrics and own_folder and (len(plan) > 1 or not training_args.do_predict):
                trainer.save_metrics("predict", metrics)
        if member_args is not training_args:
            end_writing(member_args)

    # Report
    if trainer.is_world_process_zero():
        output_dir = Path(training_args.output_dir)
        metrics = {}
        if len(plan) > 1:
            metrics = {"members": len(plan)}
            if held_out is not None:
                mean = np.mean(predictions[held_out], axis=(0, 2))
                values = label_metrics(mean, labels_of(parts[held_out]), names)
                metrics |= {f"eval_{key}": value for key, value in values.items()}
                metrics["eval_samples"] = len(parts[held_out])
        if training_args.do_predict:
            test_metrics, table = write_reports(
                output_dir, parts, predictions, digest, data_args, training_args.do_train
            )
            metrics |= test_metrics
            print(table)
        elif training_args.do_train:
            write_splits(output_dir, parts, digest, data_args)
        if len(plan) > 1:
            kept = {} if training_args.do_train else read_json(output_dir / "all_results.json")  # of other parts
            write_json(kept | metrics, output_dir / "all_results.json")
        elif metrics:
            trainer.save_metrics("predict", metrics)
    members = [(f"{folder.name}/", folder) for folder in member_folders(training_args.output_dir)]
    finish_run(training_args, "regression", [*members, ("", Path(training_args.output_dir))])


if __name__ == "__main__":
    run_script(main, ARGUMENTS, DEFAULTS, __doc__)
