"""trainer_regression.py: sampling, optimizer groups, accumulation, secrets."""

import errno
import json
import os
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import TrainerState

import trainer_regression
from arguments import EMBEDDED_DATA, DataTrainingArguments, InputError, ModelArguments, TrainingArguments
from modeling_molformer_reg import MolformerForRegression
from run_peft import PeftArguments, adapt
from trainer_regression import LengthGroupedBatchSampler, RegressionTrainer, augment, to_dataset
from utils_checkpoints import build_tokenizer
from utils_molecules import canonicalize
from utils_runs import last_complete_checkpoint


def arguments(folder, **values):
    values = {"report_to": "none", "disable_tqdm": True, "learning_rate": 1e-3, "num_train_epochs": 1} | values
    return TrainingArguments(output_dir=str(folder), **values)


@pytest.fixture
def molecules():
    """48 molecules of the embedded data with their token ids."""
    table = pd.read_csv(EMBEDDED_DATA, nrows=48).rename(columns={"SMILES": "smiles"})
    table["input_ids"] = build_tokenizer()(table["smiles"].tolist())["input_ids"]
    table["length"] = table["input_ids"].map(len)
    return table


def make_trainer(tiny_checkpoint, molecules, args):
    torch.manual_seed(0)  # the head is new
    model = MolformerForRegression.from_pretrained(
        tiny_checkpoint, redraw_features=False, hidden_dropout_prob=0.0, embedding_dropout_prob=0.0
    )
    model.config.label_mean = [float(molecules["label"].mean())]
    model.config.label_std = [float(molecules["label"].std())]
    data = to_dataset(molecules)
    return RegressionTrainer(
        model=model, args=args, train_dataset=data, eval_dataset=data, processing_class=build_tokenizer()
    )


@pytest.mark.parametrize("size", [48, 45])
def test_loss_and_weights_do_not_depend_on_gradient_accumulation(tiny_checkpoint, molecules, tmp_path, size):
    """Reference: batches of 16 at once. 45 molecules leave an uneven last group of micro-batches."""
    molecules = molecules.head(size)
    weights, losses = [], []
    for batch, steps in ((16, 1), (4, 4)):
        args = arguments(
            tmp_path / str(batch),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=steps,
            train_sampling_strategy="sequential",
            logging_strategy="steps",
            logging_steps=1,
            eval_strategy="no",
            save_strategy="no",
            load_best_model_at_end=False,
            optim="sgd",
        )
        trainer = make_trainer(tiny_checkpoint, molecules, args)
        trainer.train()
        weights.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert torch.allclose(weights[0], weights[1], atol=1e-6)


def test_label_of_minus_100_counts_like_any_other(tiny_checkpoint, molecules, tmp_path):
    trainer = make_trainer(tiny_checkpoint, molecules, arguments(tmp_path))
    batch = {"labels": torch.tensor([-100.0, 1.0, 2.0])}
    assert int(trainer._get_num_items_in_batch([batch, batch], torch.device("cpu"))) == 6


def test_a_checkpoint_that_is_written_anew_and_cut_short_does_not_look_whole(
    tiny_checkpoint, molecules, tmp_path, monkeypatch
):
    """As where a run was taken up at an earlier checkpoint, and the later one's state was still there."""
    flags = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2, "load_best_model_at_end": False}
    make_trainer(tiny_checkpoint, molecules, arguments(tmp_path, **flags)).train()
    first, second = (tmp_path / f"checkpoint-{step}" for step in (1, 2))
    assert last_complete_checkpoint(tmp_path) == second
    trainer = make_trainer(tiny_checkpoint, molecules, arguments(tmp_path, **flags))

    def fail(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(trainer, "save_model", fail)
    with pytest.raises(OSError, match="No space"):
        trainer.train(resume_from_checkpoint=str(first))
    assert second.exists() and last_complete_checkpoint(tmp_path) == first


def test_a_full_cache_of_data_sets_is_told(molecules, monkeypatch):
    """A data set whose `map` fails stands in for a disk that is full."""
    data = to_dataset(molecules)

    def fail(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(type(data), "map", fail)
    with pytest.raises(InputError, match="no room in the cache of data sets .*--cache_dir"):
        augment(data, build_tokenizer(), 1, 0, 256)

    def lose(*args, **options):
        raise FileNotFoundError("tmp5z766")

    monkeypatch.setattr(type(data), "map", lose)
    with pytest.raises(InputError, match="cache of data sets was removed meanwhile, .*tmp5z766"):
        augment(data, build_tokenizer(), 1, 0, 256)


def test_head_gets_its_own_learning_rate(tiny_checkpoint, molecules, tmp_path):
    trainer = make_trainer(tiny_checkpoint, molecules, arguments(tmp_path, head_learning_rate=5e-2))
    optimizer = trainer.create_optimizer()
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    named = dict(trainer.model.named_parameters())
    assert len(rates) == len(named)
    for name, parameter in named.items():
        assert rates[id(parameter)] == (5e-2 if name.startswith("classifier.") else 1e-3), name


def test_the_head_beside_an_adapter_gets_its_own_learning_rate(tiny_checkpoint, molecules, tmp_path):
    """PEFT keeps it under a longer name."""
    trainer = make_trainer(tiny_checkpoint, molecules, arguments(tmp_path, head_learning_rate=5e-2))
    model = adapt(trainer.model, PeftArguments())
    optimizer = trainer.create_optimizer(model)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    head = {name for name, parameter in trained.items() if rates[id(parameter)] == 5e-2}
    assert len(head) == 2 and head == {name for name in trained if "classifier" in name} < set(trained)


def test_a_training_set_is_known_by_its_labels(molecules):
    """A file whose labels were corrected is another one, for a checkpoint and for a fine-tuning of a comparison."""
    corrected = molecules.assign(label=molecules["label"].where(molecules.index != 7, 9.0), text=molecules["smiles"])
    parts = {"train": molecules.assign(text=molecules["smiles"])}
    keys = {trainer_regression.molecules_key(to_dataset(rows)) for rows in (parts["train"], corrected)}
    assert len(keys) == 2
    settings = ModelArguments(model_name_or_path=None), DataTrainingArguments(), TrainingArguments()
    keys = {trainer_regression._settings_key(*settings, {"train": rows}, "") for rows in (parts["train"], corrected)}
    assert len(keys) == 2


def test_the_parts_are_cut_to_what_was_asked_for(molecules):
    molecules["split"] = ["train"] * 24 + ["validation"] * 12 + ["test"] * 12
    limits = DataTrainingArguments(max_train_samples=20, max_eval_samples=5, max_predict_samples=7)
    parts = trainer_regression.select_parts(molecules, limits)
    assert {name: len(part) for name, part in parts.items()} == {"train": 20, "validation": 5, "test": 7}


def test_the_label_scale_is_that_of_the_training_molecules(tiny_checkpoint, molecules, tmp_path):
    model = MolformerForRegression.from_pretrained(tiny_checkpoint)
    args = arguments(tmp_path, do_train=True)
    trainer_regression.prepare_head(model, molecules, "hash", DataTrainingArguments(label_name="logD"), args)
    assert model.config.label_mean == [pytest.approx(molecules["label"].mean())]
    assert model.config.label_std == [pytest.approx(molecules["label"].std(ddof=0))]
    assert (model.config.split_hash, model.config.id2label) == ("hash", {0: "logD"})


def test_label_smoothing_is_refused(tiny_checkpoint, molecules, tmp_path):
    with pytest.raises(InputError, match="--label_smoothing_factor is for classes"):
        make_trainer(tiny_checkpoint, molecules, arguments(tmp_path, label_smoothing_factor=0.1))


def test_a_training_that_goes_on_with_other_processes_is_told(tiny_checkpoint, molecules, tmp_path, caplog):
    common = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "eval_strategy": "no"}
    common["load_best_model_at_end"] = False
    make_trainer(tiny_checkpoint, molecules, arguments(tmp_path, **common)).train()
    state = tmp_path / "checkpoint-2" / "trainer_state.json"
    kept = json.loads(state.read_text())
    kept["stateful_callbacks"]["Stopwatch"]["attributes"]["processes"] = 2
    state.write_text(json.dumps(kept))
    trainer = make_trainer(tiny_checkpoint, molecules, arguments(tmp_path, **common))
    metrics = trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2")).metrics
    assert "began with 2 processes and goes on with 1" in caplog.text
    assert metrics["train_steps_per_second"] == pytest.approx(4 / metrics["train_runtime"])
    learned = len(molecules) * trainer.state.epoch
    assert metrics["train_samples_per_second"] == pytest.approx(learned / metrics["train_runtime"])


def test_learning_rate_falls_from_layer_to_layer(tiny_checkpoint, molecules, tmp_path):
    trainer = make_trainer(tiny_checkpoint, molecules, arguments(tmp_path, layer_rate_decay=0.5, weight_decay=0.1))
    optimizer = trainer.create_optimizer()
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert trainer.model.config.num_hidden_layers == 2
    found = {name: rates.pop(id(parameter)) for name, parameter in trainer.model.named_parameters()}
    assert not rates
    for name, rate in found.items():
        below = {"layer.1.": 1, "layer.0.": 2, "embeddings.": 3}
        power = next((power for part, power in below.items() if part in name), 0)
        assert rate == pytest.approx(1e-3 * 0.5**power), name
    assert sum(rate == 1e-3 for rate in found.values()) >= 4  # head and last LayerNorm
    for name, parameter in trainer.model.named_parameters():
        assert decays[id(parameter)] == (0.0 if "bias" in name or "norm" in name.lower() else 0.1), name


def test_batches_hold_molecules_of_like_length_in_an_order_set_by_seed_and_epoch():
    lengths = np.random.default_rng(0).integers(10, 90, 2000).tolist()
    sampler = LengthGroupedBatchSampler(16, lengths, seed=1)
    first = list(sampler)
    assert sorted(first) == list(range(2000)) and list(sampler) == first
    spread = [np.ptp([lengths[i] for i in first[k : k + 16]]) for k in range(0, 2000, 16)]
    assert np.mean(spread) < 0.1 * np.ptp(lengths)
    means = np.array([np.mean([lengths[i] for i in first[k : k + 16]]) for k in range(0, 2000, 16)])
    assert abs(np.corrcoef(means[1:], means[:-1])[0, 1]) < 0.3  # no long-to-short order between batches
    sampler.set_epoch(1)
    assert list(sampler) != first
    assert list(LengthGroupedBatchSampler(16, lengths, seed=2)) != first


def test_an_incomplete_batch_comes_last():
    sampler = LengthGroupedBatchSampler(4, [5, 9, 1, 7, 3, 8, 2, 6, 4, 10], seed=0, window=2)
    order = list(sampler)
    assert sorted(order) == list(range(10)) and len(sampler) == 10
    lengths = [sampler.lengths[i].item() for i in order]
    assert all(lengths[k : k + 4] == sorted(lengths[k : k + 4], reverse=True) for k in (0, 4, 8))


def test_predictions_come_in_the_order_of_the_rows(tiny_checkpoint, molecules, tmp_path):
    """Reference: the model, molecule by molecule."""
    trainer = make_trainer(tiny_checkpoint, molecules, arguments(tmp_path))
    predictions = trainer.predict_molecules(molecules)[:, 0]
    trainer.model.eval()
    with torch.no_grad():
        one_by_one = [float(trainer.model(torch.tensor([ids])).logits) for ids in molecules["input_ids"]]
    assert predictions == pytest.approx(one_by_one, abs=1e-5)


def test_hub_token_reaches_no_file(tiny_checkpoint, molecules, tmp_path):
    secret = "hf_" + "s3cr3t" * 5
    args = arguments(tmp_path / "out", hub_token=secret, max_steps=1, eval_strategy="no", save_strategy="steps",
        save_steps=1, load_best_model_at_end=False)  # fmt: skip
    trainer = make_trainer(tiny_checkpoint, molecules, args)
    trainer.train()
    trainer.save_model()
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert any(path.name == "training_args.bin" for path in files)
    assert not [path for path in files if secret.encode() in path.read_bytes()]
    assert trainer.args.hub_token == secret


def test_augmented_data_set_has_random_smiles_of_each_molecule_in_turn(molecules):
    """Reference: RDKit's canonical form of every row, and the labels of the molecules."""
    tokenizer = build_tokenizer()
    dataset = to_dataset(molecules.head(20))
    augmented = augment(dataset, tokenizer, 3, seed=0, max_length=256)
    assert len(augmented) == 80 and augmented["labels"][::4] == dataset["labels"][:]
    texts = ["".join(tokenizer.convert_ids_to_tokens(ids[1:-1])) for ids in augmented["input_ids"]]
    assert texts[::4] == molecules["smiles"].head(20).tolist() and len(set(texts)) > 60
    same = [canonicalize(text, "isomeric") for text in texts]
    assert same == [text for text in same[::4] for _ in range(4)]
    assert augmented["length"][:] == [len(ids) for ids in augmented["input_ids"]]
    assert augment(dataset, tokenizer, 3, seed=0, max_length=256)["input_ids"][:] == augmented["input_ids"][:]


def test_random_smiles_that_are_too_long_are_replaced_by_the_molecules_own(molecules):
    dataset = to_dataset(molecules.head(5))
    augmented = augment(dataset, build_tokenizer(), 2, seed=0, max_length=1)
    assert augmented["input_ids"][:] == [ids for ids in dataset["input_ids"] for _ in range(3)]


def test_predictions_of_random_smiles_stand_beside_those_of_the_molecules(tiny_checkpoint, molecules, tmp_path):
    """References: the prediction without random SMILES, and the model run on each of them alone."""
    trainer = make_trainer(tiny_checkpoint, molecules, arguments(tmp_path))
    few = molecules.head(6)
    predictions = trainer.predict_molecules(few, num_forms=2, max_length=256)
    assert predictions.shape == (6, 3, 1)
    assert predictions[:, :1] == pytest.approx(trainer.predict_molecules(few), abs=1e-5)
    forms = augment(to_dataset(few), trainer.processing_class, 2, 0, 256)["input_ids"]
    trainer.model.eval()
    with torch.no_grad():
        expected = [float(trainer.model(torch.tensor([ids])).logits) for ids in forms]
    assert predictions.ravel() == pytest.approx(expected, abs=1e-5)


def test_unknown_metric_for_the_best_model_is_refused_before_training(tiny_checkpoint, molecules, tmp_path):
    for name in ("mae", "eval_spearman", "loss"):
        make_trainer(tiny_checkpoint, molecules, arguments(tmp_path, metric_for_best_model=name))
    with pytest.raises(InputError, match="No evaluation here gives .* accuracy. Choose one of loss, mse, rmse"):
        make_trainer(tiny_checkpoint, molecules, arguments(tmp_path, metric_for_best_model="accuracy"))


def test_a_metric_that_the_held_out_molecules_do_not_give_is_refused(tiny_checkpoint, molecules, tmp_path):
    """One molecule has no R², and none where all labels are the same."""
    for held_out in (molecules.head(1), molecules.head(3).assign(label=2.0)):
        with pytest.raises(InputError, match="No evaluation here gives --metric_for_best_model r2"):
            make_trainer(tiny_checkpoint, held_out, arguments(tmp_path, metric_for_best_model="r2"))


def test_a_metric_that_an_evaluation_did_not_give_is_told(tiny_checkpoint, molecules, tmp_path, monkeypatch):
    """Predictions that are all alike have no correlation."""
    trainer = make_trainer(tiny_checkpoint, molecules, arguments(tmp_path, metric_for_best_model="pearson"))
    trainer.control.should_save = True
    with pytest.raises(InputError, match="An evaluation gave no --metric_for_best_model pearson"):
        trainer._determine_best_metric({"eval_loss": 0.5}, None)


@pytest.mark.parametrize(
    ("name", "value"),
    [("prediction_loss_only", True), ("label_names", ["y"]), ("eval_do_concat_batches", False),
     ("batch_eval_metrics", True), ("remove_unused_columns", False), ("length_column_name", "input_ids"),
     ("restore_callback_states_from_checkpoint", True), ("enable_jit_checkpoint", True), ("bf16_full_eval", True),
     ("fp16_full_eval", True), ("use_liger_kernel", True)],
)  # fmt: skip
def test_settings_that_take_what_the_scripts_work_with_are_refused(tmp_path, name, value):
    with pytest.raises(ValueError, match=f"--{name} is not for these scripts"):
        arguments(tmp_path, **{name: value})


# three steps an epoch, nothing at random but the order
STEPS = {"save_strategy": "steps", "eval_strategy": "no", "load_best_model_at_end": False}


def weights_of(trainer):
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


def test_a_training_that_ended_within_an_epoch_takes_no_further_step(tiny_checkpoint, molecules, tmp_path):
    """As where a finished run is called again to be pushed. Reference: the finished run."""
    flags = {**STEPS, "max_steps": 4, "save_steps": 2, "lr_scheduler_type": "constant"}
    whole = make_trainer(tiny_checkpoint, molecules, arguments(tmp_path, **flags))
    expected = whole.train().metrics
    again = make_trainer(tiny_checkpoint, molecules, arguments(tmp_path, **flags))
    metrics = again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4")).metrics
    assert again.state.global_step == 4 and torch.equal(weights_of(again), weights_of(whole))
    assert metrics["train_loss"] == pytest.approx(expected["train_loss"])
    assert metrics["epoch"] == pytest.approx(expected["epoch"]) and not (tmp_path / "checkpoint-5").exists()


def test_the_loss_of_an_epoch_that_was_interrupted_is_that_of_all_its_steps(tiny_checkpoint, molecules, tmp_path):
    """Reference: the uninterrupted run's log."""
    flags = {**STEPS, "num_train_epochs": 2, "save_steps": 2, "save_total_limit": None}
    trainers = [make_trainer(tiny_checkpoint, molecules, arguments(tmp_path, **flags)) for _ in range(2)]
    trainers[0].train()
    trainers[1].train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    whole, resumed = ([entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in trainers)
    assert resumed == pytest.approx(whole) and len(whole) == 2


def test_what_an_attempt_that_ran_out_of_memory_lost_is_not_counted(tiny_checkpoint, molecules, tmp_path):
    trainer = make_trainer(tiny_checkpoint, molecules, arguments(tmp_path))
    trainer._tr_loss, trainer._globalstep_last_logged, trainer._total_loss_scalar = torch.tensor(0.0), 0, 0.0
    for step, expected in ((0, 0.0), (3, 12.0)):
        stopwatch = trainer_regression.Stopwatch(trainer, "key")
        kept = {"loss_before": 9.0, "not_logged": 3.0, "last_logged": 2}
        state = TrainerState(global_step=step, stateful_callbacks={"Stopwatch": {"attributes": kept}})
        state.best_model_checkpoint, stopwatch.best_checkpoint = "/before/checkpoint-2", "/here/checkpoint-2"
        stopwatch.on_train_begin(trainer.args, state, trainer.control)
        assert stopwatch.loss_sum == expected and trainer._globalstep_last_logged == (2 if step else 0)
        assert state.best_model_checkpoint == "/here/checkpoint-2"  # where the run was another may be by now


def test_only_what_is_saved_can_be_the_best(tiny_checkpoint, molecules, tmp_path):
    trainer = make_trainer(tiny_checkpoint, molecules, arguments(tmp_path))
    trainer.state.global_step = 5
    for saved, loss, best in ((False, 0.1, None), (True, 0.5, 0.5), (False, 0.2, 0.5), (True, 0.4, 0.4)):
        trainer.control.should_save = saved
        assert trainer._determine_best_metric({"eval_loss": loss}, None) == saved
        assert trainer.state.best_metric == best
    saves_the_best = arguments(tmp_path, save_strategy="best", metric_for_best_model="loss")
    trainer = make_trainer(tiny_checkpoint, molecules, saves_the_best)
    assert trainer._determine_best_metric({"eval_loss": 0.1}, None)


@pytest.mark.parametrize(("limit", "left"), [(1, {2, 6}), (2, {2, 6}), (3, {2, 5, 6}), (9, {2, 3, 4, 5, 6})])
def test_the_oldest_checkpoints_go_and_no_other_folder(tmp_path, limit, left):
    for step in (2, 3, 4, 5, 6):
        (tmp_path / f"checkpoint-{step}").mkdir()
        os.utime(tmp_path / f"checkpoint-{step}", (step, step))
    others = {"checkpoint-keep", "checkpoint-4-mine", "checkpoint-1"}
    for name in others:
        (tmp_path / name).mkdir()
        (tmp_path / name / "notes.txt").touch()
        os.utime(tmp_path / name, (1, 1))
    trainer_regression.rotate_checkpoints(tmp_path / "checkpoint-6", "/elsewhere/checkpoint-2", limit)
    found = {path.name for path in tmp_path.iterdir()}
    assert found == others | {f"checkpoint-{step}" for step in left}


def test_a_training_leaves_copies_of_checkpoints_alone(tiny_checkpoint, molecules, tmp_path):
    """And its last checkpoint, by which a finished run is known."""
    copies = [tmp_path / name for name in ("checkpoint-keep", "checkpoint-1-copy")]
    for folder in copies:
        folder.mkdir()
        (folder / "model.safetensors").touch()
    args = arguments(tmp_path, num_train_epochs=3, save_total_limit=1)
    trainer = make_trainer(tiny_checkpoint, molecules, args)
    trainer.train()
    assert all((folder / "model.safetensors").exists() for folder in copies)
    best = Path(trainer.state.best_model_checkpoint).name
    left = {path.name for path in tmp_path.glob("checkpoint-*")} - {folder.name for folder in copies}
    assert left == {best, "checkpoint-9"} and args.save_total_limit == 1


def test_weights_are_averaged_before_they_are_kept(tiny_checkpoint, molecules, tmp_path, monkeypatch):
    """By optimizers that do so when they are told to evaluate; but not those of a best checkpoint, which has been."""
    told = []
    monkeypatch.setattr(torch.optim.AdamW, "eval", lambda self: told.append("eval"), raising=False)
    monkeypatch.setattr(torch.optim.AdamW, "train", lambda self: told.append("train"), raising=False)
    make_trainer(tiny_checkpoint, molecules, arguments(tmp_path / "a", **STEPS, max_steps=2)).train()
    assert told[-1] == "eval"
    told.clear()
    trainer = make_trainer(tiny_checkpoint, molecules, arguments(tmp_path / "b"))
    trainer.train()
    assert trainer.state.best_model_checkpoint and told.count("eval") == 1  # of the evaluation


def test_a_label_whose_name_looks_like_one_of_memory_stops_no_log(tiny_checkpoint, molecules, tmp_path, capsys):
    trainer = make_trainer(tiny_checkpoint, molecules, arguments(tmp_path))
    trainer.log_metrics("eval", {"eval_mse_logK_mem_w": 0.5, "eval_loss": 0.5, "init_mem_cpu_alloc_delta": 2**20})
    shown = capsys.readouterr().out
    assert "eval_loss" in shown and re.search(r"init_mem_cpu_alloc_delta *= *1MB", shown)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"dataloader_persistent_workers": True}, "cannot be set up: persistent_workers option needs num_workers > 0"),
        ({"dataloader_drop_last": True, "per_device_train_batch_size": 64}, "--dataloader_drop_last leaves no batch"),
    ],
)
def test_loaders_that_cannot_be_made_are_told_before_training(tiny_checkpoint, molecules, tmp_path, flags, message):
    with pytest.raises(InputError, match=message):
        make_trainer(tiny_checkpoint, molecules, arguments(tmp_path, do_train=True, **flags))


def test_no_molecule_is_left_out_of_evaluation_and_prediction(tiny_checkpoint, molecules, tmp_path):
    """The flag is for the batches of the training."""
    args = arguments(tmp_path, dataloader_drop_last=True, per_device_eval_batch_size=32)
    trainer = make_trainer(tiny_checkpoint, molecules, args)
    assert len(trainer.get_eval_dataloader()) == 2 and len(trainer.predict_molecules(molecules)) == 48
    assert len(make_trainer(tiny_checkpoint, molecules.head(33), args).get_train_dataloader()) == 2


def test_labels_in_small_units_are_labels(tiny_checkpoint, molecules, tmp_path):
    """As of constants in mol/L."""
    model = MolformerForRegression.from_pretrained(tiny_checkpoint)
    data_args = DataTrainingArguments(smiles_form="canonical")
    small = molecules.assign(label=1e-10 * molecules["label"])
    trainer_regression.prepare_head(model, small, "hash", data_args, arguments(tmp_path, do_train=True))
    assert model.config.label_std == pytest.approx([1e-10 * molecules["label"].std(ddof=0)])


@pytest.mark.parametrize(
    "name, greater",
    [
        ("mse", False), ("eval_mae", False), ("loss", False), ("perplexity", False), ("descriptor_mse", False),
        ("eval_r2", True), ("descriptor_r2", True), ("eval_environment_2_accuracy", True), ("masked_accuracy", True),
    ],
)  # fmt: skip
def test_the_best_model_is_that_of_the_better_metric(tmp_path, name, greater):
    """The library takes every metric that is no loss for one that is better if greater."""
    assert arguments(tmp_path, metric_for_best_model=name).greater_is_better == greater
    assert arguments(tmp_path, metric_for_best_model=name, greater_is_better=not greater).greater_is_better != greater


@pytest.mark.parametrize(
    "settings",
    [
        {"lr_scheduler_type": "cosine_with_min_lr"},
        {"lr_scheduler_kwargs": {"no_such_thing": 1}},
        {"optim": "adamw_bnb_8bit"},
        {"save_strategy": "best", "eval_strategy": "no", "load_best_model_at_end": False},
    ],
    ids=["schedule lacks a rate", "unknown setting", "optimizer of a package that is not there", "never the best"],
)
def test_settings_that_do_not_go_together_are_refused_before_training(tiny_checkpoint, molecules, tmp_path, settings):
    with pytest.raises(InputError, match="The training cannot be set up: "):
        make_trainer(tiny_checkpoint, molecules, arguments(tmp_path, do_train=True, **settings))


@pytest.mark.parametrize(("count", "most"), [(100, 0.4), (300, 0.4), (3024, 0.15)])
def test_batches_of_few_molecules_change_from_epoch_to_epoch(count, most):
    """Of pairs that meet in a batch, few meet in the next epoch too; all sorted at once, up to 88 % would."""
    sampler = LengthGroupedBatchSampler(16, np.random.default_rng(0).normal(48, 18, count).round(), seed=0)

    def pairs(epoch):
        sampler.set_epoch(epoch)
        batches = np.array_split(list(sampler), range(16, count, 16))
        return {(a, b) for rows in batches for a in rows for b in rows if a < b}

    first, second = pairs(0), pairs(1)
    assert len(first & second) / len(first) < most
