"""Fixtures that the test files share: a tiny checkpoint, a small table of molecules, a call of a script."""

import gc
import os
import subprocess
import sys
from pathlib import Path


os.environ["HF_HUB_OFFLINE"] = "1"  # before any library reads it: no test needs a network
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the numbers are those of the processor
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1,localhost"  # where the double of the Hub answers
os.environ["ACCELERATE_MIXED_PRECISION"] = "no"  # float32 on every machine, for the tests that ask for nothing else
os.environ["OMP_NUM_THREADS"] = "1"  # workers share the cores, and sums are those of the scripts that tests start

import pandas as pd
import pytest
import torch

from arguments import DataTrainingArguments, ModelArguments, TrainingArguments, parse_arguments
from modeling_molformer_reg import MolformerConfig, MolformerForMaskedLM
from utils_checkpoints import build_tokenizer


ROOT = Path(__file__).resolve().parent.parent
# stands in for `python`; every call finds a free port
TWO_PROCESSES = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,  # not all layers are square
    "num_random_features": 8,
    "tie_word_embeddings": True,
}


# what the tests of arguments and runs give to a script that has no arguments of its own
DATACLASSES = (ModelArguments, DataTrainingArguments, TrainingArguments)
DEFAULTS = {"output_dir": "outputs/script", "learning_rate": 6e-4, "per_device_eval_batch_size": 128}
# in this order, so that no worker is left alone with a long one at the end
LONGEST = """test_run_influence.py test_utils_report.py test_run_peft.py test_run_regression.py test_run_mlm.py
    test_studies.py test_utils_influence.py test_utils_predict.py""".split()


def parse(*args, defaults=DEFAULTS):
    """Returns the arguments of such a script."""
    return parse_arguments(*DATACLASSES, defaults=defaults, args=[str(arg) for arg in args])


def pytest_collection_modifyitems(items):
    """The files that take longest go first."""
    order = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


def pytest_collection_finish(session):
    """Spares the modules that are imported by now to the garbage collector, which every training calls many times."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory):
    """A masked language model of two layers with random weights, and the tokenizer."""
    folder = tmp_path_factory.mktemp("tiny") / "checkpoint"
    torch.manual_seed(0)
    MolformerForMaskedLM(MolformerConfig(**TINY)).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def small_table(tmp_path_factory):
    """The first 160 molecules of the embedded data set, as a CSV."""
    path = tmp_path_factory.mktemp("data") / "small.csv"
    pd.read_csv(ROOT / "data" / "lipophilicity.csv", nrows=160).to_csv(path, index=False)
    return str(path)


@pytest.fixture
def run_script(tmp_path):
    """Runs `python SCRIPT flags…` in a process of its own; `launcher` stands in for `python`, `text` is its input."""

    def run(script, *flags, launcher=(sys.executable,), timeout=300, text=None, **environment):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "hf"), **environment}
        return subprocess.run(
            [*launcher, str(ROOT / script), *map(str, flags)],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            **({"stdin": subprocess.DEVNULL} if text is None else {"input": text}),
        )

    return run
