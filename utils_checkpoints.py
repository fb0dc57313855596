"""Checkpoints: loading of tokenizers, configurations, models and adapters, with reasons for what cannot be loaded.

    from utils_checkpoints import load_model, load_tokenizer

A checkpoint is a folder or a Hub name: a model, adapters beside the name of their base, or some parameters of one.
"""

import contextlib
import hashlib
import json
import logging
import pickle
import re
import warnings
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import RepositoryNotFoundError
from rdkit import rdBase
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast
from transformers.utils import cached_file

from arguments import EMBEDDED_DATA, EMBEDDED_VOCABULARY, ROOT, DataTrainingArguments, InputError, hide_tokens
from modeling_molformer_reg import MolformerConfig, MolformerForRegression
from utils_molecules import compute_descriptors, parse_smiles, use_cache_alone_without_network
from utils_runs import UNFINISHED, last_complete_checkpoint, member_folders, project_path


PARTIAL_FILE = "trained_parameters.json"  # of a checkpoint that holds some parameters: method, base, their names
UNLOADABLE = (OSError, ValueError, RuntimeError, SafetensorError, pickle.UnpicklingError)
UNLOADABLE += (TypeError, AttributeError, KeyError)  # of the libraries that read them, where JSON has other types
# `cached_file` then answers `None` for a file that is not there
QUIET = {name: False for name in ("_raise_exceptions_for_missing_entries", "_raise_exceptions_for_connection_errors")}
QUIET["_raise_exceptions_for_gated_repo"] = False
SHAPE_FIELDS = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")

# The pattern of MoLFormer's pre-tokenizer (IBM/molformer, Apache-2.0): one token a match, the rest is dropped.
SMILES_PATTERN = (
    r"(\[[^\]]+]|Br?|Cl?|N|O|S|P|F|I|b|c|n|o|s|p|\(|\)|\.|=|#|-|\+|\\|\/|:|~|@|\?|>|\*|\$|\%[0-9]{2}|[0-9])"
)


# VeRA's projections are not in its checkpoints: they are drawn again from their seed
warnings.filterwarnings("ignore", message="Specified to not (save|load) vera_A")

logger = logging.getLogger("molformer.checkpoints")


def build_tokenizer(vocabulary_file=EMBEDDED_VOCABULARY):
    """Returns MoLFormer's tokenizer, built from its vocabulary: one token a line, the line number is the id."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors

    tokens = Path(vocabulary_file).read_text(encoding="utf-8").splitlines()
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SMILES_PATTERN), "removed", invert=True),
            pre_tokenizers.Split(Regex(SMILES_PATTERN), "isolated"),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>",
        pair="<bos> $A <eos> $B:1 <eos>:1",
        special_tokens=[(token, vocabulary[token]) for token in ("<bos>", "<eos>")],
    )
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        cls_token="<bos>",
        sep_token="<eos>",
        pad_token="<pad>",
        mask_token="<mask>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def hub_options(model_args):
    """Returns where and in which revision a checkpoint on the Hub is looked for, as the libraries name it (`dict`)."""
    return {"cache_dir": model_args.cache_dir, "revision": model_args.model_revision}


def load_tokenizer(model_args):
    """Returns the tokenizer of the checkpoint, or MoLFormer's own for a model from scratch.

    Raises:
        InputError: if it cannot be loaded.
    """
    source = model_args.tokenizer_name or model_args.model_name_or_path
    if source is None:
        return build_tokenizer()
    refuse_missing_folder(source)
    try:
        # not AutoTokenizer: that asks to run the code that a Hub tokenizer's auto_map names
        tokenizer = PreTrainedTokenizerFast.from_pretrained(source, **hub_options(model_args))
    except UNLOADABLE as error:
        raise InputError(_not_loaded("tokenizer", source, error)) from error
    # whatever it was saved with: a head may read the first token, and without a mask padding would count as atoms
    tokenizer.padding_side, tokenizer.model_input_names = "right", ["input_ids", "attention_mask"]
    tokenizer.init_kwargs.pop("auto_map", None)  # or the source's remote code would be named in our checkpoints
    return tokenizer


def read_config(source, hub, **values):
    """Returns the configuration of a folder, a file or a Hub name, with these values in place of its own.

    Raises:
        ValueError: if there is none of a MoLFormer; the library would give one of MoLFormer-XL's size.
    """
    kind = MolformerConfig.get_config_dict(source, **hub)[0].get("model_type")
    if kind != MolformerConfig.model_type:
        what = "there is no config.json" if kind is None else f"it is that of a {kind}"
        raise ValueError(f'{what} with "model_type": "{MolformerConfig.model_type}"')
    return MolformerConfig.from_pretrained(source, **hub, **values)


def load_config(model_args, **values):
    """Returns the configuration that the run starts from: that of --config_name, else the checkpoint's.

    What a checkpoint has seen, and how it reads SMILES, holds in both cases.

    Args:
        values: what holds in place of the configuration's own values.
    Raises:
        InputError: if it cannot be loaded; if --config_name would stand in for that of a fine-tuned checkpoint.
    """
    source, named = model_args.model_name_or_path, model_args.config_name
    if named is not None and source is not None:
        own = load_config(replace(model_args, config_name=None))
        values = {name: getattr(own, name) for name in ("split_hash", "smiles_form", "smiles_max_length")} | values
        if own.label_mean is not None:
            raise InputError(
                f"--config_name {named} would replace what {source} knows from its fine-tuning: the scale of its "
                "labels, its split and the form of its SMILES. Leave --config_name out."
            )
    source = named or source
    refuse_missing_folder(source)
    try:
        config = read_config(source, hub_options(model_args), **values)
    except UNLOADABLE as error:
        if named is None:
            find_base(source, model_args)  # which knows what an adapter needs its configuration for
        raise InputError(_not_loaded("configuration", source, error)) from error
    check_auto_map(source, getattr(config, "auto_map", None))
    return config


def check_auto_map(source, auto_map):
    """Raises `InputError` if the code that a checkpoint names lies elsewhere than beside it or in a Hub repository.

    None of it runs here; who writes such a name means to have something else run for readers who trust it.
    """
    values = list(auto_map.values()) if isinstance(auto_map, dict) else [auto_map]
    names = [name for value in values for name in (value if isinstance(value, list) else [value]) if name is not None]
    for name in names:
        if not isinstance(name, str) or not re.fullmatch(r"((\w[\w.-]*/)?\w[\w.-]*--)?\w+\.\w+", name):
            raise InputError(
                f"The configuration of {source} names {name!r} in auto_map, which is no class of a module beside it: "
                "the checkpoint is damaged or hostile. Use another one."
            )


def settle_smiles_form(config, data_args):
    """Fills in form and length of the SMILES where the user named none: the fine-tuned checkpoint's, or the usual."""
    if data_args.smiles_form is None:
        data_args.smiles_form = config.smiles_form or "canonical"
        if data_args.smiles_form != "canonical":
            logger.info("SMILES are read in %s form, as in the training of the model", data_args.smiles_form)
    usual = DataTrainingArguments.max_length
    if data_args.max_length == usual:  # a model that has learned longer ones is asked for them too
        data_args.max_length = max(usual, config.smiles_max_length or usual)
        if data_args.max_length > usual:
            logger.info(
                "Molecules of up to %d tokens are taken, as in the training of the model", data_args.max_length
            )


def hub_revision(model_args):
    """Returns the revision of a Hub model that is not its newest one; `None` for that one, and for a local folder."""
    local = model_args.model_name_or_path is None or Path(model_args.model_name_or_path).exists()
    return None if local or model_args.model_revision == "main" else model_args.model_revision


def refuse_missing_folder(source):
    """Raises `InputError` for what is meant as a folder and is none: without a network the Hub is asked for minutes.

    That is a path, or a name beside other files.
    """
    path = Path(source)
    beside_others = path.parent != Path(".") and path.parent.is_dir()
    if not path.exists() and (beside_others or source.startswith((".", "/", "~")) or source.count("/") > 1):
        raise InputError(f"There is no local folder {source}. Correct its path.")
    if not path.exists():
        use_cache_alone_without_network(constants.ENDPOINT)


def find_file(source, name, hub):
    """Returns the path of a file of a checkpoint, fetched if it is on the Hub; `None` where there is none.

    Raises:
        InputError: if there is no such checkpoint.
    """
    refuse_missing_folder(source)
    try:
        return cached_file(source, name, **hub, **QUIET)
    except OSError as error:
        raise InputError(_not_loaded("model", source, error)) from error


def is_on_hub(name, token):
    """Returns whether the Hub has a repository of this name, which the token opens if it is private.

    Raises:
        InputError: if the Hub does not answer.
    """
    try:
        HfApi(token=token).model_info(name)
    except RepositoryNotFoundError:
        return False
    except Exception as error:  # the client's own, and those of the library it speaks HTTP with, which changes
        reason = next(iter(hide_tokens(str(error)).splitlines()), "").rstrip(".") or type(error).__name__
        raise InputError(f"Whether {name} is on the Hub could not be found out: {reason}. Try again later.") from error
    return True


def find_base(source, model_args):
    """Returns how a checkpoint of adapters, or of some parameters, names its method and base; `None` for a plain one.

    Returns:
        `dict` with `method`, `base`, `revision` (of the base), `partial`: whether it holds some of the model's own
        parameters, and the names of these, `parameters`.
    Raises:
        InputError: if the file that names them is no JSON of that form, or there is no configuration beside it.
    """
    for name, base in ((PARTIAL_FILE, "base"), ("adapter_config.json", "base_model_name_or_path")):
        path = find_file(source, name, hub_options(model_args)) if source is not None else None
        if path is not None:
            try:
                values = dict(json.loads(Path(path).read_text(encoding="utf-8")))
                if not all(
                    isinstance(values.get(key), str | None) for key in (base, "revision", "method", "peft_type")
                ):
                    raise ValueError(f"base, revision or method in {name} is no text.")
            except (ValueError, TypeError) as error:
                raise InputError(_not_loaded("adapter", source, error)) from error
            if find_file(source, "config.json", hub_options(model_args)) is None:
                raise InputError(
                    f"The adapter {source} has no config.json, which holds the scale of its labels, its pooling and "
                    "its head. Copy it from the folder of the run that made the adapter."
                )
            method = values.get("method") or values.get("peft_type")
            found = {"method": method, "base": values.get(base), "revision": values.get("revision") or "main"}
            return found | {"partial": name == PARTIAL_FILE, "parameters": values.get("parameters") or []}
    return None


def find_members(model_args):
    """Returns the folders of an ensemble's members, first member first; an empty list for a single model.

    Those of an ensemble on the Hub are fetched.
    """
    source = model_args.model_name_or_path
    if source is None or Path(source).exists():
        members = member_folders(source) if source is not None else []
        if members and (Path(source) / UNFINISHED).exists():
            raise InputError(f"{source} holds an ensemble whose training was interrupted. Resume it first.")
        return members
    hub = hub_options(model_args)
    if find_file(source, "member-0/config.json", hub) is None:
        return []
    try:
        return member_folders(snapshot_download(source, allow_patterns="member-*/*", **hub))
    except (OSError, ValueError) as error:
        raise InputError(_not_loaded("ensemble", source, error)) from error


def check_index(source):
    """Raises `ValueError` if the index of a folder's weights names files that are not in the folder itself."""
    for path in Path(source).glob("*.index.json"):
        files = json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()
        outside = next((name for name in files if Path(name).name != name), None)
        if outside is not None:
            raise ValueError(f"{path.name} names {outside}, which is not in the folder.")


def portable_path(source):
    """Returns a checkpoint's name as an adapter keeps it: of a folder the path, relative to this project if in it."""
    if not Path(source).exists():
        return source
    return project_path(source) or str(Path(source).resolve())


def path_of_base(base):
    """Returns where the base lies that `portable_path` has named: a folder of this project, or as it was named."""
    return str(ROOT / base) if base is not None and (ROOT / base).exists() else base


def weights_digest(source, hub=None):
    """Returns a hash of a checkpoint's weights, by their names and values in float32, as they are loaded.

    `None` where they are not in one file of safetensors.

    Args:
        hub (`dict`, *optional*): `cache_dir` and `revision`; a checkpoint on the Hub is looked at with them alone.
    """
    path = Path(source) / "model.safetensors"
    if hub is not None and not Path(source).exists():
        path = find_file(source, path.name, hub)
    if path is None or not Path(path).is_file():
        return None
    digest = hashlib.sha256()
    try:
        with safe_open(path, "pt") as file:
            for name in sorted(file.keys()):
                tensor = file.get_tensor(name)
                digest.update(f"{name} {tuple(tensor.shape)}".encode())
                digest.update(tensor.float().contiguous().numpy().tobytes())
    except SafetensorError:  # damaged: whoever loads it says so
        return None
    return digest.hexdigest()[:16]


def _base_not_loaded(source, base, error):
    return (
        f"The base of {source} cannot be loaded. {_not_loaded('model', str(base), error)} Or correct its name in the "
        "adapter's configuration."
    )


def check_base_fits(source, base, base_hub, config):
    """Raises `InputError` if a base has other shapes than an adapter, or other weights than it was trained on."""
    if base is None:
        raise InputError(f"The configuration of the adapter in {source} names no base. Enter its folder or Hub name.")
    try:
        refuse_missing_folder(base)
        other = read_config(base, base_hub)
    except UNLOADABLE as error:
        raise InputError(_base_not_loaded(source, base, error)) from error
    for name in (*SHAPE_FIELDS, "num_random_features"):
        if getattr(other, name) != getattr(config, name):
            raise InputError(
                f"The adapter {source} does not fit its base {base}: {name} is {getattr(config, name)} there and "
                f"{getattr(other, name)} in the base. Correct the base's name in the adapter's configuration."
            )
    digest = config.base_weights
    now = digest and weights_digest(base, {name: base_hub[name] for name in ("cache_dir", "revision")})
    if digest and now and digest != now:
        raise InputError(
            f"The adapter {source} was trained on other weights than those that {base} holds now. Bring those back, "
            "correct the base's name in the adapter's configuration, or train the adapter again."
        )


def _load_adapted(model_class, source, found, hub, values, merge):
    """Returns the base of a checkpoint of adapters, or of some parameters, with these in it or merged into it.

    The encoder of another model than that for regression is the adapted one, its heads are the base's.
    """
    base = path_of_base(found["base"])
    if base is not None:
        check_index(base)
    base_hub = {"cache_dir": hub["cache_dir"], "revision": found["revision"], "dtype": torch.float32}
    if model_class is not MolformerForRegression:
        adapted = _load_adapted(MolformerForRegression, source, found, hub, {}, merge=True)
        kept = ("redraw_features", "hidden_dropout_prob", "embedding_dropout_prob")
        values = {name: getattr(adapted.config, name) for name in kept} | values
        model = model_class.from_pretrained(base, **base_hub, **values)
        model.molformer.load_state_dict(adapted.molformer.state_dict())
        for name in ("split_hash", "smiles_form", "smiles_max_length"):
            setattr(model.config, name, getattr(adapted.config, name))
        return model
    config = read_config(source, hub, **values)
    check_base_fits(source, base, {name: base_hub[name] for name in ("cache_dir", "revision")}, config)
    config.base_weights = None  # of the adapter alone
    try:
        with without_warnings():  # of a head that the base lacks, and the adapter has
            model = model_class.from_pretrained(base, config=config, **base_hub)
    except UNLOADABLE as error:
        raise InputError(_base_not_loaded(source, base, error)) from error
    if not found["partial"]:
        folder = fetch_adapter(source, hub)
        check_kind_of_adapter(source, found["method"])
        merge = merge if isinstance(merge, bool) else found["method"].lower() in merge
    try:
        if found["partial"]:
            weights = load_file(cached_file(source, "model.safetensors", **hub))
            model.load_state_dict(weights, strict=False)
            wanted = {*found["parameters"], *(name for name in model.state_dict() if name.startswith("classifier."))}
            unknown = {*weights} - {*model.state_dict()}
        else:
            import peft

            adapted = peft.PeftModel.from_pretrained(model, folder)
            weights = peft.load_peft_weights(folder, "cpu")
            wanted = {*peft.get_peft_model_state_dict(adapted, save_embedding_layers=False)}
            unknown = {*weights} - wanted
            # the model inside, with the adapters in its layers, is what the scripts know
            model = merge_adapter(adapted).requires_grad_(True) if merge else _unwrap(adapted)
        if misfit := sorted(unknown or wanted - {*weights}):
            raise ValueError(f"it {'has' if unknown else 'lacks'} {', '.join(misfit[:3])}")
    except UNLOADABLE as error:
        if isinstance(error, pickle.UnpicklingError):
            raise InputError(_not_loaded("adapter", source, error)) from error
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(
            f"The adapter {source} does not fit its base {base}: {reason.rstrip(' :.')}. It is damaged, has other "
            "shapes, or was trained with another head; leave --regression_head out."
        ) from error
    if any("classifier." in name for name in weights):
        model.new_heads = ()  # the head came with the adapter
    return model


@contextlib.contextmanager
def without_warnings():
    """Keeps warnings of transformers to itself."""
    before = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.utils.logging.set_verbosity(before)


def fetch_adapter(source, hub):
    """Returns the folder of an adapter of PEFT, fetched if it is on the Hub: PEFT would ask the Hub even for a cached
    one, and end where there is no network."""
    config = find_file(source, "adapter_config.json", hub)
    names = ("adapter_model.safetensors", "adapter_model.bin")
    if all(find_file(source, name, hub) is None for name in names):
        raise InputError(f"The adapter {source} has no {names[0]}. Bring it back, or train the adapter again.")
    return str(Path(config).parent)


def check_kind_of_adapter(source, kind):
    """Raises `InputError` if PEFT does not know an adapter's type."""
    import peft

    if kind not in [known.value for known in peft.PeftType]:
        raise InputError(
            f"The adapter {source} is of the type {kind}, which peft {peft.__version__} does not know. Install the "
            "version that wrote it."
        )


def merge_adapter(model):
    """Returns the plain model that a PEFT model is equal to; a model without adapters is returned as it is."""
    if not hasattr(model, "merge_and_unload"):
        return model
    _unwrap(model)
    return model.merge_and_unload()


def _unwrap(model):
    """Returns the model inside a PEFT model, the trained head in its place: PEFT does not do so for every method."""
    inside = model.get_base_model()
    if hasattr(inside.classifier, "modules_to_save"):  # otherwise the base's head was left as it is
        inside.classifier = inside.classifier.modules_to_save[model.active_adapter]
    return inside


def check_pooling(config, source, named):
    """Refuses another pooling than that which the trained head of the checkpoint `source` reads."""
    if config.label_mean is not None and named != config.pooling:
        raise InputError(
            f"The regression head of {source} reads {config.pooling} pooling, --pooling names {named}. Leave the flag "
            "out, or start from a checkpoint without a regression head."
        )


def check_descriptors(config, source, named):
    """Refuses other descriptors than a trained head reads, and those that this RDKit does not know.

    Args:
        config (`MolformerConfig`): that of the checkpoint `source`.
        named (`list[str]`): those that the run names, by flag or configuration.
    """
    own = config.head_descriptors or []
    if config.label_mean is not None and named != own:
        raise InputError(
            f"The regression head of {source} reads {len(own)} descriptors{': ' * bool(own)}{', '.join(own[:5])}, "
            f"--head_descriptors names {len(named)}: {', '.join(named[:5])}. Leave the flag out, or start from a "
            "checkpoint without a regression head."
        )
    compute_descriptors(parse_smiles("C"), own)
    version = config.rdkit_version or rdBase.rdkitVersion
    if own and version != rdBase.rdkitVersion:
        logger.warning(
            "%s was trained on descriptors of RDKit %s; here is %s, some of which may differ",
            source, version, rdBase.rdkitVersion,
        )  # fmt: skip


def forget_head(config):
    """Takes from a configuration what it knows of a regression head that the model no longer has."""
    config.label_mean = config.label_std = config.label_names = config.label_column = config.head_descriptors = None
    config.id2label, config.label2id = {0: "LABEL_0"}, {"LABEL_0": 0}
    config.rdkit_version = None


def check_labels(config, source, count):
    """Refuses another number of labels than the trained head of the checkpoint `source` predicts."""
    if config.label_mean is not None and config.num_labels != count:
        names = config.label_names or ([config.label_column] if config.label_column else [])
        raise InputError(
            f"The regression head of {source} predicts {config.num_labels} label{'s' * (config.num_labels > 1)}"
            f"{': ' * bool(names)}{', '.join(names)}. This run has {count}. Name as many with --label_column, or "
            "start from a checkpoint without a regression head."
        )


def load_model(model_class, model_args, tokenizer, merge=False, **overrides):
    """Returns the model of the checkpoint, or one with random weights if only a configuration was named.

    A checkpoint of adapters, or of some parameters, gives its base with these in it.

    Args:
        merge (`bool` or `tuple[str]`): whether adapters are merged into a plain model, which can be trained; or the
            methods, as PEFT calls them, whose adapters are.
        overrides: configuration values that hold over the checkpoint's and the user's, such as `num_labels`.
    Raises:
        InputError: if it cannot be loaded, if weights are missing or fit nothing, or if tokenizer and model do not
            belong together.
    """
    hub = hub_options(model_args)
    values = {**model_args.config_overrides(), **overrides}
    source = model_args.model_name_or_path
    try:
        if model_class is MolformerForRegression and source is not None:
            named = values.get("head_descriptors", load_config(model_args).head_descriptors) or []
            own = load_config(replace(model_args, config_name=None))
            check_pooling(own, source, values.get("pooling", own.pooling))
            check_descriptors(own, source, named)
            check_labels(own, source, values.get("num_labels", own.num_labels))
        if source is None:
            config = load_config(model_args, **values)
            logger.warning(
                "Training from scratch: %s names a configuration, the weights are random", model_args.config_name
            )
            model = model_class(config)
        elif (found := find_base(source, model_args)) is not None:
            model = _load_adapted(model_class, source, found, hub, values, merge)
        else:
            if model_args.config_name:
                hub["config"], values = load_config(model_args, **values), {}
            check_index(source)
            with without_warnings():  # of a head that is new, which is told below; the other weights are checked
                model = model_class.from_pretrained(source, dtype=torch.float32, **hub, **values)
    except InputError:
        raise
    except UNLOADABLE as error:
        raise InputError(_not_loaded("model", source or model_args.config_name, error)) from error
    tensors = (*model.named_parameters(), *model.named_buffers())
    broken = next((name for name, tensor in tensors if not tensor.isfinite().all()), None)
    if broken is not None:
        raise InputError(
            f"{source} holds weights that are no finite numbers, first in {broken}: its training diverged, or the "
            "file is damaged. Use another checkpoint."
        )
    if source is not None and getattr(model, "head_is_new", False):
        parts = " and ".join(prefix.strip(".").replace("_", " ") for prefix in model.new_heads)
        logger.info("%s has new weights, random ones, in: %s", source, parts)
    config = model.config
    if len(tokenizer) != config.vocab_size or tokenizer.pad_token_id != config.pad_token_id:
        raise InputError(
            f"Tokenizer and model do not belong together: {len(tokenizer)} tokens with padding id "
            f"{tokenizer.pad_token_id}, but the model has {config.vocab_size} embeddings and padding id "
            f"{config.pad_token_id}. Pass the --tokenizer_name that the model was trained with."
        )
    return model


def check_split(config, digest, data_args, checkpoint=None):
    """Refuses a checkpoint that was trained with another split: it may have seen this run's test molecules.

    Args:
        config (`MolformerConfig`): of the model that the run starts from.
        checkpoint (`str`, *optional*): the folder that an interrupted run goes on from; counts in place of `config`.
        digest (`str`, *optional*): hash of this run's split; `None` for a corpus, which has none.
    Raises:
        InputError: if the checkpoint's split hash differs from `digest`, unless `--ignore_split_mismatch`; if the
            interrupted run is that of a model of another shape.
    """
    if checkpoint is not None:
        saved = MolformerConfig.from_pretrained(checkpoint)
        other = [name for name in SHAPE_FIELDS if getattr(saved, name) != getattr(config, name)]
        if other:
            raise InputError(
                f"{checkpoint} is of a model with {other[0]}={getattr(saved, other[0])}, but this run's has "
                f"{getattr(config, other[0])}. Resume with the model that the run began with."
            )
        config = saved
    known = config.split_hash
    if known is None or digest is None or known == digest:
        return
    message = (
        f"The checkpoint was trained with another split of the data (hash {known}, this run's {digest}): it may have "
        "learned this run's test molecules."
    )
    if not data_args.ignore_split_mismatch:
        if data_args.train_file == EMBEDDED_DATA and data_args.split != "file":
            message += (
                " No file was named, so the data are data/lipophilicity.csv: name yours with --train_file, molecules "
                "to predict with --do_predict --test_file."
            )
        raise InputError(
            f"{message} Use the same data, --split, --split_seed, fractions and --pool_size, or pass "
            "--ignore_split_mismatch."
        )
    logger.warning("%s Going on, because --ignore_split_mismatch was given.", message)


def _not_loaded(what, source, error):
    # of a tokenizer that is not there the library says that it has no files to make it from
    absent = isinstance(error, (OSError, ValueError) if what == "tokenizer" else OSError)
    if what == "tokenizer" and Path(source).is_dir() and not (Path(source) / "tokenizer.json").exists():
        if members := member_folders(source):
            return f"{source} holds an ensemble of {len(members)} models. Pass one of them, such as {members[0]}."
        if (inside := Path(source) / "finetune-selected" / "tokenizer.json").exists():  # a run of run_influence.py
            return f"{source} holds no model itself. Pass {inside.parent}, or another of its models."
        if (Path(source) / "influence.json").exists():
            return (
                f"{source} holds influence scores and no model. Pass the one that was scored; influence.json names it."
            )
        if (Path(source) / UNFINISHED).exists():
            last = last_complete_checkpoint(source)
            other = f", or pass {last}" if last is not None else ""
            return (
                f"{source} holds a run that was interrupted. Finish it by its own command with "
                f"--resume_from_checkpoint true{other}."
            )
        return f"There is no tokenizer.json in {source}. Pass --tokenizer_name with the checkpoint that has it."
    if Path(source).exists() or not absent:
        if isinstance(error, pickle.UnpicklingError):  # torch's text says how to run it
            return (
                f"The {what} in {source} cannot be loaded: its weights are a pickle that is damaged or holds more "
                "than tensors: loading it could run code. Pass a checkpoint in safetensors."
            )
        reason = (str(error).strip().splitlines() or [""])[0]  # some libraries write an essay
        kind = "" if reason and not isinstance(error, KeyError) else f"{type(error).__name__} "
        return f"The {what} in {source} cannot be loaded: {kind}{reason}".strip()
    return (
        f"There is no local folder {source}, and the {what} of that name cannot be fetched from the Hub: wrong name, "
        "no access, or no network. Pass the path of a local folder, such as models/molformer-mini."
    )
