"""A run says beside its ε what its final model knows by heart, and a build that adds no noise is found out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import fedlab
from fedlab.config import RunConfig
from fedlab.errors import ConfigError
from fedlab.privacy.audit.memorisation import check_memorisation
from fedlab.privacy.audit.run import audit_run
from fedlab.privacy.noise import SeededNoise
from fedlab.run.regenerate import regenerate

REFUTED = "the noise or the clip is not what was accounted for"


@pytest.fixture(autouse=True)
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures of reports take longer than the rest."""
    import fedlab.report.plots as plots

    for name in ("line_chart", "bar_chart"):
        monkeypatch.setattr(plots, name, lambda title, *_, **__: f"<svg><title>{title}</title></svg>")


def simulate(toml: str, out: Path, *overrides: str) -> fedlab.Run:
    return fedlab.simulate(RunConfig.parse(toml, overrides), out, quiet=True)


def test_noise_hides_records_and_secrets_and_a_build_without_it_is_found_out(
    heart_toml: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    honest = simulate(heart_toml, tmp_path / "honest")
    draw = SeededNoise.draw
    with monkeypatch.context() as patch:  # behind the plan's back: it is signed and charged as ever
        patch.setattr(SeededNoise, "draw", lambda self, shape, std: 0.0 * draw(self, shape, std))
        broken = simulate(heart_toml, tmp_path / "broken")
    assert honest.result["epsilon"] == broken.result["epsilon"] < 0.2
    for what in ("membership", "exposure"):
        assert honest.result["memorisation"][what]["epsilon"] <= honest.result["epsilon"]
        assert broken.result["memorisation"][what]["epsilon"] > broken.result["epsilon"]
        assert any(w.startswith(f"{what}: ") and REFUTED in w for w in broken.result["warnings"])
    assert not any(REFUTED in warning for warning in honest.result["warnings"])
    top = broken.result["memorisation"]["exposure"]
    assert top["median"] > 0.8 * top["most"], "the secrets are at the top of their space"
    low, high = honest.result["memorisation"]["membership"]["attacks"]["ratio"]["auc_interval"]
    assert low < 0.5 < high
    _beside_epsilon(honest)
    assert audit_run(honest.path, regenerate=regenerate).findings == ()
    findings = [finding.message for finding in audit_run(broken.path, regenerate=regenerate).findings]
    assert sum("the mechanism did not do what was accounted for" in text for text in findings) == 2


def _beside_epsilon(run: fedlab.Run) -> None:
    for name in ("PRIVACY.md", "report.html"):
        text = (run.path / name).read_text(encoding="utf-8")
        for words in ("Membership inference", "Exposure", "made-up secrets", "Low figures prove nothing"):
            assert words in text, (name, words)
        assert "publishing them is not covered by ε" in text


def test_without_dp_figures_stand_beside_nothing_promised_and_references_are_counted(heart_toml: str, tmp_path: Path):
    less = ["train.steps=2", "evaluate.membership={pairs=20, references=1}", "data.limit=80", "train.batch_size=16"]
    run = simulate(heart_toml, tmp_path / "run", "privacy={unit='none'}", *less)
    found = run.result["memorisation"]
    assert found["membership"]["references"] == 2
    assert found["membership"]["pairs"] == 20
    assert found["membership"]["attacks"]["loss"]["fpr"] is None, "20 held-out records show no rate of 1 %"
    assert not any(REFUTED in warning for warning in run.result["warnings"])
    _beside_epsilon(run)
    assert audit_run(run.path, regenerate=regenerate).findings == ()


def test_a_classifier_has_members_too(tiny_toml: str, tmp_path: Path):
    run = simulate(tiny_toml, tmp_path / "run", "run.rounds=1", "evaluate.membership={pairs=10, references=1}")
    assert run.result["memorisation"].keys() == {"membership"}
    assert run.result["memorisation"]["membership"]["pairs"] == 30
    text = (run.path / "PRIVACY.md").read_text(encoding="utf-8")
    assert "(references: 2 models, the base one of them)" in text
    assert "Exposure" not in text


def test_after_a_purge_there_is_no_bound(tiny_toml: str, tmp_path: Path):
    run = simulate(tiny_toml, tmp_path / "run", "run.rounds=1", "evaluate.membership={}", "data.duplicates=purge")
    assert run.result["memorisation"]["membership"]["epsilon"] is None
    assert "It gives no bound on ε" in (run.path / "PRIVACY.md").read_text(encoding="utf-8")


EXPOSURE = {
    "space": 100,
    "most": 6.643856189774724,
    "canaries": [{"client": "client-0", "records": 1, "rank": 50, "exposure": 1.0}],
    "median": 1.0,
    "epsilon": 0.0,
    "confidence": 0.95,
}
ATTACK = {"auc": 0.5, "auc_interval": [0.4, 0.6], "fpr": None, "tpr": None, "tpr_interval": None}
MEMBERSHIP = {"pairs": 9, "references": 1, "attacks": {"loss": ATTACK}, "epsilon": 0.1, "confidence": 0.95}
ASKED = {"evaluate": {"membership": {}}, "data": {"canaries": {}}}


def findings(epsilon: Any = 1.0, config: Any = ASKED, **change: Any) -> list[str]:
    found = {"membership": MEMBERSHIP, "exposure": EXPOSURE} | change
    result = {"epsilon": epsilon, "rounds": 1, "memorisation": {k: v for k, v in found.items() if v is not None}}
    return [finding.message for finding in check_memorisation(result, config)]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"exposure": EXPOSURE | {"median": 3.0}}, "has an exposure that is not log2"),
        ({"exposure": EXPOSURE | {"space": 40}}, "has a rank outside 1 to 40"),
        ({"exposure": EXPOSURE | {"epsilon": 0.5}}, "more than its ranks can"),
        ({"exposure": None}, "memorisation.exposure is missing, but run.toml asks for it (data.canaries)"),
        ({"config": {}}, "memorisation.membership is there, but run.toml asks for none"),
        ({"membership": MEMBERSHIP | {"epsilon": 1.5}}, "shows ε >= 1.5 at 95% confidence, but 1 is claimed"),
        ({"membership": MEMBERSHIP | {"attacks": {"loss": ATTACK | {"auc": 2}}}}, "has a auc or an interval"),
        ({"membership": MEMBERSHIP | {"epsilon": "much"}}, "has an ε that is none"),
        ({"membership": [1]}, "is not of the form that a run writes"),
        ({"other": {}}, "memorisation has 'other'"),
    ],
)
def test_the_auditor_reads_figures_by_itself(change: dict[str, Any], said: str):
    assert findings() == []
    assert any(said in text for text in findings(**change))
    assert findings(epsilon="no DP", membership=MEMBERSHIP | {"epsilon": 9.0}) == []


def test_figures_that_were_edited_are_seen(tiny_toml: str, tmp_path: Path):
    run = simulate(tiny_toml, tmp_path / "run", "run.rounds=1", "evaluate.membership={pairs=10}")
    file = run.path / "result.json"
    result = json.loads(file.read_text())
    result["memorisation"]["membership"]["attacks"]["ratio"]["auc"] = 0.5
    file.write_text(json.dumps(result, indent=2) + "\n")
    assert any("was changed" in finding.message for finding in audit_run(run.path, regenerate=regenerate).findings)


def test_data_on_other_machines_are_not_measured(heart_toml: str, tmp_path: Path):
    from flwr.app import Context, RecordDict

    from fedlab.run.deployment import Deployment
    from fedlab.run.launch import deploy_run
    from fedlab.run.launch.local import LocalGrid

    def nobody(server_app: Any, client_app: Any, config: RunConfig, run_config: dict[str, Any]) -> None:
        server_app(LocalGrid(client_app, 0), Context(1, 1, {}, RecordDict(), run_config))

    config = RunConfig.parse(heart_toml, ["privacy={unit='none'}"])
    with pytest.raises(ConfigError, match="is for simulations: it looks at single records"):
        deploy_run(config, Deployment(server="here", wait=0.0), tmp_path / "run", quiet=True, backend=nobody)
