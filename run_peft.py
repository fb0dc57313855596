"""Fine-tunes a few parameters of MoLFormer to predict lipophilicity: BitFit, (IA)³, LoRA and newer methods.

    python run_peft.py                                                    # LoRA on the embedded checkpoint and data
    python run_peft.py --peft_method bitfit --output_dir outputs/bitfit
    python run_peft.py --model_name_or_path outputs/peft --merge_adapter --output_dir outputs/plain    # into its base
    python run_regression.py --do_predict --model_name_or_path outputs/peft --output_dir outputs/predicted

Data, split, head, protocol and outputs are those of run_regression.py. Writes to --output_dir what was trained and
nothing else (an adapter of PEFT, or the trained parameters beside the name of their base), all_results.json with the
numbers of trainable parameters, time, memory and size, predictions.csv, splits.json and plots. The folder serves as
--model_name_or_path of every script, and is merged into its base where it is trained on.

Ben Zaken et al., BitFit, 2021, https://arxiv.org/abs/2106.10199. Liu et al., (IA)³, 2022,
https://arxiv.org/abs/2205.05638. Hu et al., LoRA, 2021, https://arxiv.org/abs/2106.09685.
"""

import json
import logging
import math
import re
import shlex
import shutil
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import nn

from arguments import DataTrainingArguments, InputError, ModelArguments, TrainingArguments, check_positive
from utils_runs import ARGUMENTS_FILE, is_merged, read_json, run_script, says_true, setup_run, write_json


DEFAULTS = {"output_dir": "outputs/peft"}

# What --peft_method means: learning rate, rank, target modules. The rates are for the embedded
# checkpoint; `python studies/peft_comparison.py --tune` finds them on validation.
LAYER = r"molformer\.encoder\.layer\.\d+\."
ALL_LINEAR = LAYER + r"(attention\.self\.(query|key|value)|(attention\.output|intermediate|output)\.dense)"


@dataclass
class Method:
    """Defaults of a method, and what it has.

    Args:
        rank (`int`, *optional*): `None` where there is none.
        targets (`str`, *optional*): pattern for the modules that it adapts.
        alpha (`int`, *optional*): scaling as a multiple of the rank, `None` where there is none.
        dropout (`bool`): whether there is a dropout before the adapters.
    """

    learning_rate: float
    rank: int | None = None
    targets: str | None = None
    summary: str = ""
    alpha: int | None = None
    dropout: bool = False


# Ranks give each low-rank method less than 2 % of the embedded checkpoint's parameters.
METHODS = {
    "full": Method(6e-4, summary="all parameters, the line to beat"),
    "head": Method(9e-3, summary="the regression head alone"),
    "bitfit": Method(9e-3, summary="every bias of the encoder"),
    "ia3": Method(
        1e-2, None, LAYER + r"(attention\.self\.(key|value)|output\.dense)",
        "factors for keys, values and the inner state of the feed-forward layer",
    ),
    "ln_tuning": Method(9e-3, None, r".*LayerNorm", "weight and bias of every LayerNorm"),
    "lora": Method(1.2e-3, 4, ALL_LINEAR, "low-rank updates of every linear layer", alpha=2, dropout=True),
    "rslora": Method(3e-3, 4, ALL_LINEAR, "LoRA scaled by 1 / sqrt(rank)", alpha=2, dropout=True),
    "dora": Method(2e-3, 4, ALL_LINEAR, "LoRA of directions, with a magnitude for each output", alpha=2, dropout=True),
    "pissa": Method(3e-3, 4, ALL_LINEAR, "LoRA that starts from the largest singular vectors", alpha=1, dropout=True),
    "vera": Method(3e-2, 256, ALL_LINEAR, "scalings of shared random projections", dropout=True),
    "oft": Method(1e-3, 16, ALL_LINEAR, "rotations of the inputs, in blocks of `rank`"),
    "miss": Method(3e-3, 8, ALL_LINEAR, "one shared shard of each weight matrix", dropout=True),
    "hira": Method(6e-3, 4, ALL_LINEAR, "low-rank factors that multiply the weights element by element", dropout=True),
    "shira": Method(7e-3, 4, ALL_LINEAR, "a random sparse part of the weights, as many as LoRA would have"),
}  # fmt: skip
PLAIN_METHODS = ("full", "head", "bitfit")  # parameters of the model itself; all others are tuners of PEFT

logger = logging.getLogger("molformer.peft")


@dataclass
class PeftArguments:
    """Which parameters are trained."""

    _argument_group_name = "parameter-efficient method"

    peft_method: str = field(
        default="lora",
        metadata={"help": "; ".join(f"{name}: {method.summary}" for name, method in METHODS.items()) + "."},
    )
    peft_rank: int | None = field(
        default=None, metadata={"help": "Rank; of oft the block size. Default: the method's, see the README."}
    )
    peft_alpha: float | None = field(
        default=None,
        metadata={
            "help": "Scaling of LoRA and its kin, divided by the rank (of rslora by its square root). Default: twice "
            "the rank, of pissa the rank."
        },
    )
    peft_dropout: float = field(default=0.0, metadata={"help": "Dropout before the adapters, where there is one."})
    target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Modules that are adapted: ends of their names, or one pattern. Default: the method's."},
    )
    merge_adapter: bool = field(
        default=False,
        metadata={
            "help": "Also write a plain checkpoint, the adapter merged into its base, to the folder merged; "
            "--push_to_hub then sends this one. If --model_name_or_path is an adapter, it is merged into --output_dir "
            "itself, without data, and nothing is trained."
        },
    )
    base_hub_name: str | None = field(
        default=None,
        metadata={"help": "Hub name of a base that is a local folder, which an adapter that is pushed is to name."},
    )

    def __post_init__(self):
        if self.peft_method not in METHODS:
            raise ValueError(
                f"--peft_method {self.peft_method} is unknown. Choose one of {', '.join(METHODS)}; "
                "studies/peft_comparison.py trains and compares all of them."
            )
        method = METHODS[self.peft_method]
        if method.targets is None and (self.peft_rank or self.target_modules):
            raise ValueError(
                f"--peft_method {self.peft_method} has neither rank nor target modules. Leave them out, of a file of "
                "arguments of another method too."
            )
        if self.peft_rank is not None and method.rank is None:
            raise ValueError(f"--peft_method {self.peft_method} has no rank. Leave --peft_rank out.")
        smallest = 2 if self.peft_method == "oft" else 1  # a rotation needs two
        if self.peft_rank is not None and self.peft_rank < smallest:
            raise ValueError(f"--peft_rank is {self.peft_rank}; give a number from {smallest} up.")
        check_positive(self, "peft_alpha")
        if self.peft_alpha is not None and method.alpha is None:
            raise ValueError(f"--peft_method {self.peft_method} has no alpha. Leave --peft_alpha out.")
        if self.peft_dropout and not method.dropout:
            raise ValueError(f"--peft_method {self.peft_method} has no dropout. Leave --peft_dropout out.")
        if not 0 <= self.peft_dropout < 1:
            raise ValueError(f"--peft_dropout is {self.peft_dropout}; give a number from 0 up to, not including, 1.")
        if self.base_hub_name is not None:
            if self.peft_method == "full" or self.merge_adapter:
                raise ValueError("--base_hub_name names the base of an adapter, and none is sent. Leave it out.")
            from huggingface_hub.utils import validate_repo_id

            validate_repo_id(self.base_hub_name)
        self.peft_rank = self.peft_rank or method.rank
        self.peft_alpha = self.peft_alpha or (self.peft_rank * method.alpha if method.alpha else None)


ARGUMENTS = (ModelArguments, DataTrainingArguments, PeftArguments, TrainingArguments)


def find_targets(model, peft_args):
    """Returns the names of the modules that the method adapts.

    Raises:
        InputError: if a target names no linear layer (for ln_tuning, no LayerNorm) of the encoder, or the rank is
            larger than a layer allows.
    """
    wanted = METHODS[peft_args.peft_method].targets
    kind = nn.LayerNorm if peft_args.peft_method == "ln_tuning" else nn.Linear
    modules = {name: module for name, module in model.named_modules() if isinstance(module, kind)}
    modules = {name: module for name, module in modules.items() if not name.startswith("classifier")}
    targets = peft_args.target_modules
    if targets is None:
        patterns = {wanted: wanted}
    elif len(targets) == 1:
        patterns = {targets[0]: rf"(.*\.)?({targets[0]})"}
    else:
        patterns = {target: rf"(.*\.)?{re.escape(target)}" for target in targets}
    found = []
    for target, pattern in patterns.items():
        try:
            matched = [name for name in modules if re.fullmatch(pattern, name)]
        except re.error as error:
            raise InputError(f"--target_modules {target!r} is no regular expression: {error}.") from error
        if not matched:
            ends = sorted({re.sub(r".*layer\.\d+\.", "", name) for name in modules})
            raise InputError(f"--target_modules {target!r} matches no module. There are: {', '.join(ends)}.")
        found += matched
    check_shapes({name: modules[name] for name in found}, peft_args)
    return sorted(set(found))


def check_shapes(modules, peft_args):
    """Raises `InputError` if a rank is larger than a layer, or a layer cannot be cut into the blocks of a method."""
    method, rank = peft_args.peft_method, peft_args.peft_rank
    if rank is None:
        return
    for name, module in modules.items():
        most = min(module.weight.shape)
        if method == "shira":  # trains rank times (inputs + outputs) of the weights
            most = module.weight.numel() // sum(module.weight.shape)
        if method == "vera":  # scales random matrices of rank one: as many as there are weights span all matrices
            most = module.weight.numel()
        if method != "oft" and rank > most:
            raise InputError(
                f"--peft_rank {rank} is too large for {name}, {tuple(module.weight.shape)}. Give at most {most}."
            )
        if method == "oft" and module.in_features % rank:
            common = math.gcd(*(other.in_features for other in modules.values()))
            fits = [size for size in range(2, 129) if common % size == 0]
            raise InputError(
                f"--peft_method oft cuts the {module.in_features} inputs of {name} into blocks of --peft_rank {rank}, "
                f"which does not divide them. Choose one of {', '.join(map(str, fits))}, or --peft_method lora."
            )


def peft_config(peft_args, targets, seed):
    """Returns the configuration of PEFT's tuner for a method; `seed` draws what is random in it."""
    import peft

    method, rank = peft_args.peft_method, peft_args.peft_rank
    common = {"task_type": "SEQ_CLS", "target_modules": targets, "modules_to_save": ["classifier"]}
    lora = {"r": rank, "lora_alpha": peft_args.peft_alpha, "lora_dropout": peft_args.peft_dropout}
    inner = [name for name in targets if re.search(r"layer\.\d+\.output\.dense$", name)]
    makers = {
        "lora": lambda: peft.LoraConfig(**common, **lora),
        "rslora": lambda: peft.LoraConfig(**common, **lora, use_rslora=True),
        "dora": lambda: peft.LoraConfig(**common, **lora, use_dora=True),
        "pissa": lambda: peft.LoraConfig(**common, **lora, init_lora_weights="pissa"),
        "ia3": lambda: peft.IA3Config(**common, feedforward_modules=inner),
        "ln_tuning": lambda: peft.LNTuningConfig(**common),
        # its projections are drawn again from their seed wherever it is loaded
        "vera": lambda: peft.VeraConfig(**common, r=rank, vera_dropout=peft_args.peft_dropout,
                                        projection_prng_key=seed, save_projection=False),
        # the library's default is a series that rotates only nearly
        "oft": lambda: peft.OFTConfig(**common, oft_block_size=rank, use_cayley_neumann=False),
        "miss": lambda: peft.MissConfig(**common, r=rank, miss_dropout=peft_args.peft_dropout),
        "hira": lambda: peft.HiraConfig(**common, r=rank, hira_dropout=peft_args.peft_dropout),
        "shira": lambda: peft.ShiraConfig(**common, r=rank, random_seed=seed),
    }  # fmt: skip
    return makers[method]()


def trained_names(model, method):
    """Returns the names of the parameters that a method trains which adds none of its own."""
    encoder = {"full": lambda name: True, "head": lambda name: False, "bitfit": lambda name: name.endswith(".bias")}
    return [name for name, _ in model.named_parameters() if name.startswith("classifier.") or encoder[method](name)]


def adapt(model, peft_args, seed=0, revision=None):
    """Returns the model in which only what the method trains requires gradients, adapters added.

    Args:
        revision (`str`, *optional*): that of the base on the Hub, which the adapter is to name.
    Raises:
        InputError: as `find_targets` does.
    """
    method = peft_args.peft_method
    if method in PLAIN_METHODS:
        names = set(trained_names(model, method))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in names)
        return model
    import peft

    adapted = peft.get_peft_model(
        model, peft_config(peft_args, find_targets(model, peft_args), seed), revision=revision
    )
    adapted.create_or_update_model_card = lambda folder: None  # a run writes its own, and no README of the user's
    return adapted


def check_base(model_args):
    """Raises `InputError` if no adapter could name, or keep, the model that the arguments start from."""
    from utils_checkpoints import find_base

    if model_args.model_name_or_path is None:
        raise InputError("--config_name alone gives a random base, which no adapter can name. Pass a checkpoint.")
    if find_base(model_args.model_name_or_path, model_args) is not None:
        raise InputError(
            f"{model_args.model_name_or_path} holds an adapter, which cannot be the base of another one. Merge it "
            f"first, `python run_peft.py --model_name_or_path {model_args.model_name_or_path} --merge_adapter "
            "--output_dir outputs/plain`, and pass outputs/plain."
        )
    if model_args.redraw_features:
        raise InputError(
            "--redraw_features true changes the attention of the base in every layer, which no adapter could keep. "
            "Leave it out, or use --peft_method full."
        )


def check_base_name(model_args, peft_args, training_args, base_weights):
    """Raises `InputError` if an adapter is to be pushed over its base, or nobody else could find its base, or has it
    with other weights.

    Args:
        base_weights (`str`, *optional*): hash of the weights of this run's base.
    """
    from utils_checkpoints import find_file, hub_options, is_on_hub, weights_digest
    from utils_report import repository_name

    if peft_args.peft_method == "full" or peft_args.merge_adapter:
        return
    source, name = model_args.model_name_or_path, peft_args.base_hub_name
    local = Path(source).exists()
    if name and not local:
        raise InputError(f"--base_hub_name {name}: the base, {source}, is on the Hub already. Leave it out.")
    if not training_args.push_when_done:
        return
    if local and not name:
        raise InputError(
            f"The base of the adapter, {source}, is a local folder, which nobody else could load it with. Push the "
            "base and name it with --base_hub_name USER/NAME, or pass --merge_adapter."
        )
    on_hub, target = name or source, repository_name(training_args)
    if "/" not in target and "/" in on_hub:  # it may be the same user's
        target = f"{on_hub.split('/')[0]}/{target}"
    if on_hub.lower() == target.lower():
        raise InputError(
            f"The adapter would be pushed to {target}, where its base is, and replace the weights that it needs. "
            "Give another repository, --hub_model_id USER/NAME."
        )
    if name:
        hub = {**hub_options(model_args), "revision": "main", "token": training_args.hub_token}
        there = is_on_hub(name, training_args.hub_token)
        try:
            fits = there and find_file(name, "config.json", hub) and weights_digest(name, hub) in (None, base_weights)
        except InputError:  # there is no such repository
            fits = False
        if not fits:
            raise InputError(
                f"--base_hub_name {name} is not on the Hub, or has other weights than {source}: nobody could load the "
                f"adapter with it. Push the base there first: `hf upload {name} {shlex.quote(str(source))} . "
                "--include README.md --include config.json --include 'model*' --include 'tok*.json' "
                "--include 'modeling*.py'`."
            )


def check_resumed(training_args, checkpoint, base_weights):
    """Raises `InputError` if the interrupted run in the output folder began with other weights of its base.

    Args:
        base_weights (`str`, *optional*): hash of the weights of this run's base.
    """

    known = read_json(Path(checkpoint) / "config.json").get("base_weights")
    if known and base_weights and known != base_weights:
        raise InputError(
            f"The run in {training_args.output_dir} was trained on other weights than those that its base holds now. "
            "Bring those back, or train again with another --output_dir."
        )


def write_merged(model, tokenizer, folder, find, base=None):
    """Writes a plain checkpoint to a folder, with arguments, metrics and plots of the run that made the adapter.

    Args:
        find (`Callable`): maps the name of a file of that run to its path, or to `None` if there is none.
        base (`str`, *optional*): what the adapter's base is called here, if the run may have called it otherwise.
    """
    from utils_report import FIGURES

    arguments, folder = find(ARGUMENTS_FILE), Path(folder)
    if arguments is not None:  # those of the run that made, or evaluated, the adapter: repeated, it merges it too
        values = read_json(arguments)
        values.pop("base_hub_name", None)
        if base is not None:
            for name in ("hub_model_id", "hub_revision"):  # those of the adapter
                values.pop(name, None)
            values["model_name_or_path"] = base
        # first: by these a folder that was begun is known as one that may be written again
        folder.mkdir(parents=True, exist_ok=True)
        write_json({**values, "merge_adapter": True, "output_dir": str(folder)}, folder / ARGUMENTS_FILE)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    copied = ("all_results.json", "splits.json", "trainer_state.json", *FIGURES)
    for name in copied if arguments is not None else ():  # without them results would be told of unknown data
        if (path := find(name)) is not None:
            shutil.copyfile(path, folder / name)


def merge_alone(model_args, data_args, training_args):
    """Writes the adapter that the arguments name, merged into its base, to the output folder; no data are needed."""
    from modeling_molformer_reg import MolformerForRegression
    from trainer_regression import begin_run
    from utils_checkpoints import find_base, find_file, hub_options, load_model, load_tokenizer, path_of_base
    from utils_report import finish_run

    source, folder = model_args.model_name_or_path, Path(training_args.output_dir)
    if Path(source).resolve() == folder.resolve():
        raise InputError(f"--output_dir {folder} is the adapter itself. Give another folder for the merged model.")
    if training_args.resume_from_checkpoint is not None:  # to push it later: it is made again
        if not says_true(training_args.resume_from_checkpoint) or not is_merged(folder):
            raise InputError(
                f"{folder} holds no merged adapter, and there is no training to resume. Leave "
                "--resume_from_checkpoint out."
            )
        training_args.resume_from_checkpoint, data_args.overwrite_output_dir = None, True
    setup_run(training_args, data_args)
    logger.info("%s holds an adapter: it is merged into its base, and nothing is trained", source)
    tokenizer = load_tokenizer(model_args)
    model = load_model(MolformerForRegression, model_args, tokenizer, merge=True)
    if model.head_is_new:
        raise InputError(
            f"Neither the adapter {source} nor its base has a regression head to go into the merged model. Train one: "
            f"`python run_regression.py --model_name_or_path {source}`."
        )
    begin_run(training_args, None, source, [])
    if training_args.should_save:
        base = path_of_base(find_base(source, model_args)["base"])
        write_merged(model, tokenizer, folder, lambda name: find_file(source, name, hub_options(model_args)), base)
    finish_run(training_args, "peft")


def name_base(output_dir, peft_args):
    """Returns what an adapter that is pushed says in place of its configuration, by file: the Hub name of its base."""
    from utils_checkpoints import PARTIAL_FILE

    if not peft_args.base_hub_name or peft_args.merge_adapter:
        return {}
    keys = {"adapter_config.json": "base_model_name_or_path", PARTIAL_FILE: "base"}
    found = {name: key for name, key in keys.items() if (output_dir / name).exists()}
    return {
        name: json.dumps(read_json(output_dir / name) | {key: peft_args.base_hub_name}, indent=2) + "\n"
        for name, key in found.items()
    }


def measure(trainer):
    """Returns what the training took: trainable parameters (all, and without the head), peak memory, size on disk."""
    from modeling_molformer_reg import MolformerForRegression

    with torch.device("meta"):  # the plain model, without memory for it
        base_parameters = MolformerForRegression(trainer.model.config).num_parameters()
    trainable = {name: p.numel() for name, p in trainer.model.named_parameters() if p.requires_grad}
    head = sum(count for name, count in trainable.items() if "classifier." in name)
    total = sum(trainable.values())
    folder = Path(trainer.args.output_dir)
    weights = folder.glob("*.safetensors")
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    final, stds = losses[-1] if losses else None, trainer.model.config.label_std
    in_units = final * stds[0] ** 2 if losses and len(stds) == 1 else None
    return {
        "trainable_parameters": total,
        "trainable_parameters_without_head": total - head,
        "base_parameters": base_parameters,
        "trainable_percent": 100 * total / base_parameters,
        "final_train_loss": final,
        "final_train_mse": in_units,  # the same in the squared unit of the label
        "checkpoint_bytes": sum(path.stat().st_size for path in weights),
        "peak_memory_bytes": trainer.stopwatch.peak_memory,  # of this process, libraries and all
    }


def begin_peft(model_args, data_args, peft_args, training_args):
    """Starts a run when its base is checked; returns the checkpoint to resume from, and a hash of the base's weights.

    Raises:
        InputError: as `setup_run`, `check_base`, `check_base_name` and `check_resumed` do; if the base is an ensemble.
    """
    from utils_checkpoints import find_members, hub_options, weights_digest

    settled = {"peft_rank": peft_args.peft_rank, "peft_alpha": peft_args.peft_alpha}
    if training_args.run_values and training_args.do_train:  # the defaults of a method may change
        training_args.run_values |= {name: value for name, value in settled.items() if value is not None}
    checkpoint = setup_run(training_args, data_args)
    if members := find_members(model_args):
        raise InputError(
            f"{model_args.model_name_or_path} holds an ensemble of {len(members)} models. Pass one of them, such as "
            f"{members[0]}."
        )
    source = model_args.model_name_or_path
    base_weights = weights_digest(source, hub_options(model_args)) if source is not None else None
    if checkpoint is not None:
        check_resumed(training_args, checkpoint, base_weights)
    merged = Path(training_args.output_dir) / "merged"
    if peft_args.merge_adapter and (merged.is_file() or (merged.is_dir() and any(merged.iterdir()))):
        if not is_merged(merged):
            raise InputError(f"{merged} is not of these scripts and would be replaced. Give another --output_dir.")
    if peft_args.peft_method != "full" and training_args.do_train:
        check_base(model_args)
        check_base_name(model_args, peft_args, training_args, base_weights)
        model_args.redraw_features = False
    return checkpoint, base_weights


def is_merge_alone(model_args, peft_args, training_args):
    """Returns whether an adapter is only to be merged: `--merge_adapter` with one, and no `--do_train` by the user."""
    from utils_checkpoints import find_base

    named = training_args.run_values or {}  # --do_train said so: then an adapter is refused as base
    if not (peft_args.merge_adapter and training_args.do_train) or named.get("do_train"):
        return False
    return find_base(model_args.model_name_or_path, model_args) is not None


def main(model_args, data_args, peft_args, training_args):
    if data_args.only_test_file and not (training_args.do_train or training_args.do_eval):
        raise InputError("New molecules are predicted by run_regression.py --do_predict, which takes adapters too.")
    if is_merge_alone(model_args, peft_args, training_args):
        return merge_alone(model_args, data_args, training_args)
    checkpoint, base_weights = begin_peft(model_args, data_args, peft_args, training_args)

    from modeling_molformer_reg import MolformerForRegression
    from trainer_regression import (
        begin_run,
        build_trainer,
        check_evaluated,
        evaluate_regression,
        order_labels,
        select_parts,
        train_regression,
    )
    from utils_checkpoints import (
        check_split,
        hub_revision,
        load_config,
        load_model,
        load_tokenizer,
        merge_adapter,
        settle_smiles_form,
    )
    from utils_molecules import load_molecules
    from utils_report import finish_run, write_card, write_reports, write_splits

    # Data
    tokenizer, config = load_tokenizer(model_args), load_config(model_args)
    settle_smiles_form(config, data_args)
    if METHODS[peft_args.peft_method].targets and training_args.do_train:
        with torch.device("meta"):  # what does not fit is named before the data are read
            find_targets(MolformerForRegression(config), peft_args)
    molecules, digest, dropped = load_molecules(tokenizer, model_args, data_args, training_args)
    check_evaluated(training_args, digest)
    parts = select_parts(order_labels(molecules, config, training_args), data_args)

    # Model and trainer
    if training_args.learning_rate is None and data_args.protocol == "default":
        training_args.learning_rate = METHODS[peft_args.peft_method].learning_rate
    check_split(config, digest, data_args, checkpoint)
    revision = hub_revision(model_args)
    trainer = build_trainer(
        model_args,
        data_args,
        training_args,
        tokenizer,
        parts,
        digest,
        adapt=lambda model: adapt(model, peft_args, training_args.seed, revision) if training_args.do_train else model,
    )
    if peft_args.peft_method in PLAIN_METHODS and peft_args.peft_method != "full":
        trainer.partial_method, trainer.base_revision = peft_args.peft_method, revision
    trainer.base_weights = base_weights
    check = partial(trainer.check_resumed, checkpoint)
    begin_run(training_args, checkpoint, model_args.model_name_or_path, dropped, check=check)

    # Train
    if training_args.do_train:
        metrics = train_regression(trainer, parts, checkpoint)
        measured = measure(trainer)
        trainer.save_metrics("train", {**metrics, "peft_method": peft_args.peft_method, **measured})
        logger.info(
            "%s: %d trainable parameters, %.3f %% of the base model's %d (%d without the head); %.2f MB on disk, peak "
            "memory %.2f GB",
            peft_args.peft_method, measured["trainable_parameters"], measured["trainable_percent"],
            measured["base_parameters"], measured["trainable_parameters_without_head"],
            measured["checkpoint_bytes"] / 1e6, measured["peak_memory_bytes"] / 1e9,
        )  # fmt: skip

    # Evaluate
    if training_args.do_eval:
        evaluate_regression(trainer)

    # Predict
    if training_args.do_predict:
        predictions = {name: [trainer.predict_molecules(part)] for name, part in parts.items()}
        if trainer.is_world_process_zero():
            metrics, table = write_reports(
                training_args.output_dir, parts, predictions, digest, data_args, training_args.do_train
            )
            trainer.save_metrics("predict", metrics)
            print(table)
    elif training_args.do_train and trainer.is_world_process_zero():
        write_splits(training_args.output_dir, parts, digest, data_args)

    # Merge
    output_dir = Path(training_args.output_dir)
    if peft_args.merge_adapter and training_args.should_save:
        model = trainer.model
        if not training_args.do_train:  # of an adapter that was given
            model = load_model(MolformerForRegression, model_args, tokenizer, merge=True)
        files = {path.name: path for path in output_dir.glob("*")}
        write_merged(merge_adapter(model), tokenizer, output_dir / "merged", files.get)
        write_card(output_dir / "merged", "peft")
    pushed = output_dir / "merged" if peft_args.merge_adapter else output_dir
    finish_run(training_args, "peft", [("", pushed)], name_base(output_dir, peft_args))


if __name__ == "__main__":
    run_script(main, ARGUMENTS, DEFAULTS, __doc__)
