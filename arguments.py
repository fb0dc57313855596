"""Arguments that the scripts share, and their parser, which takes flags, or one .json or .yaml file of them.

python run_regression.py --help
"""

import json
import math
import os
import re
import sys
from argparse import ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
import transformers
from transformers import HfArgumentParser


ROOT = Path(__file__).resolve().parent
EMBEDDED_CHECKPOINT = str(ROOT / "models" / "molformer-mini")
EMBEDDED_DATA = str(ROOT / "data" / "lipophilicity.csv")
EMBEDDED_VOCABULARY = str(ROOT / "data" / "molformer_vocab.txt")
# of the metrics by which a model can be chosen; an environment_… is an accuracy
GREATER_IS_BETTER = ("r2", "pearson", "spearman", "masked_accuracy", "descriptor_r2", "environment_")
# of the library, whose other values take from the evaluation, or from the model, what these scripts work with
NEEDED_SETTINGS = {
    "prediction_loss_only": False, "label_names": None, "eval_do_concat_batches": True, "batch_eval_metrics": False,
    "remove_unused_columns": True, "length_column_name": "length", "restore_callback_states_from_checkpoint": False,
    # a training that was cut short would pass for a whole one; numbers are those of float32; no kernels for the model
    "enable_jit_checkpoint": False, "bf16_full_eval": False, "fp16_full_eval": False, "use_liger_kernel": False,
    # the run is sent once, at its end
    "hub_strategy": "every_save", "hub_always_push": False,
}  # fmt: skip
# of one call, not of a run
NOT_REPEATED = ("push_to_hub", "hub_token", "resume_from_checkpoint", "overwrite_output_dir")


class InputError(ValueError):
    """Something that the user gave cannot be used; the message says what, the value, and what to do."""


def check_positive(arguments, *names):
    """Raises `ValueError` for a named argument that is not positive, or not finite; `None` stands for its default."""
    for name in names:
        value = getattr(arguments, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"--{name} is {value}; give a positive number.")


@dataclass
class ModelArguments:
    """Which model, from where, with which pooling and head."""

    _argument_group_name = "model"

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Checkpoint folder or Hub name. Without it and --config_name: models/molformer-mini."},
    )
    config_name: str | None = field(
        default=None,
        metadata={"help": "Config file, folder or Hub name. Alone, it starts a model from scratch (random weights)."},
    )
    tokenizer_name: str | None = field(
        default=None,
        metadata={"help": "Tokenizer folder or Hub name, if not that of the checkpoint."},
    )
    cache_dir: str | None = field(default=None, metadata={"help": "Where downloads from the Hub are kept."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of a Hub model."})
    pooling: str | None = field(
        default=None,
        metadata={
            "choices": ["cls", "mean"],
            "help": "What the head reads: the state of <bos> or the masked mean. Default: the checkpoint's, else cls "
            "(--regression_head molformer: mean).",
        },
    )
    regression_head: str | None = field(
        default=None,
        metadata={
            "choices": ["linear", "molformer"],
            "help": "Dropout and linear, or the published residual head. Default: the checkpoint's, else linear.",
        },
    )
    head_descriptors: list[str] | None = field(
        default=None,
        metadata={
            "help": "RDKit descriptors that the head reads beside the pooled state: their names, or all. "
            "Default: the checkpoint's, else none."
        },
    )
    redraw_features: bool | None = field(
        default=None,
        metadata={
            "help": "Whether training redraws the random features of the attention at every step. "
            "Default: as the checkpoint."
        },
    )
    hidden_dropout_prob: float | None = field(
        default=None, metadata={"help": "Dropout in the layers. Default: the checkpoint's."}
    )
    embedding_dropout_prob: float | None = field(
        default=None, metadata={"help": "Dropout of the embeddings. Default: the checkpoint's."}
    )
    classifier_dropout_prob: float | None = field(
        default=None, metadata={"help": "Dropout of the head. Default: the checkpoint's, else --hidden_dropout_prob."}
    )

    def __post_init__(self):
        for name in ("hidden_dropout_prob", "embedding_dropout_prob", "classifier_dropout_prob"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise ValueError(f"--{name} is {value}; give a number from 0 up to, not including, 1.")
        if self.model_name_or_path is None and self.config_name is None:
            self.model_name_or_path = EMBEDDED_CHECKPOINT

    def config_overrides(self):
        """Returns the configuration values that the user named, as a dictionary.

        Raises:
            InputError: if RDKit does not know a descriptor.
        """
        names = ("pooling", "regression_head", "redraw_features", "hidden_dropout_prob", "embedding_dropout_prob")
        names += ("classifier_dropout_prob",)
        values = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if self.head_descriptors is not None:
            from utils_molecules import choose_descriptors

            values["head_descriptors"] = choose_descriptors(self.head_descriptors)
        return values


@dataclass
class DataTrainingArguments:
    """Which molecules, how they are read, checked and split."""

    _argument_group_name = "molecules"

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Hub data set, such as scikit-fingerprints/MoleculeNet_Lipophilicity: its train split, split here."
        },
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the Hub data set."})
    train_file: str | None = field(
        default=None,
        metadata={
            "help": "CSV or TSV with SMILES and labels (.gz and .xz too); for run_mlm.py also text with one SMILES a "
            "line. Default: data/lipophilicity.csv."
        },
    )
    validation_file: str | None = field(default=None, metadata={"help": "Separate file of validation molecules."})
    test_file: str | None = field(
        default=None,
        metadata={
            "help": "Separate file of test molecules. With --do_predict alone and no --train_file: the molecules to "
            "predict, labels or not; - is standard input, answered on standard output."
        },
    )
    smiles_column: str | None = field(
        default=None,
        metadata={
            "help": "Column of the SMILES. Default: the first called smiles, canonical_smiles, mol, molecule or "
            "structure, in any case."
        },
    )
    label_column: list[str] | None = field(
        default=None,
        metadata={
            "help": "Column of the label. Default: the one called label, labels, exp, target, y, logD or value, in "
            "any case. Several columns are learned together; a molecule may then lack some of the labels. For "
            "run_mlm.py a file with such a column is split, and its test molecules are not learned."
        },
    )
    label_name: str | None = field(
        default=None,
        metadata={
            "help": "What plots and card call the label, with its unit. Default: logD7.4, or the column's name, as of "
            "several labels."
        },
    )
    smiles_form: str | None = field(
        default=None,
        metadata={
            "choices": ["canonical", "isomeric", "raw"],
            "help": "RDKit-canonical without stereo (as MoLFormer was pre-trained), canonical with it, or as given "
            "(a molecule that a corpus writes in two ways then counts as two). Default: that with which the "
            "checkpoint was trained, else canonical.",
        },
    )
    invalid_smiles: str = field(
        default="error",
        metadata={
            "choices": ["error", "drop"],
            "help": "Molecules that cannot be used: stop with a list, or drop them and write them to a file.",
        },
    )
    max_length: int = field(
        default=256,
        metadata={
            "help": "Most tokens of a molecule, <bos> and <eos> included. A model that was trained with more takes "
            "these, unless another number is given. Longer ones are never cut."
        },
    )
    split: str | None = field(
        default=None,
        metadata={
            "choices": ["random", "scaffold", "file"],
            "help": "Random; by Bemis-Murcko scaffold; or given, in --split_file or as separate files. "
            "Default: file if files are given, else random.",
        },
    )
    split_file: str | None = field(
        default=None, metadata={"help": "JSON with lists of row numbers: train, validation, test."}
    )
    test_fraction: float = field(
        default=0.2,
        metadata={"help": "Share of all molecules held out as test set; 0 for a model that learns from all of them."},
    )
    validation_fraction: float = field(
        default=0.1,
        metadata={
            "help": "Share of the training side held out to choose the best epoch. With 0 all of it is learned, and "
            "the model of the last epoch is kept."
        },
    )
    split_seed: int | None = field(default=None, metadata={"help": "Seed of the split. Default: --seed."})
    augment_smiles: int = field(
        default=0,
        metadata={"help": "Random SMILES of every training molecule that are learned beside its own; an epoch then "
        "takes so many times longer."},
    )  # fmt: skip
    protocol: str = field(
        default="default",
        metadata={
            "choices": ["default", "paper"],
            "help": "paper: rows split without grouping stereo twins, no validation part, epoch chosen by test loss, "
            "learning rate of a regression 1e-4. Its numbers are optimistic.",
        },
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Use this many training molecules only."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use this many validation molecules only."})
    max_predict_samples: int | None = field(default=None, metadata={"help": "Use this many test molecules only."})
    ignore_split_mismatch: bool = field(
        default=False,
        metadata={"help": "Go on although the checkpoint was trained with another split of the data."},
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Replace the run that the output folder holds."}
    )

    def __post_init__(self):
        for name in ("test_fraction", "validation_fraction"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise ValueError(f"--{name} is {value}; give a number from 0 up to, not including, 1.")
        given = self.test_file is not None or self.split_file is not None
        if self.protocol == "paper" and not self.test_fraction and not given:
            raise ValueError("--protocol paper chooses the epoch by the test set, and --test_fraction 0 leaves none.")
        check_positive(self, "max_length", "max_train_samples", "max_eval_samples", "max_predict_samples")
        if self.augment_smiles < 0:
            raise ValueError(f"--augment_smiles is {self.augment_smiles}; give a number from 0 up.")
        if self.dataset_name is not None and self.train_file is not None:
            raise ValueError(
                f"--dataset_name {self.dataset_name} and --train_file {self.train_file}: give one of them."
            )
        files = [f"--{n}" for n in ("split_file", "validation_file", "test_file") if getattr(self, n) is not None]
        self.split = self.split or ("file" if files else "random")
        if self.split == "file" and not files:
            raise ValueError("--split file needs --split_file, or --test_file (and --validation_file).")
        if self.split_file is not None and len(files) > 1:
            raise ValueError(f"{' and '.join(files)}: give --split_file, or separate files.")
        if self.split_seed is not None and self.split_seed < 0:
            raise ValueError(f"--split_seed is {self.split_seed}; give a number from 0 up.")
        if self.split != "file" and files:
            raise ValueError(f"{' and '.join(files)} go with --split file, not with --split {self.split}.")
        others = (self.train_file, self.dataset_name, self.validation_file, self.split_file)
        self.only_test_file = self.test_file is not None and not any(others)
        if self.train_file is None and self.dataset_name is None:
            self.train_file = EMBEDDED_DATA
        if self.label_name not in (None, *(self.label_column or [])[:1]) and len(self.label_column or ()) > 1:
            raise ValueError(
                f"--label_name {self.label_name} is for one label; several are called as their columns. Leave it out."
            )
        if self.label_name is None:
            own = self.train_file is not None and Path(self.train_file).resolve() == Path(EMBEDDED_DATA)
            self.label_name = "logD7.4" if own else (self.label_column or [None])[0]  # None: until the file is read


def usable_cores():
    """Returns the number of cores that this process may use, which a job's limits can make fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def has_bfloat16(use_cpu):
    """Returns whether the processor, or else the GPU, multiplies bfloat16 in hardware."""
    if use_cpu:
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def gains_by_bfloat16(use_cpu):
    """Returns whether training is faster in bfloat16 than in float32, as far as the hardware tells.

    Intel's processors gain by AMX alone: by AVX-512 BF16 one of them had 84 GFLOP/s a core where float32 had 150
    (matrices of the embedded checkpoint), and trained at 0.6 of float32's speed. AMD's gain by AVX-512 BF16.
    """
    capabilities = torch.cpu.get_capabilities() if use_cpu else {}
    by_vectors_alone = "Intel" in capabilities.get("cpu_name", "") and not capabilities.get("amx_bf16", False)
    return has_bfloat16(use_cpu) and not by_vectors_alone


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    """The library's arguments with this project's defaults, and learning rates by layer."""

    _argument_group_name = "training, evaluation and the Hub (arguments of Hugging Face's trainer)"
    given = frozenset()  # names of the flags that the user gave
    run_values = None  # what would repeat the run, of the parser
    expects_no_run = False  # whether the output folder was empty at the start

    output_dir: str | None = field(
        default=None, metadata={"help": "Where everything is written. Default: outputs/ and the script's name."}
    )
    do_train: bool = field(default=False, metadata={"help": "Train. Without any --do_... flag all three are done."})
    do_eval: bool = field(
        default=False, metadata={"help": "Evaluate what is held out for validation; of run_influence.py: score alone."}
    )
    do_predict: bool = field(
        default=False,
        metadata={
            "help": "Predict every part, the test molecules among them, or --test_file alone; of run_influence.py: "
            "score alone."
        },
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "true, or a checkpoint folder: the interrupted run goes on; give the flags that it began with."
        },
    )
    push_to_hub: bool = field(default=False, metadata={"help": "Send the finished run to the Hub, once, at the end."})
    hub_private_repo: bool | None = field(
        default=None,
        metadata={"help": "Whether the repository is private. One that is there already and public is then refused."},
    )
    learning_rate: float | None = field(
        default=None, metadata={"help": "Peak learning rate of the encoder. Default: the script's, see the README."}
    )
    head_learning_rate: float | None = field(
        default=None, metadata={"help": "Peak learning rate of the regression head. Default: --learning_rate."}
    )
    layer_rate_decay: float | None = field(
        default=None,
        metadata={
            "help": "Factor from each layer's learning rate to that of the layer below it: from --learning_rate, "
            "which the head has, to the topmost layer, and so on to the embeddings. 0.8 changes what is general "
            "less than what is near the head. Default: one rate for all."
        },
    )
    num_train_epochs: float = field(default=7.0, metadata={"help": "Epochs."})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Training batch of a device."})
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Evaluation batch of a device."})
    warmup_steps: float = field(default=0.06, metadata={"help": "Warm-up steps, or their share of all if below 1."})
    weight_decay: float = field(default=0.0, metadata={"help": "Weight decay of AdamW (0 makes it Adam)."})
    optim: str = field(default="adamw_torch_fused", metadata={"help": "Optimizer."})
    eval_strategy: str = field(default="epoch", metadata={"help": "When to evaluate: no, steps or epoch."})
    save_strategy: str = field(default="epoch", metadata={"help": "When to save: no, steps, epoch or best."})
    save_steps: float | None = field(
        default=None,
        metadata={
            "help": "Steps from one checkpoint to the next, or their share of all if below 1. Default: as many "
            "as from one evaluation to the next."
        },
    )
    save_total_limit: int | None = field(
        default=2, metadata={"help": "Checkpoints kept, the last one and the best one among them."}
    )
    logging_nan_inf_filter: bool = field(
        default=False,
        metadata={"help": "Whether losses that are no numbers are left out of the log; a GPU is then waited for."},
    )
    logging_strategy: str = field(default="epoch", metadata={"help": "When to log: no, steps or epoch."})
    bf16: bool = field(  # the parser takes a bare --bf16 for this type alone
        default=None,
        metadata={
            "help": "Compute in bfloat16 where that is safe (autocast). Default: what accelerate launch says; else in "
            "training, where processor or GPU gain by it. What is predicted after a training is float32 all the same."
        },
    )
    ddp_broadcast_buffers: bool | None = field(
        default=False, metadata={"help": "Whether every step sends the random features from the first process."}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Whether every step looks for parameters that got no gradient."}
    )
    load_best_model_at_end: bool = field(default=True, metadata={"help": "Keep the model of the best evaluation."})
    train_sampling_strategy: str = field(
        default="group_by_length",
        metadata={
            "choices": ["random", "sequential", "group_by_length"],
            "help": "Order of the training molecules. Batches of like length save a third of the tokens.",
        },
    )

    def __post_init__(self):
        # The library takes CPU training in bf16 or in several processes only where the flag says so.
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        if not (self.do_train or self.do_eval or self.do_predict):
            self.do_train = self.do_eval = self.do_predict = True
        if self.bf16 is None:
            launched = os.environ.get("ACCELERATE_MIXED_PRECISION")  # of accelerate launch
            wanted = launched or ("bf16" if gains_by_bfloat16(self.use_cpu) else "no")
            if wanted == "bf16" and not has_bfloat16(self.use_cpu):
                wanted = "no"  # of a configuration that is meant for others; emulated it is several times slower
            self.bf16 = self.do_train and not self.fp16 and wanted == "bf16"
            self.fp16 = self.fp16 or (self.do_train and wanted == "fp16")
        for name, usual in NEEDED_SETTINGS.items():
            if getattr(self, name) != usual:
                raise ValueError(f"--{name} is not for these scripts, which need {usual} there. Leave it out.")
        if self.greater_is_better is None and self.metric_for_best_model is not None:
            # the library takes every metric but a loss for one that is better if greater
            self.greater_is_better = self.metric_for_best_model.removeprefix("eval_").startswith(GREATER_IS_BETTER)
        if self.save_steps is None:
            # as the library has it, which has evaluations follow the log by default
            self.save_steps = (self.eval_steps or self.logging_steps) if self.eval_strategy == "steps" else 500
        check_positive(
            self, "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"
        )
        if self.max_steps == 0:
            raise ValueError("--max_steps is 0; give a positive number, or leave it out.")
        do_eval = self.do_eval
        super().__post_init__()
        if self.greater_is_better and self.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy"):
            self.lr_scheduler_kwargs = {"mode": "max"} | (self.lr_scheduler_kwargs or {})
        # the library takes the launcher's where no flag is set: predictions alone are in float32, however launched
        self.mixed_precision = "fp16" if self.fp16 else "bf16" if self.bf16 else "no"
        self.do_eval = do_eval  # the library sets it wherever there is an evaluation during training
        # one push at the end, of what `finish_run` names; the library would push at every save
        self.push_when_done, self.push_to_hub = self.push_to_hub, False
        check_positive(self, "learning_rate", "head_learning_rate")
        if self.layer_rate_decay is not None and not 0 < self.layer_rate_decay <= 1:
            raise ValueError(f"--layer_rate_decay is {self.layer_rate_decay}; give a number above 0, at most 1.")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"--seed is {self.seed}; give a number from 0 up, below 2**32.")
        if self.max_steps <= 0:
            check_positive(self, "num_train_epochs")
        if not math.isfinite(self.warmup_steps):
            raise ValueError(f"--warmup_steps is {self.warmup_steps}; give a number.")


class ArgumentParser(HfArgumentParser):
    """Refuses words of the command line without repeating a token that is among them."""

    def error(self, message):
        super().error(hide_tokens(message))


def hide_tokens(text):
    """Returns a text without the Hub tokens in it."""
    return re.sub(r"\bhf_[A-Za-z0-9]{16,}", "hf_…", text)


class HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Shows defaults, and the script's docstring with its own line breaks."""


def parse_arguments(*dataclasses, defaults=None, description=None, args=None):
    """Returns one instance of each dataclass, from flags, or from a .json or .yaml file and flags that follow it.

    What the run would need to be repeated goes along as `run_values` of the last one, and the names of the flags that
    the user gave as `given`.

    Args:
        defaults (`dict`, *optional*): a script's own defaults; they hold for argument files as well.
        args (`list[str]`, *optional*): the command line, `sys.argv[1:]` if absent.
    Raises:
        SystemExit: for an unknown flag, after naming it; for an argument that a dataclass refuses, with its reason.
    """
    args = words = sys.argv[1:] if args is None else list(args)
    parser = ArgumentParser(
        dataclasses,
        usage="%(prog)s [FILE.json or FILE.yaml] [--flag value ...]",
        description=description,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    defaults = {**(defaults or {})}
    try:
        parser.set_defaults(**defaults)
        if args and not args[0].startswith("-") and Path(args[0]).suffix in (".json", ".yaml", ".yml"):
            args = _read_argument_file(args[0], parser) + (words := args[1:])
        check_words(words, args, parser)
        *arguments, unknown = parser.parse_args_into_dataclasses(args, return_remaining_strings=True)
        if unknown:  # without their values, which may be a token
            flags = [word.split("=")[0] for word in unknown if word.startswith("-")]
            flags = flags or [word for word in unknown if not word.startswith("hf_")] or ["A word"]
            raise ValueError(f"{', '.join(flags)} is no argument of this script. --help lists those that there are.")
        arguments[-1].run_values = _values_to_repeat(vars(parser.parse_args(args)))
        flags = parser._option_string_actions
        arguments[-1].given = {flags[word].dest for word in (word.split("=")[0] for word in args) if word in flags}
        return arguments
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: error: {hide_tokens(str(error))}\n")


def check_words(words, args, parser):
    """Raises `ValueError` for flags that would be left out without a word.

    Args:
        words (`list[str]`): what was typed; `args` has the argument file's flags before it, which it may replace.
    """
    actions = [parser._option_string_actions.get(word.split("=")[0]) for word in words if word.startswith("-")]
    lists = [action for action in actions if action is not None and action.nargs == "+"]
    for action in lists:
        if lists.count(action) > 1:
            raise ValueError(f"--{action.dest} is given more than once. Name all its values after one.")
    asked = {action.dest for action in actions if action is not None} & {"do_train", "do_eval", "do_predict"}
    values = vars(parser.parse_known_args(args)[0]) if asked else {}
    if asked and not any(values[name] for name in ("do_train", "do_eval", "do_predict")):
        raise ValueError(f"--{sorted(asked)[0]} false leaves nothing to do. Name what is to be done: --do_eval, say.")


def _values_to_repeat(values):
    """Returns the parsed values that an argument file needs: no token, nothing that is the library's own default."""
    library = {field.name: field.default for field in fields(transformers.TrainingArguments)}
    # fields that this project left as they are
    defaults = {f.name: f.default for f in fields(TrainingArguments) if f.default == library.get(f.name)}
    kept = {name: value for name, value in values.items() if name not in NOT_REPEATED and value not in (None, [])}
    kept = {name: value for name, value in kept.items() if name not in defaults or value != defaults[name]}
    return {name: getattr(value, "value", value) for name, value in kept.items()}


def _read_argument_file(path, parser):
    """Returns the file as flags, so that its values are converted and checked as those of the command line."""
    import yaml

    if not Path(path).is_file():
        raise ValueError(f"There is no file of arguments {path}. Correct its path.")
    try:
        text = Path(path).read_text(encoding="utf-8")
        values = json.loads(text) if path.endswith(".json") else yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:  # whose own text repeats the line, which may hold a token
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ValueError(f"{path} cannot be read: {error.problem}{place}.") from error
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no arguments. It needs one flag a line, such as learning_rate: 2.0e-4.")
    names = {action.dest for action in parser._actions}
    for name, value in values.items():
        default = parser.get_default(str(name))
        if name not in names:
            raise ValueError(f"{name} in {path} is no argument of this script. --help lists those that there are.")
        if (value is None and default is not None) or (isinstance(value, list) and None in value):
            raise ValueError(f"{name} has no value in {path}. Give one, or leave it out for its default, {default}.")
        if value is False and str(name).endswith("_strategy"):  # what YAML makes of a bare no
            values[name] = "no"
    return as_flags(values)


def as_flags(values):
    """Returns values by name as the flags of a command line."""
    flags = []
    for name, value in values.items():
        if isinstance(value, list):
            flags += [f"--{name}", *map(str, value)]
        elif value is not None:
            flags.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
    return flags
