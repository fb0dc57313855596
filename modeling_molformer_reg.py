# Licensed under the Apache License, Version 2.0 (the "License"); see LICENSE.
"""MoLFormer with linear attention and rotary positions: encoder, masked language model and regression model.

    python -c "from modeling_molformer_reg import *; print(MolformerModel.from_pretrained('models/molformer-mini'))"

The file imports none of this project's modules, because it travels with every saved checkpoint. It reads checkpoints
of the Hub's remote-code MoLFormer (`ibm/MoLFormer-XL-both-10pct`) by key name and needs no remote code itself.

Ross et al., Large-scale chemical language representations capture molecular structure and properties, Nature Machine
Intelligence 4 (2022), https://arxiv.org/abs/2106.09553. Shape letters: B batch, T tokens, H heads, D head size, C
hidden size, F random features, L layers, Q tokens that attend (the first ones), K labels, M descriptors, A descriptors
of an atom, R radii, V vocabulary.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling, MaskedLMOutput, SequenceClassifierOutput


ROTARY_BASE = 10000.0
HEAD_PREFIXES = ("lm_head.", "descriptor_head.", "atom_head.", "classifier.")
DESCRIPTOR_LIMIT = 10.0  # standard deviations; single molecules lie thousands of them away and would rule the loss


class MolformerConfig(PreTrainedConfig):
    """Configuration of a MoLFormer; the defaults are those of MoLFormer-XL.

    Args:
        num_random_features (`int`, defaults to 32): F, the width of the random feature map of the attention.
        feature_map_kernel (`str`, defaults to `"relu"`): activation of the feature map, a name in `ACT2FN`.
        max_position_embeddings (`int`, defaults to 202): longest pre-training sequence, in tokens. Kept as a fact;
            rotary positions have no limit.
        deterministic_eval (`bool`, defaults to `False`): read for compatibility and ignored: evaluation never redraws
            the random features here.
        redraw_features (`bool`, defaults to `True`): whether training draws new random features at every forward.
        pooling (`str`, *optional*): `"cls"` (state of `<bos>`, the default of the linear head) or `"mean"` (masked
            mean, the default of the published head).
        regression_head (`str`, *optional*): `"linear"` (dropout and linear, the default) or `"molformer"` (the
            published residual head). While `pooling` and `regression_head` are `None`, the checkpoint's keys decide.
        head_descriptors (`list[str]`, *optional*): M names of RDKit descriptors that the regression head reads beside
            the pooled state; `None` for none.
        head_mixed_size (`int`, defaults to 256): width of the layer that reads both.
        label_mean, label_std (`list[float]`, *optional*): K means and standard deviations of the training labels, in
            label units. `None` stands for 0 and 1.
        label_names (`list[str]`, *optional*): K names of the labels.
        label_column (`str`, *optional*): column of the single label in the training file, if the user named it.
        descriptor_names (`list[str]`, *optional*): M names of RDKit descriptors that `MolformerForMaskedLM` predicts
            beside the masked tokens; `None` for none.
        atom_descriptor_names (`list[str]`, *optional*): A names of numbers that it predicts for each atom.
        environment_buckets (`list[int]`, *optional*): R numbers of classes into which the surroundings of an atom are
            hashed, within one bond, two bonds and so on; they go with `atom_descriptor_names`.
        smiles_form (`str`, *optional*): `"canonical"`, `"isomeric"` or `"raw"`: how the SMILES were written that the
            model learned; `smiles_max_length` (`int`, *optional*) tokens they might have.
        split_hash (`str`, *optional*): of the split whose training molecules the model learned.
        rdkit_version (`str`, *optional*): which computed the head's descriptors.
        base_weights (`str`, *optional*): of an adapter, hash of the weights that it adapts.

    Raises:
        ValueError: if a number or name cannot describe a model.
    """

    model_type = "molformer"
    keys_to_ignore_at_inference = ["hidden_states", "attentions"]  # by the trainer, which gathers all outputs

    def __init__(
        self,
        vocab_size=2362,
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        intermediate_size=768,
        hidden_act="gelu",
        hidden_dropout_prob=0.1,
        embedding_dropout_prob=0.2,
        max_position_embeddings=202,
        initializer_range=0.02,
        layer_norm_eps=1e-12,
        linear_attention_eps=1e-6,
        num_random_features=32,
        feature_map_kernel="relu",
        deterministic_eval=False,
        classifier_dropout_prob=None,
        classifier_skip_connection=True,
        pad_token_id=2,
        tie_word_embeddings=False,
        redraw_features=True,
        pooling=None,
        regression_head=None,
        head_descriptors=None,
        head_mixed_size=256,
        label_mean=None,
        label_std=None,
        label_names=None,
        label_column=None,
        descriptor_names=None,
        atom_descriptor_names=None,
        environment_buckets=None,
        smiles_form=None,
        smiles_max_length=None,
        split_hash=None,
        rdkit_version=None,
        base_weights=None,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.hidden_act = hidden_act
        self.hidden_dropout_prob = hidden_dropout_prob
        self.embedding_dropout_prob = embedding_dropout_prob
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        self.layer_norm_eps = layer_norm_eps
        self.linear_attention_eps = linear_attention_eps
        self.num_random_features = num_random_features
        self.feature_map_kernel = feature_map_kernel
        self.deterministic_eval = deterministic_eval
        self.classifier_dropout_prob = classifier_dropout_prob
        self.classifier_skip_connection = classifier_skip_connection
        self.redraw_features = redraw_features
        self.pooling = pooling
        self.regression_head = regression_head
        self.head_descriptors = head_descriptors or None
        self.head_mixed_size = head_mixed_size
        self.label_mean = label_mean
        self.label_std = label_std
        self.label_names = label_names
        self.label_column = label_column
        self.descriptor_names = descriptor_names
        self.atom_descriptor_names = atom_descriptor_names
        self.environment_buckets = environment_buckets
        self.smiles_form = smiles_form
        self.smiles_max_length = smiles_max_length
        self.split_hash = split_hash
        self.rdkit_version = rdkit_version
        self.base_weights = base_weights
        kwargs["problem_type"] = kwargs.get("problem_type") or "regression"  # or a pipeline would answer sigmoids
        if "id2label" not in kwargs:
            kwargs.setdefault("num_labels", 1)  # a regression on one label, not the library's two classes
        super().__init__(pad_token_id=pad_token_id, tie_word_embeddings=tie_word_embeddings, **kwargs)
        self.validate_values()

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """Reads a configuration. Another `num_labels` is another head: what is known of other labels is left out."""
        for field in ("label_mean", "label_std", "label_names"):
            value = config_dict.get(field)
            if isinstance(value, list) and kwargs.get("num_labels", len(value)) != len(value):
                config_dict = {name: config_dict[name] for name in config_dict if name != field}
        return super().from_dict(config_dict, **kwargs)

    def to_diff_dict(self):
        """Returns what is saved; the library would leave out two labels, its own default."""
        return super().to_diff_dict() | {key: self.to_dict()[key] for key in ("id2label", "label2id")}

    def validate_values(self):
        """Raises `ValueError` for values that describe no model; also called with what `from_pretrained` overrides."""
        fields = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_random_features")
        for field in (*fields, "intermediate_size"):
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{field}={value!r} must be a whole number, at least 1.")
        if self.pad_token_id not in (None, *range(self.vocab_size)):
            raise ValueError(f"pad_token_id={self.pad_token_id!r} is none of the {self.vocab_size} tokens.")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not a multiple of num_attention_heads={self.num_attention_heads}."
            )
        if (self.hidden_size // self.num_attention_heads) % 2:
            raise ValueError(
                f"The head size {self.hidden_size // self.num_attention_heads} is odd; rotary positions turn pairs. "
                "Choose hidden_size and num_attention_heads with an even quotient."
            )
        for field in ("hidden_act", "feature_map_kernel"):
            if getattr(self, field) not in ACT2FN:
                raise ValueError(f"{field}={getattr(self, field)!r} is unknown. Choose one of {', '.join(ACT2FN)}.")
        for field, known in (("pooling", ("cls", "mean")), ("regression_head", ("linear", "molformer"))):
            if getattr(self, field) not in (None, *known):
                raise ValueError(f"{field}={getattr(self, field)!r} is unknown. Choose one of {', '.join(known)}.")
        names = self.head_descriptors
        if names and not (isinstance(names, list) and len(set(names)) == len(names)):
            raise ValueError(f"head_descriptors={names!r} must be a list of names, each of them once.")
        for field in ("label_mean", "label_std", "label_names"):
            value, kind = getattr(self, field), str if field == "label_names" else (int, float)
            if value is None:
                continue
            if not isinstance(value, (list, tuple)) or not all(isinstance(entry, kind) for entry in value):
                raise ValueError(f"{field}={value!r} must be a list of {'names' if kind is str else 'numbers'}.")
            if len(value) != self.num_labels:
                raise ValueError(f"{field} has {len(value)} entries, but the model has {self.num_labels} labels.")
            if kind is not str and not all(map(math.isfinite, value)):
                raise ValueError(f"{field}={value!r} must be finite.")
        if not isinstance(self.smiles_max_length, (int, type(None))):
            raise ValueError(f"smiles_max_length={self.smiles_max_length!r} must be a whole number.")
        if self.smiles_form not in (None, "canonical", "isomeric", "raw"):
            raise ValueError(f"smiles_form={self.smiles_form!r} is unknown. Choose canonical, isomeric or raw.")
        if bool(self.atom_descriptor_names) != bool(self.environment_buckets):
            raise ValueError("atom_descriptor_names and environment_buckets go together: one head predicts both.")
        if self.label_std is not None and not all(std > 0 for std in self.label_std):
            raise ValueError(f"label_std={self.label_std} must be positive.")


def rotary_tables(position_ids, head_size, dtype):
    """Returns the cosines and sines that turn queries and keys (Su et al. 2021, https://arxiv.org/abs/2104.09864).

    The angle of position p and pair i is p * base^(-2i/D). Computed at every forward: there is no buffer that could
    come back uninitialized from a checkpoint, and the cost is T * D/2 numbers a forward, not a layer.

    Args:
        position_ids (`torch.Tensor`): shape (1 or B, T).
    Returns:
        Two `torch.Tensor` of shape (1 or B, T, 1, D): cosines twice, and sines of which the first half is negated.
    """
    precision = torch.promote_types(dtype, torch.float32)  # bf16 cannot count positions above 256
    pairs = torch.arange(0, head_size, 2, device=position_ids.device, dtype=precision)
    angles = position_ids[..., None].to(precision) * ROTARY_BASE ** (-pairs / head_size)  # (B, T, D/2)
    cos, sin = angles.cos()[:, :, None].to(dtype), angles.sin()[:, :, None].to(dtype)  # (B, T, 1, D/2)
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def apply_rotary(states, cos, sin):
    """Returns `states` (B, T, H, D) turned by the tables of `rotary_tables`, the two halves of D being a pair."""
    return states * cos + states.roll(states.shape[-1] // 2, dims=-1) * sin


def draw_random_features(count, head_size, num_random_features, device=None, dtype=torch.float32):
    """Returns `count` independent random feature maps, shape (count, D, F).

    Each block of D columns is the Q of the QR decomposition of a Gaussian matrix, column j scaled by the norm of that
    matrix's row j (orthogonal random features, Choromanski et al. 2021, https://arxiv.org/abs/2009.14794). ceil(F / D)
    blocks stand side by side, cut to F columns. All blocks of all layers take one batched QR.
    """
    blocks = math.ceil(num_random_features / head_size)
    precision = torch.promote_types(dtype, torch.float32)  # there is no QR in half precision
    gaussian = torch.randn(count, blocks, head_size, head_size, device=device, dtype=precision)
    orthogonal, _ = torch.linalg.qr(gaussian)
    weights = orthogonal * gaussian.norm(dim=-1).unsqueeze(-2)  # (count, blocks, D, D)
    weights = weights.transpose(1, 2).reshape(count, head_size, blocks * head_size)
    return weights[..., :num_random_features].contiguous().to(dtype)


def linear_attention(query, key, value, attention_mask, eps):
    """Returns softmax-free attention in time linear in T (Katharopoulos et al. 2020, https://arxiv.org/abs/2006.16236).

    out = q (kᵀ v) / clamp(q · Σ k, eps), where the mask multiplies the mapped keys.

    Args:
        query, key (`torch.Tensor`): mapped by the feature map, shapes (B, Q, H, F) and (B, T, H, F).
        value (`torch.Tensor`): shape (B, T, H, D).
        attention_mask (`torch.Tensor`, *optional*): shape (B, T), 1 for a token and 0 for padding.
    Returns:
        `torch.Tensor` of shape (B, Q, H, D), and the masked keys (B, T, H, F).
    """
    kind = query.device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    if torch.float16 in (query.dtype, autocast):  # the sums over tokens reach millions, and it ends at 65,504
        with torch.autocast(kind, enabled=False):
            wide = (states.float() for states in (query, key, value))
            context, key = linear_attention(*wide, attention_mask, eps)
        return context.to(query.dtype), key.to(query.dtype)
    if attention_mask is not None:
        key = key * attention_mask[:, :, None, None].to(key.dtype)
    masked_key, value = key.transpose(1, 2), value.transpose(1, 2)  # (B, H, T, ·)
    query = query.transpose(1, 2).contiguous()  # once, for the two products that take it
    key_value = masked_key.transpose(-1, -2) @ value  # (B, H, F, D)
    key_sum = masked_key.sum(dim=-2).unsqueeze(-1)  # (B, H, F, 1)
    normalizer = (query @ key_sum).clamp(min=eps)  # (B, H, Q, 1)
    return ((query @ key_value) / normalizer).transpose(1, 2), key


class MolformerEmbeddings(nn.Module):
    """Word embeddings and dropout: no positions, no LayerNorm."""

    def __init__(self, config):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.dropout = nn.Dropout(config.embedding_dropout_prob)

    def forward(self, input_ids=None, inputs_embeds=None):
        if inputs_embeds is None:
            inputs_embeds = self.word_embeddings(input_ids)  # (B, T, C)
        return self.dropout(inputs_embeds)


class MolformerFeatureMap(nn.Module):
    """kernel(x W): the random feature map, one a layer, shared by the layer's heads. W is saved with the weights."""

    def __init__(self, config):
        super().__init__()
        self.kernel = ACT2FN[config.feature_map_kernel]
        head_size = config.hidden_size // config.num_attention_heads
        self.register_buffer("weight", torch.empty(head_size, config.num_random_features))

    def forward(self, states, weight=None):
        return self.kernel(states @ (self.weight if weight is None else weight).to(states.dtype))  # (B, T, H, F)


class MolformerSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.eps = config.linear_attention_eps
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)
        self.feature_map = MolformerFeatureMap(config)

    def forward(self, hidden_states, asked, attention_mask, cos, sin, feature_weight=None, output_attentions=False):
        """Returns what the states `asked` (B, Q, C), those of the first Q tokens, attend to; attentions or `None`."""
        per_head = (self.num_heads, hidden_states.shape[-1] // self.num_heads)  # no -1: a batch may be empty
        shape, count = (*hidden_states.shape[:2], *per_head), asked.shape[1]
        query = self.query(asked).view(len(asked), count, *per_head)  # (B, Q, H, D)
        query = apply_rotary(query, cos[:, :count], sin[:, :count])
        key = apply_rotary(self.key(hidden_states).view(shape), cos, sin)
        value = self.value(hidden_states).view(shape)
        query = self.feature_map(query, feature_weight)  # (B, Q, H, F)
        key = self.feature_map(key, feature_weight)
        context, key = linear_attention(query, key, value, attention_mask, self.eps)
        attentions = None
        if output_attentions:  # the quadratic form of the same thing: rows that sum to one
            wide = torch.promote_types(query.dtype, torch.float32)  # the sums are too large for float16
            with torch.autocast(query.device.type, enabled=False):
                scores = query.transpose(1, 2).to(wide) @ key.permute(0, 2, 3, 1).to(wide)  # (B, H, Q, T)
                attentions = (scores / scores.sum(dim=-1, keepdim=True).clamp(min=self.eps)).to(query.dtype)
        return context.reshape(asked.shape), attentions


class MolformerResidualOutput(nn.Module):
    """dense -> dropout -> + residual -> LayerNorm, after the attention and after the feed-forward layer."""

    def __init__(self, config, input_size):
        super().__init__()
        self.dense = nn.Linear(input_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states, residual):
        return self.LayerNorm(self.dropout(self.dense(hidden_states)) + residual)


class MolformerAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.self = MolformerSelfAttention(config)
        self.output = MolformerResidualOutput(config, config.hidden_size)

    def forward(self, hidden_states, *args, first=None, **kwargs):
        # contiguous: of strided states a product takes another path, and other last digits, where weights are trained
        asked = hidden_states if first is None else hidden_states[:, :first].contiguous()
        context, attentions = self.self(hidden_states, asked, *args, **kwargs)
        return self.output(context, asked), attentions


class MolformerIntermediate(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, hidden_states):
        return self.activation(self.dense(hidden_states))


class MolformerLayer(GradientCheckpointingLayer):
    def __init__(self, config):
        super().__init__()
        self.attention = MolformerAttention(config)
        self.intermediate = MolformerIntermediate(config)
        self.output = MolformerResidualOutput(config, config.intermediate_size)

    def forward(self, hidden_states, *args, **kwargs):
        attended, attentions = self.attention(hidden_states, *args, **kwargs)
        return self.output(self.intermediate(attended), attended), attentions


class MolformerEncoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.layer = nn.ModuleList(MolformerLayer(config) for _ in range(config.num_hidden_layers))


class MolformerPreTrainedModel(PreTrainedModel):
    """Weight initialization, and loading that never leaves a weight at random in silence."""

    config_class = MolformerConfig
    base_model_prefix = "molformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MolformerLayer"]
    # rotary tables that some published checkpoints carry; ours are computed
    _keys_to_ignore_on_load_unexpected = [r"rotary_embeddings\."]

    new_heads = HEAD_PREFIXES  # those that are still random; a checkpoint brings some

    def __init__(self, config, *args, **kwargs):
        config.validate_values()
        super().__init__(config, *args, **kwargs)

    @property
    def head_is_new(self):
        """Whether a head of this model is still random."""
        return bool(self.new_heads)

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, MolformerDescriptorScale):
            init.zeros_(module.mean)
            init.ones_(module.std)
        if isinstance(module, MolformerFeatureMap):
            weight = module.weight
            init.copy_(weight, draw_random_features(1, *weight.shape, device=weight.device, dtype=weight.dtype)[0])
        for name in {self.config.hidden_act, self.config.feature_map_kernel}:
            fresh = ACT2FN[name]
            if type(module) is type(fresh):  # prelu and xielu have weights of their own
                for key, value in fresh.state_dict().items():
                    init.copy_(getattr(module, key), value)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        """Loads as `PreTrainedModel.from_pretrained` does, and refuses what would leave random weights behind.

        Raises:
            ValueError: if weights of the encoder are missing from the checkpoint, if a head is there in part, or if
                the checkpoint holds weights that fit no module; the message names the keys. If the name is that of
                an adapter.
            RuntimeError: as the library's classes, if weights have other shapes than the configuration gives.
        """
        return_info = kwargs.pop("output_loading_info", False)
        model, info = cls._load(pretrained_model_name_or_path, *model_args, **kwargs)
        model._check_loaded_keys(pretrained_model_name_or_path, info)
        return (model, info) if return_info else model

    @classmethod
    def _load(cls, source, *model_args, **kwargs):
        """Returns the model and what was loaded of it, not yet judged; refuses an adapter, whose scale of the labels
        would stay behind, and weights of other shapes."""
        adapter = source is not None and Path(source, "adapter_config.json").exists()
        ignored = kwargs.pop("ignore_mismatched_sizes", False)
        if not adapter:
            kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
            model, info = super().from_pretrained(source, *model_args, **kwargs)
            adapter = getattr(model, "_hf_peft_config_loaded", False)  # of a name on the Hub
        if adapter:
            source = (kwargs.get("adapter_kwargs") or {}).get("_adapter_model_path") or source
            raise ValueError(
                f"{source} is an adapter, and loaded like this its scale of the labels stays behind. Load its base "
                "with the configuration that lies beside the adapter, and then the adapter with "
                "PeftModel.from_pretrained(base, …), as its card says."
            )
        if info["mismatched_keys"] and not ignored:
            others = [f"{name} {tuple(here)}, not {tuple(own)}" for name, here, own in sorted(info["mismatched_keys"])]
            raise RuntimeError(f"{source} holds weights that mismatch its configuration: {_some(others)}.")
        return model, info

    def _check_loaded_keys(self, source, info):
        missing, unexpected = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
        missing += sorted(entry[0] for entry in info["mismatched_keys"])  # with ignore_mismatched_sizes
        encoder = [key for key in missing if not key.startswith(HEAD_PREFIXES)]
        if encoder:
            raise ValueError(
                f"{source} lacks weights of the encoder: {_some(encoder)}. It is no MoLFormer checkpoint, or one of "
                "some parameters alone (trained_parameters.json), which run_peft.py --merge_adapter makes whole."
            )
        if type(self) is MolformerModel:  # the encoder alone leaves every head aside
            unexpected = [key for key in unexpected if not key.startswith(HEAD_PREFIXES)]
        if unexpected:  # the other task's head is not in this list
            raise ValueError(f"{source} holds weights that fit nothing in {type(self).__name__}: {_some(unexpected)}.")
        heads = {k for k in self.state_dict() if k.startswith(HEAD_PREFIXES)} - self.all_tied_weights_keys.keys()
        self.new_heads = tuple(prefix for prefix in HEAD_PREFIXES if any(k.startswith(prefix) for k in missing))
        other_size = {entry[0] for entry in info["mismatched_keys"]}
        if set(missing) not in ({k for k in heads if k.startswith(self.new_heads)}, other_size):
            raise ValueError(f"{source} holds the head of {type(self).__name__} in part; missing: {_some(missing)}.")
        # names the source's remote code; set to our classes when the model is saved
        self.config.__dict__.pop("auto_map", None)


def _some(keys, limit=5):
    """Returns the first keys as text, and how many more there are."""
    more = f" and {len(keys) - limit} more" if len(keys) > limit else ""
    return ", ".join(keys[:limit]) + more


class MolformerModel(MolformerPreTrainedModel):
    """The encoder: embeddings, L post-LayerNorm layers with linear attention, a last LayerNorm, a masked mean."""

    def __init__(self, config):
        super().__init__(config)
        self.embeddings = MolformerEmbeddings(config)
        self.encoder = MolformerEncoder(config)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    def get_input_embeddings(self):
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value):
        self.embeddings.word_embeddings = value

    def feature_maps(self):
        """Returns the feature maps of the layers, first layer first."""
        return [layer.attention.self.feature_map for layer in self.encoder.layer]

    @torch.no_grad()
    def redraw_random_features(self):
        """Draws new random features for all layers in one batched QR and returns them, shape (L, D, F).

        The buffers get the values too, so that evaluation and the saved checkpoint use the last draw. The forward
        computes with the returned tensor: a buffer that a later forward overwrites must not be part of the graph.
        """
        maps = self.feature_maps()
        buffer = maps[0].weight
        weights = draw_random_features(len(maps), *buffer.shape, device=buffer.device, dtype=buffer.dtype)
        for feature_map, weight in zip(maps, weights, strict=True):
            feature_map.weight.copy_(weight)
        return weights

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        inputs_embeds=None,
        output_attentions=None,
        output_hidden_states=None,
        return_dict=None,
        first=None,
    ):
        """Returns `BaseModelOutputWithPooling`: states (B, T, C) after the last LayerNorm, their masked mean (B, C).

        Args:
            input_ids (`torch.LongTensor`): shape (B, T); or `inputs_embeds`, shape (B, T, C), in their place.
            attention_mask (`torch.Tensor`, *optional*): shape (B, T), 1 for a token, 0 for padding, which stands to
                the right of the tokens; default all ones.
            position_ids (`torch.LongTensor`, *optional*): shape (B, T) or (1, T), in any order; 0 to T-1 if absent.
            first (`int`, *optional*): states of so many first tokens alone, and no mean: the last layer leaves the
                others out. Has no effect where all hidden states or attentions are asked for.
        Raises:
            ValueError: unless exactly one of `input_ids` and `inputs_embeds` is given.
        """
        output_attentions = self.config.output_attentions if output_attentions is None else output_attentions
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        return_dict = self.config.return_dict if return_dict is None else return_dict
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give either input_ids or inputs_embeds, not both and not neither.")

        hidden_states = self.embeddings(input_ids, inputs_embeds)  # (B, T, C)
        if position_ids is None:
            position_ids = torch.arange(hidden_states.shape[1], device=hidden_states.device).unsqueeze(0)
        head_size = self.config.hidden_size // self.config.num_attention_heads
        kind = hidden_states.device.type  # under autocast queries and keys have its type, and so should the tables
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden_states.dtype
        cos, sin = rotary_tables(position_ids, head_size, dtype)
        redraw = self.training and self.config.redraw_features
        weights = self.redraw_random_features() if redraw else [None] * len(self.encoder.layer)

        first = None if output_hidden_states or output_attentions else first
        all_states, all_attentions = (hidden_states,), ()
        for number, (layer, weight) in enumerate(zip(self.encoder.layer, weights, strict=True), start=1):
            hidden_states, attentions = layer(
                hidden_states,
                attention_mask,
                cos,
                sin,
                feature_weight=weight,
                output_attentions=output_attentions,
                first=first if number == len(weights) else None,
            )
            if output_hidden_states:
                all_states += (hidden_states,)
            if output_attentions:
                all_attentions += (attentions,)
        last_hidden_state = self.LayerNorm(hidden_states)
        output = BaseModelOutputWithPooling(
            last_hidden_state=last_hidden_state,
            pooler_output=masked_mean(last_hidden_state, attention_mask) if first is None else None,
            hidden_states=all_states if output_hidden_states else None,
            attentions=all_attentions if output_attentions else None,
        )
        return output if return_dict else output.to_tuple()


def masked_mean(hidden_states, attention_mask=None):
    """Returns the mean of `hidden_states` (B, T, C) over the tokens that the mask (B, T) keeps, shape (B, C)."""
    if attention_mask is None:
        return hidden_states.mean(dim=1)
    wide = torch.promote_types(hidden_states.dtype, torch.float32)  # sums of long molecules are too large for float16
    mask = attention_mask.unsqueeze(-1).to(wide)  # (B, T, 1)
    return ((hidden_states * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)).to(hidden_states.dtype)


class MolformerPredictionTransform(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = ACT2FN[config.hidden_act]
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden_states):
        return self.LayerNorm(self.activation(self.dense(hidden_states)))


class MolformerLMHead(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.transform = MolformerPredictionTransform(config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, hidden_states):
        return self.decoder(self.transform(hidden_states))


class MolformerDescriptorScale(nn.Module):
    """Means and standard deviations of M named numbers, saved with the weights."""

    def __init__(self, names):
        super().__init__()
        self.register_buffer("mean", torch.zeros(len(names)))
        self.register_buffer("std", torch.ones(len(names)))

    @torch.no_grad()
    def set_scale(self, mean, std):
        """Stores the scale of the descriptors, each of shape (M,); constant ones are only centered."""
        self.mean.copy_(torch.as_tensor(mean))
        self.std.copy_(torch.where(torch.as_tensor(std) > 0, torch.as_tensor(std), 1.0))

    def standardize(self, descriptors):
        """Returns standardized descriptors (…, M): what is not finite becomes 0, the mean, and limits hold."""
        standardized = (descriptors - self.mean) / self.std
        standardized = torch.where(standardized.isfinite(), standardized, 0.0)
        return standardized.clamp(-DESCRIPTOR_LIMIT, DESCRIPTOR_LIMIT)


class MolformerDescriptorHead(MolformerDescriptorScale):
    """A linear layer from states to M named numbers."""

    def __init__(self, config, names):
        super().__init__(names)
        self.out_proj = nn.Linear(config.hidden_size, len(names))

    def forward(self, states):
        return self.out_proj(states)

    def loss(self, logits, descriptors):
        """Returns the mean squared error of `logits` against standardized `descriptors`, both (N, M); 0 for N = 0."""
        precision = torch.promote_types(logits.dtype, torch.float32)
        target = self.standardize(descriptors).to(precision)
        return nn.functional.mse_loss(logits.to(precision), target, reduction="sum") / max(target.numel(), 1)


class MolformerAtomHead(MolformerDescriptorHead):
    """A descriptor head for the state of each atom's token, and a linear layer to classes of its surroundings."""

    def __init__(self, config):
        super().__init__(config, config.atom_descriptor_names)
        self.buckets = list(config.environment_buckets)
        self.environments = nn.Linear(config.hidden_size, sum(self.buckets))

    def environment_loss(self, logits, environments):
        """Returns the cross-entropy of `logits` (N, sum of buckets) against classes (N, R), averaged over radii."""
        precision = torch.promote_types(logits.dtype, torch.float32)
        losses = [
            nn.functional.cross_entropy(radius.to(precision), environments[:, index], reduction="sum")
            / max(len(radius), 1)
            for index, radius in enumerate(logits.split(self.buckets, dim=-1))
        ]
        return sum(losses) / len(losses)


@dataclass
class MolformerMaskedLMOutput(MaskedLMOutput):
    """`MaskedLMOutput`, and what the other heads say where there are some.

    Args:
        descriptor_logits (`torch.FloatTensor`, *optional*): shape (B, M), standardized descriptors of the molecules.
        atom_descriptor_logits (`torch.FloatTensor`, *optional*): shape (N, A), those of the N labeled atoms.
        environment_logits (`torch.FloatTensor`, *optional*): shape (N, sum of buckets), classes of their surroundings.
    """

    descriptor_logits: torch.FloatTensor | None = None
    atom_descriptor_logits: torch.FloatTensor | None = None
    environment_logits: torch.FloatTensor | None = None


class MolformerForMaskedLM(MolformerPreTrainedModel):
    """MoLFormer with the masked-language-modeling head; `tie_word_embeddings` shares the decoder's weights.

    The configuration may name two more heads. `descriptor_names`: multi-task regression of RDKit descriptors from the
    masked mean (Ahmad et al., ChemBERTa-2, 2022, https://arxiv.org/abs/2209.01712). `atom_descriptor_names` and
    `environment_buckets`: for the token of each atom its share in some of these descriptors, and which surroundings it
    has (after the contextual property prediction of Rong et al., GROVER, 2020, https://arxiv.org/abs/2007.02835).
    """

    _keys_to_ignore_on_load_unexpected = [r"rotary_embeddings\.", r"^(classifier|descriptor_head|atom_head)\."]
    _tied_weights_keys = {"lm_head.decoder.weight": "molformer.embeddings.word_embeddings.weight"}
    accepts_loss_kwargs = True  # forward takes num_items_in_batch, so accumulated batches weigh every token alike

    def __init__(self, config):
        super().__init__(config)
        self.molformer = MolformerModel(config)
        self.lm_head = MolformerLMHead(config)
        if config.descriptor_names:
            self.descriptor_head = MolformerDescriptorHead(config, config.descriptor_names)
        if config.atom_descriptor_names:
            self.atom_head = MolformerAtomHead(config)
        self.post_init()

    def get_output_embeddings(self):
        return self.lm_head.decoder

    def set_output_embeddings(self, new_embeddings):
        self.lm_head.decoder = new_embeddings

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        inputs_embeds=None,
        labels=None,
        descriptors=None,
        atom_descriptors=None,
        environments=None,
        masked_rows=None,
        atom_rows=None,
        output_attentions=None,
        output_hidden_states=None,
        return_dict=None,
        num_items_in_batch=None,
    ):
        """Returns `MolformerMaskedLMOutput`: the loss, and logits (B, T, V).

        The loss is the sum of what there are targets for: the mean cross-entropy over labeled tokens; the mean squared
        error of standardized descriptors; that of the atoms' and the cross-entropy of their environments. In training
        with `labels` the logits are computed at the N labeled tokens only, shape (N, V): they are 15 % of the tokens
        and the decoder is wide. With other targets alone there are none.

        Args:
            labels (`torch.LongTensor`, *optional*): shape (B, T), token ids, -100 where nothing is to be predicted.
            descriptors (`torch.Tensor`, *optional*): shape (B, M), in the units of RDKit.
            atom_descriptors (`torch.Tensor`, *optional*): shape (B, T, A), likewise; goes with `environments`.
            environments (`torch.LongTensor`, *optional*): shape (B, T, R), classes, -100 where there is no atom.
            masked_rows, atom_rows (`torch.LongTensor`, *optional*): shape (N,), where in the B * T tokens those with
                a label, and the atoms, are. Without them they are looked for, and a GPU is waited for.
            num_items_in_batch (`int` or `torch.Tensor`, *optional*): labeled tokens in all accumulated batches; the
                sum of cross-entropies is then divided by it. It says nothing of other targets: where there are some,
                set `accepts_loss_kwargs` to `False`, and every batch counts alike.
        Raises:
            ValueError: if targets are given to a model without a head for them, or their number is another.
        """
        return_dict = self.config.return_dict if return_dict is None else return_dict
        outputs = self.molformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        states, losses = outputs.last_hidden_state, []
        logits = descriptor_logits = atom_logits = environment_logits = None
        if labels is not None or (descriptors is None and environments is None):
            labeled_states = states
            if labels is not None and self.training:
                rows = (labels.flatten() != -100).nonzero()[:, 0] if masked_rows is None else masked_rows  # (N,)
                labeled_states, labels = states.flatten(0, 1)[rows], labels.flatten()[rows]  # (N, C), (N,)
            logits = self.lm_head(labeled_states)
        if labels is not None:
            precise = logits.to(torch.promote_types(logits.dtype, torch.float32)).view(-1, logits.shape[-1])
            total = nn.functional.cross_entropy(precise, labels.reshape(-1), reduction="sum")
            labeled = (labels != -100).sum()
            count = labeled if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
            count = count.clamp(min=1)  # a batch without labeled tokens has no such loss
            losses.append(total / count)
        if self.config.descriptor_names:
            descriptor_logits = self.descriptor_head(outputs.pooler_output)  # (B, M)
        if descriptors is not None:
            self._check_targets("descriptors", descriptors, (len(states), len(self.config.descriptor_names or ())))
            losses.append(self.descriptor_head.loss(descriptor_logits, descriptors))
        if environments is not None or atom_descriptors is not None:
            shape = tuple(states.shape[:2])
            self._check_targets("environments", environments, (*shape, len(self.config.environment_buckets or ())))
            expected = (*shape, len(self.config.atom_descriptor_names or ()))
            self._check_targets("atom_descriptors", atom_descriptors, expected)
            rows = atom_rows  # (N,)
            if rows is None:
                rows = (environments[..., 0].flatten() != -100).nonzero()[:, 0]
            atom_states = states.flatten(0, 1)[rows]  # (N, C)
            atom_logits = self.atom_head(atom_states)  # (N, A)
            environment_logits = self.atom_head.environments(atom_states)
            losses.append(self.atom_head.loss(atom_logits, atom_descriptors.flatten(0, 1)[rows]))
            losses.append(self.atom_head.environment_loss(environment_logits, environments.flatten(0, 1)[rows]))
        output = MolformerMaskedLMOutput(
            loss=sum(losses) if losses else None,
            logits=logits,
            descriptor_logits=descriptor_logits,
            atom_descriptor_logits=atom_logits,
            environment_logits=environment_logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return output if return_dict else output.to_tuple()

    def _check_targets(self, name, targets, expected):
        if targets is None or tuple(targets.shape) != expected:
            given = None if targets is None else tuple(targets.shape)
            raise ValueError(f"{name} have shape {given}, the model's {expected}.")


class MolformerLinearHead(nn.Module):
    """dropout -> linear, the head of the paper that this project follows."""

    def __init__(self, config):
        super().__init__()
        self.dropout = nn.Dropout(_classifier_dropout(config))
        self.out_proj = nn.Linear(config.hidden_size, config.num_labels)

    def forward(self, pooled):
        return self.out_proj(self.dropout(pooled))


class MolformerResidualHead(nn.Module):
    """The published classification head: two dense blocks with skip connections, then a linear layer."""

    def __init__(self, config):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.dense2 = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(_classifier_dropout(config))
        self.activation = ACT2FN[config.hidden_act]
        self.skip_connection = config.classifier_skip_connection
        self.out_proj = nn.Linear(config.hidden_size, config.num_labels)

    def forward(self, pooled):
        for dense in (self.dense, self.dense2):
            block = self.activation(self.dropout(dense(pooled)))
            pooled = block + pooled if self.skip_connection else block
        return self.out_proj(pooled)


class MolformerHeadBesideDescriptors(nn.Module):
    """A head on the pooled state, plus two dense layers on that state and RDKit descriptors beside it."""

    def __init__(self, config, head):
        super().__init__()
        self.head = head
        self.size = config.hidden_size
        self.scale = MolformerDescriptorScale(config.head_descriptors)
        self.mix = nn.Linear(config.hidden_size + len(config.head_descriptors), config.head_mixed_size)
        self.activation = ACT2FN[config.hidden_act]
        self.dropout = nn.Dropout(_classifier_dropout(config))
        self.out_mix = nn.Linear(config.head_mixed_size, config.num_labels)

    def join(self, pooled, descriptors):
        """Returns what this head reads, (B, C + M): pooled states and descriptors as RDKit gives them, (B, M)."""
        return torch.cat([pooled, self.scale.standardize(descriptors).to(pooled.dtype)], dim=1)

    def forward(self, joined):
        mixed = self.dropout(self.activation(self.mix(joined)))
        return self.head(joined[:, : self.size]) + self.out_mix(mixed)


def _classifier_dropout(config):
    return config.hidden_dropout_prob if config.classifier_dropout_prob is None else config.classifier_dropout_prob


REGRESSION_HEADS = {"linear": MolformerLinearHead, "molformer": MolformerResidualHead}


class MolformerForRegression(MolformerPreTrainedModel):
    """MoLFormer with a regression head that knows its unit.

    It differs from a `…ForSequenceClassification` in what it answers: the loss is the mean squared error of labels
    standardized with `config.label_mean` and `config.label_std` (those of the training part), `logits` are in label
    units. Pooling and head are choices of the configuration, so that the checkpoints of the Hub's
    `MolformerForSequenceClassification` load by key name.
    """

    _keys_to_ignore_on_load_unexpected = [r"rotary_embeddings\.", r"^(lm_head|descriptor_head|atom_head)\."]
    _keep_in_fp32_modules_strict = ["scale"]  # of descriptors: float16 ends at 65,504
    accepts_loss_kwargs = True

    def __init__(self, config):
        super().__init__(config)
        self._head_was_named = config.regression_head is not None
        self._pooling_was_named = config.pooling is not None
        config.regression_head = config.regression_head or "linear"
        config.pooling = config.pooling or ("mean" if config.regression_head == "molformer" else "cls")
        self.num_labels = config.num_labels
        self.molformer = MolformerModel(config)
        self.classifier = REGRESSION_HEADS[config.regression_head](config)
        if config.head_descriptors:
            self.classifier = MolformerHeadBesideDescriptors(config, self.classifier)
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        """Loads a checkpoint; one with the published head is recognized by its keys if its config names no head.

        Raises:
            ValueError: as of the class that it inherits from.
        """
        return_info = kwargs.pop("output_loading_info", False)
        model, info = cls._load(pretrained_model_name_or_path, *model_args, **kwargs)  # judged when the head is known
        if "classifier.dense.weight" in info["unexpected_keys"] and not model._head_was_named:
            config = model.config
            config.regression_head = "molformer"
            config.pooling = config.pooling if model._pooling_was_named else "mean"
            kwargs = {k: v for k, v in kwargs.items() if k == "dtype" or not hasattr(config, k)}
            model, info = cls._load(pretrained_model_name_or_path, *model_args, **{**kwargs, "config": config})
        model._check_loaded_keys(pretrained_model_name_or_path, info)
        return (model, info) if return_info else model

    def label_scale(self, reference):
        """Returns mean and standard deviation of the labels, each (K,), on `reference`'s device and in its dtype."""
        scales = (self.config.label_mean or [0.0] * self.num_labels, self.config.label_std or [1.0] * self.num_labels)
        # filled on the device: a copy from the host would make it wait
        return tuple(torch.stack([reference.new_full((), value) for value in values]) for values in scales)

    @property
    def tokens_read(self):
        """How many first tokens the head reads of the last layer, which need not compute the others; `None`: all."""
        return 1 if self.config.pooling == "cls" else None

    def pooled_state(self, outputs, descriptors=None):
        """Returns what the head reads: the state of `<bos>` or the mean, (B, C), and descriptors beside it if it does.

        Raises:
            ValueError: if `descriptors` (B, M) do not fit the model.
        """
        pooled = outputs.last_hidden_state[:, 0] if self.config.pooling == "cls" else outputs.pooler_output
        given, names = None if descriptors is None else tuple(descriptors.shape), self.config.head_descriptors
        if given != ((len(pooled), len(names)) if names else None):
            wanted = "none"
            if names:
                wanted = f"{len(names)} of each molecule: pass those that config.head_descriptors names, from RDKit"
            raise ValueError(f"descriptors have shape {given}; the head of this model reads {wanted}.")
        return self.classifier.join(pooled, descriptors) if names else pooled

    def standardized_predictions(self, pooled):
        """Returns standardized predictions (B, K) of what `pooled_state` returns, in float32 at least."""
        standardized = self.classifier(pooled)
        return standardized.to(torch.promote_types(standardized.dtype, torch.float32))

    def predict_with_states(self, input_ids=None, attention_mask=None, descriptors=None, inputs_embeds=None):
        """Returns predictions (B, K) in label units and what the head reads, see `pooled_state`."""
        outputs = self.molformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            return_dict=True,
            first=self.tokens_read,
        )
        pooled = self.pooled_state(outputs, descriptors)
        standardized = self.standardized_predictions(pooled)
        mean, std = self.label_scale(standardized)
        return standardized * std + mean, pooled

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        inputs_embeds=None,
        labels=None,
        output_attentions=None,
        output_hidden_states=None,
        return_dict=None,
        num_items_in_batch=None,
        descriptors=None,
    ):
        """Returns `SequenceClassifierOutput`: loss on standardized labels, and predictions (B, K) in label units.

        Args:
            labels (`torch.Tensor`, *optional*): shape (B,) or (B, K), in label units; one of several that is NaN is
                missing and counts for nothing.
            num_items_in_batch (`int` or `torch.Tensor`, *optional*): labels in all accumulated batches; the loss is
                then the sum of squared errors divided by it.
            descriptors (`torch.Tensor`, *optional*): shape (B, M), those that `config.head_descriptors` names, as
                RDKit gives them.
        Raises:
            ValueError: if the shape of `labels` is not that of the predictions, or `descriptors` do not fit.
        """
        return_dict = self.config.return_dict if return_dict is None else return_dict
        outputs = self.molformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            first=self.tokens_read,
        )
        standardized = self.standardized_predictions(self.pooled_state(outputs, descriptors))  # (B, K)
        mean, std = self.label_scale(standardized)
        loss = None
        if labels is not None:
            if labels.shape != standardized.shape and (self.num_labels > 1 or labels.shape != standardized.shape[:1]):
                raise ValueError(f"labels have shape {tuple(labels.shape)}, predictions {tuple(standardized.shape)}.")
            target = (labels.view_as(standardized).to(standardized.dtype) - mean) / std
            count = max(target.numel(), 1)
            if self.num_labels > 1:
                known = target.isfinite()
                squares = torch.where(known, standardized - target, 0.0).square().sum()
                count = known.sum().clamp(min=1)
            else:
                squares = nn.functional.mse_loss(standardized, target, reduction="sum")
            if num_items_in_batch is not None:
                count = torch.as_tensor(num_items_in_batch).clamp(min=1)  # there may be no label at all
            loss = squares / count
        output = SequenceClassifierOutput(
            loss=loss,
            logits=standardized * std + mean,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return output if return_dict else output.to_tuple()


AutoConfig.register("molformer", MolformerConfig, exist_ok=True)
AutoModel.register(MolformerConfig, MolformerModel, exist_ok=True)
AutoModelForMaskedLM.register(MolformerConfig, MolformerForMaskedLM, exist_ok=True)
AutoModelForSequenceClassification.register(MolformerConfig, MolformerForRegression, exist_ok=True)
AutoTokenizer.register(MolformerConfig, tokenizer_class=PreTrainedTokenizerFast, exist_ok=True)
# A saved checkpoint carries this file and says which class is for which Auto class, for readers without this project.
MolformerConfig.register_for_auto_class()
MolformerModel.register_for_auto_class("AutoModel")
MolformerForMaskedLM.register_for_auto_class("AutoModelForMaskedLM")
MolformerForRegression.register_for_auto_class("AutoModelForSequenceClassification")

__all__ = ["MolformerConfig", "MolformerModel", "MolformerForMaskedLM", "MolformerForRegression"]
