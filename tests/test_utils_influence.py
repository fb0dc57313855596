"""utils_influence.py: the mathematics against explicit matrices in float64, then a model on molecules.

References: matrices by `torch.autograd.functional`, `torch.linalg.solve`, Neumann sums written out, retraining.
"""

import argparse
import math
import os
import re
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

import utils_influence
from arguments import EMBEDDED_CHECKPOINT, EMBEDDED_DATA, InputError
from modeling_molformer_reg import MolformerForRegression
from run_influence import InfluenceArguments
from utils_checkpoints import build_tokenizer
from utils_influence import (
    PRODUCTS,
    SCORES,
    CgState,
    LissaState,
    MoleculeProblem,
    RandomBatches,
    choose_parameters,
    conjugate_gradient_inverse_hvp,
    extreme_eigenvalues,
    flatten,
    gradients_of_halves,
    group_influence,
    inverse_curvature,
    lissa_inverse_hvp,
    loss_gradient,
    molecule_losses,
    score_molecules,
    scores_by_jvp,
    unflatten,
)
from utils_molecules import prepare_molecules, read_table


EXACT = 1e-9  # float64


@pytest.fixture
def network():
    """Residuals of a small network in float64: (B, K) = (7, 2), P = 26."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    inputs, labels = draw(7, 3), draw(7, 2)
    params = {"first.weight": draw(4, 3), "first.bias": draw(4), "last.weight": draw(2, 4), "last.bias": draw(2)}

    def residuals(params):
        hidden = torch.tanh(inputs @ params["first.weight"].T + params["first.bias"])
        return hidden @ params["last.weight"].T + params["last.bias"] - labels

    return residuals, params


def explicit(residuals, params, kind):
    """The curvature matrix of the summed losses, from autograd's own Jacobian and Hessian."""
    point = flatten(params)
    if kind == "ggn":
        jacobian = torch.autograd.functional.jacobian(lambda x: residuals(unflatten(x, params)).reshape(-1), point)
        return 2 * jacobian.T @ jacobian
    return torch.autograd.functional.hessian(lambda x: residuals(unflatten(x, params)).square().sum(), point)


@pytest.fixture
def matrix():
    """A symmetric positive matrix with eigenvalues from 0.01 to 2, and a vector."""
    generator = torch.Generator().manual_seed(1)
    orthogonal, _ = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64))
    values = torch.tensor([0.01, 0.1, 0.3, 0.7, 1.1, 2.0], dtype=torch.float64)
    return orthogonal @ torch.diag(values) @ orthogonal.T, torch.randn(6, generator=generator, dtype=torch.float64)


# ------------------------------------------------------------------------------------------------- the mathematics


def test_a_vector_is_put_apart_and_together(network):
    _, params = network
    vector = torch.arange(26, dtype=torch.float64)
    parts = unflatten(vector, params)
    assert {name: part.shape for name, part in parts.items()} == {name: p.shape for name, p in params.items()}
    assert torch.equal(flatten(parts), vector)


@pytest.mark.parametrize("kind", PRODUCTS)
def test_products_equal_the_explicit_matrix(network, kind):
    """Reference: autograd's Jacobian and Hessian."""
    residuals, params = network
    matrix = explicit(residuals, params, kind)
    for vector in torch.eye(26, dtype=torch.float64):
        product = PRODUCTS[kind](residuals, params, vector)
        assert torch.allclose(product, matrix @ vector, rtol=0, atol=EXACT)


def test_gradient_and_losses_equal_autograd(network):
    residuals, params = network
    expected = torch.autograd.functional.jacobian(
        lambda x: residuals(unflatten(x, params)).square().sum(), flatten(params)
    )
    assert torch.allclose(loss_gradient(residuals, params), expected, rtol=0, atol=EXACT)
    assert torch.allclose(molecule_losses(residuals, params), (residuals(params) ** 2).sum(1), rtol=0, atol=EXACT)


@pytest.mark.parametrize("mode", SCORES)
def test_scores_equal_the_gradients_of_single_molecules(network, mode):
    """Reference: autograd's Jacobian of the vector of losses."""
    residuals, params = network
    direction = torch.linspace(-1, 1, 26, dtype=torch.float64)
    gradients = torch.autograd.functional.jacobian(
        lambda x: residuals(unflatten(x, params)).square().sum(1), flatten(params)
    )
    scores = SCORES[mode](residuals, params, direction)
    assert torch.allclose(scores, gradients @ direction, rtol=0, atol=EXACT)


def test_lanczos_finds_both_ends_of_the_spectrum(matrix):
    matrix, vector = matrix
    smallest, largest = extreme_eigenvalues(lambda v: matrix @ v, vector, 50)
    assert (smallest, largest) == (pytest.approx(0.01, abs=1e-9), pytest.approx(2.0, abs=1e-9))
    assert extreme_eigenvalues(lambda v: 0 * v, vector) == (0.0, 0.0)


def test_lanczos_finds_a_negative_eigenvalue_beside_many_small_ones():
    """As a Hessian has them: 1,990 within 0.01 of zero, one negative, a few large. 25 steps, as in the script."""
    generator = torch.Generator().manual_seed(0)
    values = torch.cat([0.01 * torch.rand(1990, generator=generator), torch.tensor([-0.5, 1.0, 3.0, 9.0])])
    orthogonal, _ = torch.linalg.qr(torch.randn(1994, 1994, generator=generator))
    start = torch.randn(1994, generator=generator)
    smallest, largest = extreme_eigenvalues(lambda v: orthogonal @ (values * (orthogonal.T @ v)), start, 25)
    assert largest == pytest.approx(9.0, rel=1e-3)
    assert smallest == pytest.approx(-0.5, rel=1e-2)


@pytest.mark.parametrize("depth", [0, 1, 5])
def test_lissa_without_tail_is_the_truncated_neumann_sum(matrix, depth):
    """Reference: sum over t = 0 ... T of (I - (C + damping I) / scale)^t v / scale, written out."""
    matrix, vector = matrix
    scale, damping = 3.0, 0.05
    step = torch.eye(6, dtype=torch.float64) - (matrix + damping * torch.eye(6, dtype=torch.float64)) / scale
    terms = [torch.linalg.matrix_power(step, t) @ vector for t in range(depth + 1)]
    answer = lissa_inverse_hvp(
        lambda v: matrix @ v, vector, damping=damping, scale=scale, recursion_depth=depth, tail_fraction=0.0
    )
    assert answer.shape == (1, 6)
    assert torch.allclose(answer[0], sum(terms) / scale, rtol=0, atol=EXACT)


def test_the_tail_is_the_mean_of_the_last_iterates(matrix):
    matrix, vector = matrix
    options = {"damping": 0.05, "scale": 3.0}
    single = [lissa_inverse_hvp(lambda v: matrix @ v, vector, recursion_depth=t, **options)[0] for t in (7, 8, 9, 10)]
    tail = lissa_inverse_hvp(lambda v: matrix @ v, vector, recursion_depth=10, tail_fraction=0.4, **options)[0]
    assert torch.allclose(tail, sum(single) / 4, rtol=0, atol=EXACT)


def test_the_limits_are_the_exact_solution(matrix):
    """Reference: torch.linalg.solve."""
    matrix, vector = matrix
    exact = torch.linalg.solve(matrix + 0.05 * torch.eye(6, dtype=torch.float64), vector)
    lissa = lissa_inverse_hvp(lambda v: matrix @ v, vector, damping=0.05, scale=3.0, recursion_depth=2000)[0]
    assert (lissa - exact).norm() / exact.norm() < 1e-3
    gradients = conjugate_gradient_inverse_hvp(
        lambda v: matrix @ v, vector, damping=0.05, tolerance=1e-9, max_steps=20
    )
    assert (gradients - exact).norm() / exact.norm() < 1e-6


def test_shrinking_by_koh_and_liang_is_damping_times_scale(matrix):
    """Reference: their code, h = v + (1 - d) h - C h / scale; then damping = d * scale."""
    matrix, vector = matrix
    shrink, scale, estimate = 0.02, 3.0, vector
    for _ in range(25):
        estimate = vector + (1 - shrink) * estimate - matrix @ estimate / scale
    ours = lissa_inverse_hvp(lambda v: matrix @ v, vector, damping=shrink * scale, scale=scale, recursion_depth=25)
    assert torch.allclose(ours[0], estimate / scale, rtol=0, atol=EXACT)


def test_lissa_that_diverges_says_where_and_what_to_raise(matrix):
    matrix, vector = matrix
    with pytest.raises(FloatingPointError, match=r"norm .* at step \d+ of 500 with scale=0\.5.*Raise --scale"):
        lissa_inverse_hvp(lambda v: matrix @ v, vector, damping=0.01, scale=0.5, recursion_depth=500)
    with pytest.raises(FloatingPointError, match="norm .* -> nan at step 1 of 5"):
        lissa_inverse_hvp(lambda v: v * math.nan, vector, damping=0.01, scale=5.0, recursion_depth=5)


def test_lissa_at_the_edge_of_convergence_is_not_called_divergent(matrix):
    """All eigenvalues of C + damping are below 2 * scale, the largest by a hundredth."""
    matrix, vector = matrix
    answer = lissa_inverse_hvp(lambda v: matrix @ v, vector, damping=0.05, scale=1.035, recursion_depth=5000)[0]
    exact = torch.linalg.solve(matrix + 0.05 * torch.eye(6, dtype=torch.float64), vector)
    assert torch.allclose(answer, exact, rtol=1e-3)


def test_conjugate_gradients_refuse_a_matrix_that_is_not_positive(matrix):
    matrix, vector = matrix
    with pytest.raises(FloatingPointError, match="Raise --damping"):
        conjugate_gradient_inverse_hvp(lambda v: matrix @ v - v, vector, damping=0.05, tolerance=1e-9, max_steps=20)


def test_conjugate_gradients_go_on_where_they_were_stopped(matrix):
    """Reference: the same run without a stop, bit for bit."""
    matrix, vector = matrix
    options = {"damping": 0.05, "tolerance": 1e-9}
    whole = conjugate_gradient_inverse_hvp(lambda v: matrix @ v, vector, **options, max_steps=6)
    state = CgState(torch.zeros_like(vector), vector, vector)
    conjugate_gradient_inverse_hvp(lambda v: matrix @ v, vector, **options, max_steps=3, state=state)
    assert state.step == 3
    again = conjugate_gradient_inverse_hvp(lambda v: matrix @ v, vector, **options, max_steps=6, state=state)
    assert torch.equal(again, whole)


def test_lissa_goes_on_where_it_was_stopped(matrix):
    """Reference: the same run without a stop, bit for bit."""
    matrix, vector = matrix

    def noisy():
        generator = torch.Generator().manual_seed(3)
        return lambda v: matrix @ v * (1 + 0.1 * torch.rand(1, generator=generator, dtype=torch.float64))

    options = {"damping": 0.05, "scale": 3.0, "recursion_depth": 10, "num_repeats": 3, "tail_fraction": 0.5}
    whole = lissa_inverse_hvp(noisy(), vector, **options)
    assert not torch.equal(whole[0], whole[1])

    class StopError(Exception):
        pass

    state, hvp = LissaState(vector, torch.zeros_like(vector)), noisy()

    def stop(state):
        if (len(state.answers), state.step) == (1, 7):
            raise StopError

    with pytest.raises(StopError):
        lissa_inverse_hvp(hvp, vector, **options, state=state, on_step=stop)
    assert torch.equal(lissa_inverse_hvp(hvp, vector, **options, state=state), whole)


def test_scores_predict_leaving_one_out_of_ridge_regression():
    """Reference: retraining without each row. The score over N is what the target loss rises by without the row."""
    generator = torch.Generator().manual_seed(0)
    rows, width, penalty = 60, 5, 0.1
    inputs = torch.randn(rows + 40, width, generator=generator, dtype=torch.float64)
    labels = inputs @ torch.linspace(-1, 1, width, dtype=torch.float64)
    labels = labels + 0.5 * torch.randn(len(labels), generator=generator, dtype=torch.float64)
    train, target = slice(0, rows), slice(rows, None)

    def fit(kept):  # of sum (x w - y)^2 / N + penalty w^2 / 2, N staying that of all rows
        x, y = inputs[train][kept], labels[train][kept]
        return torch.linalg.solve(
            2 * x.T @ x / rows + penalty * torch.eye(width, dtype=torch.float64), 2 * x.T @ y / rows
        )

    def residuals_of(part):
        return lambda params: (inputs[part] @ params["w"] - labels[part])[:, None]

    params = {"w": fit(torch.ones(rows, dtype=torch.bool))}
    gradient = loss_gradient(residuals_of(target), params) / 40
    solution = conjugate_gradient_inverse_hvp(
        lambda v: PRODUCTS["ggn"](residuals_of(train), params, v) / rows,
        gradient,
        damping=penalty,
        tolerance=1e-12,
        max_steps=50,
    )
    scores = SCORES["jvp"](residuals_of(train), params, solution) / rows
    before = molecule_losses(residuals_of(target), params).mean()
    changes = []
    for row in range(rows):
        kept = torch.arange(rows) != row
        changes.append(molecule_losses(residuals_of(target), {"w": fit(kept)}).mean() - before)
    changes = torch.stack(changes)
    assert spearmanr(scores, changes).statistic > 0.95
    assert float(scores @ changes / (scores @ scores)) == pytest.approx(1.0, abs=0.15)  # sign and size


# --------------------------------------------------------------------------------------------- a model on molecules


@pytest.fixture(scope="module")
def embedded():
    """The embedded checkpoint with a random head, its tokenizer, and 96 prepared molecules."""
    tokenizer = build_tokenizer()
    options = argparse.Namespace(smiles_form="canonical", max_length=256, invalid_smiles="error")
    molecules, _ = prepare_molecules(read_table(EMBEDDED_DATA).head(96), tokenizer, options, "data")
    torch.manual_seed(0)
    model = MolformerForRegression.from_pretrained(EMBEDDED_CHECKPOINT).eval()
    model.config.label_mean, model.config.label_std = [molecules["label"].mean()], [molecules["label"].std()]
    return model, tokenizer, molecules


@pytest.fixture(scope="module")
def tiny(tiny_checkpoint, embedded):
    """A model of two layers with random weights, and the molecules of `embedded`."""
    torch.manual_seed(0)
    model = MolformerForRegression.from_pretrained(tiny_checkpoint).eval()
    model.config.label_mean, model.config.label_std = embedded[0].config.label_mean, embedded[0].config.label_std
    return model, embedded[1], embedded[2]


def problem_of(embedded, pattern, chunk_size=32, curvature="ggn"):
    model, tokenizer, molecules = embedded
    return MoleculeProblem(model, tokenizer, choose_parameters(model, pattern), chunk_size, curvature)


def explicit_ggn(problem, molecules):
    """2 Jᵀ J / N from the Jacobian by torch.func.jacrev."""
    total = 0
    for _, rows in problem.chunks(molecules):
        jacobian = torch.func.jacrev(problem.residuals(rows))(problem.params)  # (B, 1, ...)
        jacobian = torch.cat([part.flatten(start_dim=2) for part in jacobian.values()], dim=2)[:, 0].double()
        total = total + 2 * jacobian.T @ jacobian
    return total / len(molecules)


@pytest.mark.parametrize("pattern", ["head", r"layer\.{last}\.output\.(dense\.bias|LayerNorm)|classifier"])
def test_lissa_on_molformer_is_near_the_exact_solution(embedded, pattern):
    """Reference: torch.linalg.solve with the explicit matrix, in float64. Goals: cosine and rank correlation 0.99."""
    _, _, molecules = embedded
    pattern = pattern.replace("{last}", str(embedded[0].config.num_hidden_layers - 1))
    problem, train, target = problem_of(embedded, pattern), molecules.iloc[:48], molecules.iloc[48:]
    gradient = problem.gradient(target)
    influence_args = InfluenceArguments(
        relative_damping=0.03, recursion_depth=120, num_repeats=1, hessian_batch_size=16
    )
    solutions, report = inverse_curvature(problem, train, gradient, influence_args, 0)
    matrix = explicit_ggn(problem, train)
    exact = torch.linalg.solve(
        matrix + report["damping"] * torch.eye(len(matrix), dtype=torch.float64), gradient.double()
    ).float()
    solution = solutions.mean(dim=0)
    assert torch.cosine_similarity(solution, exact, dim=0) > 0.99
    scores, expected = (problem.each(SCORES["jvp"], target, direction) for direction in (solution, exact))
    assert spearmanr(scores, expected).statistic > 0.99
    assert report["largest_eigenvalue"] == pytest.approx(float(torch.linalg.eigvalsh(matrix)[-1]), rel=0.1)


def test_scores_by_jvp_equal_scores_by_gradients_on_the_real_model(embedded):
    """Tolerance: 1e-5 of the largest, all parameters, float32."""
    _, _, molecules = embedded
    problem = problem_of(embedded, "all", chunk_size=8)
    gradient = problem.gradient(molecules.iloc[:16])
    fast, slow = (problem.each(SCORES[mode], molecules.iloc[16:32], gradient) for mode in SCORES)
    assert (fast - slow).abs().max() <= 1e-5 * slow.abs().max()


def test_no_more_molecules_than_a_chunk_are_computed_at_once(embedded, monkeypatch):
    """So memory does not grow with their number: no function of parameters is made of more of them."""
    _, _, molecules = embedded
    problem = problem_of(embedded, "last_1", chunk_size=8)
    sizes, residuals = [], problem.residuals
    monkeypatch.setattr(problem, "residuals", lambda rows: sizes.append(len(rows)) or residuals(rows))
    for count in (16, 48):
        rows = molecules.iloc[:count]
        gradient = problem.gradient(rows)
        problem.curvature(rows, gradient)
        problem.each(SCORES["jvp"], rows, gradient)
    assert max(sizes) == 8 and sum(sizes) == 3 * (16 + 48)


@pytest.mark.slow
def test_memory_at_the_size_of_molformer_xl_does_not_grow_with_the_molecules():
    """Reference: the peak of as many molecules as a chunk has; each count in a process of its own, random weights."""
    code = """
import sys
from modeling_molformer_reg import MolformerConfig, MolformerForRegression
from trainer_regression import peak_memory
from utils_checkpoints import build_tokenizer
from arguments import EMBEDDED_DATA, DataTrainingArguments
from utils_influence import SCORES, MoleculeProblem
from utils_molecules import prepare_molecules, read_table

tokenizer = build_tokenizer()
table = prepare_molecules(read_table(EMBEDDED_DATA), tokenizer, DataTrainingArguments(), EMBEDDED_DATA)[0]
molecules = table[table["text"].str.len() < 40].iloc[: int(sys.argv[1])]
model = MolformerForRegression(MolformerConfig(num_labels=1)).eval()
names = [name for name, _ in model.named_parameters()]
problem = MoleculeProblem(model, tokenizer, names, 16, "ggn")
gradient = problem.gradient(molecules)
problem.each(SCORES["jvp"], molecules, problem.curvature(molecules, gradient))
print(peak_memory())
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    peaks = []
    for count in ("16", "128"):
        done = subprocess.run([sys.executable, "-c", code, count], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout))
    few, many = peaks
    assert many < 1.2 * few


@pytest.mark.parametrize("curvature", PRODUCTS)
def test_products_do_not_depend_on_chunks_and_are_symmetric(embedded, curvature):
    _, _, molecules = embedded
    generator = torch.Generator().manual_seed(0)
    small, large = (problem_of(embedded, "last_1", size, curvature) for size in (5, 32))
    size = sum(tensor.numel() for tensor in small.params.values())
    first, second = torch.randn(2, size, generator=generator)
    rows = molecules.iloc[:13]
    image = large.curvature(rows, first)
    assert torch.allclose(small.curvature(rows, first), image, atol=1e-4 * float(image.abs().max()))
    assert torch.equal(large.curvature(rows, first), image)
    assert float(image @ second) == pytest.approx(float(large.curvature(rows, second) @ first), rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("room", [50_000, 5], ids=["kept states", "no room for them"])
def test_the_head_alone_is_computed_from_kept_states(embedded, monkeypatch, room):
    """Reference: the same through the whole model."""
    monkeypatch.setattr(utils_influence, "MOST_STATES", room)
    _, _, molecules = embedded
    fast, slow = problem_of(embedded, "head", chunk_size=4), problem_of(embedded, "head")
    slow.states = None
    rows = molecules.iloc[:13]
    vector = torch.randn(sum(t.numel() for t in fast.params.values()), generator=torch.Generator().manual_seed(0))
    for _ in range(2):  # the second time from what was kept
        for value, expected in (
            (fast.gradient(rows), slow.gradient(rows)),
            (fast.curvature(rows, vector), slow.curvature(rows, vector)),
            (fast.each(SCORES["jvp"], rows, vector), slow.each(SCORES["jvp"], rows, vector)),
            (fast.predictions(rows), slow.predictions(rows)),
        ):
            assert torch.allclose(value, expected, atol=1e-5 * float(expected.abs().max()))
    assert 0 < len(fast.states) <= 13


def test_descriptors_beside_the_state_are_in_every_product(tiny_checkpoint, embedded):
    """Reference: scores by gradients of each molecule through the whole model, of the head from its kept states."""
    torch.manual_seed(0)
    model = MolformerForRegression.from_pretrained(tiny_checkpoint, head_descriptors=["MolLogP", "TPSA"]).eval()
    model.config.label_mean, model.config.label_std = [2.0], [1.2]
    model.classifier.scale.set_scale([2.0, 70.0], [1.2, 40.0])
    given, rows = (model, embedded[1], embedded[2]), embedded[2].iloc[:13]
    fast, slow = problem_of(given, "head", chunk_size=4), problem_of(given, "head")
    slow.states = None
    size = sum(tensor.numel() for tensor in fast.params.values())
    assert size == 32 + 1 + (34 * 256 + 256) + (256 + 1)  # head, and the layers beside it
    vector = torch.randn(size, generator=torch.Generator().manual_seed(0))
    expected = slow.each(SCORES["per_sample_gradient"], rows, vector)
    for value in (fast.each(SCORES["jvp"], rows, vector), slow.each(SCORES["jvp"], rows, vector)):
        assert torch.allclose(value, expected, atol=1e-5 * float(expected.abs().max()))


def test_predictions_are_those_of_the_model(embedded):
    model, tokenizer, molecules = embedded
    predictions = problem_of(embedded, "head").predictions(molecules.iloc[:9])
    for index in range(9):
        encoded = {"input_ids": torch.tensor([molecules["input_ids"].iloc[index]])}
        assert float(predictions[index]) == pytest.approx(float(model(**encoded).logits), abs=1e-5)


@pytest.mark.parametrize("solver", ["lissa", "cg"])
def test_an_interrupted_solution_goes_on_from_its_file(tiny, tmp_path, solver, monkeypatch):
    """Reference: the run without interruption, bit for bit; other settings start anew."""
    monkeypatch.setattr(utils_influence, "FIXED_MOLECULES", 8)
    _, _, molecules = tiny
    train, target = molecules.iloc[:24], molecules.iloc[24:40]
    options = {"ihvp": solver, "relative_damping": 1e-4}
    options |= {"num_repeats": 2, "hessian_batch_size": 4} if solver == "lissa" else {}
    influence_args = InfluenceArguments(recursion_depth=10, tolerance=1e-6, **options)

    def run(problem, path, args=influence_args):
        return inverse_curvature(problem, train, problem.gradient(target), args, 0, path)

    whole, report = run(problem_of(tiny, "last_1"), None)
    path, broken = tmp_path / "state.safetensors", problem_of(tiny, "last_1")
    product, count, steps = broken.curvature, 0, {"lissa": (4, 14), "cg": (24, 7)}[solver]

    def failing(rows, vector, *_):
        nonlocal count
        count += path.exists() and len(rows) == steps[0]
        if count == steps[1]:
            raise KeyboardInterrupt
        return product(rows, vector)

    broken.curvature = failing
    with pytest.raises(KeyboardInterrupt):
        run(broken, path)
    going_on, products = problem_of(tiny, "last_1"), []
    product = going_on.curvature
    going_on.curvature = lambda rows, vector, *_: products.append(len(rows)) or product(rows, vector)
    again, again_report = run(going_on, path)
    assert torch.equal(again, whole)
    assert again_report.pop("earlier_seconds") > report.pop("earlier_seconds") == 0
    assert again_report == report
    assert 0 < products.count(steps[0]) < {"lissa": 20, "cg": 10}[solver]  # the first ones were not done again
    other = InfluenceArguments(recursion_depth=5, **options)
    anew, expected = (run(problem_of(tiny, "last_1"), file, other)[0] for file in (path, None))
    assert torch.equal(anew, expected)
    target = molecules.iloc[44:60]  # as another model's, another gradient is not gone on with either
    anew, expected = (run(problem_of(tiny, "last_1"), file, other)[0] for file in (path, None))
    assert torch.equal(anew, expected)


def test_parameters_are_chosen_by_name(embedded):
    model, _, _ = embedded
    assert len(choose_parameters(model, "all")) == len(list(model.parameters()))
    assert choose_parameters(model, "head") == ["classifier.out_proj.weight", "classifier.out_proj.bias"]
    last = choose_parameters(model, "last_2")
    assert {name.split(".layer.")[1][0] for name in last if ".layer." in name} == {"2", "3"}
    assert "molformer.LayerNorm.weight" in last and "classifier.out_proj.bias" in last
    assert choose_parameters(model, r"layer\.0\..*query\.bias") == [
        "molformer.encoder.layer.0.attention.self.query.bias"
    ]
    for wanted, message in (
        ("nothing", "matches no parameter.*molformer.embeddings.word_embeddings.weight"),
        ("last_7", "the model has 4 layers"),
        ("last_0", "the model has 4 layers"),
        ("(", "is no regular expression"),
    ):
        with pytest.raises(InputError, match=message):
            choose_parameters(model, wanted)


def test_the_damping_that_is_advised_makes_a_hessian_positive(tiny, caplog):
    """Reference: eigenvalues of the explicit Hessian of a bias and a LayerNorm, which has negative ones."""
    _, _, molecules = tiny
    problem = problem_of(tiny, r"layer\.1\.output\.LayerNorm|classifier", curvature="hessian")
    influence_args = InfluenceArguments(curvature="hessian", damping=1e-6, recursion_depth=1, num_repeats=1)
    train = molecules.iloc[:16]
    with caplog.at_level("WARNING"):
        _, report = inverse_curvature(problem, train, problem.gradient(molecules.iloc[16:32]), influence_args, 0)
    size = sum(tensor.numel() for tensor in problem.params.values())
    matrix = torch.stack([problem.curvature(train, vector) for vector in torch.eye(size)])
    values = torch.linalg.eigvalsh((matrix + matrix.T).double() / 2)
    assert values[0] < 0
    assert report["smallest_eigenvalue"] == pytest.approx(float(values[0]), rel=0.05)
    assert report["largest_eigenvalue"] == pytest.approx(float(values[-1]), rel=0.05)
    advised = float(caplog.text.split("Pass --damping ")[1].split()[0])
    assert advised > -values[0]
    assert not report["converged"]
    vector = torch.zeros(size).index_fill(0, torch.tensor([0]), 1.0)
    with pytest.raises(FloatingPointError, match=r"Raise --damping to more than 0\.5,"):
        conjugate_gradient_inverse_hvp(lambda v: -0.5 * v, vector, damping=0.1, tolerance=0.1, max_steps=1)


@pytest.mark.parametrize(("smallest", "largest", "damping"), [(-1.0, 10.0, 0.3), (-20.0, 10.0, 0.6), (1.0, 10.0, 0.3)])
def test_relative_damping_is_of_the_eigenvalue_farthest_from_zero(tiny, monkeypatch, smallest, largest, damping):
    _, _, molecules = tiny
    problem, rows = problem_of(tiny, "head", curvature="hessian"), molecules.iloc[:8]
    monkeypatch.setattr(utils_influence, "extreme_eigenvalues", lambda *args: (smallest, largest))
    influence_args = InfluenceArguments(curvature="hessian", relative_damping=0.03)
    values = utils_influence.measure_curvature(problem, rows, RandomBatches(problem, rows, 4, 0), influence_args)
    assert values["damping"] == pytest.approx(damping)
    assert values["scale"] == pytest.approx(1.5 * max(abs(smallest), largest) + damping)


def test_the_scale_that_is_advised_is_half_of_the_largest_eigenvalue(tiny, monkeypatch, caplog):
    _, _, molecules = tiny
    problem, rows = problem_of(tiny, "head"), molecules.iloc[:8]
    monkeypatch.setattr(utils_influence, "extreme_eigenvalues", lambda *args: (0.0, 10.0))
    for scale, warned in (("5.2", False), ("5", True)):
        influence_args = InfluenceArguments(damping=0.3, scale=scale)
        utils_influence.measure_curvature(problem, rows, RandomBatches(problem, rows, 4, 0), influence_args)
        assert ("Give more than 5.15." in caplog.text) == warned


def test_scores_are_the_mean_over_repeats_with_their_deviation(tiny):
    """Reference: the products of each solution and of the gradient, one by one."""
    _, _, molecules = tiny
    problem, external = problem_of(tiny, "head"), molecules.iloc[8:20]
    gradient = problem.gradient(molecules.iloc[:8])
    noise = torch.randn(3, len(gradient), generator=torch.Generator().manual_seed(0))
    solutions = gradient + noise * gradient.norm()
    table, agreement = score_molecules(problem, external, solutions, gradient, InfluenceArguments())
    each = np.stack([problem.each(SCORES["per_sample_gradient"], external, row).numpy() for row in solutions])
    assert np.allclose(table["score"], each.mean(axis=0), rtol=1e-4, atol=1e-6)
    assert np.allclose(table["score_sd"], each.std(axis=0, ddof=1), rtol=1e-4, atol=1e-6)
    plain = problem.each(SCORES["per_sample_gradient"], external, gradient).numpy()
    assert np.allclose(table["gradient_dot"], plain, rtol=1e-4, atol=1e-6)
    pairs = [(0, 1), (0, 2), (1, 2)]
    ranks = np.mean([spearmanr(each[first], each[second]).statistic for first, second in pairs])
    assert agreement["agreement_of_ranks"] == pytest.approx(ranks)
    assert "score_sd" not in score_molecules(problem, external, solutions[:1], gradient, InfluenceArguments())[0]


def test_the_damping_of_group_influence_is_a_share_of_the_largest_eigenvalue(tiny):
    """Reference: the curvature of the mean training loss, written out."""
    _, _, molecules = tiny
    parts = {"train": molecules.iloc[:24], "target": molecules.iloc[24:40]}
    gradients, residuals, damping = utils_influence.linearize(problem_of(tiny, "head"), parts, 0)
    known = gradients["train"]
    largest = torch.linalg.eigvalsh(2 * known.T @ known / len(known))[-1]
    assert damping == pytest.approx(1e-3 * float(largest), rel=0.01)
    losses = problem_of(tiny, "head").each(molecule_losses, parts["target"]).double()
    assert torch.allclose(residuals["target"].square(), losses, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("count", [1, 7])
def test_halves_of_the_target_agree_as_far_as_their_scores_do(tiny, count):
    """References: gradients of all and of each half; the rank correlation of their products."""
    _, _, molecules = tiny
    problem, target, external = problem_of(tiny, "head"), molecules.iloc[:count], molecules.iloc[8:20]
    halves, gradient = gradients_of_halves(problem, target)
    torch.testing.assert_close(gradient, problem.gradient(target))
    _, agreement = score_molecules(problem, external, gradient[None], gradient, InfluenceArguments(), halves)
    if count == 1:
        assert agreement["agreement_of_halves"] is None
        return
    rows = utils_influence.halves_of(target)
    scores = [problem.each(scores_by_jvp, external, problem.gradient(target.iloc[half])) for half in rows]
    expected = spearmanr(*scores).statistic
    assert agreement["agreement_of_halves"] == pytest.approx(expected)


def test_a_molecule_that_repeats_is_in_one_half():
    """Stereo twins are one molecule here, whatever the model reads of them."""
    groups = [f"{'C' * (number // 3 + 1)}O" for number in range(60)]  # each three times
    molecules = pd.DataFrame({"group": groups, "text": [f"{group}{row}" for row, group in enumerate(groups)]})
    first, second = utils_influence.halves_of(molecules)
    assert sorted([*first, *second]) == list(range(60)) and len(first) == len(second) == 30
    assert {groups[row] for row in first}.isdisjoint(groups[row] for row in second)
    assert [len(rows) for rows in utils_influence.halves_of(pd.DataFrame({"group": ["CCO", "CCO"]}))] == [2]


def test_a_prediction_does_not_depend_on_how_far_the_label_is(tiny):
    _, _, molecules = tiny
    problem, rows = problem_of(tiny, "head"), molecules.iloc[:3]
    far = problem.predictions(rows.assign(label=1e7))
    assert torch.equal(far, problem.predictions(rows))


def linear_molecules(seed, noise=0.3, train=120, target=200, external=100, wrong=30):
    """Gradients and residuals of a linear model with ridge penalty that was fitted to its training molecules; the
    first external labels are wrong. And the penalty."""
    generator = torch.Generator().manual_seed(seed)
    counts = {"train": train, "target": target, "external": external}
    truth, penalty = torch.randn(40, generator=generator, dtype=torch.float64), 3.0
    gradients = {k: torch.randn(n, 40, generator=generator, dtype=torch.float64) for k, n in counts.items()}
    labels = {k: g @ truth + noise * torch.randn(len(g), generator=generator).double() for k, g in gradients.items()}
    labels["external"][:wrong] = labels["external"][:wrong].roll(1)
    return gradients, labels, penalty


def ridge(features, labels, penalty):
    """Weights that minimize the summed squared residuals and `penalty` times the squared weights."""
    return torch.linalg.solve(features.T @ features + penalty * torch.eye(features.shape[1]), features.T @ labels)


def residuals_of(gradients, labels, weights):
    return {name: features @ weights - labels[name] for name, features in gradients.items()}


def test_group_influence_is_that_of_learning_the_molecules_one_after_the_other():
    """Reference: ridge regression, fitted again with each molecule beside those that were chosen before it."""
    gradients, labels, penalty = linear_molecules(0, external=30, wrong=10)
    features, known = gradients["train"], labels["train"]
    start = residuals_of(gradients, labels, ridge(features, known, penalty))
    parts = [np.arange(200) % 2 == number for number in (0, 1)]
    rank, gains, weight = group_influence(gradients, start, 2 * penalty / len(features), parts)
    assert sorted(rank.tolist()) == list(range(1, 31))
    before, halves = start, []
    for number in range(1, 31):
        expected = torch.full((30,), -math.inf, dtype=torch.float64)
        after = {}
        for z in torch.nonzero(rank >= number)[:, 0].tolist():
            more = torch.cat([features, gradients["external"][[z]]]), torch.cat([known, labels["external"][[z]]])
            after[z] = residuals_of(gradients, labels, ridge(*more, penalty))
            change = {name: before[name] - after[z][name] for name in before}
            if number == 1:
                lowered = start["target"] * change["target"]
                halves.append([lowered[part].mean() for part in parts])
            shared = weight * start["target"] - (start["target"] - before["target"])
            expected[z] = 120 * (2 * shared * change["target"] - change["target"].square()).mean()
        chosen = int(torch.nonzero(rank == number))
        assert float(gains[chosen]) == pytest.approx(float(expected[chosen]), rel=1e-6, abs=1e-9)
        assert int(expected.argmax()) == chosen
        features = torch.cat([features, gradients["external"][[chosen]]])
        known, before = torch.cat([known, labels["external"][[chosen]]]), after[chosen]
    agreement = np.corrcoef(np.transpose(halves))[0, 1]
    assert weight == pytest.approx(2 * agreement / (1 + agreement))


def test_group_influence_finds_wrong_labels_where_scores_of_first_order_do_not():
    """Ridge regression: 30 of 100 labels are wrong; the better half is to help on molecules that chose nothing."""
    areas, errors = [], []
    for seed in range(8):
        gradients, labels, penalty = linear_molecules(seed)
        before = residuals_of(gradients, labels, ridge(gradients["train"], labels["train"], penalty))
        halves = [np.arange(100), np.arange(100, 200)]
        rank, _, _ = group_influence(gradients, before, 2 * penalty / len(gradients["train"]), halves)
        inverse = torch.linalg.inv(gradients["train"].T @ gradients["train"] + penalty * torch.eye(40))
        direction = inverse @ (gradients["target"] * before["target"][:, None]).mean(dim=0)
        first_order = before["external"] * (gradients["external"] @ direction)
        scores = (-rank.double(), first_order)
        areas.append([roc_auc_score(np.arange(100) < 30, -values.numpy()) for values in scores])
        unseen, others, _ = linear_molecules(1000 + seed, target=500)
        truth = torch.randn(40, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        row = []
        for values in scores:
            chosen = values.argsort(descending=True)[:50]
            features = torch.cat([gradients["train"], gradients["external"][chosen]])
            found = ridge(features, torch.cat([labels["train"], labels["external"][chosen]]), penalty)
            row.append(float((unseen["target"] @ (found - truth)).square().mean()))
        errors.append(row)
    (found, chance), errors = np.mean(areas, axis=0), np.array(errors)
    assert found > 0.9 and chance < 0.65 and (errors[:, 0] < errors[:, 1]).all()


@pytest.mark.parametrize(("target", "external"), [(1, 5), (8, 1), (8, 2)])
def test_too_few_molecules_have_the_group_influence_of_least_harm(target, external, tiny, caplog):
    _, _, molecules = tiny
    parts = (molecules.iloc[:8], molecules.iloc[8 : 8 + target], molecules.iloc[16 : 16 + external])
    with caplog.at_level("WARNING", logger="molformer"):
        columns, report = utils_influence.order_by_group_influence(problem_of(tiny, "head"), *parts, seed=0)
    assert sorted(columns["group_rank"]) == list(range(1, external + 1)) and report["group_weight"] == 0
    gains = columns["group_influence"][np.argsort(columns["group_rank"])]
    assert gains[0] <= 0 and "group_weight 0" in caplog.text  # later ones may undo what the first one did


@pytest.mark.parametrize(("depth", "tail"), [(0, 0.5), (1, 1.0), (20, 0.0), (20, 0.5), (31, 1.0)])
def test_where_there_is_no_curvature_lissa_damps_by_its_implicit_damping(depth, tail):
    vector = torch.tensor([1.0, -2.0], dtype=torch.float64)
    answer = lissa_inverse_hvp(torch.zeros_like, vector, damping=0.0, scale=3.0, recursion_depth=depth,
                               tail_fraction=tail)[0]  # fmt: skip
    assert torch.allclose(answer, vector / utils_influence.implicit_damping(3.0, depth, tail))


def test_a_projection_keeps_inner_products(tiny):
    """References: the gradients themselves, which a projection to as many numbers turns alone."""
    _, _, molecules = tiny
    problem, rows = problem_of(tiny, "head"), molecules.iloc[:6]
    size = sum(tensor.numel() for tensor in problem.params.values())
    gradients, residuals = problem.projected_gradients(rows, size, 0)
    for place in range(6):
        leaves = utils_influence.leaves_of(problem.params)
        residual = problem.residuals(rows.iloc[[place]])(leaves)[0, 0]
        plain = utils_influence.flat_gradient(residual, leaves)
        assert residuals[place] == pytest.approx(float(residual.detach()), abs=1e-6)
        assert torch.allclose(gradients[place].abs(), plain.abs(), atol=1e-6)
    vectors = torch.randn(2, 50_001, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    vectors[1] += vectors[0]
    products = []
    for seed in range(40):
        signs = torch.randint(2, (50_001,), generator=torch.Generator().manual_seed(seed)) * 2 - 1
        one, other = (utils_influence.project(vector, signs, 1000) for vector in vectors)
        products.append(float(one @ other))
    exact = float(vectors[0] @ vectors[1])
    assert np.mean(products) == pytest.approx(exact, rel=0.03) and np.std(products) < 0.1 * exact


def test_scores_that_are_not_finite_are_refused(tiny):
    _, _, molecules = tiny
    problem = problem_of(tiny, "head")
    gradient = problem.gradient(molecules.iloc[:8])
    broken = torch.full_like(gradient, math.inf)[None]
    with pytest.raises(InputError, match=r"The scores of 4 molecules are not finite, first at row 8: its label \("):
        score_molecules(problem, molecules.iloc[8:12], broken, gradient, InfluenceArguments())


@pytest.mark.parametrize(
    ("share", "depth", "tail", "cosine", "verdict"),
    [
        (0.03, 200, 0.5, 0.99, "^converged$"),
        (0.03, 101, 0.5, 0.99, "^converged$"),
        (0.03, 151, 1.0, 0.99, "^converged$"),
        (
            0.03,
            99,
            0.5,
            0.99,
            r"^cut short: 99 steps add a damping of .* Raise --recursion_depth to 101, or the damping$",
        ),
        (
            0.03,
            149,
            1.0,
            0.99,
            r"^cut short: 149 steps add a damping of .* Raise --recursion_depth to 151, or the damping$",
        ),
        (1e-3, 200, 0.5, 0.75, r"^cut short: .* Raise --recursion_depth to 3001, or the damping$"),
        (0.03, 50, 0.5, 0.97, r"^cut short"),
        (0.03, 3, 0.5, 0.7, r"^not converged: relative residual .*, --tolerance 0.3. Raise --recursion_depth"),
    ],
)
def test_a_small_residual_of_a_short_recursion_is_not_called_converged(share, depth, tail, cosine, verdict):
    """A diagonal curvature, eigenvalues from 1e-6 to 1, a gradient as it has them; reference: the exact solution."""
    values = torch.logspace(-6, 0, 400, dtype=torch.float64)
    vector = values.sqrt() * torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    settings = {"damping": share, "scale": 1.5 + share, "recursion_depth": depth}
    answer = lissa_inverse_hvp(lambda v: values * v, vector, tail_fraction=tail, **settings)[0]
    similarity = float(torch.cosine_similarity(answer, vector / (values + share), dim=0))
    residual = float(((values + share) * answer - vector).norm() / vector.norm())
    implicit = utils_influence.implicit_damping(settings["scale"], depth, tail)
    report = {"residual": residual, "tolerance": 0.3, "implicit_damping": implicit, **settings}
    report["largest_eigenvalue_of_batches"] = [1.0]
    judged = utils_influence.judge(report, InfluenceArguments(recursion_depth=depth, tail_fraction=tail))
    assert re.search(verdict, judged["verdict"]) and judged["converged"] == (judged["verdict"] == "converged")
    assert cosine < similarity < cosine + 0.1 and (similarity > 0.99 or not judged["converged"])


def test_iterates_that_grow_with_alternating_signs_are_not_called_converged():
    """Above twice the scale by one percent the mean of 100 iterates is near the solution, and the last one is not."""
    vector, settings = torch.ones(1, dtype=torch.float64), {"damping": 0.03, "scale": 0.5, "recursion_depth": 200}
    eigenvalue, states = 2.02 * settings["scale"] - settings["damping"], []
    answer = lissa_inverse_hvp(
        lambda v: eigenvalue * v,
        vector,
        tail_fraction=0.5,
        on_step=lambda state: states.append(state.iterate),
        **settings,
    )[0]
    residual = float(((eigenvalue + settings["damping"]) * answer - vector).norm() / vector.norm())
    assert residual < 0.3 and float(states[-1].norm()) > 20 and len(states) == 200
    report = {"residual": residual, "tolerance": 0.3, "implicit_damping": 0.004, **settings}
    report["largest_eigenvalue_of_batches"] = [0.1, eigenvalue]
    judged = utils_influence.judge(report, InfluenceArguments())
    assert not judged["converged"] and judged["verdict"].endswith("Give more than 0.505")


def test_a_hessian_that_damping_does_not_make_positive_is_not_called_converged():
    report = {"residual": 0.01, "tolerance": 0.3, "damping": 0.1, "smallest_eigenvalue": -0.5}
    for solver in ("cg", "lissa"):
        judged = utils_influence.judge(report, InfluenceArguments(ihvp=solver, curvature="hessian"))
        assert not judged["converged"] and "Raise --damping to 0.55" in judged["verdict"]


def test_the_answer_of_conjugate_gradients_is_judged_by_its_residual():
    report = {"residual": 2.8, "tolerance": 1e-4, "damping": 0.1}
    judged = utils_influence.judge(report, InfluenceArguments(ihvp="cg"))
    assert not judged["converged"] and judged["verdict"].endswith("Raise --recursion_depth")
    assert not utils_influence.judge({**report, "residual": math.nan}, InfluenceArguments(ihvp="cg"))["converged"]


def test_lissa_that_is_worse_than_no_solution_is_refused(tiny):
    """With batches of one molecule at a scale that lets the noise grow, and does not diverge."""
    _, _, molecules = tiny
    problem, train = problem_of(tiny, "head"), molecules.iloc[:16]
    gradient = problem.gradient(molecules.iloc[16:32])
    answers = torch.stack([-gradient])
    problem.curvature = lambda rows, vector, description=None: vector
    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(InputError, match="no solution at all is 1: .* at step 0"),
    ):
        patch.setattr(utils_influence, "solve_by_lissa", lambda *args: answers)
        inverse_curvature(problem, train, gradient, InfluenceArguments(), 0)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(InputError, match="The residual is not finite"):
        patch.setattr(utils_influence, "solve_by_lissa", lambda *args: answers * math.nan)
        inverse_curvature(problem, train, gradient, InfluenceArguments(), 0)


@pytest.mark.parametrize(
    ("factor", "message"), [(0.0, "gradients are zero or not finite"), (math.nan, "or not finite")]
)
def test_a_model_without_gradients_has_no_group_influence(tiny, monkeypatch, factor, message):
    _, _, molecules = tiny
    problem = problem_of(tiny, "head")
    projected = problem.projected_gradients
    monkeypatch.setattr(problem, "projected_gradients", lambda *args: [factor * part for part in projected(*args)])
    with pytest.raises(InputError, match=message):
        utils_influence.linearize(problem, {"train": molecules.iloc[:8]}, 0)


def test_long_passes_over_molecules_have_a_progress_bar(tiny, capsys, monkeypatch):
    """From five seconds on; here from the first."""
    plain = utils_influence.tqdm
    monkeypatch.setattr(utils_influence, "tqdm", lambda *args, **options: plain(*args, **{**options, "delay": 0}))
    _, _, molecules = tiny
    problem, train = problem_of(tiny, "all"), molecules.iloc[:16]
    problem.show_progress = True
    gradient = problem.gradient(molecules.iloc[16:32])
    influence_args = InfluenceArguments(recursion_depth=5, num_repeats=1)
    solutions, _ = inverse_curvature(problem, train, gradient, influence_args, 0)
    score_molecules(problem, molecules.iloc[32:40], solutions, gradient, influence_args)
    shown = capsys.readouterr().err
    for name in ("Gradient of the target loss", "Largest eigenvalues", "LiSSA", "Residual", "Scores"):
        assert f"{name}:" in shown, name
    assert re.search(r"LiSSA: .*norm=\S+, residual=0\.\d", shown)


def test_damping_may_be_given_and_parameters_must_matter(tiny):
    _, _, molecules = tiny
    problem, train = problem_of(tiny, "head"), molecules.iloc[:16]
    gradient = problem.gradient(train)
    influence_args = InfluenceArguments(damping=0.25, num_repeats=1, recursion_depth=5)
    report = inverse_curvature(problem, train, gradient, influence_args, 0)[1]
    assert report["damping"] == 0.25 and report["scale"] > 0.25
    problem.curvature = lambda rows, vector, *_: 0 * vector
    with pytest.raises(InputError, match="The curvature is zero"):
        inverse_curvature(problem, train, gradient, InfluenceArguments(), 0)
    problem.curvature = lambda rows, vector, *_: math.nan * vector
    with pytest.raises(InputError, match="The curvature is not finite"):
        inverse_curvature(problem, train, gradient, InfluenceArguments(), 0)


@pytest.mark.parametrize("solver", ["lissa", "cg"])
def test_the_verdict_knows_a_solution_of_all_training_molecules(embedded, monkeypatch, solver):
    """The residual is that of all training molecules, not of the few that it is watched on."""
    monkeypatch.setattr(utils_influence, "FIXED_MOLECULES", 8)
    _, _, molecules = embedded
    problem, train, target = problem_of(embedded, "head"), molecules.iloc[:64], molecules.iloc[64:]
    gradient = problem.gradient(target)
    options = {"lissa": {"hessian_batch_size": 32}, "cg": {"recursion_depth": 100, "tolerance": 1e-3}}[solver]
    influence_args = InfluenceArguments(ihvp=solver, **options)
    solutions, report = inverse_curvature(problem, train, gradient, influence_args, 0)
    solution = solutions.mean(dim=0)
    left = problem.curvature(train, solution) + report["damping"] * solution - gradient
    assert report["residual"] == pytest.approx(float(left.norm() / gradient.norm()), rel=1e-5)
    assert report["converged"]
    if solver == "lissa":  # the eight that were watched have another solution
        assert report["trace"][-1]["residual"] > 2 * report["residual"]
