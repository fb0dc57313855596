"""Fine-tunes MoLFormer to predict lipophilicity (logD7.4), or another number, from SMILES.

    python run_regression.py                        # embedded checkpoint, embedded data, random 80/20 split
    python run_regression.py --protocol paper       # the paper's protocol: no validation part, optimistic numbers
    python run_regression.py --train_file my.csv --label_column y --output_dir outputs/mine

A tenth of the training side is held out to choose the best epoch; the test set is read once, at the end. Writes to
--output_dir the model (safetensors, config, tokenizer), all_results.json, predictions.csv (SMILES as given, label,
prediction, error, split), splits.json, a parity plot and loss curves.

Ross et al., Large-scale chemical language representations capture molecular structure and properties, 2022,
https://arxiv.org/abs/2106.09553. Wu et al., MoleculeNet, 2018, https://arxiv.org/abs/1703.00564.
"""

from pathlib import Path

from arguments import (
    DataTrainingArguments,
    ModelArguments,
    TrainingArguments,
    begin_writing,
    end_writing,
    run_script,
    setup_run,
)


DEFAULTS = {"output_dir": "outputs/regression"}


def main(model_args, data_args, training_args):
    checkpoint = setup_run(training_args, data_args)

    # Imported here, so that --help does not wait for RDKit and the data libraries
    from modeling_molformer_reg import MolformerForRegression
    from trainer_regression import (
        RegressionTrainer,
        check_split,
        load_model,
        load_tokenizer,
        prepare_head,
        select_parts,
        set_learning_rate,
        to_dataset,
        write_reports,
    )
    from utils_molecules import load_molecules, write_csv

    # Data, tokenizer and model
    tokenizer = load_tokenizer(model_args)
    molecules, digest, dropped = load_molecules(tokenizer, model_args, data_args, training_args)
    model = load_model(MolformerForRegression, model_args, tokenizer, num_labels=1)
    check_split(model.config, digest, data_args, checkpoint)
    parts = select_parts(molecules, data_args)
    prepare_head(model, parts["train"], digest, data_args, training_args)

    # Trainer
    held_out = "test" if data_args.protocol == "paper" else "validation"
    set_learning_rate(training_args, data_args)
    trainer = RegressionTrainer(
        model=model,
        args=training_args,
        train_dataset=to_dataset(parts["train"]),
        eval_dataset=to_dataset(parts[held_out]),
        processing_class=tokenizer,
    )
    begin_writing(training_args, checkpoint, model_args.model_name_or_path)

    if len(dropped) and trainer.is_world_process_zero():
        write_csv(dropped, Path(training_args.output_dir) / "dropped_molecules.csv")

    # Train
    if training_args.do_train:
        result = trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_model()
        metrics = {**result.metrics, "train_samples": len(parts["train"])}
        metrics["trainable_parameters"] = model.num_parameters(only_trainable=True)
        trainer.log_metrics("train", metrics)
        trainer.save_metrics("train", metrics)
        trainer.save_state()

    # Evaluate
    if training_args.do_eval:
        metrics = trainer.evaluate()
        metrics["eval_samples"] = len(parts[held_out])
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)

    # Predict
    if training_args.do_predict:
        predictions = {name: trainer.predict_molecules(part) for name, part in parts.items()}
        if trainer.is_world_process_zero():
            metrics, table = write_reports(trainer, parts, predictions, digest, data_args)
            trainer.save_metrics("predict", metrics)
            print(table)
    end_writing(training_args)


if __name__ == "__main__":
    run_script(main, (ModelArguments, DataTrainingArguments, TrainingArguments), DEFAULTS, __doc__)
