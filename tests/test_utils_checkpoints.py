"""utils_checkpoints.py: the tokenizer, and checkpoints that are refused with their reason."""

import io
import json
import re
import shutil
import time

import pandas as pd
import peft
import pytest
import torch
from huggingface_hub import constants
from transformers import AutoTokenizer

from arguments import EMBEDDED_DATA, InputError, ModelArguments
from modeling_molformer_reg import MolformerConfig, MolformerForMaskedLM, MolformerForRegression
from utils_checkpoints import (
    build_tokenizer,
    check_split,
    find_members,
    load_config,
    load_model,
    load_tokenizer,
    refuse_missing_folder,
)


def test_saved_tokenizer_reloads_through_auto_tokenizer(tmp_path):
    smiles = pd.read_csv(EMBEDDED_DATA, nrows=48)["SMILES"].tolist()
    build_tokenizer().save_pretrained(tmp_path)
    reloaded = AutoTokenizer.from_pretrained(tmp_path)
    assert reloaded(smiles)["input_ids"] == build_tokenizer()(smiles)["input_ids"]


def test_a_tokenizer_pads_on_the_right_whatever_it_was_saved_with(tmp_path):
    """A head may read the first token."""
    tokenizer = build_tokenizer()
    tokenizer.padding_side = "left"
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(ModelArguments(model_name_or_path=str(tmp_path)))
    assert loaded(["C", "CCO"], padding=True)["attention_mask"][0] == [1, 1, 1, 0, 0]


def test_a_tokenizer_gives_a_mask_whatever_it_was_saved_with(tmp_path):
    """Without it padding would count as atoms."""
    tokenizer = build_tokenizer()
    tokenizer.model_input_names = ["input_ids"]
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(ModelArguments(model_name_or_path=str(tmp_path)))
    assert loaded.pad(loaded(["C", "CCO"]))["attention_mask"] == [[1, 1, 1, 0, 0], [1] * 5]


def test_a_folder_without_a_configuration_gives_no_model(tmp_path):
    """Not one of MoLFormer-XL's size, as the library would."""
    args = ModelArguments(model_name_or_path=None, config_name=str(tmp_path))
    for load in (load_config, lambda args: load_model(MolformerForRegression, args, build_tokenizer())):
        with pytest.raises(InputError, match="configuration in .* cannot be loaded: there is no config.json"):
            load(args)


def test_a_named_configuration_keeps_what_the_checkpoint_has_seen(tiny_checkpoint, tmp_path):
    """Or its test molecules could be learned after all."""
    named = MolformerConfig.from_pretrained(tiny_checkpoint)
    named.save_pretrained(tmp_path / "named")
    named.split_hash, named.smiles_form, named.smiles_max_length = "abc", "isomeric", 99
    shutil.copytree(tiny_checkpoint, tmp_path / "seen")
    named.save_pretrained(tmp_path / "seen")
    args = ModelArguments(model_name_or_path=str(tmp_path / "seen"), config_name=str(tmp_path / "named"))
    for config in (load_config(args), load_model(MolformerForRegression, args, build_tokenizer()).config):
        assert (config.split_hash, config.smiles_form, config.smiles_max_length) == ("abc", "isomeric", 99)


def test_an_adapter_that_lacks_its_weights_or_its_base_is_told(tiny_checkpoint, tmp_path, monkeypatch):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    shutil.copytree(tiny_checkpoint, base)
    model = MolformerForRegression.from_pretrained(base)
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["query"])).save_pretrained(adapter)
    model.config.save_pretrained(adapter)
    weights = (adapter / "adapter_model.safetensors").rename(tmp_path / "weights")
    args = ModelArguments(model_name_or_path=str(adapter), tokenizer_name=tiny_checkpoint)
    with pytest.raises(InputError, match="adapter has no adapter_model.safetensors. Bring it back"):
        load_model(MolformerForRegression, args, load_tokenizer(args))
    weights.rename(adapter / "adapter_model.safetensors")
    shutil.rmtree(base)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # nor is the Hub asked, for minutes
    with pytest.raises(InputError, match="There is no local folder .*base. Correct its path. Or correct its name in"):
        load_model(MolformerForRegression, args, load_tokenizer(args))


def test_an_ensemble_is_no_model_to_start_from(tiny_checkpoint, tmp_path):
    for number in range(2):
        shutil.copytree(tiny_checkpoint, tmp_path / f"member-{number}")
    with pytest.raises(InputError, match="holds an ensemble of 2 models. Pass one of them, such as .*member-0"):
        load_tokenizer(ModelArguments(model_name_or_path=str(tmp_path)))


def test_all_of_a_model_from_scratch_is_random_and_no_head_is_named(tiny_checkpoint, caplog):
    args = ModelArguments(model_name_or_path=None, config_name=str(tiny_checkpoint))
    with caplog.at_level("INFO"):
        load_model(MolformerForRegression, args, build_tokenizer())
    assert "the weights are random" in caplog.text and "has new weights" not in caplog.text


def test_tokenizer_of_another_vocabulary_is_refused(tmp_path):
    model = MolformerForMaskedLM(MolformerConfig(vocab_size=100, hidden_size=32, num_hidden_layers=1,
        num_attention_heads=4, intermediate_size=32))  # fmt: skip
    model.save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    args = ModelArguments(model_name_or_path=str(tmp_path))
    with pytest.raises(InputError, match="2362 tokens .* 100 embeddings"):
        load_model(MolformerForRegression, args, load_tokenizer(args))


def test_checkpoint_that_lacks_encoder_weights_is_refused_with_the_key(tiny_checkpoint, tmp_path):
    model = MolformerForMaskedLM.from_pretrained(tiny_checkpoint)
    state = {k: v for k, v in model.state_dict().items() if "layer.1.intermediate" not in k and "decoder" not in k}
    model.save_pretrained(tmp_path, state_dict=state)
    build_tokenizer().save_pretrained(tmp_path)
    args = ModelArguments(model_name_or_path=str(tmp_path))
    with pytest.raises(InputError, match=r"encoder\.layer\.1\.intermediate\.dense\.bias"):
        load_model(MolformerForRegression, args, load_tokenizer(args))


def saved_by_torch(values):
    file = io.BytesIO()
    torch.save(values, file)
    return file.getvalue()


def test_pickled_checkpoint_that_would_run_code_is_refused(tiny_checkpoint, tmp_path):
    """A .bin file loads with weights_only: the code in it does not run."""
    import os
    import pickle

    class Harmful:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    MolformerConfig.from_pretrained(tiny_checkpoint).save_pretrained(tmp_path)
    args = ModelArguments(model_name_or_path=str(tmp_path), tokenizer_name=tiny_checkpoint)
    adapter = tmp_path / "adapter"
    peft.get_peft_model(
        MolformerForRegression.from_pretrained(tiny_checkpoint), peft.LoraConfig(target_modules=["query"])
    ).save_pretrained(adapter)
    (adapter / "adapter_model.safetensors").unlink()
    MolformerConfig.from_pretrained(tiny_checkpoint).save_pretrained(adapter)
    of_adapter = ModelArguments(model_name_or_path=str(adapter), tokenizer_name=tiny_checkpoint)
    for arguments, path in ((args, tmp_path / "pytorch_model.bin"), (of_adapter, adapter / "adapter_model.bin")):
        for content in (pickle.dumps({"x": Harmful()}), saved_by_torch({"x": Harmful()})):
            path.write_bytes(content)
            with pytest.raises(InputError, match="could run code. Pass a checkpoint in safetensors") as caught:
                load_model(MolformerForRegression, arguments, load_tokenizer(arguments))
            assert "weights_only" not in str(caught.value) and "\x1b" not in str(caught.value)
            assert not (tmp_path / "ran").exists()


def test_a_folder_of_influence_scores_says_which_model_is_in_it(tiny_checkpoint, tmp_path):
    shutil.copytree(tiny_checkpoint, tmp_path / "finetune-selected")
    with pytest.raises(InputError, match="holds no model itself. Pass .*finetune-selected, or another"):
        load_tokenizer(ModelArguments(model_name_or_path=str(tmp_path)))
    shutil.rmtree(tmp_path / "finetune-selected")  # as after --do_predict
    (tmp_path / "influence.json").touch()
    with pytest.raises(InputError, match="holds influence scores and no model. Pass the one that was scored"):
        load_tokenizer(ModelArguments(model_name_or_path=str(tmp_path)))


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch, caplog):
    """Its client would try for minutes, file by file."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    started = time.monotonic()
    with pytest.raises(InputError, match="cannot be fetched from the Hub: wrong name, no access, or no network"):
        load_config(ModelArguments(model_name_or_path="ibm/MoLFormer-XL-both-10pct"))
    assert time.monotonic() - started < 20 and caplog.text.count("http://127.0.0.1:9 does not answer") == 1
    assert constants.HF_HUB_OFFLINE


def test_weights_that_are_no_numbers_are_refused(tiny_checkpoint, tmp_path):
    model = MolformerForMaskedLM.from_pretrained(tiny_checkpoint)
    with torch.no_grad():
        model.molformer.encoder.layer[1].output.dense.bias[3] = torch.nan
    model.save_pretrained(tmp_path)
    args = ModelArguments(model_name_or_path=str(tmp_path), tokenizer_name=tiny_checkpoint)
    with pytest.raises(InputError, match="layer.1.output.dense.bias"):
        load_model(MolformerForRegression, args, load_tokenizer(args))


@pytest.mark.parametrize(
    ("file", "change", "named"),
    [
        ("config.json", [], "cannot be loaded"),
        ("config.json", {"hidden_size": "abc"}, "hidden_size='abc' must be a whole number"),
        ("config.json", {"vocab_size": True}, "vocab_size=True must be a whole number"),
        ("config.json", {"pad_token_id": 2362}, "pad_token_id=2362 is none of the 2362 tokens"),
        ("config.json", {"model_type": "bert"}, 'it is that of a bert with "model_type": "molformer"|it is that of'),
        ("config.json", {"model_type": None}, "there is no config.json"),
        ("config.json", {"intermediate_size": 56}, r"mismatch its configuration: .*dense.bias \(\d+,\), not \(56,\)"),
        ("config.json", {"label_mean": "x"}, "label_mean='x' must be a list of numbers"),
        ("config.json", {"label_mean": [float("nan")]}, "must be finite"),
        ("config.json", {"label_names": 5}, "label_names=5 must be a list of names"),
        ("config.json", {"num_labels": "a"}, "cannot be loaded"),
        ("config.json", {"id2label": 5}, "cannot be loaded"),
        ("config.json", {"dtype": "evil"}, "cannot be loaded"),
        ("config.json", {"auto_map": {"AutoModel": "../evil.M"}}, "names '../evil.M' in auto_map"),
        ("config.json", {"auto_map": {"AutoModel": ["evil--../evil.M", None]}}, "names 'evil--../evil.M' in auto_map"),
        ("config.json", {"auto_map": {"AutoConfig": "/tmp/evil.C"}}, "is damaged or hostile"),
        ("config.json", {"auto_map": {"AutoConfig": 5}}, "names 5 in auto_map"),
        ("config.json", {"smiles_form": "evil"}, "smiles_form='evil' is unknown"),
        ("tokenizer_config.json", [], "cannot be loaded"),
        ("tokenizer.json", [], "cannot be loaded"),
        ("adapter_config.json", {"base_model_name_or_path": 5}, "is no text"),
        ("model.safetensors.index.json", {"weight_map": {"a": "../outside.safetensors"}}, "not in the folder"),
        ("model.safetensors.index.json", {}, "cannot be loaded"),
    ],
)  # fmt: skip
def test_a_checkpoint_whose_files_say_nonsense_ends_in_one_line(tiny_checkpoint, tmp_path, file, change, named):
    folder = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint, folder)
    path = folder / file
    values = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(values | change if isinstance(change, dict) else change))
    if "index" in file:
        (folder / "model.safetensors").rename(tmp_path / "outside.safetensors")
    args = ModelArguments(model_name_or_path=str(folder))
    with pytest.raises(InputError, match=named) as caught:
        load_config(args)
        load_model(MolformerForRegression, args, load_tokenizer(args))
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("prefix", ["", "ibm/MoLFormer-XL-both-10pct--"])
def test_code_that_a_checkpoint_of_the_hub_names_is_left_aside(tiny_checkpoint, tmp_path, prefix):
    shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")
    path = tmp_path / "checkpoint" / "config.json"
    auto_map = {"AutoConfig": f"{prefix}configuration_molformer.MolformerConfig"}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": auto_map}))
    assert load_config(ModelArguments(model_name_or_path=str(path.parent))).hidden_size > 0


def test_run_of_a_model_of_another_shape_is_not_resumed(tiny_checkpoint):
    config = MolformerConfig.from_pretrained(tiny_checkpoint)
    check_split(config, None, None, tiny_checkpoint)
    config.num_hidden_layers += 1
    with pytest.raises(InputError, match="num_hidden_layers=2, but this run's has 3"):
        check_split(config, None, None, tiny_checkpoint)


@pytest.mark.parametrize("name", ["outputs/nix", "./nix", "/nowhere/nix", "~/nix", "a/b/c"])
def test_a_folder_that_is_not_there_is_not_looked_for_on_the_hub(name, tmp_path, monkeypatch):
    """Without a network the Hub is asked for minutes."""
    (tmp_path / "outputs").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    model_args = ModelArguments(model_name_or_path=name)
    for load in (load_tokenizer, load_config, find_members):
        with pytest.raises(InputError, match=f"There is no local folder {re.escape(name)}. Correct its path"):
            load(model_args)
    refuse_missing_folder("ibm/MoLFormer-XL-both-10pct")
    refuse_missing_folder("molformer")
