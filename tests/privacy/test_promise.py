"""Every sentence about privacy says what was promised: for each unit, noise source and sampling."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fedlab
from fedlab.config import RunConfig
from fedlab.privacy import promise
from fedlab.privacy.accounting import Event, epsilon
from fedlab.run.progress import closing, headline

TEXT = "[run]\nrounds = 2\n[lora]\nrank = 4\nalpha = 8\n[train]\nlr = 0.1\nsteps = 1\n[strategy]\nweights = 'uniform'\n"
PRIVATE = [
    ("example", [], "Poisson sampling within a client"),
    ("client", [], "every client in every round"),
    ("client", ["run.fraction=0.5"], "fixed-size rounds, not amplified"),
    ("client", ["run.fraction=0.5", "run.sampling=poisson"], "Poisson sampling of clients"),
]
RESULT = {
    "status": "completed",
    "epsilon": 3.00041,
    "scores": {"accuracy": 0.5},
    "primary": "accuracy",
    "client_scores": {"mean": None, "worst": None, "std": None},
    "seconds_per_round": None,
    "bytes_up": 0,
    "bytes_down": 0,
    "seconds": 1.0,
}


def config(unit: str, *settings: str) -> RunConfig:
    private = {"example", "client"} & {unit}
    return RunConfig.parse(TEXT, [*([f"privacy={{unit='{unit}', epsilon=6.0, clip=1.0}}"] * len(private)), *settings])


def everything(one: RunConfig) -> str:
    """What a terminal, the report and the statement say of a run that spent 3.00041."""
    texts = [headline(one, Path("runs/x")), closing(one, RESULT, Path("runs/x"))]
    texts += promise.report(one, 3.00041, 1e-5)
    return "\n".join([*texts, promise.promise(one, 3.00041, 1e-5) if one.private else ""])


@pytest.mark.parametrize("noise", ["seeded", "secure"])
@pytest.mark.parametrize(("unit", "settings", "sampling"), PRIVATE)
def test_what_is_said_is_what_is_promised(unit: str, settings: list[str], sampling: str, noise: str):
    one = config(unit, *settings, f"privacy.noise={noise}")
    said, other = everything(one), "client" if unit == "example" else "example"
    assert f"{unit}-level" in headline(one, Path("x"))
    assert f"{other}-level" not in said
    assert promise.UNIT[unit] in said
    assert promise.UNIT[other] not in said
    assert f"add/remove one {unit}, {sampling}" in promise.accountant(one)
    assert promise.accountant(one) in said
    assert ("The server is trusted" in said) == (unit == "client")
    assert ("are not trusted" in said) == (unit == "example")
    assert ("seeded" in said and "Not protected" in said and "not a protection" in said) == (noise == "seeded")
    assert "3.0005" in said, "rounded up"
    assert "ε = 3.001" in closing(one, RESULT, Path("x"))
    assert "3.0004" not in said
    assert "**" not in "".join(promise.report(one, 3.0, None))


SHARED = [
    "data={clients=6, source='files', path='x', text='t', label='l'}", "strategy={name='ffa'}", "run.fraction=0.84",
    "privacy.survivors=4", "privacy.colluding=1", "train.sampling_rate=0.2",
]  # fmt: skip


@pytest.mark.parametrize("masked", [True, False])
def test_under_shared_noise_it_says_against_whom_how_many_collude_and_who_may_drop_out(masked: bool):
    one = config("example", *SHARED, f"privacy.masked={str(masked).lower()}")
    said = everything(one)
    assert "no single client's part: the server, one client who tells it all" in said
    assert "that of at least 3 honest clients" in said
    assert "a round draws 5 clients, and with fewer than 4 in its sum nothing is released" in said
    assert "Every sum of updates that the server received" in said
    assert "every client's every update" not in said
    assert f"(sums of 4 or more, 1 of them colluding; {'masked' if masked else 'masks left out'})" in headline(
        one, Path("x")
    )
    assert ("learnt their sum alone" in said) == masked
    assert ("left the masks out" in said) == (not masked)
    assert promise.accountant(one) == (
        "dp-accounting RDP at integer orders, zero-out or add/remove one example, Poisson sampling within a client,"
        " discrete noise shared by clients"
    )
    assert "3.0005" in said


def test_without_dp_nothing_is_promised():
    said = everything(config("none"))
    assert "no DP" in said
    assert "no privacy guarantee" in said
    assert "ε" not in said
    assert "-level" not in said


@given(st.floats(min_value=0, max_value=1e6), st.integers(0, 6))
def test_epsilon_is_never_rounded_down(value: float, digits: int):
    shown = float(promise.rounded_up(value, digits))
    assert value <= shown <= value + 10.0**-digits + 1e-9


def test_what_an_epsilon_may_be():
    assert promise.rounded_up(0.1, 4) == "0.1000", "what is exact stays"
    assert promise.rounded_up(1 + 1e-12, 4) == "1.0001"
    assert [promise.shown_epsilon(v) for v in (None, "no DP", "inf", math.inf, 2.0)] == [
        "–",
        "no DP",
        "inf",
        "inf",
        "2.000",
    ]


@pytest.mark.parametrize(
    ("unit", "settings"),
    [
        ("example", ["privacy.noise=secure"]),
        ("client", ["privacy={unit='client', sigma=2.0, clip=0.5}", "strategy={name='ffa', weights='uniform'}"]),
    ],
)
def test_the_files_of_a_run_say_it_too(unit: str, settings: list[str], tiny_toml: str, tmp_path: Path):
    one = RunConfig.parse(tiny_toml, [*settings, "run.rounds=1", "run.fraction=0.67", "data.partition={kind='linear'}"])
    run = fedlab.simulate(one, tmp_path / "run", quiet=True)
    other = "client" if unit == "example" else "example"
    most = promise.rounded_up(run.result["epsilon"])
    sentence = {
        "example": f"the largest ε over the clients is {most} at",
        "client": f"are ({most}, δ)-differentially private",
    }[unit]
    for name in ("PRIVACY.md", "report.html"):
        text = (run.path / name).read_text(encoding="utf-8").partition("<h2>Configuration")[0]
        assert promise.UNIT[unit] in text, name
        assert promise.UNIT[other] not in text, name
        assert f"{other}-level" not in text, name
        assert sentence in text.replace("**", ""), name
    assert run.result["accountant"] == promise.accountant(one)
    page = (run.path / "report.html").read_text(encoding="utf-8")
    assert f"ε (maximum)<b>{promise.rounded_up(run.result['epsilon'])}</b>" in page
    if unit == "example":
        assert len({c["epsilon"] for c in run.result["clients"].values()}) > 1, "clients differ"
    assert run.result["epsilon"] == max(c["epsilon"] for c in run.result["clients"].values())


def privacy_of_records(k: int, q: float, sigma: float, delta: float) -> float:
    """ε of one Poisson step for k records of one client, each drawn by its own coin; removed or added, whichever costs
    more. By quadrature, with nothing of the product.
    """
    x = np.linspace(-12 * sigma, k + 12 * sigma, 60_001)
    shares = [math.comb(k, j) * q**j * (1 - q) ** (k - j) for j in range(k + 1)]
    bell = [np.exp(-((x - j) ** 2) / (2 * sigma**2)) / (sigma * math.sqrt(2 * math.pi)) for j in range(k + 1)]
    there, gone = sum(s * b for s, b in zip(shares, bell, strict=True)), bell[0]

    def exceeds(epsilon: float) -> bool:
        ways = (there, gone), (gone, there)
        return bool(max(np.maximum(a - math.exp(epsilon) * b, 0).sum() for a, b in ways) * (x[1] - x[0]) > delta)

    low, high = 0.0, 60.0
    for _ in range(35):
        low, high = (middle, high) if exceeds(middle := (low + high) / 2) else (low, middle)
    return high


@pytest.mark.parametrize(("q", "sigma"), [(0.05, 0.9), (0.3, 1.0), (1.0, 2.0)])
def test_several_records_at_one_client_can_cost_more_than_their_number_of_epsilons(q: float, sigma: float):
    one = privacy_of_records(1, q, sigma, 1e-5)
    assert one == pytest.approx(epsilon([Event("poisson", q, sigma, 1)], 1e-5), rel=2e-3, abs=2e-3)
    for k in (2, 3):
        assert privacy_of_records(k, q, sigma, 1e-5) > 1.04 * k * one


def test_a_person_with_several_records_is_told_what_it_costs():
    said = promise.promise(config("example"), 3.0, 1e-5)
    assert "the ε of several clients add up, and k records at one client can cost more than k times its ε" in said
    assert "their ε adds up" not in said


@pytest.mark.parametrize("unit", ["example", "client"])
def test_what_no_message_shows_is_named_too(unit: str):
    said = everything(config(unit))
    assert "partition.json of this directory, which its owner alone can read" in said
    assert "zeroing out one" in said
    assert "is public; or by adding or removing one" in said
    assert "1.0004 C" not in said
    assert "1.0004 C was seen where C is accounted for" in everything(config(unit, "run.dtype=bfloat16"))
