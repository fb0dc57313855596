"""The `Trainer` subclasses that the scripts share, and the fine-tuning that they have in common.

    from trainer_regression import RegressionTrainer
    from utils_checkpoints import load_model, load_tokenizer

`MolformerTrainer` adds what MoLFormer needs (random features equal on all processes in evaluation, batches of like
length that resume exactly, learning rates by layer); `RegressionTrainer` adds labels in their own unit.
"""

import contextlib
import copy
import hashlib
import json
import logging
import math
import re
import shutil
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import torch
from rdkit import rdBase
from torch.utils.data import Sampler, SequentialSampler
from transformers import (
    DataCollatorWithPadding,
    EvalPrediction,
    Trainer,
    TrainerCallback,
    set_seed,
)
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import IntervalStrategy

from arguments import InputError, ModelArguments
from modeling_molformer_reg import MolformerConfig, MolformerForRegression
from utils_checkpoints import (
    PARTIAL_FILE,
    find_base,
    hub_options,
    load_model,
    path_of_base,
    portable_path,
    weights_digest,
)
from utils_molecules import (
    LABEL_PREFIX,
    SPLITS,
    descriptors_of,
    encode_random_smiles,
    label_columns,
    label_metrics,
    label_names,
    labels_of,
    regression_metrics,
    scale_of,
    to_text,
    write_csv,
)
from utils_report import plot_losses
from utils_runs import (
    ARGUMENTS_FILE,
    SETTINGS_KEY,
    TRAINING_SETTINGS,
    begin_writing,
    end_writing,
    is_checkpoint,
    is_finished,
    is_out_of_space,
    last_complete_checkpoint,
    make_folder,
    of_training,
    read_json,
    remove_checkpoints,
    update_results,
    write_json,
    write_text,
)


LEARNING_RATES = {"default": 6e-4, "paper": 1e-4}  # the default was found on validation, see the README


# Raise the number when what a cached function computes changes; RDKit's answers differ between versions.
CACHE_VERSION = f"2, RDKit {rdBase.rdkitVersion}"

logger = logging.getLogger("molformer.trainer")


# ------------------------------------------------------------------------------------------------------------ trainers


class LengthGroupedBatchSampler(Sampler):
    """Indices of which each run of `batch_size` has like length, in an order that is a function of seed and epoch.

    Two things differ from the library's sampler: the batches are shuffled (there, fifty batches in turn go from long
    to short molecules, and the model follows them: validation errors jumped between epochs), and a resumed run
    repeats the order. As there, of few molecules a part is sorted at a time: if all were, the same ones would meet in
    every epoch.
    """

    def __init__(self, batch_size, lengths, seed, window=50):
        self.batch_size = batch_size
        self.lengths = torch.as_tensor(lengths)
        self.seed = seed
        # batches that are sorted together: more saves padding, fewer mixes better
        self.window = max(1, min(window, len(self.lengths) // (2 * batch_size)))
        self.epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return len(self.lengths)

    def __iter__(self):
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**32)
        order = torch.randperm(len(self.lengths), generator=generator)
        batches = []
        for rows in order.split(self.window * self.batch_size):
            batches += rows[self.lengths[rows].argsort(descending=True, stable=True)].split(self.batch_size)
        rest = [batches.pop()] if len(batches[-1]) < self.batch_size else []  # must stay last
        shuffled = [batches[i] for i in torch.randperm(len(batches), generator=generator)]
        return iter(torch.cat(shuffled + rest).tolist())


class SetEpoch(TrainerCallback):
    """Tells a sampler which epoch begins: of several processes the library does not find it in a resumed run."""

    def __init__(self, sampler):
        self.sampler = sampler

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.sampler.set_epoch(int(state.epoch))


def best_checkpoint(output_dir, resumed):
    """Returns the best checkpoint that the `resumed` one names (`str`), in the output folder; `None` if it names none.

    The run may have been moved since: the library looks where it was, and keeps the last model where it finds nothing.

    Raises:
        InputError: if it is not there.
    """
    named = read_json(Path(resumed) / "trainer_state.json").get("best_model_checkpoint")
    path = named and Path(output_dir) / Path(named).name
    if path and not path.is_dir():
        raise InputError(
            f"{path}, the best checkpoint of the run that is to be resumed, is not there. Bring it back, or train "
            "again with --overwrite_output_dir."
        )
    return path and str(path)


def rotate_checkpoints(newest, best, limit):
    """Removes the oldest checkpoints beside the newest and the best one (`None` if there is none), down to `limit`."""
    kept = {newest.name, Path(best or newest).name}
    folders = [path for path in newest.parent.glob("checkpoint-*") if is_checkpoint(path)]
    others = sorted((path for path in folders if path.name not in kept), key=lambda path: path.stat().st_mtime)
    for path in others[: max(0, len(folders) - max(limit, len(kept)))]:
        shutil.rmtree(path, ignore_errors=True)


def check_molecules(resumed, key):
    """Raises `InputError` if the training of a checkpoint began with other molecules than it is to go on with.

    A corpus may have been replaced by another of its name.
    """
    kept = read_json(Path(resumed) / "trainer_state.json").get("stateful_callbacks", {}).get(Stopwatch.__name__, {})
    if kept.get("attributes", {}).get("molecules", key) != key:  # one of an older checkpoint is not there
        raise InputError(
            f"The training of {resumed} began with other molecules than it is to go on with. Give the file that it "
            "began with, unchanged, or train again with --overwrite_output_dir."
        )


def molecules_key(dataset):
    """Returns a hash of how many rows a training set has, and of tokens and labels of a thousand at even distances."""
    rows = dataset.select(range(0, len(dataset), math.ceil(len(dataset) / 1000)))
    content = [len(dataset), *(rows[name][:] for name in ("input_ids", "labels") if name in rows.column_names)]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


class Stopwatch(TrainerCallback, ExportableState):
    """Counts seconds, peak memory and losses of a training over its interruptions; the checkpoints keep them.

    `molecules` (`str`) says which it learns, as `molecules_key` does.
    """

    def __init__(self, trainer, molecules):
        self.trainer, self.begun, self.molecules = trainer, None, molecules
        self.seconds_before, self.memory_before, self.loss_before = 0.0, 0, 0.0
        self.not_logged, self.last_logged = 0.0, None  # the sum of the losses of the steps since then
        self.processes = None  # of an interrupted training
        self.best_checkpoint = None  # of a run that is resumed

    def on_train_begin(self, args, state, control, **kwargs):
        """Goes on from what the checkpoint has counted, when one is resumed, and says if the processes are others."""
        # the state names the folder where the run was, in which another one may be by now
        state.best_model_checkpoint = self.best_checkpoint or state.best_model_checkpoint
        self.begun = time.monotonic()
        kept = state.stateful_callbacks.get(type(self).__name__)  # of the checkpoint, when one is resumed
        if kept and state.global_step:  # not of an attempt that ran out of memory
            for name, value in kept["attributes"].items():
                setattr(self, name, value)
            self.trainer._tr_loss += self.not_logged  # or the next log would have the rest of its steps alone
            if self.last_logged is not None:  # one of an older checkpoint is not there
                self.trainer._globalstep_last_logged = self.last_logged
        if self.processes not in (None, args.world_size):
            logger.warning(
                "The training began with %d processes and goes on with %d: its batches are others from here on, and "
                "the result is not that of an uninterrupted run", self.processes, args.world_size,
            )  # fmt: skip
        self.processes = args.world_size
        state.stateful_callbacks[type(self).__name__] = self.state()  # one of an older checkpoint is not there

    @property
    def seconds(self):
        return self.seconds_before + time.monotonic() - self.begun

    @property
    def peak_memory(self):
        return max(self.memory_before, peak_memory())

    @property
    def loss_sum(self):
        """The sum of the losses of all steps (`float`)."""
        return self.loss_before + self.trainer._total_loss_scalar + float(self.trainer._tr_loss)

    def state(self):
        values = {"seconds_before": 0.0, "memory_before": 0, "loss_before": 0.0, "processes": None}
        if self.begun is not None:
            values = {"seconds_before": self.seconds, "memory_before": self.peak_memory, "processes": self.processes}
            values["loss_before"] = self.loss_before + self.trainer._total_loss_scalar
            values["not_logged"] = float(self.trainer._tr_loss)
            values["last_logged"] = self.trainer._globalstep_last_logged
        return {"args": {}, "attributes": {**values, "molecules": self.molecules}}


class MolformerTrainer(Trainer):
    """Trainer for MoLFormer: exact resumption, equal random features on all processes, rates by layer.

    `partial_method` names the method if some of the model's own parameters are trained; only these are saved then.
    """

    partial_method = None
    base_revision = None
    base_weights = None  # hash of the weights that are adapted

    def __init__(self, *args, **kwargs):
        """As the library does, and makes optimizer and schedule once, to know before any work that it can.

        Raises:
            InputError: if settings of the training do not go together.
        """
        if kwargs["args"].should_save:
            make_folder(kwargs["args"].output_dir)  # as the library does, which does not say so
        try:
            super().__init__(*args, **kwargs)
            if self.args.do_train:
                self.create_optimizer_and_scheduler(num_training_steps=100)
                batches = len(self.get_train_dataloader())
                self.remove_callback(SetEpoch)  # of this sampler; the training makes its own
            if self.eval_dataset is not None:
                self.get_eval_dataloader()
        except (ValueError, TypeError, ImportError) as error:
            raise InputError(f"The training cannot be set up: {error}") from error
        self.optimizer = self.lr_scheduler = None
        if self.args.do_train and not batches:
            raise InputError(
                f"--dataloader_drop_last leaves no batch of {len(self.train_dataset)} molecules. Leave it out, or "
                "lower --per_device_train_batch_size."
            )

    def check_best_metric(self, metrics):
        """Refuses a `--metric_for_best_model` that no evaluation will give, before anything is trained.

        Args:
            metrics (`Iterable[str]`): names of what an evaluation gives beside the loss.
        """
        wanted, known = (self.args.metric_for_best_model or "loss").removeprefix("eval_"), ["loss", *metrics]
        if wanted not in known:
            raise InputError(
                f"No evaluation here gives --metric_for_best_model {wanted}. Choose one of {', '.join(known)}."
            )

    def _determine_best_metric(self, metrics, trial):
        # an evaluation between two checkpoints would be the best one for good, and have no model to keep
        if not (self.control.should_save or self.args.save_strategy == "best"):
            return False
        try:
            return super()._determine_best_metric(metrics, trial)
        except KeyError as error:  # of few molecules, none of which is masked, or all of which are predicted alike
            raise InputError(
                f"An evaluation gave no --metric_for_best_model {self.args.metric_for_best_model}, which needs more "
                "or other held-out molecules. Hold out more, or choose the loss."
            ) from error

    def _get_dataloader(self, dataset, *args, is_training=False, **kwargs):
        # The library would drop the last molecules of an evaluation and of predictions too.
        drop_last = self.args.dataloader_drop_last
        self.args.dataloader_drop_last = drop_last and is_training
        try:
            return super()._get_dataloader(dataset, *args, is_training=is_training, **kwargs)
        finally:
            self.args.dataloader_drop_last = drop_last

    def _save_checkpoint(self, model, trial):
        # what is kept of it is process 0's, and counts for all where a training goes on
        self._tr_loss = self.accelerator.reduce(self._tr_loss, reduction="mean")
        self._check_loss(self.stopwatch.loss_sum)  # what is broken must not take the place of what is not
        # where a run was taken up before this step, its checkpoint of then must not make that of now look whole
        if self.args.should_save:
            folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            (folder / "trainer_state.json").unlink(missing_ok=True)
        with self._without_limit() as limit:
            super()._save_checkpoint(model, trial)
        if self.args.should_save and limit is not None and limit > 0:
            rotate_checkpoints(folder, self.state.best_model_checkpoint, limit)

    @contextlib.contextmanager
    def _without_limit(self):
        # the library removes every folder whose name begins as a checkpoint's does, a copy of the user's among them
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            yield limit
        finally:
            self.args.save_total_limit = limit

    def _finalize_training(self, *args, **kwargs):
        with self._without_limit():  # the last checkpoint stays, by which a finished run is known
            return super()._finalize_training(*args, **kwargs)

    def _run_epoch(self, *args, **kwargs):
        # the library asks whether the last step was taken only after one more
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _get_train_sampler(self, train_dataset=None):
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        lengths = self.train_dataset[self.args.length_column_name][:]  # the argument has lost this column
        # what all processes take for one step of the optimizer
        batch_size = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        sampler = LengthGroupedBatchSampler(batch_size, lengths, seed)
        self.add_callback(SetEpoch(sampler))
        return sampler

    def _get_eval_sampler(self, eval_dataset):
        # In the data set's order: the parent groups by length here too, and predictions would come permuted.
        return SequentialSampler(eval_dataset) if self.args.world_size <= 1 else None

    def create_optimizer(self, model=None):
        """Creates the optimizer, with `--head_learning_rate` for the head and `--layer_rate_decay` for the encoder."""
        optimizer = super().create_optimizer(model)
        if self.args.head_learning_rate is None and self.args.layer_rate_decay is None:
            return optimizer
        model = self.model if model is None else model
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        for group in list(optimizer.param_groups):
            by_rate = {group["lr"]: []}  # the group that was there keeps its rate, which is the one that is logged
            for parameter in group["params"]:
                by_rate.setdefault(self._learning_rate(names[id(parameter)]), []).append(parameter)
            options = {key: value for key, value in group.items() if key != "params"}
            group["params"] = by_rate.pop(group["lr"])
            for rate, parameters in by_rate.items():
                optimizer.add_param_group({**options, "params": parameters, "lr": rate})
        return optimizer

    def _learning_rate(self, name):
        """Returns the peak learning rate of the parameter of this name."""
        head_rate, decay = self.args.head_learning_rate, self.args.layer_rate_decay
        if "classifier." in name:
            return head_rate or self.args.learning_rate
        if decay is None:
            return self.args.learning_rate
        layer = re.search(r"\.layer\.(\d+)\.", name)
        num_layers = self.model.config.num_hidden_layers
        below = num_layers - int(layer[1]) if layer else (num_layers + 1) * ("embeddings." in name)
        return self.args.learning_rate * decay**below

    def check_resumed(self, checkpoint):
        """Returns the best checkpoint of the run that is to be resumed (`str`), if it is to be kept; else `None`.

        To be asked before the output folder is written to; with `None` for a new run, of which nothing is asked.

        Raises:
            InputError: if the training began with other molecules, or its best checkpoint is not there.
        """
        if checkpoint is None:
            return None
        check_molecules(checkpoint, molecules_key(self.train_dataset))
        return best_checkpoint(self.args.output_dir, checkpoint) if self.args.load_best_model_at_end else None

    def _check_loss(self, loss):
        if not math.isfinite(loss):
            raise InputError(
                f"The training diverged: its loss is {loss} after {self.state.global_step} steps. Lower "
                "--learning_rate, or pass --bf16 false."
            )

    def train(self, resume_from_checkpoint=None, **kwargs):
        """Trains as the library does; from then on the model computes in float32, as it will for whoever loads it.

        Time, rates and mean loss of a training that was resumed are those of all its pieces.

        Raises:
            InputError: if the training diverged; as `check_resumed` does.
        """
        self.stopwatch = Stopwatch(self, molecules_key(self.train_dataset))
        self.stopwatch.best_checkpoint = self.check_resumed(resume_from_checkpoint)
        self.add_callback(self.stopwatch)
        result = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        if not (self.args.load_best_model_at_end and self.state.best_model_checkpoint):
            self.optimizer.eval()  # has those that average weights leave the average, which is what is evaluated
        metrics, state, before = result.metrics, self.state, self.stopwatch.loss_before
        metrics["train_runtime"] = seconds = self.stopwatch.seconds
        if self._initial_global_step:
            metrics["train_loss"] = (before + self._total_loss_scalar) / max(state.global_step, 1)
            metrics["train_steps_per_second"] = state.global_step / seconds
            metrics["train_samples_per_second"] = len(self.train_dataset) * state.epoch / seconds
        self._check_loss(metrics["train_loss"])
        return result

    def evaluation_loop(self, *args, **kwargs):
        """Evaluates as the library does, with equal features on all processes.

        In bfloat16 where `--bf16 true` says so, and after a training no longer.
        """
        # Every process drew random features of its own; the ones that are saved are those of process 0.
        if self.args.world_size > 1:
            for name, buffer in self.model.named_buffers():
                if name.endswith("feature_map.weight"):
                    torch.distributed.broadcast(buffer, src=0)
        half = torch.bfloat16 if self.args.bf16 and self.is_in_train else None
        # a model that was not trained here is prepared by the loop, by what the process began with
        before = self.accelerator.native_amp
        self.accelerator.native_amp = before and (self.args.bf16 or self.args.fp16)
        try:
            # one block for all batches: weights that are trained are then cast once
            with torch.autocast(self.args.device.type, half, enabled=half is not None):
                return super().evaluation_loop(*args, **kwargs)
        finally:
            self.accelerator.native_amp = before

    def log_metrics(self, split, metrics):
        """Logs metrics as the library does, which takes what has `_mem_` in its name, as a label may, for bytes."""
        super().log_metrics(split, {k: v for k, v in metrics.items() if "_mem_" not in k or isinstance(v, int)})

    def save_metrics(self, split, metrics):
        """Saves metrics as the library does, but every file whole or not at all."""
        if self.is_world_process_zero():
            update_results(self.args.output_dir, split, metrics)

    def _save(self, output_dir=None, state_dict=None):
        folder = Path(output_dir or self.args.output_dir)
        if self.partial_method is not None:
            trained = {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
            scales = {name for name, _ in self.model.named_buffers() if name.startswith("classifier.")}
            whole = self.model.state_dict() if state_dict is None else state_dict
            state_dict = {name: tensor for name, tensor in whole.items() if name in trained | scales}
        restore_class(self.model)
        token, self.args.hub_token = self.args.hub_token, None  # training_args.bin would hold it in plain bytes
        try:
            super()._save(output_dir, state_dict)
        finally:
            self.args.hub_token = token
        if not self.args.should_save:
            return
        if self.partial_method is not None:
            values = {"method": self.partial_method, "base": portable_path(self.model.name_or_path)}
            values |= {"revision": self.base_revision, "parameters": sorted(trained)}
            write_json(values, folder / PARTIAL_FILE)
        elif hasattr(self.model, "peft_config"):  # with the scale of the labels, pooling and head
            self.model.get_base_model().config.save_pretrained(folder)
            values = read_json(folder / "adapter_config.json")
            values["base_model_name_or_path"] = portable_path(values["base_model_name_or_path"])
            write_json(values, folder / "adapter_config.json")
        else:
            return
        write_json(read_json(folder / "config.json") | {"base_weights": self.base_weights}, folder / "config.json")

    def _issue_warnings_after_load(self, load_result):
        # the library warns of every weight that a checkpoint lacks; those of the base are not meant to be in ours
        trained = {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        if self.partial_method is None or trained & set(load_result.missing_keys):
            super()._issue_warnings_after_load(load_result)


def restore_class(model):
    """Gives a model's class the name of ours again, so that the checkpoint carries our file.

    FSDP puts a class of its own in place, which it says is of a file of its own.
    """
    ours = [cls for cls in type(model).__mro__ if cls.__module__ == MolformerConfig.__module__]
    if ours and type(model).__module__.startswith("torch."):
        type(model).__module__, type(model).__name__ = ours[0].__module__, ours[0].__name__


class RegressionTrainer(MolformerTrainer):
    """Trainer of `MolformerForRegression`: labels, predictions and metrics are in label units."""

    def __init__(self, *args, **kwargs):
        if kwargs["args"].label_smoothing_factor:
            raise InputError("--label_smoothing_factor is for classes, not for a regression. Leave it out.")
        names = kwargs["model"].config.label_names or []
        kwargs.setdefault("compute_metrics", lambda output: label_metrics(output.predictions, output.label_ids, names))
        kwargs.setdefault("data_collator", DataCollatorWithPadding(kwargs["processing_class"]))
        super().__init__(*args, **kwargs)
        labels = [[0.0], [1.0]] if self.eval_dataset is None else self.eval_dataset["labels"][:]
        labels = np.asarray(labels, dtype=float).reshape(len(labels), -1)
        labels = np.broadcast_to(labels, (len(labels), kwargs["model"].config.num_labels))
        numbers = np.broadcast_to(np.arange(len(labels))[:, None], labels.shape)  # predictions that differ
        self.check_best_metric(self.compute_metrics(EvalPrediction(numbers, labels)))

    def _get_num_items_in_batch(self, batch_samples, device):
        # The parent leaves out labels of -100, which is a legal value of a regression label; a missing one is NaN.
        labels = [batch["labels"] for batch in batch_samples if "labels" in batch]
        counted = [{"labels": torch.where(values.isfinite(), 0, -100)} for values in labels]
        return super()._get_num_items_in_batch(counted, device)

    def evaluation_loop(self, *args, **kwargs):
        output = super().evaluation_loop(*args, **kwargs)
        if output.label_ids is not None:
            # The library averages over batches: of several labels some molecules have more than others, and of several
            # processes the last batches are filled with molecules that are counted twice.
            labels = output.label_ids.reshape(output.predictions.shape)
            scale = np.asarray(self.model.config.label_std or 1.0)
            errors = ((output.predictions - labels) / scale)[np.isfinite(labels)]
            name = f"{kwargs.get('metric_key_prefix', 'eval')}_loss"
            output.metrics[name] = float(np.mean(errors**2)) if len(errors) else 0.0
        return output

    def predict_molecules(self, molecules, num_forms=0, max_length=None, seed=0):
        """Returns predictions for all molecules in their order, in label units, shape (N, num_forms + 1, K).

        The first form is the SMILES as the model reads it, the others are random SMILES of the molecule, the same
        ones for one `seed`.
        Batches are of like length; the order of rows is restored.
        """
        dataset = to_dataset(molecules, self.model.config.head_descriptors, with_labels=False)
        if num_forms:
            dataset = augment(dataset, self.processing_class, num_forms, seed, max_length)
        order = np.argsort(-np.asarray(dataset["length"][:]), kind="stable")
        predictions = np.empty((len(dataset), self.model.config.num_labels))
        predictions[order] = self.predict(dataset.select(order)).predictions
        return predictions.reshape(len(molecules), num_forms + 1, -1)


def to_dataset(molecules, descriptors=None, with_labels=True):
    """Returns the `datasets.Dataset` of token ids, lengths and labels that a trainer takes, in the table's order.

    Args:
        descriptors (`list[str]`, *optional*): names of those that the head reads.
    """
    columns = {"input_ids": molecules["input_ids"].tolist(), "length": molecules["length"].tolist()}
    if descriptors:
        columns["descriptors"] = descriptors_of(molecules["text"], descriptors)
    if with_labels:
        several = len(label_columns(molecules)) > 1
        columns["labels"] = labels_of(molecules).tolist() if several else molecules["label"].tolist()
    return datasets.Dataset.from_dict(columns)


NO_ROOM = "There is no room in the cache of data sets ({}). Make room, or name another folder with --cache_dir."


def cached_map(dataset, function, tokenizer, **map_options):
    """Returns `dataset.map` of a batched function that takes a tokenizer, cached by what its result depends on.

    The library's own key is a pickle of the arguments, which differs between a tokenizer that was built and the same
    one loaded. Ours is of the rows, the function's name, the tokenizer's content, the further arguments and
    `CACHE_VERSION`.
    """
    arguments = map_options.pop("fn_kwargs", {})
    content = tokenizer.backend_tokenizer.to_str()
    key = json.dumps([dataset._fingerprint, function.__name__, content, arguments, CACHE_VERSION])
    try:
        return dataset.map(
            function,
            batched=True,
            fn_kwargs={"tokenizer": tokenizer, **arguments},
            new_fingerprint=hashlib.sha256(key.encode()).hexdigest()[:16],
            **map_options,
        )
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            raise InputError(
                f"The cache of data sets was removed meanwhile, by another run with --overwrite_cache, say ({error}). "
                "Start again."
            ) from error
        if not is_out_of_space(error):
            raise
        raise InputError(NO_ROOM.format(error)) from error


def augment(dataset, tokenizer, count, seed, max_length, **map_options):
    """Returns the data set with `count` random SMILES beside every molecule, which keep its other columns.

    A random SMILES that the tokenizer does not know in full, or that has more than `max_length` tokens, is replaced by
    the molecule's own. Row i gives rows i * (count + 1) and on, its own SMILES first.

    Args:
        dataset (`datasets.Dataset`): with `input_ids` and `length`.
        map_options: for `datasets.Dataset.map`, such as `num_proc`.
    """
    options = {"count": count, "seed": seed, "max_length": max_length}
    return cached_map(
        dataset, _augment_batch, tokenizer, fn_kwargs=options, desc="Writing random SMILES", **map_options
    )


def _augment_batch(batch, tokenizer, count, seed, max_length):
    columns = {name: [value for value in values for _ in range(count + 1)] for name, values in batch.items()}
    for index, ids in enumerate(batch["input_ids"]):
        forms = encode_random_smiles(to_text(ids, tokenizer), ids, tokenizer, count, seed, max_length)
        for place, new in enumerate(forms, start=index * (count + 1) + 1):
            columns["input_ids"][place], columns["length"][place] = new, len(new)
    return columns


# -------------------------------------------------------------------------------------------------------- fine-tuning


def order_labels(molecules, config, training_args):
    """Returns the molecules with their labels in the order of the model's, if it is not trained.

    Raises:
        InputError: if the model predicts other labels.
    """
    if training_args.do_train or config.label_mean is None:
        return molecules
    names, known = label_names(molecules), config.label_names or []
    if sorted(names) != sorted(known):
        raise InputError(
            f"The model predicts {', '.join(known) or 'one label'}, but the data have {', '.join(names) or 'one'}. "
            "Pass --label_column with the labels of the model."
        )
    others = [column for column in molecules if column not in label_columns(molecules)]
    return molecules[[*others, *([f"{LABEL_PREFIX}{name}" for name in known] or ["label"])]]


def select_parts(molecules, data_args):
    """Returns the molecules of each split, by name, cut to `--max_train_samples` and its like.

    With `--protocol paper` or `--validation_fraction 0` there is no validation part.
    """
    limits = (data_args.max_train_samples, data_args.max_eval_samples, data_args.max_predict_samples)
    parts = {
        name: molecules[molecules["split"] == name].head(limit) for name, limit in zip(SPLITS, limits, strict=True)
    }
    return {name: part for name, part in parts.items() if len(part)}


def prepare_head(model, train, digest, data_args, training_args):
    """Stores in the configuration what the head will have learned from: label scale, split and form of the SMILES.

    Raises:
        InputError: if the training labels are constant, or if the run does not train a head that is still random.
    """
    if not training_args.do_train:
        if model.head_is_new:
            raise InputError(
                f"{model.name_or_path or 'The model'} has no trained regression head to evaluate. Add --do_train, or "
                "pass a --model_name_or_path that run_regression.py made."
            )
        return
    means, stds = [], []
    for column in label_columns(train):
        labels = train[column].dropna().to_numpy()
        which = "" if column == "label" else f" of {column.removeprefix(LABEL_PREFIX)!r}"
        if not len(labels):
            raise InputError(f"There are no training labels{which}. Leave them out.")
        mean, std = float(np.mean(labels)), float(np.std(labels))
        if not std > 1e-9 * abs(mean):
            raise InputError(
                f"All {len(labels)} training labels{which} are {mean:g}. A regression needs labels that differ."
            )
        if not std > 1e-5 * abs(mean):  # float32, in which labels are learned, has seven digits
            raise InputError(
                f"The training labels{which} have a standard deviation of {std:.1g} at a mean of {mean:g}, too little "
                "for numbers of seven digits. Subtract a constant from them."
            )
        means.append(mean)
        stds.append(std)
    model.config.label_mean, model.config.label_std = means, stds
    model.config.label_names = label_names(train) or None
    shown = label_names(train) or [data_args.label_name]
    model.config.id2label, model.config.label2id = dict(enumerate(shown)), {name: i for i, name in enumerate(shown)}
    named = data_args.label_column or []
    model.config.label_column = named[0] if len(named) == 1 else None
    model.config.split_hash = digest
    # heads of the pre-training that this model does not have
    model.config.descriptor_names = model.config.atom_descriptor_names = model.config.environment_buckets = None
    model.config.smiles_form, model.config.smiles_max_length = data_args.smiles_form, data_args.max_length
    names = model.config.head_descriptors
    if names and model.head_is_new:
        model.classifier.scale.set_scale(*scale_of(descriptors_of(train["text"], names), "descriptors"))
        model.config.rdkit_version = rdBase.rdkitVersion


def set_learning_rate(training_args, data_args):
    """Fills in the learning rate of the protocol where the user named none."""
    if training_args.learning_rate is None:
        training_args.learning_rate = LEARNING_RATES[data_args.protocol]


def build_trainer(model_args, data_args, training_args, tokenizer, parts, digest, adapt=None):
    """Returns a `RegressionTrainer` of the model that the arguments name, when model and labels are checked.

    Args:
        parts (`dict[str, pandas.DataFrame]`): molecules of each split; the trainer evaluates on that of
            `held_out_name`. Where there is none, it evaluates nothing and keeps the last epoch.
        adapt (`Callable`, *optional*): returns the model that is trained in place of the one that was loaded.
    Raises:
        InputError: as `load_model`, `prepare_head` and `MolformerTrainer` do; if there is nothing to evaluate, and the
            run does no more.
    """
    held_out = parts.get(held_out_name(parts, data_args))
    if held_out is None:
        evaluate_nothing(training_args)
    set_learning_rate(training_args, data_args)
    set_seed(training_args.seed)
    num_labels = len(label_columns(parts["train"]))
    model = load_model(
        MolformerForRegression, model_args, tokenizer, merge=training_args.do_train, num_labels=num_labels
    )
    prepare_head(model, parts["train"], digest, data_args, training_args)
    names = model.config.head_descriptors
    if held_out is not None:  # by length: batches of like length, and no metric depends on the order
        held_out = to_dataset(held_out.sort_values("length", ascending=False, kind="stable"), names)
    if adapt is not None:
        source = model_args.model_name_or_path
        if source is not None and Path(source).exists():  # PEFT asks the Hub for what it takes for no folder
            model.name_or_path = str(Path(source).resolve())
        model = adapt(model)
    return RegressionTrainer(
        model=model,
        args=training_args,
        train_dataset=training_set(parts["train"], tokenizer, data_args, training_args, names),
        eval_dataset=held_out,
        processing_class=tokenizer,
    )


def evaluate_nothing(training_args):
    """Changes the arguments of a run that has no validation part: the model of the last epoch is kept.

    Raises:
        InputError: if a setting needs an evaluation, or the run does nothing else.
    """
    if not (training_args.do_train or training_args.do_predict):
        raise InputError(
            "--do_eval evaluates validation molecules, and --validation_fraction 0 leaves none. --do_predict reports "
            "all that there are."
        )
    settings = {"lr_scheduler_type": ("reduce_lr_on_plateau", "greedy"), "save_strategy": ("best",)}
    for name, values in settings.items():
        if training_args.do_train and getattr(training_args, name) in values:
            raise InputError(
                f"--{name} {getattr(training_args, name).value} needs validation molecules. Choose another, or leave "
                "--validation_fraction 0 out."
            )
    if training_args.do_train:
        logger.info("No validation molecules: nothing is evaluated, and the model of the last epoch is kept")
    training_args.eval_strategy, training_args.eval_on_start = IntervalStrategy.NO, False
    training_args.load_best_model_at_end = False


def peak_memory(of_children=False):
    """Returns the most memory that this process has held so far, in bytes: of the GPU if it has used one.

    Args:
        of_children (`bool`): what the largest of the processes has held that it started and that have ended.
    """
    if not of_children and torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    # getrusage counts on Linux what the parent held when it started this process
    if not of_children and status.exists():
        found = re.search(r"VmHWM:\s*(\d+) kB", status.read_text())  # some sandboxes do not have it
        if found is not None:
            return 1024 * int(found[1])
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    whose = resource.RUSAGE_CHILDREN if of_children else resource.RUSAGE_SELF
    return resource.getrusage(whose).ru_maxrss * unit


def training_set(molecules, tokenizer, data_args, training_args, descriptors=None):
    """Returns the data set of training molecules, with their random SMILES if `--augment_smiles` says so.

    Args:
        descriptors (`list[str]`, *optional*): see `to_dataset`; those of a random SMILES are the molecule's.
    """
    dataset = to_dataset(molecules, descriptors)
    if not (data_args.augment_smiles and training_args.do_train):
        return dataset
    return augment(dataset, tokenizer, data_args.augment_smiles, training_args.seed, data_args.max_length)


def held_out_name(parts, data_args):
    """Returns which part chooses the epoch: validation, or the test set with `--protocol paper`; `None` for none."""
    if "validation" in parts:
        return "validation"
    return "test" if data_args.protocol == "paper" else None


def train_regression(trainer, parts, checkpoint=None):
    """Fine-tunes, and writes the model of the best epoch, metrics, state and loss curves into the output folder.

    Returns:
        the metrics of the training (`dict`).
    """
    result = trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    metrics = {**result.metrics, "train_samples": len(parts["train"]), "train_smiles": len(trainer.train_dataset)}
    metrics["trainable_parameters"] = trainer.model.num_parameters(only_trainable=True)
    trainer.log_metrics("train", metrics)
    trainer.save_metrics("train", metrics)
    trainer.save_state()
    logged = {name for entry in trainer.state.log_history for name in entry}
    if trainer.is_world_process_zero() and {"loss", "eval_loss"} & logged:
        path = Path(trainer.args.output_dir) / "loss_curves.png"
        held_out = "validation" if "validation" in parts else "test"  # if there is one
        plot_losses(trainer.state.log_history, path, held_out, "mean squared error of standardized labels")
    return metrics


def evaluate_regression(trainer):
    """Evaluates on the held-out part, if there is one, and writes its metrics into the output folder."""
    if trainer.eval_dataset is None:
        return
    metrics = trainer.evaluate()
    metrics["eval_samples"] = len(trainer.eval_dataset)
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)


def _settings_key(model_args, data_args, training_args, parts, digest):
    """Returns a hash of what a fine-tuning depends on: start, molecules, labels and training settings."""
    settings = {name: str(getattr(training_args, name)) for name in TRAINING_SETTINGS}
    settings["digest"] = digest
    start = model_args.model_name_or_path  # by its weights: others may come to lie there, and it may move
    settings["start"] = (start and weights_digest(start, hub_options(model_args))) or start
    settings |= {"config": model_args.config_name, **model_args.config_overrides()}
    settings |= {"augment": data_args.augment_smiles, "form": data_args.smiles_form}
    labels = {name: sorted(zip(part["text"], part["label"], strict=True)) for name, part in parts.items()}
    return hashlib.sha256(json.dumps([settings, labels]).encode()).hexdigest()


def fine_tune(folder, model_args, data_args, training_args, tokenizer, parts, digest):
    """Fine-tunes in a folder of its own, or goes on there, and returns the metrics of validation and test (`dict`).

    A finished run of the same labels and settings is not repeated, an interrupted one continues, another is replaced.

    Args:
        digest (`str`): hash of the molecules of `parts` and of their split, which the model will carry.
    Raises:
        InputError: if other processes than now have trained there: their batches were others, and so is the model.
    """
    stage_args = copy.copy(training_args)
    stage_args.output_dir, stage_args.do_train, stage_args.run_values = str(folder), True, None
    key, key_file = _settings_key(model_args, data_args, training_args, parts, digest), Path(folder) / SETTINGS_KEY
    processes, start = str(stage_args.world_size), None
    kept = key_file.read_text(encoding="utf-8").split() if key_file.exists() else None
    if kept == [key, processes]:
        if is_finished(folder):
            return read_json(Path(folder) / "all_results.json")
        start = last_complete_checkpoint(folder)
    elif kept and kept[0] == key:
        raise InputError(
            f"The number of processes that train {folder} was {kept[-1]} and is {processes} now, with other batches. "
            "Go on with as many as before, or start anew with --overwrite_output_dir."
        )
    elif kept:
        logger.warning("%s was trained with other molecules or settings, and is trained again", folder)
    trainer = build_trainer(model_args, data_args, stage_args, tokenizer, parts, digest)
    begin_writing(stage_args, start)
    if stage_args.should_save:
        write_text(f"{key} {processes}\n", key_file)
    train_regression(trainer, parts, None if start is None else str(start))
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    evaluate_regression(trainer)
    metrics = {}
    for name in [name for name in parts if name != "train"]:
        values = regression_metrics(trainer.predict_molecules(parts[name]), parts[name]["label"])
        metrics |= {f"{name}_{key}": value for key, value in values.items()} | {f"{name}_samples": len(parts[name])}
    metrics["eval_losses"] = losses
    trainer.save_metrics("predict", metrics)
    trainer.accelerator.wait_for_everyone()  # the others read what the first process has written
    end_writing(stage_args)
    if stage_args.should_save:  # a finished stage is not resumed, and they are several times as large as the model
        remove_checkpoints(folder)
    return read_json(Path(folder) / "all_results.json")


def begin_run(training_args, checkpoint, source, dropped, **options):
    """Prepares the output folder as `begin_writing` does, and lists there the molecules that were dropped.

    Raises:
        InputError: as `begin_writing` does; if the base of the adapter `source` would be replaced.
    """
    replaces = options.get("replace", checkpoint is None and training_args.do_train)
    if replaces and source is not None and Path(source).exists():
        folder = Path(training_args.output_dir).resolve()
        base = path_of_base((find_base(source, ModelArguments()) or {}).get("base"))
        if base is not None and folder in (Path(base).resolve(), *Path(base).resolve().parents):
            raise InputError(
                f"--output_dir {training_args.output_dir} would replace {base}, the base of {source}. Give another "
                "--output_dir."
            )
    begin_writing(training_args, checkpoint, source, **options)
    if len(dropped) and training_args.should_save:
        write_csv(dropped, Path(training_args.output_dir) / "dropped_molecules.csv")


def check_evaluated(training_args, digest):
    """Refuses to evaluate other molecules in a training's folder, whose split, predictions and card would be lost.

    Args:
        digest (`str`): hash of the split that is evaluated; `None` for a corpus, which has none.
    """
    folder = Path(training_args.output_dir)
    path = folder / ARGUMENTS_FILE
    if training_args.do_train or not path.exists() or not of_training(path):
        return
    if read_json(folder / "splits.json").get("hash") not in (None, digest):
        raise InputError(
            f"The output folder {folder} holds a training of another split, whose splits.json and predictions this "
            "evaluation would replace. Give another --output_dir."
        )
