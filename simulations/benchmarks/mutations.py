"""Break the real trainer in every way we know, one at a time, and see which detector of the audit notices.

    python simulations/benchmarks/mutations.py [--config simulations/quickstart.toml] [--canaries 2000] [--only NAME
    ...]

Prints a Markdown table, mutation × detector. A mutation is an edit of production source, compiled in the place where
production looks the function up; an edit whose text is no longer there is an error, so the table cannot go stale in
silence.
``tests/trainer_audit/test_empirical.py`` runs the same table on a tiny model and demands that every line has a mark and
the first has none.
"""

from __future__ import annotations

import argparse
import inspect
import textwrap
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from fedlab.config import RunConfig
from fedlab.privacy import clipping, noise, plan
from fedlab.privacy.plan import DPPlan
from fedlab.session import Session, open_session
from fedlab.train import dp, local, trainer
from fedlab.trainer_audit.empirical import audit_session
from fedlab.trainer_audit.mechanism import CHECKS as ALL_CHECKS

BOUNDS = ("steinke", "f-dp", "cp-gdp")
CHECKS = tuple(
    check for check in ALL_CHECKS if check != "shared pass"
)  # compares with train_client, which is what is broken here
NOTHING = "none (correct build)"


@dataclass(frozen=True)
class Mutation:
    """Edits (owner, attribute, text, replacement) of the sources of functions."""

    name: str
    edits: tuple[tuple[Any, str, str, str], ...]


STD = "self.sigma * self.clip"
TAKE = "partial, norms = clipped_sum(hooks.take(), clip)"
PRIVATISE = "return plan.privatise(total, local.noise)"
NOISE_STREAM = 'random_stream(seed, "noise", client, round_number)'
DRAW = "self._rng.standard_normal(shape) * std"
FACTORS = "return torch.where(torch.isfinite(norms), factors, torch.zeros_like(factors))"


def _trainer(name: str, old: str, new: str, function: str = "train_client") -> Mutation:
    return Mutation(name, ((trainer, function, old, new),))


def _private(name: str, new: str) -> Mutation:
    """What comes after the sum is clipped."""
    return _trainer(name, PRIVATISE, new, "_private_gradients")


def _steps(name: str, old: str, new: str, function: str = "__init__") -> Mutation:
    """What a client draws in a round."""
    return Mutation(name, ((local.LocalSteps, function, old, new),))


MUTATIONS = (
    Mutation(NOTHING, ()),
    Mutation("noise off", ((DPPlan, "privatise", STD, "0.0"),)),
    Mutation("half noise", ((DPPlan, "privatise", STD, f"0.5 * {STD}"),)),
    Mutation("noise divided by the batch size", ((DPPlan, "privatise", STD, f"{STD} / self.normaliser"),)),
    Mutation("σ accounted for is 1.2 times what is drawn", ((DPPlan, "event", "self.sigma", "1.2 * self.sigma"),)),
    Mutation(
        "uniform noise of the same variance",
        ((noise.SeededNoise, "draw", DRAW, "(self._rng.random(shape) - 0.5) * 12**0.5 * std"),),
    ),
    _private(
        "noised sum cut to ±C",
        "return {n: v.clamp(-1 / plan.normaliser * plan.clip, 1 / plan.normaliser * plan.clip)"
        " for n, v in plan.privatise(total, local.noise).items()}",
    ),
    Mutation(
        "clipping skipped",
        ((clipping, "clip_factors", FACTORS, FACTORS.replace("factors, torch", "torch.ones_like(factors), torch")),),
    ),
    Mutation(
        "batch mean clipped",
        (
            (
                trainer,
                "clipped_sums",
                TAKE,
                (
                    "partial, norms = clipped_sum({n: g.mean(0, keepdim=True) for n, g in hooks.take().items()},"
                    " clip); partial = {n: len(each) * v for n, v in partial.items()}"
                ),
            ),
        ),
    ),
    Mutation(
        "clipped per layer, accounted once",
        (
            (
                trainer,
                "clipped_sums",
                TAKE,
                (
                    "pieces = {n: clipped_sum({n: g}, clip) for n, g in hooks.take().items()}; "
                    "partial, norms = {n: p[0][n] for n, p in pieces.items()}, next(iter(pieces.values()))[1]"
                ),
            ),
        ),
    ),
    _trainer(
        "clip loosened after the first step",
        "_private_gradients(losses, model, names, hooks, local, plan)",
        "_private_gradients(losses, model, names, hooks, local, "
        "__import__('dataclasses').replace(plan, clip=plan.clip * (2 if local.executed else 1)))",
    ),
    Mutation(
        "a gradient holds its neighbour's too",
        ((dp.PerExampleGradients, "_add", "else gradient", "else gradient + gradient.roll(1, 0)"),),
    ),
    Mutation("NaN passes min(1, C/norm)", ((clipping, "clip_factors", FACTORS, "return factors.nan_to_num(1.0)"),)),
    Mutation(
        "NaN passes and is zeroed afterwards",
        (
            (
                clipping,
                "clip_factors",
                FACTORS,
                "return torch.where(torch.isfinite(norms), factors, torch.ones_like(factors))",
            ),
            (trainer, "clipped_sum", "finite.double()", "finite.double().nan_to_num(0.0, 0.0, 0.0)"),
        ),
    ),
    _trainer(
        "divided by the realised batch size",
        "parameter.grad = gradients[name].to(parameter)",
        "parameter.grad = (gradients[name] * plan.normaliser / max(1, len(batch))).to(parameter)",
    ),
    _private(
        "head un-noised",
        PRIVATISE + ' | {n: total[n] / plan.normaliser for n in names if n.startswith("head.")}',
    ),
    _private(
        "a tenth of the raw sum added",
        "return {n: v + 0.1 * total[n] / plan.normaliser for n, v in plan.privatise(total, local.noise).items()}",
    ),
    Mutation(
        "momentum from the raw sum",
        (
            (trainer, "_private_gradients", PRIVATISE, "local.raw = total; " + PRIVATISE),
            (
                trainer,
                "train_client",
                "parameter.grad = gradients[name].to(parameter)",
                "parameter.grad = gradients[name].to(parameter)"
                " + (0.1 * local.raw[name] / plan.normaliser).to(parameter) * bool(config.train.momentum)",
            ),
        ),
    ),
    _trainer(
        "the audit's way in ignored",
        "per_example(model, names if plan else [])",
        "PerExampleGradients(model, names if plan else [])",
    ),
    Mutation(
        "same noise every step",
        (
            (
                local.LocalSteps,
                "__init__",
                "self.own = ",
                f"self.again = lambda: plan.noise_source({NOISE_STREAM}); self.own = ",
            ),
            (trainer, "_private_gradients", PRIVATISE, PRIVATISE.replace("local.noise", "local.again()")),
        ),
    ),
    _steps("same noise every round", NOISE_STREAM, 'random_stream(seed, "noise", client)'),
    _steps("same noise for every client", NOISE_STREAM, 'random_stream(seed, "noise", round_number)'),
    Mutation(
        "same noise in every tensor",
        (
            (
                DPPlan,
                "privatise",
                "names = sorted(clipped_sum)",
                "names = sorted(clipped_sum); flat = noise.draw((max(t.numel() for t in clipped_sum.values()),), 1.0)",
            ),
            (
                DPPlan,
                "privatise",
                f"noise.draw(tuple(clipped_sum[name].shape), {STD}).flatten()",
                f"{STD} * flat[: clipped_sum[name].numel()]",
            ),
        ),
    ),
    Mutation(
        "shuffled, not Poisson, batches",
        (
            (
                local.LocalSteps,
                "__init__",
                "self._fixed = [] if plan else list(fixed_batches(len(self.indices), size,",
                "size = max(1, round(plan.normaliser)) if plan else size; "
                "self._fixed = list(fixed_batches(len(self.indices), size,",
            ),
            (local.LocalSteps, "batch", "self.plan.batch(self._draws) if self.plan else ", ""),
        ),
    ),
    Mutation(
        "fixed-size batches",
        (
            (
                plan,
                "poisson_batch",
                "np.flatnonzero(rng.random(n) < q)",
                "np.sort(np.argsort(rng.random(n))[: round(q * n)])",
            ),
        ),
    ),
    _steps(
        "same batches every round",
        'random_stream(seed, "batches", client, round_number)',
        'random_stream(seed, "batches", client)',
    ),
    _trainer(
        "empty batches skipped",
        "batch = local.batch(step)\n",
        "batch = local.batch(step)\n            if not len(batch): continue\n",
    ),
    _trainer("twice the steps charged", "range(local.count)", "range(2 * local.count)"),
)


@contextmanager
def mutated(mutation: Mutation) -> Iterator[None]:
    """Production with the edits in place. Raises LookupError if a text to edit is not there exactly once."""
    undo: list[tuple[Any, str, Any]] = []
    sources: dict[tuple[int, str], str] = {}  # two edits of one function are made in the same text
    try:
        for owner, attribute, old, new in mutation.edits:
            present, key = getattr(owner, attribute), (id(owner), attribute)
            source = sources.get(key) or textwrap.dedent(inspect.getsource(present))
            if source.count(old) != 1:
                raise LookupError(
                    f"{mutation.name}: {old!r} is not (exactly once) in {attribute}; bring the mutation up to date"
                )
            sources[key] = source.replace(old, new)
            scope: dict[str, Any] = {}
            exec(compile(sources[key], f"<{mutation.name}>", "exec"), present.__globals__, scope)
            undo.append((owner, attribute, present))
            setattr(owner, attribute, scope[attribute])
        yield
    finally:
        for owner, attribute, original in reversed(undo):
            setattr(owner, attribute, original)


def detect(session: Session, mutation: Mutation, canaries: int = 2000, seed: int = 0) -> dict[str, list[str]]:
    """Detector → what it has to say about the mutated trainer; an empty list if nothing."""
    with mutated(mutation):
        audit = audit_session(session, canaries, seed)
    result: dict[str, list[str]] = {name: [] for name in BOUNDS} | {
        check: list(audit.mechanism[check]) for check in CHECKS
    }
    for bound in audit.bounds:
        if bound.epsilon > audit.claimed:
            result[bound.name].append(f"{bound.epsilon:.1f}")
    return result


def mutation_table(
    session: Session, canaries: int = 2000, seed: int = 0, only: Iterable[str] = ()
) -> dict[str, dict[str, list[str]]]:
    """Mutation → detector → findings, for all mutations or those named."""
    wanted = set(only)
    return {m.name: detect(session, m, canaries, seed) for m in MUTATIONS if not wanted or m.name in wanted}


def markdown(table: dict[str, dict[str, list[str]]]) -> str:
    """The table to paste: a bound shows its value where it exceeds the claim, a check a ✔ where it has a finding."""
    columns = [*BOUNDS, *CHECKS]
    lines = ["| mutation | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, row in table.items():
        cells = [row[c][0] if c in BOUNDS and row[c] else "✔" if row[c] else "–" for c in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="simulations/quickstart.toml")
    parser.add_argument("--canaries", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME")
    parser.add_argument("--findings", action="store_true", help="print the first sentence of each detector too")
    args = parser.parse_args()
    session = open_session(RunConfig.load(args.config).to_toml())
    started = time.perf_counter()
    table = mutation_table(session, args.canaries, args.seed, args.only)
    print(markdown(table))
    print(f"\n{len(table)} builds in {time.perf_counter() - started:.0f} s")
    if args.findings:
        for name, row in table.items():
            for detector, sentences in row.items():
                if detector in CHECKS and sentences:
                    print(
                        f"{name} | {detector}: {sentences[0]}"
                        + (f" (+{len(sentences) - 1})" if len(sentences) > 1 else "")
                    )


if __name__ == "__main__":
    main()
