"""models/molformer-mini: size, form, and that it learned what it was trained for."""

import copy
import json

import numpy as np
import pandas as pd
import torch
from conftest import ROOT
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer

from arguments import EMBEDDED_CHECKPOINT, EMBEDDED_DATA
from utils_checkpoints import build_tokenizer
from utils_mlm import PretrainingCollator, score_tokens
from utils_molecules import canonicalize


def test_it_is_small_safe_and_loads_through_the_auto_classes():
    folder = ROOT / "models" / "molformer-mini"
    assert not list(folder.glob("*.bin")) and not list(folder.glob("*.py"))
    assert (folder / "model.safetensors").stat().st_size < 20e6
    model = AutoModelForMaskedLM.from_pretrained(EMBEDDED_CHECKPOINT)
    assert type(model).__name__ == "MolformerForMaskedLM" and not model.head_is_new
    heads = sum(p.numel() for p in model.descriptor_head.parameters())
    assert model.num_parameters() - heads == 4_971_200
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())
    regression = AutoModelForSequenceClassification.from_pretrained(EMBEDDED_CHECKPOINT)
    assert regression.head_is_new and regression.config.num_labels == 1


def test_its_tokenizer_is_the_one_built_from_the_vocabulary():
    smiles = pd.read_csv(EMBEDDED_DATA)["SMILES"].tolist()
    loaded = AutoTokenizer.from_pretrained(EMBEDDED_CHECKPOINT)
    assert loaded(smiles)["input_ids"] == build_tokenizer()(smiles)["input_ids"]


def test_it_predicts_masked_tokens_of_molecules_that_it_has_not_seen():
    """Lipophilicity molecules were kept out of its corpus. The most frequent token would be right in about a fifth."""
    smiles = [canonicalize(s, "canonical") for s in pd.read_csv(EMBEDDED_DATA)["SMILES"][::20]]
    tokenizer = build_tokenizer()
    examples = [{"input_ids": ids} for ids in tokenizer(smiles)["input_ids"]]
    batch = PretrainingCollator(tokenizer, 0.15, seed=0)(examples)
    model = AutoModelForMaskedLM.from_pretrained(EMBEDDED_CHECKPOINT).eval()
    labels = batch.pop("labels")
    with torch.no_grad():
        right, _, count = score_tokens(model(**batch).logits, labels).sum(dim=0).tolist()
    frequent = np.bincount(labels[labels >= 0]).max() / count
    assert right / count > 0.75 > 2 * frequent


def test_the_configuration_for_training_from_scratch_is_that_of_the_checkpoint():
    given = json.loads((ROOT / "configs" / "molformer-mini.json").read_text())
    config = json.loads((ROOT / "models" / "molformer-mini" / "config.json").read_text())
    assert {name: config[name] for name in given} == given


def test_it_answers_in_half_precision():
    """Sums over tokens reach millions in its first layer; float16 ends at 65,504."""
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(EMBEDDED_CHECKPOINT).eval()
    smiles = [canonicalize(s, "canonical") for s in pd.read_csv(EMBEDDED_DATA)["SMILES"][:16]]
    batch = build_tokenizer()(smiles, return_tensors="pt", padding=True)
    with torch.no_grad():
        expected = model(**batch).logits
        for dtype in (torch.bfloat16, torch.float16):
            with torch.autocast("cpu", dtype):  # as --bf16 and --fp16 have it, the weights in float32
                torch.testing.assert_close(model(**batch).logits, expected, atol=0.05, rtol=0.05)
            torch.testing.assert_close(copy.deepcopy(model).to(dtype)(**batch).logits, expected, atol=0.05, rtol=0.05)
    with torch.autocast("cpu", torch.float16):
        model.train()(**batch, labels=torch.zeros(16)).loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
