"""run_mlm.py: files, the split it respects, corpora in every form, masking, resumption, bad input."""

import gzip
import json
import lzma
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT

import run_mlm
from arguments import DataTrainingArguments, InputError, ModelArguments, TrainingArguments, parse_arguments
from modeling_molformer_reg import MolformerAtomHead, MolformerConfig, MolformerForMaskedLM
from run_mlm import MlmArguments, PretrainingCollator, mlm_metrics, score_tokens
from trainer_regression import build_tokenizer
from utils_molecules import compute_descriptors, default_descriptors, parse_smiles


QUICK = ("--num_train_epochs", "2", "--disable_tqdm", "true")
TIMES = ("runtime", "per_second", "preparation_time")


def parse(*flags):
    classes = (ModelArguments, DataTrainingArguments, MlmArguments, TrainingArguments)
    return parse_arguments(*classes, defaults=run_mlm.DEFAULTS, args=[str(flag) for flag in flags])


def results(folder):
    """The metrics of a run, without those that tell time. A resumed run's train_loss covers what it trained itself."""
    values = json.loads((folder / "all_results.json").read_text())
    return {name: value for name, value in values.items() if not any(time in name for time in (*TIMES, "train_loss"))}


@pytest.fixture(scope="module")
def corpus(small_table, tmp_path_factory):
    """The SMILES of the small table as text, one a line."""
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_text("\n".join(pd.read_csv(small_table)["SMILES"]) + "\n")
    return path


def test_main_writes_its_result_files_and_regression_takes_the_checkpoint(tiny_checkpoint, small_table, tmp_path):
    out = tmp_path / "mlm"
    run_mlm.main(
        *parse("--model_name_or_path", tiny_checkpoint, "--train_file", small_table, "--output_dir", out, *QUICK)
    )
    for name in ("model.safetensors", "config.json", "tokenizer.json", "all_results.json", "loss_curves.png"):
        assert (out / name).stat().st_size > 0
    values = results(out)
    assert values["eval_perplexity"] == pytest.approx(np.exp(values["eval_loss"]), rel=0.05)
    assert 0 <= values["eval_masked_accuracy"] <= 1 and values["train_samples"] == 115

    import run_regression

    flags = ["--model_name_or_path", str(out), "--train_file", small_table, "--output_dir", str(tmp_path / "reg"),
        "--max_steps", "1", "--disable_tqdm", "true"]  # fmt: skip
    classes = run_regression.ARGUMENTS
    run_regression.main(*parse_arguments(*classes, defaults=run_regression.DEFAULTS, args=flags))
    with pytest.raises(InputError, match="another split"):  # its test molecules were learned
        flags[flags.index(str(tmp_path / "reg"))] = str(tmp_path / "reg2")
        run_regression.main(*parse_arguments(*classes, defaults=run_regression.DEFAULTS, args=[*flags, "--seed", "1"]))


def test_labeled_table_gives_the_training_molecules_of_the_regression_split_alone(
    tiny_checkpoint, small_table, tmp_path
):
    """Reference: the split of run_regression.py from the same seed."""
    from utils_molecules import load_molecules

    parsed = parse(
        "--model_name_or_path", tiny_checkpoint, "--train_file", small_table, "--output_dir", tmp_path / "x"
    )
    tokenizer = build_tokenizer()
    train, held_out, digest, _ = run_mlm.load_data(tokenizer, *parsed)
    molecules, expected_digest, _ = load_molecules(tokenizer, parsed[0], parsed[1], parsed[3])
    by_split = {name: sorted(map(tuple, rows["input_ids"])) for name, rows in molecules.groupby("split")}
    assert digest == expected_digest
    assert sorted(tuple(row["input_ids"]) for row in train) == by_split["train"]
    assert sorted(tuple(row["input_ids"]) for row in held_out) == by_split["validation"]
    assert not set(by_split["test"]) & {tuple(row["input_ids"]) for row in train}


@pytest.mark.parametrize("form", ["txt", "crlf", "bom", "gz", "xz", "csv", "named.smi"])
def test_corpus_is_read_alike_in_every_form(form, corpus, tiny_checkpoint, tmp_path):
    """Reference: the plain text file."""
    text = corpus.read_text()
    path = tmp_path / {"gz": "c.txt.gz", "xz": "c.txt.xz", "csv": "c.csv", "named.smi": "c.smi"}.get(form, "c.txt")
    if form == "gz":
        path.write_bytes(gzip.compress(text.encode()))
    elif form == "xz":
        path.write_bytes(lzma.compress(text.encode()))
    elif form == "csv":
        path.write_text("id,smiles\n" + "".join(f"{i},{line}\n" for i, line in enumerate(text.splitlines())))
    elif form == "named.smi":
        path.write_text("".join(f"{line} molecule {i}\n" for i, line in enumerate(text.splitlines())))
    else:
        path.write_bytes({"txt": b"", "bom": b"\xef\xbb\xbf", "crlf": b""}[form]
            + (text.replace("\n", "\r\n") if form == "crlf" else text).encode())  # fmt: skip

    def load(file):
        cache = tmp_path / f"cache-{file.name}"
        parsed = parse("--train_file", file, "--model_name_or_path", tiny_checkpoint, "--cache_dir", cache,
            "--output_dir", tmp_path / "x", "--preprocessing_num_workers", 1)  # fmt: skip
        train, held_out, digest, _ = run_mlm.load_data(build_tokenizer(), *parsed)
        assert digest is None and train.cache_files  # memory-mapped, not in memory
        return [row["input_ids"] for row in train], [row["input_ids"] for row in held_out]

    assert load(path) == load(corpus)


def test_masking_follows_the_stated_shares_and_spares_special_tokens():
    """80 % <mask>, 10 % another token, 10 % unchanged, of 15 % of the tokens (Devlin et al. 2019)."""
    tokenizer = build_tokenizer()
    examples = [{"input_ids": ids} for ids in tokenizer(["CC(=O)Nc1ccc(O)cc1"] * 3000)["input_ids"]]
    batch = PretrainingCollator(tokenizer, 0.15, seed=0)(examples)
    original = torch.tensor([example["input_ids"] for example in examples])
    chosen = batch["labels"] != -100
    assert not chosen[:, [0, -1]].any()
    assert torch.equal(batch["labels"][chosen], original[chosen])
    assert torch.equal(batch["input_ids"][~chosen], original[~chosen])
    assert chosen[:, 1:-1].float().mean() == pytest.approx(0.15, abs=0.005)
    inputs = batch["input_ids"][chosen]
    assert (inputs == tokenizer.mask_token_id).float().mean() == pytest.approx(0.8, abs=0.02)
    assert (inputs == original[chosen]).float().mean() == pytest.approx(0.1, abs=0.015)


def test_masks_are_a_function_of_batch_and_seed():
    tokenizer = build_tokenizer()
    examples = [{"input_ids": ids} for ids in tokenizer(["CCO", "c1ccccc1", "CC(=O)O"] * 5)["input_ids"]]
    one = PretrainingCollator(tokenizer, 0.15, seed=0)
    first = one(examples)["input_ids"]
    torch.manual_seed(99)
    assert torch.equal(one(examples)["input_ids"], first)
    assert not torch.equal(one(examples[::-1])["input_ids"].flip(0), first)
    assert not torch.equal(PretrainingCollator(tokenizer, 0.15, seed=1)(examples)["input_ids"], first)


def test_perplexity_and_accuracy_are_over_tokens_not_batches():
    """Reference: the mean over all labeled tokens, computed at once."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 9, 20, generator=generator)
    labels = torch.randint(0, 20, (6, 9), generator=generator)
    labels[torch.rand(6, 9, generator=generator) < 0.5] = -100
    scores = torch.cat([score_tokens(logits[:2], labels[:2]), score_tokens(logits[2:], labels[2:])]).numpy()

    known = labels != -100
    loss = torch.nn.functional.cross_entropy(logits[known], labels[known])
    metrics = mlm_metrics(scores)
    assert metrics["perplexity"] == pytest.approx(float(loss.exp()), rel=1e-5)
    assert metrics["masked_accuracy"] == pytest.approx(float((logits.argmax(-1) == labels)[known].float().mean()))
    assert metrics["masked_tokens"] == int(known.sum())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.txt", "", "is empty"),
        ("c.txt", "CCO\nC1CC\nCCC\n", "1 of 3 SMILES .* row 1: 'C1CC'"),
        ("c.txt", "CCO\n" + "C" * 300 + "\n", "more tokens than --max_length"),
        ("c.csv", "name,mass\nCCO,1\n", "no SMILES column"),
    ],
)
def test_bad_corpora_are_refused_before_training(name, content, message, tiny_checkpoint, tmp_path):
    (tmp_path / name).write_text(content)
    parsed = parse("--train_file", tmp_path / name, "--model_name_or_path", tiny_checkpoint, "--output_dir",
        tmp_path / "x", "--cache_dir", tmp_path / "cache", "--preprocessing_num_workers", 1)  # fmt: skip
    with pytest.raises(InputError, match=message):
        run_mlm.main(*parsed)
    assert not (tmp_path / "x").exists()


def test_corpus_that_is_not_utf8_is_refused(tiny_checkpoint, tmp_path):
    (tmp_path / "c.txt").write_bytes("CCO\ncaf\xe9\n".encode("latin-1"))
    parsed = parse("--train_file", tmp_path / "c.txt", "--model_name_or_path", tiny_checkpoint, "--output_dir",
        tmp_path / "x", "--cache_dir", tmp_path / "cache")  # fmt: skip
    with pytest.raises(InputError, match="UTF-8"):
        run_mlm.main(*parsed)


def test_unusable_lines_are_dropped_on_request(tiny_checkpoint, tmp_path, caplog):
    (tmp_path / "c.txt").write_text("CCO\nC1CC\nCCC\nCCCC\n" * 3)
    parsed = parse("--train_file", tmp_path / "c.txt", "--model_name_or_path", tiny_checkpoint, "--output_dir",
        tmp_path / "x", "--cache_dir", tmp_path / "cache", "--invalid_smiles", "drop")  # fmt: skip
    train, held_out, _, dropped = run_mlm.load_data(build_tokenizer(), *parsed)
    assert len(train) + len(held_out) == 9
    assert "3 of 12 SMILES" in caplog.text
    assert dropped["row"].tolist() == [1, 5, 9] and set(dropped["reason"]) == {"do not parse as SMILES"}


def test_help_exits_zero(run_script):
    done = run_script("run_mlm.py", "--help")
    assert done.returncode == 0 and "--mlm_probability" in done.stdout


def test_run_killed_in_mid_epoch_resumes_to_the_same_metrics(tiny_checkpoint, corpus, tmp_path):
    """Reference: the uninterrupted run. Checkpoints fall inside an epoch, so order and masks must repeat."""
    flags = ["--model_name_or_path", tiny_checkpoint, "--train_file", str(corpus), "--cache_dir", str(tmp_path / "c"),
        "--preprocessing_num_workers", "1", "--num_train_epochs", "3", "--per_device_train_batch_size", "4",
        "--eval_strategy", "steps", "--eval_steps", "25", "--save_strategy", "steps", "--save_steps", "25",
        "--disable_tqdm", "true", "--redraw_features", "true"]  # fmt: skip
    command = [sys.executable, str(ROOT / "run_mlm.py"), *flags, "--output_dir"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    whole = subprocess.run([*command, str(tmp_path / "whole")], env=environment, capture_output=True, text=True)
    assert whole.returncode == 0, whole.stderr
    folder = tmp_path / "killed"
    process = subprocess.Popen(
        [*command, str(folder)], env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE
    )
    deadline = time.time() + 120
    while not list(folder.glob("checkpoint-*/trainer_state.json")) and time.time() < deadline:
        assert process.poll() is None, process.stderr.read().decode()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (folder / "all_results.json").exists()
    resume = [*command, str(folder), "--resume_from_checkpoint", "true"]
    resumed = subprocess.run(resume, env=environment, capture_output=True, text=True)
    assert resumed.returncode == 0, resumed.stderr
    expected, values = results(tmp_path / "whole"), results(folder)
    for name in expected:
        assert values[name] == pytest.approx(expected[name], rel=1e-6), name


def test_encoding_tells_what_is_wrong_with_each_line():
    tokenizer = build_tokenizer()
    lines = ["OCC ethanol", "C1CC", "", None, "C" * 30, "c1ccccc1"]
    encoded = run_mlm.encode_batch({"smiles": lines}, tokenizer, "canonical", 20)
    assert encoded["reason"] == ["", "invalid", "invalid", "invalid", "too_long", ""]
    assert encoded["input_ids"][0] == tokenizer("CCO")["input_ids"] and encoded["length"][0] == 5
    raw = run_mlm.encode_batch({"smiles": ["CXC", "[Zz]", "C1CC"]}, tokenizer, "raw", 20)
    assert raw["reason"] == ["lost", "unknown", ""]  # not parsed, but nothing is lost in silence


def test_validation_file_of_a_corpus_is_held_out_whole(corpus, tiny_checkpoint, tmp_path):
    (tmp_path / "v.txt").write_text("CCO\nCCC\nCCCC\n")
    parsed = parse("--train_file", corpus, "--validation_file", tmp_path / "v.txt", "--model_name_or_path",
        tiny_checkpoint, "--output_dir", tmp_path / "x", "--cache_dir", tmp_path / "cache", "--max_train_samples", 7,
        "--max_eval_samples", 2)  # fmt: skip
    train, held_out, digest, _ = run_mlm.load_data(build_tokenizer(), *parsed)
    assert len(train) == 7 and digest is None
    assert [row["input_ids"] for row in held_out] == [build_tokenizer()(s)["input_ids"] for s in ("CCO", "CCC")]


def test_paper_protocol_holds_out_training_molecules_and_never_learns_test_molecules(
    tiny_checkpoint, small_table, tmp_path
):
    parsed = parse("--train_file", small_table, "--protocol", "paper", "--model_name_or_path", tiny_checkpoint,
        "--output_dir", tmp_path / "x")  # fmt: skip
    train, held_out, _, _ = run_mlm.load_data(build_tokenizer(), *parsed)
    assert (len(train), len(held_out)) == (115, 13)  # of the 128 on the training side; 32 are the test set


@pytest.mark.parametrize("share", ["0", "1", "-0.1"])
def test_impossible_masking_share_is_refused(share, capsys):
    with pytest.raises(SystemExit):
        parse("--mlm_probability", share)
    assert "--mlm_probability" in capsys.readouterr().err


def test_hub_data_set_without_network_is_explained(tiny_checkpoint, tmp_path):
    parsed = parse("--dataset_name", "nobody/nothing", "--model_name_or_path", tiny_checkpoint, "--output_dir",
        tmp_path / "x", "--cache_dir", tmp_path / "cache")  # fmt: skip
    with pytest.raises(InputError, match="--train_file"):
        run_mlm.load_data(build_tokenizer(), *parsed)


def test_dropped_lines_are_listed_in_the_output_folder(tiny_checkpoint, tmp_path):
    (tmp_path / "c.txt").write_text("C1CC\n" * 5 + "CCO\n" * 5)
    parsed = parse("--train_file", tmp_path / "c.txt", "--model_name_or_path", tiny_checkpoint, "--output_dir",
        tmp_path / "x", "--cache_dir", tmp_path / "cache", "--invalid_smiles", "drop", "--num_train_epochs", 1,
        "--disable_tqdm", "true")  # fmt: skip
    run_mlm.main(*parsed)
    listed = pd.read_csv(tmp_path / "x" / "dropped_molecules.csv")
    assert listed["row"].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("objective", ["mtr", "mlm+mtr+atoms"])
def test_descriptors_are_learned_and_their_scale_stays_with_the_checkpoint(
    objective, tiny_checkpoint, small_table, tmp_path
):
    """References: RDKit's values of the training molecules, and the scale that the first run saved."""
    flags = ("--train_file", small_table, "--objective", objective, "--learning_rate", "3e-3", *QUICK)
    out = tmp_path / "first"
    run_mlm.main(*parse("--model_name_or_path", tiny_checkpoint, "--output_dir", out, *flags))
    values = results(out)
    assert ("eval_masked_accuracy" in values) == (objective == "mlm+mtr+atoms")
    assert ("eval_environment_2_accuracy" in values) == (objective == "mlm+mtr+atoms")
    assert 0 < values["eval_descriptor_mse"] < 5 and values["eval_descriptor_r2"] < 1
    model = MolformerForMaskedLM.from_pretrained(out)
    names = model.config.descriptor_names
    assert names == default_descriptors() and not model.head_is_new

    parsed = parse("--model_name_or_path", out, "--output_dir", tmp_path / "second", *flags, "--split_seed", 42)
    tokenizer = build_tokenizer()
    train, held_out, *_ = run_mlm.load_data(tokenizer, *parsed)
    heads = run_mlm.choose_heads(model.config, parsed[2].parts)
    train, held_out = run_mlm.add_targets(train, held_out, tokenizer, *parsed[1:], heads)
    table = np.array(train["descriptors"][:])
    tokens = ["".join(build_tokenizer().convert_ids_to_tokens(ids[1:-1])) for ids in train["input_ids"]]
    assert table[5] == pytest.approx(compute_descriptors(parse_smiles(tokens[5]), names), rel=1e-6)
    index = names.index("MolLogP")
    assert model.descriptor_head.mean[index].item() == pytest.approx(table[:, index].mean(), rel=1e-4)
    assert model.descriptor_head.std[index].item() == pytest.approx(table[:, index].std(), rel=1e-4)
    # another seed, other molecules: the scale that the weights were trained for stays
    run_mlm.main(*parsed[:3], replace_seed(parsed[3], 5))
    again = MolformerForMaskedLM.from_pretrained(tmp_path / "second")
    assert torch.equal(again.descriptor_head.mean, model.descriptor_head.mean)


def replace_seed(training_args, seed):
    training_args.seed = seed
    return training_args


def test_descriptor_learning_beats_the_mean(tiny_checkpoint, small_table, tmp_path):
    """The mean has an R² of 0."""
    flags = ("--train_file", small_table, "--objective", "mtr", "--learning_rate", "1e-2", "--num_train_epochs", 40)
    flags += ("--eval_strategy", "no", "--save_strategy", "no", "--load_best_model_at_end", "false")
    run_mlm.main(*parse("--model_name_or_path", tiny_checkpoint, "--output_dir", tmp_path / "x", *flags,
        "--disable_tqdm", "true"))  # fmt: skip
    assert results(tmp_path / "x")["eval_descriptor_r2"] > 0.3


def test_values_that_are_not_finite_do_not_count_in_the_scale(caplog):
    import datasets

    rows = [[1.0, np.nan, np.inf], [3.0, np.nan, 2.0], [5.0, np.nan, 4.0]]
    mean, std = run_mlm.measure_scale(datasets.Dataset.from_dict({"descriptors": rows}), "descriptors", 3)
    assert mean == pytest.approx([3, 0, 3]) and std == pytest.approx([np.std([1, 3, 5]), 0, 1])
    assert "4 of 9 values in descriptors are missing or infinite" in caplog.text


def test_unparsable_line_is_found_where_descriptors_need_it(tiny_checkpoint, tmp_path):
    (tmp_path / "c.txt").write_text("CCO\nC1CC\nCCC\n")
    common = ("--train_file", tmp_path / "c.txt", "--model_name_or_path", tiny_checkpoint, "--smiles_form", "raw",
        "--cache_dir", tmp_path / "cache", "--output_dir", tmp_path / "x")  # fmt: skip
    assert len(run_mlm.load_data(build_tokenizer(), *parse(*common))[0]) == 2  # the tokenizer takes it
    with pytest.raises(InputError, match="row 1: 'C1CC'"):
        run_mlm.load_data(build_tokenizer(), *parse(*common, "--objective", "mtr"))


def test_descriptor_scores_are_over_molecules_not_batches():
    """Reference: scikit-learn's R² of the columns that vary."""
    from sklearn.metrics import r2_score

    rng = np.random.default_rng(0)
    targets = rng.normal(size=(50, 4))
    targets[:, 3] = 1.0
    predictions = targets + rng.normal(size=(50, 4)) * 0.3
    metrics = run_mlm.descriptor_metrics(predictions, targets)
    assert metrics["descriptor_mse"] == pytest.approx(((predictions - targets) ** 2).mean())
    assert metrics["descriptor_r2"] == pytest.approx(r2_score(targets[:, :3], predictions[:, :3]))
    assert "descriptor_r2" not in run_mlm.descriptor_metrics(targets[:, 3:], targets[:, 3:])


def test_random_smiles_are_learned_and_the_held_out_part_is_left_as_it_is(tiny_checkpoint, corpus, tmp_path):
    common = ("--train_file", corpus, "--model_name_or_path", tiny_checkpoint, "--output_dir", tmp_path / "x",
        "--cache_dir", tmp_path / "cache", "--preprocessing_num_workers", 1)  # fmt: skip
    tokenizer = build_tokenizer()
    parsed = parse(*common, "--augment_smiles", 2, "--objective", "mtr+atoms")
    train, held_out, *_ = run_mlm.load_data(tokenizer, *parsed)
    heads = run_mlm.choose_heads(MolformerConfig(), parsed[2].parts)
    augmented, same = run_mlm.add_targets(train, held_out, tokenizer, *parsed[1:], heads)
    assert augmented["descriptors"][0] == augmented["descriptors"][2] != augmented["descriptors"][3]
    own, other = (sorted(augmented["environments"][row][1::2]) for row in (0, 1))
    assert own == other and augmented["environments"][0] != augmented["environments"][1]  # another order of the same
    assert len(augmented) == 3 * len(train) and augmented["input_ids"][::3] == train["input_ids"][:]
    assert same["input_ids"][:] == held_out["input_ids"][:]


def test_numbers_of_atoms_stand_at_the_tokens_of_their_atoms():
    """Reference: the atoms of the SMILES, one by one. [H] atoms that RDKit removes leave their molecule out."""
    tokenizer = build_tokenizer()
    texts = ["CC(=O)N", "[H]OC", "[NH4+].Cl"]
    rows = [{"input_ids": ids} for ids in tokenizer(texts)["input_ids"]]
    import datasets

    options = {"tokenizer": tokenizer, "names": ["hydrogens", "crippen_log_p"], "buckets": [64, 64]}
    columns = {"atom_descriptors": "float32", "environments": "int32"}
    mlm_args = parse("--preprocessing_num_workers", 1)[2]
    examples = run_mlm.add_columns(
        datasets.Dataset.from_list(rows), run_mlm.describe_atoms, columns, mlm_args, **options
    ).to_list()
    collator = PretrainingCollator(tokenizer, None, 0, 1.0, ["hydrogens", "crippen_log_p"], [64, 64])
    placed = collator(examples)
    hydrogens = placed["atom_descriptors"][:, :, 0].tolist()
    # <bos> C C ( = O ) N <eos>
    assert hydrogens[0] == [-100, 3, 0, -100, -100, 0, -100, 2, -100]
    assert set(hydrogens[1]) == {-100} and hydrogens[2][:5] == [-100, 4, -100, 1, -100]
    assert ((placed["environments"] == -100) == (placed["atom_descriptors"] == -100)).all()
    assert placed["environments"].max() < 64


def test_atom_scores_are_sums_over_the_atoms_of_each_molecule():
    """Reference: plain loops."""
    config = MolformerConfig(hidden_size=8, num_attention_heads=2, atom_descriptor_names=["a", "b"],
        environment_buckets=[3, 4])  # fmt: skip
    head = MolformerAtomHead(config)
    generator = torch.Generator().manual_seed(0)
    environments = torch.full((3, 5, 2), -100)
    atoms = [(0, 1), (0, 3), (2, 0), (2, 1), (2, 4)]
    for row, token in atoms:
        environments[row, token] = torch.randint(0, 3, (2,), generator=generator)
    numbers = torch.randn(3, 5, 2, generator=generator)
    predicted, logits = torch.randn(5, 2, generator=generator), torch.randn(5, 7, generator=generator)
    expected = np.zeros((3, 4))
    for index, (row, token) in enumerate(atoms):
        right = [logits[index, :3].argmax() == environments[row, token, 0]]
        right += [logits[index, 3:].argmax() == environments[row, token, 1]]
        expected[row] += [1, float(((predicted[index] - numbers[row, token]) ** 2).mean()), *map(float, right)]
    scores = run_mlm.score_atoms(head, predicted, logits, numbers, environments).numpy()
    assert scores == pytest.approx(expected, abs=1e-5)
    metrics = run_mlm.atom_metrics(scores)
    assert metrics["environment_2_accuracy"] == pytest.approx(expected[:, 3].sum() / 5)
    assert metrics["atom_mse"] == pytest.approx(expected[:, 1].sum() / 5, rel=1e-5)
    assert run_mlm.atom_metrics(np.zeros((2, 4))) == {}


def test_checkpoint_keeps_its_heads_whatever_the_objective(tiny_checkpoint, small_table, tmp_path):
    common = ("--train_file", small_table, "--max_steps", 2, "--disable_tqdm", "true")
    run_mlm.main(*parse("--model_name_or_path", tiny_checkpoint, "--output_dir", tmp_path / "all", *common,
        "--objective", "mlm+mtr+atoms"))  # fmt: skip
    run_mlm.main(*parse("--model_name_or_path", tmp_path / "all", "--output_dir", tmp_path / "mlm", *common))
    model = MolformerForMaskedLM.from_pretrained(tmp_path / "mlm")
    assert model.new_heads == () and model.config.environment_buckets == [1024, 4096]


def test_only_a_share_of_the_molecules_is_masked():
    tokenizer = build_tokenizer()
    examples = [{"input_ids": ids} for ids in tokenizer(["CC(=O)Nc1ccc(O)cc1" * 3] * 40)["input_ids"]]
    batch = PretrainingCollator(tokenizer, 0.15, 0, masked_share=0.25)(examples)
    assert ((batch["labels"] != -100).any(dim=1)).sum() == 10
    alone = PretrainingCollator(tokenizer, 0.15, 0, masked_share=0.25)(examples[:1])
    assert (alone["labels"] != -100).any()  # a batch is never without a masked molecule


@pytest.mark.parametrize("share", ["0", "1.5"])
def test_impossible_share_of_masked_molecules_is_refused(share, capsys):
    with pytest.raises(SystemExit):
        parse("--masked_share", share)
    assert "--masked_share" in capsys.readouterr().err
