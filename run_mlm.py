"""Pre-trains MoLFormer on SMILES, from a checkpoint or from scratch: masked tokens, descriptors, atoms.

    python run_mlm.py                                      # adapts models/molformer-mini to the training molecules
    python run_mlm.py --objective mtr+atoms                # the same molecules, by their RDKit descriptors
    python run_mlm.py --train_file corpus.txt.xz --config_name configs/molformer-mini.json --max_steps 10000

With a table that has a label column (by default data/lipophilicity.csv) the split is the one that run_regression.py
makes from the same seed, and only its training molecules are learned; any other file (text with one SMILES a line,
CSV, TSV, .gz, .xz, Hub data set) is a corpus of which a part is held out. Writes to --output_dir the checkpoint,
which `run_regression.py --model_name_or_path` takes, all_results.json with what was reached on the held-out part
(perplexity and masked accuracy for the masked tokens), and loss curves.

Devlin et al., BERT, 2019, https://arxiv.org/abs/1810.04805 (the masking). Ahmad et al., ChemBERTa-2, 2022,
https://arxiv.org/abs/2209.01712 (the regression of descriptors). Rong et al., GROVER, 2020,
https://arxiv.org/abs/2007.02835 (the surroundings of atoms).
"""

import logging
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from arguments import (
    DataTrainingArguments,
    InputError,
    ModelArguments,
    TrainingArguments,
    check_positive,
    usable_cores,
)
from utils_runs import run_script, setup_run


DEFAULTS = {"output_dir": "outputs/mlm", "learning_rate": 6e-4, "per_device_eval_batch_size": 128}
DEFAULTS["ddp_find_unused_parameters"] = True  # an objective may leave a head of the checkpoint unused
LABELS = {"mlm": ("labels",), "mtr": ("descriptors",), "atoms": ("atom_descriptors", "environments")}
LOSSES = {
    "mlm": "cross-entropy of masked tokens",
    "mtr": "squared error of descriptors",
    "atoms": "loss of atoms",
}

logger = logging.getLogger("molformer.mlm")


@dataclass
class MlmArguments:
    """What is masked, and how a corpus is read."""

    _argument_group_name = "what is learned"

    objective: str = field(
        default="mlm",
        metadata={
            "choices": ["mlm", "mtr", "atoms", "mlm+mtr", "mlm+atoms", "mtr+atoms", "mlm+mtr+atoms"],
            "help": "What is learned, one or several at once. mlm: masked tokens; mtr: multi-task regression of RDKit "
            "descriptors from the mean state; atoms: for each atom's token, its share in such descriptors and its "
            "surroundings. After these two a fine-tuning reads the mean state, if no other was named.",
        },
    )
    mlm_probability: float = field(default=0.15, metadata={"help": "Of mlm: share of the tokens to be predicted."})
    masked_share: float = field(
        default=1.0,
        metadata={
            "help": "Of mlm: share of the molecules in a batch whose tokens are masked; other objectives then see "
            "whole molecules too."
        },
    )
    exclude_file: list[str] | None = field(
        default=None,
        metadata={
            "help": "Files of molecules that a corpus is read without, such as those that are to test the model: "
            "text, CSV or TSV. They are left out whatever their stereo, and as a part of a mixture too; "
            "with another charge a molecule counts as another one."
        },
    )
    preprocessing_num_workers: int | None = field(
        default=None, metadata={"help": "Processes that read a corpus. Default: one a core."}
    )
    overwrite_cache: bool = field(default=False, metadata={"help": "Read the corpus again although it is cached."})

    def __post_init__(self):
        if not 0 < self.mlm_probability < 1:
            raise ValueError(f"--mlm_probability is {self.mlm_probability}; give a number between 0 and 1.")
        if not 0 < self.masked_share <= 1:
            raise ValueError(f"--masked_share is {self.masked_share}; give a number above 0, up to 1.")
        check_positive(self, "preprocessing_num_workers")
        self.preprocessing_num_workers = self.preprocessing_num_workers or usable_cores()
        self.parts = self.objective.split("+")

    def workers(self, dataset):
        """Returns how many processes pay for a data set of this size."""
        return min(self.preprocessing_num_workers, max(1, len(dataset) // 1000))


ARGUMENTS = (ModelArguments, DataTrainingArguments, MlmArguments, TrainingArguments)


def check_arguments(model_args, data_args, mlm_args, training_args):
    """Raises `InputError` for what goes with another script, and where nothing would be learned or measured."""
    given = data_args.validation_file is not None or data_args.split_file is not None
    if not data_args.validation_fraction and not given:
        raise InputError(
            "What was learned is measured on molecules that are held out. Leave --validation_fraction 0 out, or give "
            "a --validation_file."
        )
    for name, value in (
        ("head_descriptors", model_args.head_descriptors),
        ("head_learning_rate", training_args.head_learning_rate),
    ):
        if value is not None:
            raise InputError(f"--{name} is for a regression head, which run_regression.py trains. Leave it out.")
    if training_args.label_smoothing_factor and mlm_args.objective != "mlm":
        raise InputError("--label_smoothing_factor goes with --objective mlm alone. Leave it out.")
    if "mlm" not in mlm_args.parts:
        for name, default in (("mlm_probability", 0.15), ("masked_share", 1.0)):
            if getattr(mlm_args, name) != default:
                raise InputError(
                    f"--{name} goes with mlm in --objective; {mlm_args.objective} masks nothing. Leave it out."
                )
    if training_args.train_sampling_strategy == "sequential" and "mlm" in mlm_args.parts:
        raise InputError(
            "--train_sampling_strategy sequential makes the same batches in every epoch, with the same masks. Leave "
            "it out, or pass random."
        )
    if training_args.do_train and training_args.per_device_train_batch_size == 1 and "mlm" in mlm_args.parts:
        raise InputError(
            "In batches of one (--per_device_train_batch_size 1) a molecule has the same masks in every epoch. Pass 2 "
            "or more."
        )
    if not (training_args.do_train or training_args.do_eval):
        raise InputError("--do_predict alone has nothing to predict here. Use --do_train or --do_eval.")


def main(model_args, data_args, mlm_args, training_args):
    checkpoint = setup_run(training_args, data_args)
    check_arguments(model_args, data_args, mlm_args, training_args)

    from modeling_molformer_reg import MolformerForMaskedLM
    from trainer_regression import MolformerTrainer, begin_run, check_evaluated
    from utils_checkpoints import (
        check_split,
        forget_head,
        load_config,
        load_model,
        load_tokenizer,
        settle_smiles_form,
    )
    from utils_mlm import (
        PretrainingCollator,
        PretrainingMetrics,
        check_heads,
        choose_heads,
        load_data,
        measure_scale,
    )
    from utils_report import finish_run, plot_losses, write_splits

    # Data, tokenizer and model
    if training_args.learning_rate is None:  # of a call without the parser
        training_args.learning_rate = DEFAULTS["learning_rate"]
    tokenizer = load_tokenizer(model_args)
    config = load_config(model_args)
    settle_smiles_form(config, data_args)
    heads = choose_heads(config, mlm_args.parts)
    chosen = {name: value for name, value in heads.items() if value}
    model = load_model(MolformerForMaskedLM, model_args, tokenizer, **chosen)
    check_heads(model, mlm_args.parts, training_args.do_train)
    forget_head(model.config)
    if mlm_args.objective != "mlm" and model.config.pooling is None:
        model.config.pooling = "mean"  # a fine-tuning is to read what was trained, which <bos> then was not
    model.config.smiles_form, model.config.smiles_max_length = data_args.smiles_form, data_args.max_length
    # one process reads it again; the others then find it in the cache
    mlm_args.overwrite_cache &= training_args.local_process_index == 0
    with training_args.main_process_first(desc="reading the corpus"):
        arguments = (model_args, data_args, mlm_args, training_args)
        train, held_out, digest, split, dropped = load_data(tokenizer, *arguments, heads)
    check_split(model.config, digest, data_args, checkpoint)
    check_evaluated(training_args, digest)
    if digest is not None:
        model.config.split_hash = digest
    for name, column in (("descriptor", "descriptors"), ("atom", "atom_descriptors")):
        if column in train.column_names and f"{name}_head." in model.new_heads:
            head = getattr(model, f"{name}_head")
            head.set_scale(*measure_scale(train, column, len(head.mean)))
    molecules = len(train) // (1 + data_args.augment_smiles * training_args.do_train)
    logger.info("%d training molecules, %d held out, %d parameters", molecules, len(held_out), model.num_parameters())

    # Trainer
    if mlm_args.objective != "mlm":
        model.accepts_loss_kwargs = False  # accumulated batches then count alike, not by their masked tokens
    training_args.remove_unused_columns = False  # the collator takes what it needs
    training_args.label_names = [label for part in mlm_args.parts for label in LABELS[part]]
    scorer = PretrainingMetrics(model, training_args.label_names)
    mlm_probability = mlm_args.mlm_probability if "mlm" in mlm_args.parts else None
    collator = PretrainingCollator(
        tokenizer,
        mlm_probability,
        training_args.seed,
        mlm_args.masked_share,
        heads["atom_descriptor_names"],
        heads["environment_buckets"],
    )
    trainer = MolformerTrainer(
        model=model,
        args=training_args,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
        data_collator=collator,
        compute_metrics=scorer.compute,
        preprocess_logits_for_metrics=scorer.score,
    )
    trainer.check_best_metric(scorer.names())
    check = partial(trainer.check_resumed, checkpoint)
    begin_run(training_args, checkpoint, model_args.model_name_or_path, dropped, check=check)
    if split and training_args.should_save:
        write_splits(training_args.output_dir, split, digest, data_args)

    # Train
    if training_args.do_train:
        result = trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_model()
        metrics = {**result.metrics, "train_samples": molecules, "train_smiles": len(train)}
        metrics["train_steps"] = trainer.state.global_step
        trainer.log_metrics("train", metrics)
        trainer.save_metrics("train", metrics)
        trainer.save_state()

    # Evaluate
    if training_args.do_eval:
        metrics = trainer.evaluate()
        metrics["eval_samples"] = len(held_out)
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
        if training_args.do_train and trainer.is_world_process_zero():
            path = Path(training_args.output_dir) / "loss_curves.png"
            loss_name = " + ".join(LOSSES[part] for part in mlm_args.parts)
            plot_losses(trainer.state.log_history, path, "held-out", loss_name)
    finish_run(training_args, "mlm")


if __name__ == "__main__":
    run_script(main, ARGUMENTS, DEFAULTS, __doc__)
