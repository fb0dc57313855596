"""Influence functions: curvature products, inverse-curvature-vector products by LiSSA and conjugate gradients, scores.

    python -c "import utils_influence; help(utils_influence.lissa_inverse_hvp)"

First the mathematics, which knows vectors and functions only; then a model on molecules, in one or many processes.
What is scored, selected and learned again is in run_influence.py.

Koh and Liang, Understanding black-box predictions via influence functions, ICML 2017,
https://arxiv.org/abs/1703.04730. Agarwal et al., Second-order stochastic optimization for machine learning in linear
time (LiSSA), JMLR 18 (2017), https://arxiv.org/abs/1602.03943. Shape letters: B molecules of a batch, K labels, P
parameters, R repeats, N molecules.
"""

import contextlib
import hashlib
import json
import logging
import math
import os
import re
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, reduce
from safetensors import safe_open
from safetensors.torch import save_file
from scipy import linalg
from tqdm.auto import tqdm
from transformers import DataCollatorWithPadding

from arguments import InputError
from utils_molecules import descriptors_of


LISSA_SETTINGS = ("recursion_depth", "num_repeats", "tail_fraction", "hessian_batch_size")
MOST_STATES = 50_000  # states that are kept: 154 MB of MoLFormer-XL, 194 MB with all descriptors
PROJECTION_SIZE = 4096
GROUP_DAMPING = 1e-3  # of group influence, as a share of the largest eigenvalue
MOST_IN_GROUP = 5_000  # molecules: tables of all pairs take 0.6 GB, and some minutes
FIXED_MOLECULES = 128  # on which largest eigenvalue and residual are measured

logger = logging.getLogger("molformer.influence")


# -------------------------------------------------------------------------------------------------- the mathematics
#
# A model is here a function of its parameters (a dictionary of tensors): `residuals(params)` of shape (B, K). The loss
# of a molecule is the sum of its squared residuals. Vectors are flat, shape (P,).


def flatten(tensors):
    """Returns the tensors of a dictionary as one vector, shape (P,)."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors.values()])


def unflatten(vector, params):
    """Returns a vector (P,) as a dictionary of tensors with the names and shapes of `params`."""
    parts = vector.split([tensor.numel() for tensor in params.values()])
    return {name: part.view_as(params[name]) for name, part in zip(params, parts, strict=True)}


def molecule_losses(residuals, params):
    """Returns the loss of each molecule, shape (B,)."""
    return residuals(params).square().sum(dim=-1)


def leaves_of(params):
    """Returns the parameters as leaves that gradients are taken for."""
    return {name: tensor.detach().requires_grad_() for name, tensor in params.items()}


def flat_gradient(value, leaves, **options):
    """Returns the gradient of a number, shape (P,); zeros where it does not depend on a parameter."""
    gradients = torch.autograd.grad(value, list(leaves.values()), materialize_grads=True, **options)
    return torch.cat([gradient.reshape(-1) for gradient in gradients])


def loss_gradient(residuals, params):
    """Returns the gradient of the summed losses, shape (P,)."""
    leaves = leaves_of(params)
    return flat_gradient(molecule_losses(residuals, leaves).sum(), leaves)


def ggn_vector_product(residuals, params, vector):
    """Returns the generalized Gauss-Newton matrix of the summed losses times a vector, shape (P,).

    With J the Jacobian of the residuals it is 2 Jᵀ J v: a forward-mode product, then a reverse-mode one (Schraudolph
    2002, https://doi.org/10.1162/08997660260028683). Positive semi-definite, and the Hessian where residuals vanish.
    """
    _, tangent = torch.func.jvp(residuals, (params,), (unflatten(vector, params),))  # J v, (B, K)
    _, pull_back = torch.func.vjp(residuals, params)
    return flatten(pull_back(2 * tangent)[0])


def hessian_vector_product(residuals, params, vector):
    """Returns the Hessian of the summed losses times a vector, shape (P,), by differentiating twice.

    Pearlmutter 1994, https://doi.org/10.1162/neco.1994.6.1.147. Away from a minimum it has negative eigenvalues.
    """
    leaves = leaves_of(params)
    slope = flat_gradient(molecule_losses(residuals, leaves).sum(), leaves, create_graph=True) @ vector
    return flat_gradient(slope, leaves)


PRODUCTS = {"ggn": ggn_vector_product, "hessian": hessian_vector_product}


def scores_by_jvp(residuals, params, direction):
    """Returns ∇L(z)·direction of every molecule z, shape (B,): one forward-mode product, no gradient in memory."""

    def losses(params):
        return molecule_losses(residuals, params)

    return torch.func.jvp(losses, (params,), (unflatten(direction, params),))[1]


def scores_by_gradients(residuals, params, direction):
    """Returns the same from the gradient of every molecule, one after the other: the reference, and slower."""
    leaves = leaves_of(params)
    losses = molecule_losses(residuals, leaves)
    return torch.stack([flat_gradient(loss, leaves, retain_graph=len(losses) > 1) @ direction for loss in losses])


SCORES = {"jvp": scores_by_jvp, "per_sample_gradient": scores_by_gradients}


def project(vector, signs, size):
    """Returns a vector (P,) in a random projection, shape (size,), that keeps inner products in expectation.

    Entries get random signs and are summed, every `size`-th into one (a count sketch, Charikar et al. 2002,
    https://doi.org/10.1016/S0304-3975(03)00400-6, with places in turn). With `size` = P nothing is lost.
    """
    return torch.nn.functional.pad(vector * signs, (0, -len(vector) % size)).view(-1, size).sum(dim=0)


def group_influence(gradients, residuals, damping, halves, on_step=None):
    """Orders external molecules by what each is expected to lower the loss of others by, beside those before it.

    In a model that is linear in its parameters, with the gradients g of the residuals r, one more training molecule z
    lowers the residual of every x by d_x = b_xz r_z / (1 + b_zz), b_xz being 2 g_xᵀ (N (C + damping I))^-1 g_z; then r
    is less by d, and b_xy by b_xz b_yz / (1 + b_zz) (Sherman and Morrison 1950). The loss falls by 2 r_x d_x - d_x²
    (to first order this is the influence score; Basu et al., Second-order group influence functions, 2020,
    https://arxiv.org/abs/1911.00418). Of the target's residuals only a part holds for others like them: w r_x, w being
    the correlation of what two halves of the target say of each z, stepped up for both together (Spearman and Brown
    1910; Kelley 1927). So the gain is the mean of 2 w r_x d_x - d_x² over the target, and what is left of w r_x is
    less by d_x afterwards; each time the z of the largest gain is added. A wrong label has an r_z that nobody shares:
    its first part is chance, its d² a loss to all.

    Args:
        gradients (`dict[str, torch.Tensor]`): of the `train` (N), `target` (n) and `external` (M) molecules, in any
            coordinates that keep inner products; shape (N, p), (n, p), (M, p).
        residuals (`dict[str, torch.Tensor]`): their residuals, shape (N,), (n,), (M,).
        halves (`list`): positions of two halves of the target; nothing is known of w where there are not two.
        on_step (`Callable`, *optional*): called after every molecule.
    Returns:
        rank of each molecule from 1, and its gain when it was added, times N; both of shape (M,). And w.
    """
    train, external = gradients["train"], gradients["external"]
    count = len(residuals["target"])
    matrix = torch.zeros(train.shape[1], train.shape[1], dtype=train.dtype)
    matrix.diagonal().fill_(len(train) * damping)
    matrix.addmm_(train.T, train, alpha=2)
    # in its own place, which PyTorch has no way for: this is the largest thing in memory
    factor = linalg.cho_factor(matrix.numpy().T, lower=True, overwrite_a=True, check_finite=False)
    both = torch.cat([gradients["target"], external])  # (n + M, p)
    solved = torch.from_numpy(linalg.cho_solve(factor, external.T.numpy(), check_finite=False))  # (p, M)
    pull = 2 * both @ solved  # b, (n + M, M)
    residual, own = residuals["external"].clone(), pull[count:]
    step = residual / (1 + own.diagonal())
    lowered = residuals["target"][:, None] * pull[:count] * step  # (n, M)
    agreement = 0.0
    if len(halves) == 2 and len(external) > 2:  # a correlation of two molecules says nothing
        means = torch.stack([lowered[rows].mean(dim=0) for rows in halves])
        agreement = float(torch.corrcoef(means)[0, 1])
    weight = 2 * agreement / (1 + agreement) if agreement > 0 else 0.0
    shared = weight * residuals["target"]  # what is left to lower
    rank, gains = torch.zeros(len(external), dtype=torch.long), torch.zeros_like(residual)
    for number in range(1, len(external) + 1):
        step = residual / (1 + own.diagonal())
        spread = torch.linalg.vector_norm(pull[:count], dim=0).square()
        gain = (2 * step * (shared @ pull[:count]) - step.square() * spread) / count
        z = int(torch.where(rank == 0, gain, -math.inf).argmax())
        rank[z], gains[z] = number, len(train) * gain[z]
        shared -= pull[:count, z] * step[z]
        residual -= own[:, z] * step[z]
        pull.addr_(pull[:, z].clone(), own[:, z].clone(), alpha=-1 / (1 + float(own[z, z])))
        if on_step is not None:
            on_step()
    return rank, gains, weight


def extreme_eigenvalues(product, vector, steps=20):
    """Returns about the smallest and the largest eigenvalue of a symmetric matrix, by Lanczos from a vector (P,).

    Both ends settle first (Lanczos 1950, https://doi.org/10.6028/jres.045.026); three vectors are in memory. Rounding
    lets eigenvalues come twice, which moves no end.

    Args:
        product (`Callable`): maps a vector (P,) to the matrix times it.
    """
    vector = vector / vector.norm()
    before, beta, diagonal, beside = torch.zeros_like(vector), 0.0, [], []
    for _ in range(steps):
        image = product(vector) - beta * before
        diagonal.append(float(image @ vector))
        image = image - diagonal[-1] * vector
        beta = float(image.norm())
        beside.append(beta)
        if beta <= 10 * torch.finfo(vector.dtype).eps * max(map(abs, diagonal)):
            break  # what has been seen is an invariant subspace
        before, vector = vector, image / beta
    tridiagonal = np.diag(diagonal) + np.diag(beside[:-1], 1) + np.diag(beside[:-1], -1)
    if not np.isfinite(tridiagonal).all():
        return math.nan, math.nan
    values = np.linalg.eigvalsh(tridiagonal)
    return float(values[0]), float(values[-1])


@dataclass
class LissaState:
    """Where a LiSSA run stands: enough to go on from. `iterate` is h_t; `tail` the sum of the averaged iterates."""

    iterate: torch.Tensor
    tail: torch.Tensor
    step: int = 0
    answers: list = field(default_factory=list)  # of the finished repeats, each (P,)


def averaged_iterates(recursion_depth, tail_fraction):
    """Returns the number of last iterates whose mean is the answer of LiSSA."""
    return max(1, round(tail_fraction * recursion_depth))


def implicit_damping(scale, recursion_depth, tail_fraction):
    """Returns what a LiSSA of so many steps adds to a curvature of zero, as `damping` does: h_t is (t + 1) v there."""
    return scale / (recursion_depth + 1 - (averaged_iterates(recursion_depth, tail_fraction) - 1) / 2)


def lissa_inverse_hvp(
    hvp, vector, *, damping, scale, recursion_depth, num_repeats=1, tail_fraction=0.0, state=None, on_step=None
):
    """Estimates (C + damping * I)^-1 vector with LiSSA (Agarwal et al. 2017; Koh and Liang 2017), once a repeat.

    h_0 = v, h_t = v + h_{t-1} - (C h_{t-1} + damping h_{t-1}) / scale for t = 1 ... T; the answer is the mean of the
    last T * tail_fraction iterates (at least of h_T) over scale: a truncated Neumann series. It converges while every
    eigenvalue of C + damping * I is between 0 and 2 * scale, in each of the batches that C is estimated from.

    Args:
        hvp (`Callable`): maps a vector (P,) to C times it, (P,); each call may use a new random batch.
        vector (`torch.Tensor`): v, shape (P,).
        state (`LissaState`, *optional*): where an earlier call was stopped. `hvp` must go on with the next batch.
        on_step (`Callable`, *optional*): called with the state after every step.
    Returns:
        `torch.Tensor` of shape (R, P), on `vector`'s device and in its dtype.
    Raises:
        FloatingPointError: if the estimate grows beyond what a convergent run can reach, or is not finite; the message
            gives step, norm and what to raise.
    """
    if state is None:
        state = LissaState(vector, torch.zeros_like(vector))
    averaged = averaged_iterates(recursion_depth, tail_fraction)
    size = float(vector.norm())
    while len(state.answers) < num_repeats:
        before = size
        while state.step < recursion_depth:
            curved = hvp(state.iterate) + damping * state.iterate
            state.iterate = vector + state.iterate - curved / scale
            state.step += 1
            norm = float(state.iterate.norm())
            # no step of a convergent run adds more than |v|; ten times that leaves room for single bad batches
            if not norm <= 10 * (state.step + 1) * size:
                raise FloatingPointError(
                    f"LiSSA diverged: norm {before:.1e} -> {norm:.1e} at step {state.step} of {recursion_depth} with "
                    f"scale={scale:.4g} and damping={damping:.4g}. Raise --scale."
                )
            before = norm
            if state.step > recursion_depth - averaged:
                state.tail = state.tail + state.iterate
            if on_step is not None:
                on_step(state)
        mean = state.tail / averaged if recursion_depth else state.iterate
        state.answers.append(mean / scale)
        state.iterate, state.tail, state.step = vector, torch.zeros_like(vector), 0
    return torch.stack(state.answers)


@dataclass
class CgState:
    """Where conjugate gradients stand: the answer so far, its residual, the next direction, each (P,)."""

    answer: torch.Tensor
    residual: torch.Tensor
    direction: torch.Tensor
    step: int = 0


def conjugate_gradient_inverse_hvp(hvp, vector, *, damping, tolerance, max_steps, state=None, on_step=None):
    """Solves (C + damping * I) x = vector by conjugate gradients (Hestenes and Stiefel 1952), from x = 0.

    Args:
        hvp (`Callable`): maps a vector (P,) to C times it, always with the same symmetric C.
        tolerance (`float`): stops when |vector - (C + damping I) x| is below `tolerance` times |vector|.
        state (`CgState`, *optional*): where an earlier call was stopped.
        on_step (`Callable`, *optional*): called with the state after every step.
    Returns:
        `torch.Tensor` of shape (P,).
    Raises:
        FloatingPointError: if C + damping * I is met with a direction in which it is not positive.
    """
    if state is None:
        state = CgState(torch.zeros_like(vector), vector, vector)
    target, square = (tolerance * float(vector.norm())) ** 2, float(state.residual @ state.residual)
    while state.step < max_steps and square > target:
        direction = state.direction
        image = hvp(direction) + damping * direction
        curvature = float(direction @ image)
        if not curvature > 0:
            found = curvature / float(direction @ direction)
            raise FloatingPointError(
                f"Conjugate gradients met curvature {found:.2e} at step {state.step + 1}: the matrix with "
                f"damping={damping:.4g} is not positive. Raise --damping to more than {damping - found:.2g}, or use "
                "--curvature ggn."
            )
        state.answer = state.answer + (square / curvature) * direction
        state.residual = state.residual - (square / curvature) * image
        square, before = float(state.residual @ state.residual), square
        state.direction = state.residual + (square / before) * direction
        state.step += 1
        if on_step is not None:
            on_step(state)
    return state.answer


# ------------------------------------------------------------------------------- a model on molecules, in N processes


class MoleculeProblem:
    """What the mathematics computes, for a model on molecules, summed over all processes.

    Every process has the same parameters and vectors and takes its share of the molecules; sums, not means, are
    reduced, so that an uneven last share counts right and the answer is that of one process. The model is in
    evaluation mode: no dropout, fixed random features, float32.

    Args:
        names (`list[str]`): parameters that the loss is a function of; the others are constants.
        chunk_size (`int`): molecules that are computed at once; does not change an answer.
        curvature (`str`): `"ggn"` or `"hessian"`.

    Attributes:
        show_progress (`bool`): whether solutions, and passes that take five seconds, have a progress bar.
    """

    show_progress = False

    def __init__(self, model, tokenizer, names, chunk_size, curvature):
        self.model = model.eval().requires_grad_(False)
        self.params = {name: tensor.detach() for name, tensor in model.named_parameters() if name in set(names)}
        # below a loss that is a function of the head alone, the states are constants, and need computing once
        head_only = all(name.startswith("classifier.") for name in self.params)
        self.states = {} if head_only else None
        self.collator = DataCollatorWithPadding(tokenizer)
        self.chunk_size = chunk_size
        self.curvature_product = PRODUCTS[curvature]
        self.process = PartialState()

    def batch(self, molecules):
        """Returns what the model takes for molecules (`pandas.DataFrame`)."""
        examples, names = [{"input_ids": ids} for ids in molecules["input_ids"]], self.model.config.head_descriptors
        if names:
            described = descriptors_of(molecules["text"], names)
            examples = [e | {"descriptors": values} for e, values in zip(examples, described, strict=True)]
        return dict(self.collator(examples).to(self.model.device))

    def residuals(self, molecules):
        """Returns the residuals of molecules (`pandas.DataFrame`), standardized as in training, as a function."""
        labels = torch.tensor(molecules["label"].to_numpy(), dtype=torch.float32, device=self.model.device)
        if self.states is not None:
            states = self.pooled_states(molecules)
            mean, std = self.model.label_scale(states)

            def residuals_of_head(params):
                weights = {name.removeprefix("classifier."): tensor for name, tensor in params.items()}
                standardized = torch.func.functional_call(self.model.classifier, weights, states)  # (B, 1)
                return standardized - (labels[:, None] - mean) / std

            return residuals_of_head
        batch = self.batch(molecules)

        def residuals(params):
            logits = torch.func.functional_call(self.model, params, kwargs=batch).logits  # (B, 1)
            _, std = self.model.label_scale(logits)
            return (logits - labels[:, None]) / std

        return residuals

    def keep_states(self, molecules):
        """Computes once what the head reads of molecules, so that no later batch depends on what came before it."""
        if self.states is not None:
            order = np.argsort(molecules["length"].to_numpy(), kind="stable")
            starts = range(0, len(order), self.chunk_size)
            for start in self.with_progress(starts, "States below the head"):
                self.pooled_states(molecules.iloc[order[start : start + self.chunk_size]])

    @torch.no_grad()
    def pooled_states(self, molecules):
        """Returns what the head reads of each molecule (`pooled_state`), kept while there is room."""
        keys = [tuple(ids) for ids in molecules["input_ids"]]
        if not all(key in self.states for key in keys):
            _, pooled = self.model.predict_with_states(**self.batch(molecules))
            if len(self.states) > MOST_STATES:
                return pooled
            self.states |= dict(zip(keys, pooled, strict=True))
        return torch.stack([self.states[key] for key in keys])

    def with_progress(self, starts, description):
        """Returns the starts of chunks with a progress bar, which appears after five seconds; none if unnamed."""
        return tqdm(starts, desc=description, delay=5, disable=description is None or not self.show_progress)

    def chunks(self, molecules, chunk_size=None, description=None):
        """Yields positions and rows of this process's share of the molecules, those of like length together."""
        chunk_size = chunk_size or self.chunk_size
        order = np.argsort(molecules["length"].to_numpy(), kind="stable")
        share = order[self.process.process_index :: self.process.num_processes]
        for start in self.with_progress(range(0, len(share), chunk_size), description):
            positions = share[start : start + chunk_size]
            yield positions, molecules.iloc[positions]

    def mean(self, function, molecules, *args, description=None):
        """Returns the mean over molecules of a function of residuals and parameters that sums, such as a gradient."""
        total = torch.zeros(sum(tensor.numel() for tensor in self.params.values()), device=self.model.device)
        for _, rows in self.chunks(molecules, description=description):
            total += function(self.residuals(rows), self.params, *args)
        return reduce(total, "sum") / len(molecules)

    def curvature(self, molecules, vector, description=None):
        """Returns C v, C being the curvature of the mean loss of the molecules, shape (P,)."""
        return self.mean(self.curvature_product, molecules, vector, description=description)

    def gradient(self, molecules):
        """Returns the gradient of the mean loss, shape (P,)."""
        return self.mean(loss_gradient, molecules, description="Gradient of the target loss")

    def each(self, function, molecules, *args, description=None):
        """Returns a number of each molecule, shape (N,): what `function` returns for the batch."""
        total = torch.zeros(len(molecules), device=self.model.device)
        # a gradient of one molecule of many would run back through all of them
        chunk_size = 1 if function is scores_by_gradients else None
        for positions, rows in self.chunks(molecules, chunk_size, description):
            total[torch.as_tensor(positions, device=total.device)] = function(
                self.residuals(rows), self.params, *args
            ).detach()
        return reduce(total, "sum")

    def projected_gradients(self, molecules, size, seed, description=None):
        """Returns the gradients of the residuals in a random projection, (N, size), and the residuals, (N,)."""
        generator = torch.Generator().manual_seed(seed)
        parameters = sum(tensor.numel() for tensor in self.params.values())
        signs = torch.randint(2, (parameters,), generator=generator, dtype=torch.int8).to(self.model.device) * 2 - 1
        gradients = torch.zeros(len(molecules), size, device=self.model.device)
        residuals = torch.zeros(len(molecules), device=self.model.device)
        for (position,), rows in self.chunks(molecules, 1, description):
            leaves = leaves_of(self.params)
            residual = self.residuals(rows)(leaves)[0, 0]
            residuals[position] = residual.detach()
            gradients[position] = project(flat_gradient(residual, leaves), signs, size)
        return reduce(gradients, "sum"), reduce(residuals, "sum")

    @torch.no_grad()
    def predictions(self, molecules):
        """Returns predictions in label units, shape (N,)."""

        def errors(residuals, params):
            residual = residuals(params)[:, 0]
            return residual * self.model.label_scale(residual)[1]

        return self.each(errors, molecules.assign(label=0.0))  # the error of 0: that of a far label would be rounded


def choose_parameters(model, wanted):
    """Returns the names of the parameters that `--influence_params` means.

    Raises:
        InputError: if there is none.
    """
    names = [name for name, _ in model.named_parameters()]
    layers = re.fullmatch(r"last_(\d+)", wanted)
    if wanted == "all":
        return names
    if wanted == "head" or layers:
        count = int(layers[1]) if layers else 0
        first = model.config.num_hidden_layers - count
        if first < 0 or wanted == "last_0":
            raise InputError(
                f"--influence_params {wanted}: the model has {model.config.num_hidden_layers} layers. Pass last_1 to "
                f"last_{model.config.num_hidden_layers}, all or head."
            )
        kept = ["classifier."] + [f".layer.{number}." for number in range(first, model.config.num_hidden_layers)]
        kept += ["molformer.LayerNorm."] if layers else []
        return [name for name in names if any(part in name for part in kept)]
    try:
        chosen = [name for name in names if re.search(wanted, name)]
    except re.error as error:
        raise InputError(f"--influence_params {wanted!r} is no regular expression: {error}.") from error
    if not chosen:
        raise InputError(
            f"--influence_params {wanted!r} matches no parameter. Pass all, head, last_N or a pattern for one of: "
            f"{', '.join(names)}."
        )
    return chosen


class RandomBatches:
    """Maps a vector to the curvature of a new random batch of training molecules times it; batch i is a function of
    the seed and i, so that a run whose `position` is set to i goes on as an uninterrupted one."""

    def __init__(self, problem, molecules, batch_size, seed):
        self.problem, self.molecules, self.seed, self.position = problem, molecules, seed, 0
        self.batch_size = min(batch_size, len(molecules))

    def draw(self):
        rows = np.random.default_rng([self.seed, self.position]).choice(
            len(self.molecules), self.batch_size, replace=False
        )
        self.position += 1
        return self.molecules.iloc[rows]

    def __call__(self, vector):
        return self.problem.curvature(self.draw(), vector)


def measure_curvature(problem, fixed, batches, influence_args):
    """Returns largest eigenvalue, damping, scale and, for the Hessian, smallest eigenvalue, by name (`dict`).

    Args:
        fixed (`pandas.DataFrame`): molecules on which the eigenvalues of C are measured.
        batches (`RandomBatches`): for LiSSA five of them are drawn; their largest eigenvalue, not that of all
            molecules, decides whether it converges. The scale is there for LiSSA only.
    Raises:
        InputError: if the curvature is zero.
    """
    size = sum(tensor.numel() for tensor in problem.params.values())
    start = torch.randn(size, generator=torch.Generator().manual_seed(batches.seed)).to(problem.model.device)
    hessian, lissa = influence_args.curvature == "hessian", influence_args.ihvp == "lissa"
    steps = {"fixed": 25 if hessian else 10, "batch": 8}  # a smallest eigenvalue takes more than a largest one
    with tqdm(
        total=steps["fixed"] + 5 * steps["batch"] * lissa,
        desc="Largest eigenvalues",
        disable=not problem.show_progress,
    ) as bar:

        def measure(molecules, steps):
            def product(vector):
                bar.update()
                return problem.curvature(molecules, vector)

            return extreme_eigenvalues(product, start, steps)

        smallest, largest = measure(fixed, steps["fixed"])
        values = {"largest_eigenvalue": largest} | ({"smallest_eigenvalue": smallest} if hessian else {})
        if lissa:
            values["largest_eigenvalue_of_batches"] = [
                max(map(abs, measure(batches.draw(), steps["batch"]))) for _ in range(5)
            ]
    damping = influence_args.damping or influence_args.relative_damping * max(largest, -smallest)
    if not (math.isfinite(damping) and math.isfinite(largest)):
        raise InputError("The curvature is not finite: the model's predictions are too large, or no numbers.")
    if not damping > 0:
        raise InputError("The curvature is zero: none of the chosen parameters changes a prediction. Pass --damping.")
    if hessian and smallest + damping <= 0:
        logger.warning(
            "On %d training molecules the Hessian has eigenvalues down to %.3g, and damping is %.3g: the scores mean "
            "little. Pass --damping %.2g or more, or --curvature ggn.",
            len(fixed), smallest, damping, least_damping(values),
        )  # fmt: skip
    values["damping"] = damping
    if lissa:
        automatic = 1.5 * max(values["largest_eigenvalue_of_batches"]) + damping
        values["scale"] = automatic if influence_args.scale == "auto" else float(influence_args.scale)
        if values["scale"] <= least_scale(values):
            text = "--scale %.3g is too small for LiSSA to converge. Give more than %.3g."
            logger.warning(text, values["scale"], least_scale(values))
    return values


def least_damping(report):
    """Returns the damping that makes a Hessian positive, a tenth more than its smallest measured eigenvalue asks."""
    return -1.1 * report["smallest_eigenvalue"]


def least_scale(report):
    """Returns the scale above which LiSSA converges in each of the measured batches."""
    return (max(report["largest_eigenvalue_of_batches"]) + report["damping"]) / 2


def inverse_curvature(problem, train, gradient, influence_args, seed, state_file=None):
    """Returns (C + damping I)^-1 gradient, shape (R, P), and how it was computed and how well (`dict`).

    Args:
        train (`pandas.DataFrame`): molecules whose mean loss has the curvature C.
        state_file (`Path`, *optional*): where an interrupted solution is kept, and continued from.
    Raises:
        InputError: if LiSSA diverges, conjugate gradients meet negative curvature, or the answer is worse than none.
    """
    report = {"ihvp": influence_args.ihvp, "curvature": influence_args.curvature, "parameters": len(gradient)}
    if influence_args.ihvp == "identity":
        return gradient[None], report
    problem.keep_states(train)
    batches = RandomBatches(problem, train, influence_args.hessian_batch_size, seed)
    fixed = train.sample(min(FIXED_MOLECULES, len(train)), random_state=seed)
    file = StateFile(state_file, settings_key(problem, train, influence_args, seed), gradient)
    gradient = file.gradient
    report["earlier_seconds"] = file.earlier_seconds
    if "measured" not in file.values:
        measured = measure_curvature(problem, fixed, batches, influence_args)
        file.save({}, measured=measured, position=batches.position, trace=[])
    report |= file.values["measured"]
    batches.position, damping = file.values["position"], report["damping"]

    def residual(answer, molecules, description=None):
        left = problem.curvature(molecules, answer, description) + damping * answer - gradient
        return float(left.norm() / gradient.norm())

    try:
        if influence_args.ihvp == "cg":
            answers = solve_by_conjugate_gradients(
                lambda vector: problem.curvature(train, vector),
                gradient,
                damping,
                influence_args,
                file,
                problem.show_progress,
            )
        else:
            depth, tail = influence_args.recursion_depth, influence_args.tail_fraction
            report |= {"implicit_damping": implicit_damping(report["scale"], depth, tail)}
            report |= {name: getattr(influence_args, name) for name in LISSA_SETTINGS}
            answers = solve_by_lissa(
                batches, gradient, report, lambda answer: residual(answer, fixed), file, problem.show_progress
            )
    except FloatingPointError as error:
        more = ""
        if (influence_args.ihvp, influence_args.curvature) == ("lissa", "hessian"):
            more = " Where the Hessian has negative eigenvalues raise --damping, or use --curvature ggn."
        raise InputError(f"{error}{more}") from error
    report |= {"residual": residual(answers.mean(dim=0), train, "Residual"), "tolerance": influence_args.tolerance}
    if not math.isfinite(report["residual"]):
        raise InputError(
            "The residual is not finite: the solution is none. Raise --damping, or use another checkpoint."
        )
    if report["residual"] >= 1 and influence_args.ihvp == "lissa":
        last = file.values["trace"][-1:] or [{"norm": float(gradient.norm()) / report["scale"], "step": 0}]
        raise InputError(
            f"The relative residual is {report['residual']:.3g}, and that of no solution at all is 1: the scores "
            f"would mean nothing (norm {last[0]['norm']:.1e} at step {last[0]['step']}). Raise --scale, --damping or "
            "--hessian_batch_size, or use --curvature ggn."
        )
    report |= {"trace_molecules": len(train) if influence_args.ihvp == "cg" else len(fixed)}
    report["trace"] = file.values["trace"]  # of the last iterate, on these; `residual` is of the answer, on all
    report |= judge(report, influence_args)
    if not report["converged"]:
        logger.warning("The solution is %s.", report["verdict"])
    return answers, report


def judge(report, influence_args):
    """Returns whether a solution is one, and the verdict in words (`dict`), from its residual and how it was made.

    A small residual alone proves little: directions of small curvature hardly enter it, and a truncated LiSSA treats
    those below `implicit_damping` as if they had about that much. Where that is two thirds of the damping, 0.22 to
    0.31 of what directions without curvature have is left out (the more, the longer the tail), and less of others.
    """
    lissa = influence_args.ihvp == "lissa"
    # conjugate gradients stop by a residual that they carry along, which in float32 is not quite the true one
    tolerance = report["tolerance"] * (1 if lissa else 2)
    verdict = "converged"
    if not report["residual"] <= tolerance:
        raised = (
            "--recursion_depth, --damping, --num_repeats or --hessian_batch_size" if lissa else "--recursion_depth"
        )
        verdict = (
            f"not converged: relative residual {report['residual']:.3g}, --tolerance {report['tolerance']:.3g}. Raise "
            f"{raised}"
        )
    elif report.get("smallest_eigenvalue", 0.0) + report["damping"] <= 0:
        verdict = (
            f"not to be trusted: the Hessian has eigenvalues down to {report['smallest_eigenvalue']:.3g}, and the "
            f"damping is {report['damping']:.3g}. Raise --damping to {least_damping(report):.2g}, or use --curvature "
            "ggn"
        )
    elif lissa and report["scale"] <= least_scale(report):  # above twice the scale the signs alternate: means hide it
        verdict = (
            f"not to be trusted: with --scale {report['scale']:.3g} LiSSA does not converge in every batch. Give more "
            f"than {least_scale(report):.3g}"
        )
    elif lissa and 1.5 * report["implicit_damping"] > report["damping"]:
        steps = 1.5 * report["scale"] / report["damping"] - 1
        enough = math.ceil(steps / (1 - influence_args.tail_fraction / 2))
        verdict = (
            f"cut short: {influence_args.recursion_depth} steps add a damping of {report['implicit_damping']:.3g}, "
            f"more than two thirds of {report['damping']:.3g}. Raise --recursion_depth to {enough}, or the damping"
        )
    return {"converged": verdict == "converged", "verdict": verdict}


def solve_by_conjugate_gradients(product, gradient, damping, influence_args, file, show_progress):
    """Returns the solution, shape (1, P).

    Args:
        product (`Callable`): maps a vector (P,) to the curvature of all training molecules times it.
        file (`StateFile`): continued from, and written every fifth step.
    """
    vectors, trace = file.vectors, file.values["trace"]
    names = ("answer", "residual", "direction")
    done = file.values.get("step", 0)
    state = CgState(*(vectors[name] for name in names), done) if vectors else None
    with tqdm(
        total=influence_args.recursion_depth, initial=done, desc="Conjugate gradients", disable=not show_progress
    ) as bar:

        def on_step(state):
            trace.append({"step": state.step, "norm": float(state.answer.norm())})
            trace[-1]["residual"] = float(state.residual.norm() / gradient.norm())
            bar.update()
            bar.set_postfix(residual=f"{trace[-1]['residual']:.1e}")
            if state.step % 5 == 0:
                file.save({name: getattr(state, name) for name in names}, step=state.step, trace=trace)

        answer = conjugate_gradient_inverse_hvp(
            product,
            gradient,
            damping=damping,
            tolerance=influence_args.tolerance,
            max_steps=influence_args.recursion_depth,
            state=state,
            on_step=on_step,
        )
    return answer[None]


def solve_by_lissa(batches, gradient, settings, residual, file, show_progress):
    """Returns the solutions of all repeats, shape (R, P).

    Args:
        settings (`dict`): `damping`, `scale` and `LISSA_SETTINGS` by name.
        residual (`Callable`): maps a solution to its relative residual; asked five times a repeat.
        file (`StateFile`): continued from, and written as often.
    """
    depth, repeats, scale = settings["recursion_depth"], settings["num_repeats"], settings["scale"]
    trace, state = file.values["trace"], None
    done = 0
    if file.vectors:
        answers = [file.vectors[f"answer_{number}"] for number in range(len(file.vectors) - 2)]
        state = LissaState(file.vectors["iterate"], file.vectors["tail"], file.values["step"], answers)
        done = len(answers) * depth + state.step
        batches.position += done
    with tqdm(total=repeats * depth, initial=done, desc="LiSSA", disable=not show_progress) as bar:

        def on_step(state):
            bar.update()
            if state.step % max(1, depth // 5) == 0:
                answer = state.iterate / scale
                trace.append({"repeat": len(state.answers), "step": state.step, "norm": float(answer.norm())})
                trace[-1]["residual"] = residual(answer)
                bar.set_postfix(norm=f"{trace[-1]['norm']:.2e}", residual=f"{trace[-1]['residual']:.2f}")
                vectors = {f"answer_{number}": answer for number, answer in enumerate(state.answers)}
                file.save({"iterate": state.iterate, "tail": state.tail, **vectors}, step=state.step, trace=trace)

        return lissa_inverse_hvp(
            batches,
            gradient,
            damping=settings["damping"],
            scale=scale,
            recursion_depth=depth,
            num_repeats=repeats,
            tail_fraction=settings["tail_fraction"],
            state=state,
            on_step=on_step,
        )


def settings_key(problem, train, influence_args, seed):
    """Returns a hash of what a solution depends on beside the gradient: settings, parameters, molecules, labels."""
    names = ("ihvp", "curvature", "damping", "relative_damping", "scale", "tolerance", *LISSA_SETTINGS)
    settings = [seed, list(problem.params), *(getattr(influence_args, name) for name in names)]
    molecules = list(zip(train["text"], train["label"], strict=True))
    return hashlib.sha256(json.dumps([settings, molecules]).encode()).hexdigest()


class StateFile:
    """What an interrupted solution goes on from: the gradient, `vectors` by name, and `values` as JSON has them.

    A file of other settings, or of a gradient that differs by more than another number of threads explains, is left
    aside. Without a `path` nothing is kept.
    """

    def __init__(self, path, key, gradient):
        self.path, self.key, self.gradient, self.vectors, self.values = path, key, gradient, {}, {}
        self.earlier_seconds, self.started = 0.0, time.monotonic()  # of the pieces before this one
        if path is None or not Path(path).exists():
            return
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            # clones lie aligned in memory as new tensors do, and sums over them have the same bits
            vectors = {name: file.get_tensor(name).clone().to(gradient.device) for name in file.keys()}  # noqa: SIM118
        found = vectors.pop("gradient")
        close = found.shape == gradient.shape and (found - gradient).norm() <= 1e-3 * gradient.norm()
        if metadata["key"] != key or not close:
            logger.warning("%s is of a run with other settings; the solution starts anew", path)
            return
        self.gradient, self.vectors, self.values = found, vectors, json.loads(metadata["values"])
        self.earlier_seconds = self.values["seconds"]
        logger.info("Going on from %s", path)

    def save(self, vectors, **values):
        """Writes vectors and values, whole or not at all; only the first process does."""
        self.values |= values | {"seconds": self.earlier_seconds + time.monotonic() - self.started}
        if self.path is None or not PartialState().is_main_process:
            return
        # copies: two of them may be one tensor, which the format refuses
        tensors = {name: tensor.cpu().clone() for name, tensor in {"gradient": self.gradient, **vectors}.items()}
        part = Path(f"{self.path}.part")  # a name that RUN_PIECES knows
        save_file(tensors, part, {"key": self.key, "values": json.dumps(self.values)})
        os.replace(part, self.path)


def halves_of(molecules):
    """Returns the positions of two halves at random, a molecule that repeats in one of them; one part of one molecule.

    Else replicates and stereo twins would have the halves agree.
    """
    codes, different = pd.factorize(molecules["group"])
    place = np.random.default_rng(0).permutation(len(different))[codes]
    parts = [np.flatnonzero(place % 2 == number) for number in (0, 1)]
    return [rows for rows in parts if len(rows)]


def gradients_of_halves(problem, molecules):
    """Returns the gradients of the mean loss of two halves of the molecules, (2, P), and that of all, (P,)."""
    halves = [molecules.iloc[rows] for rows in halves_of(molecules)]
    gradients = torch.stack([problem.gradient(half) for half in halves])
    shares = torch.tensor([len(half) / len(molecules) for half in halves], device=gradients.device)
    return gradients, shares @ gradients


def score_molecules(problem, external, solutions, gradient, influence_args, halves=None):
    """Returns the external molecules with prediction, loss, score and what goes with it (`pandas.DataFrame`).

    The score is ∇L(z)ᵀ (C + damping I)^-1 ∇L(target), positive if learning z lowers the target's loss; `score_sd` its
    standard deviation over the repeats, `gradient_dot` the same without the inverse curvature.

    Args:
        solutions (`torch.Tensor`): (C + damping I)^-1 ∇L(target) of every repeat, shape (R, P).
        gradient (`torch.Tensor`): ∇L(target), shape (P,).
        halves (`torch.Tensor`, *optional*): those of two halves of the target's molecules, shape (2, P).
    """
    function = SCORES[influence_args.score_mode]
    repeats = [problem.each(function, external, solution, description="Scores") for solution in solutions]
    repeats = torch.stack(repeats).cpu().numpy()
    table = external.copy()
    table["prediction"] = problem.predictions(external).cpu().numpy()
    table["loss"] = problem.each(molecule_losses, external).cpu().numpy()
    table["score"] = repeats.mean(axis=0)
    if len(repeats) > 1:
        table["score_sd"] = repeats.std(axis=0, ddof=1)
    table["gradient_dot"] = problem.each(function, external, gradient, description="Gradient products").cpu().numpy()
    numbers = [name for name in ("prediction", "loss", "score", "score_sd", "gradient_dot") if name in table]
    broken = ~np.isfinite(table[numbers]).all(axis=1)
    if broken.any():
        first = table[broken].iloc[0]
        raise InputError(
            f"The scores of {broken.sum()} molecules are not finite, first at row {first['row']}: its label "
            f"({first['label']:g}) is beyond all measure, the checkpoint is broken, or LiSSA diverged. Correct the "
            "label, use another checkpoint, or raise --damping."
        )
    agreement = {
        "agreement_of_solutions": mean_agreement(torch.corrcoef(solutions).cpu().numpy()),
        "agreement_of_ranks": mean_agreement(pd.DataFrame(repeats.T).corr("spearman").to_numpy()),
    }
    if halves is not None:  # how far the scores are of the property, and not of these molecules alone
        scores = torch.stack([problem.each(function, external, half) for half in halves]).cpu().numpy()
        agreement["agreement_of_halves"] = mean_agreement(pd.DataFrame(scores.T).corr("spearman").to_numpy())
    return table, agreement


def linearize(problem, parts, seed):
    """Returns what is known of the model as one linear in its parameters: gradients and residuals, and the damping.

    The gradients are projected to `PROJECTION_SIZE` numbers (as in TRAK, Park et al. 2023,
    https://arxiv.org/abs/2303.14186), in which the inverse curvature is exact, so that the damping can be small.

    Args:
        parts (`dict[str, pandas.DataFrame]`): molecules, those learned as `train`.
    Returns:
        two `dict[str, torch.Tensor]`, of shapes (N, p) and (N,) in float64, and `float`.
    Raises:
        InputError: if the gradients are zero or not finite.
    """
    size = min(PROJECTION_SIZE, sum(tensor.numel() for tensor in problem.params.values()))
    gradients, residuals = {}, {}
    for name, molecules in parts.items():
        values = problem.projected_gradients(molecules, size, seed, f"Gradients of {name} molecules")
        gradients[name], residuals[name] = (tensor.cpu().double() for tensor in values)
    known, start = gradients["train"], torch.randn(size, generator=torch.Generator().manual_seed(seed)).double()
    _, largest = extreme_eigenvalues(lambda vector: known.T @ (known @ vector) * (2 / len(known)), start)
    damping = GROUP_DAMPING * largest
    if not (damping > 0 and math.isfinite(damping)):
        raise InputError("The gradients are zero or not finite: there is no linear model to refit.")
    return gradients, residuals, damping


def order_by_group_influence(problem, train, target, external, seed):
    """Returns `group_rank` and `group_influence` of external molecules and how they were computed (two `dict`).

    Raises:
        InputError: if the gradients are zero or not finite.
    """
    parts = {"train": train, "target": target, "external": external}
    gradients, residuals, damping = linearize(problem, parts, seed)
    values = [None]
    if problem.process.is_main_process:  # all go by one order, which another processor may round otherwise
        with tqdm(total=len(external), desc="Group influence", delay=5, disable=not problem.show_progress) as bar:
            halves = halves_of(target)
            values = [group_influence(gradients, residuals, damping, halves, bar.update)]
    rank, gains, weight = broadcast_object_list(values)[0]
    if not gains.isfinite().all():
        raise InputError("Group influences are not finite: the checkpoint is broken. Use another one.")
    if not weight:
        logger.warning(
            "The halves of the target's molecules do not agree on which molecules help more than others (group_weight "
            "0): the order of group influence is only that of least harm."
        )
    size = gradients["train"].shape[1]
    report = {"projection_size": size, "group_damping": damping, "group_weight": weight}
    return {"group_rank": rank.numpy(), "group_influence": gains.numpy()}, report


def mean_agreement(correlations):
    """Returns the mean of a correlation matrix off its diagonal; `None` for a single row."""
    if np.ndim(correlations) < 2 or len(correlations) < 2:
        return None
    mean = float(correlations[np.triu_indices(len(correlations), k=1)].mean())
    return mean if math.isfinite(mean) else None  # of a single molecule or parameter


@contextlib.contextmanager
def full_float32():
    """Has GPUs multiply float32 in float32, as the mathematics needs it, until the block ends."""
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before
