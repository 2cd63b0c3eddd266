"""Tests of the baselines and of the measurements: python -m pytest -q assets"""
import copy
import json
import os
import subprocess
from types import SimpleNamespace
from unittest.mock import Mock

import numpy
import peft
import pytest
import scipy.linalg
import torch
from torch import nn

import folora
import train_math
from assets import baselines, experiments
from test_folora import CPU, FAST, HERE, SAME, TASKS, close, covariance, descend, read_json

pytest_plugins = ["test_folora"]                     # its fixture `trained`


# ---- the baselines -------------------------------------------------------------------------------

def baseline(method, alpha=None):
    """(layer, covariance of its inputs, adapter, optimiser) of a baseline of rank 4."""
    torch.manual_seed(0)
    base, C = nn.Linear(12, 10), covariance(12, 400, 100).float()
    model = nn.ModuleDict({"q_proj": copy.deepcopy(base)})
    C_pre = {"q_proj": C} if method in baselines.NEEDS_C_PRE else None
    options = SimpleNamespace(rank=4, lr=1e-2, target_modules="q_proj")
    optimizer = baselines.add_adapters(method, model, options, C_pre, alpha)
    return base, C, model["q_proj"], optimizer


@pytest.mark.parametrize("alpha", [None, 12.0])
@pytest.mark.parametrize("method", baselines.STARTS)
def test_a_baseline_starts_as_its_layer_then_moves_and_merges(method, alpha):
    base, _, adapter, optimizer = baseline(method, alpha)
    x, before = torch.randn(9, 12), [p.detach().clone() for p in (adapter.lora_A, adapter.lora_B)]
    close(adapter(x), base(x), **SAME)
    descend(adapter, optimizer, [{"input": x}] * 3, lambda y: y.square().mean())
    frozen = [*map(torch.equal, (adapter.lora_A, adapter.lora_B), before)]
    assert frozen == [method == "lora-null-v2", False] and not adapter.weight.requires_grad
    model = nn.ModuleDict({"q_proj": adapter})
    model.forward = lambda input: model["q_proj"](input)
    close(train_math.untouched(model)(input=x), base(x), **SAME)     # the drift is from there
    merged = folora.merge(model)["q_proj"]
    close(merged(x), adapter(x), **SAME)
    update = merged.weight.detach() - base.weight.detach()
    assert update.abs().max() > 1e-3
    if method == "oplora":                   # orthogonal to the top singular spaces on both sides
        U, _, Vh = torch.linalg.svd(base.weight.detach())
        assert max((U.mT @ update)[:4].abs().max(), (update @ Vh.mT)[:, :4].abs().max()) < 1e-5


@pytest.mark.parametrize("alpha, kappa", [(None, 1.0), (12.0, 3.0)])
@pytest.mark.parametrize("method", ["milora", "lora-null", "lora-null-v2"])
def test_a_baselines_start_is_its_formula_in_numpy(method, alpha, kappa):
    base, C, adapter, _ = baseline(method, alpha)
    A, B, W, C = (t.detach().double().numpy()
                  for t in (adapter.lora_A, adapter.lora_B, base.weight, C))
    least = numpy.linalg.eigh(C)[1][:, :4]
    W, kept = (W, slice(-4, None)) if method == "milora" else (W @ least @ least.T, slice(4))
    U, S, Vh = numpy.linalg.svd(W, full_matrices=False)
    S = S[kept] / kappa
    numpy.testing.assert_allclose(B @ A, U[:, kept] * S @ Vh[kept], atol=1e-4)
    numpy.testing.assert_allclose(B.T @ B, numpy.diag(S), rtol=1e-4, atol=1e-4)  # √(S/κ) in each


@pytest.mark.parametrize("alpha", [4, 8])
def test_cordas_start_is_pefts(alpha, tmp_path):
    from peft.tuners.lora import config, corda
    base, C, ours, _ = baseline("corda", alpha)
    model = nn.ModuleDict({"q_proj": copy.deepcopy(base)})
    torch.save({"q_proj": C.clone()}, tmp_path / "C.pt")
    how = config.CordaConfig(corda_method="kpm", covariance_file=str(tmp_path / "C.pt"))
    lora = peft.LoraConfig(r=4, lora_alpha=alpha, target_modules=["q_proj"], corda_config=how,
                           init_lora_weights="corda")
    corda.preprocess_corda(model, lora)
    theirs = peft.get_peft_model(model, lora).base_model.model["q_proj"]
    A, B = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight
    signs, near = torch.sign((ours.lora_A * A).sum(1)), dict(rtol=1e-3, atol=1e-4)
    close(ours.lora_A * signs[:, None], A, **near)                   # signs of singular vectors
    close(ours.lora_B * signs, B, **near)
    close(ours.weight, theirs.base_layer.weight, **near)
    assert ours.scaling == theirs.scaling["default"]


# ---- the measurements ----------------------------------------------------------------------------

@pytest.fixture(autouse=True)
def written_elsewhere(tmp_path, monkeypatch):
    for folder in ("HERE", "CACHE"):
        monkeypatch.setattr(experiments, folder, tmp_path)
    monkeypatch.chdir(HERE)


def test_a_suite_scores_the_command_lines_run_and_its_scaled_update_once(
        trained, monkeypatch):
    """And "A frozen" leaves the run's A where it started."""
    suite, setting = (*FAST, "--tasks", TASKS), ("FoLoRA", *experiments.grid("folora --lam 1")[0])
    settings = [setting]
    monkeypatch.setattr(experiments, "settings_of", lambda name: settings)
    experiments.run_all("tiny", suite)
    row, = experiments.read("tiny")["runs"]
    scores = read_json(trained("folora")[0] / "summary.json")["scores"]["folora"]
    measures = {name: row["scores"].pop(name) for name in ("penalty", "cka", "task drift")}
    del scores["Avg1(%)"]
    assert 0 < measures["task drift"] != scores["drift"]
    assert row["scores"] == pytest.approx(scores, rel=1e-4, abs=1e-6)
    for scale in (0.7, 0.5, 0.35):
        some = row["scaled"][str(scale)]
        assert some["penalty"] == pytest.approx(scale ** 2 * measures["penalty"], rel=1e-3)
        assert measures["cka"] < some["cka"] < 1 and some["drift"] < scores["drift"]
    changes = ["A frozen", "A slow, plain Adam", "replay"]
    settings += [("", *experiments.grid(f"folora --lam 1 ; {change}")[0]) for change in changes]
    train = Mock(side_effect=FloatingPointError)                     # diverged runs have no row
    monkeypatch.setattr(train_math, "train", train)
    experiments.run_all("tiny", suite)
    assert len(experiments.read("tiny")["runs"]) == 1 and train.call_count == len(changes)
    found = [(a["scale"], a["basis"] is None, b["scale"] == 1) for a, *_, b in
             (call.args[2].param_groups for call in train.call_args_list)]
    assert found == [(0.0, False, False), (1 / 3, True, False), (1.0, False, False)]
    assert train_math.kl_from_untouched is baselines.replay
    train_math.kl_from_untouched = experiments.KL


def test_drift_by_penalty_and_cka_is_what_their_formulas_say():
    g = torch.Generator().manual_seed(0)
    body = lambda W: SimpleNamespace(device=CPU, get_decoder=lambda: lambda ids: [W[ids]],
                                     get_submodule=lambda name: SimpleNamespace(weight=W))
    X, Y, C = (torch.randn(12, 12, generator=g) for _ in range(3))
    shared = SimpleNamespace(texts=[torch.arange(12)], model=body(X), C={"x": C @ C.mT})
    kernels = [K - K.mean(0) - K.mean(1)[:, None] + K.mean() for K in (X @ X.mT, Y @ Y.mT)]
    expected = (kernels[0] * kernels[1]).sum() / (kernels[0].norm() * kernels[1].norm())
    assert experiments.hidden_cka(shared, body(Y)) == pytest.approx(expected.item(), rel=1e-4)
    R = [sum(row @ C @ C.mT @ row for row in M) for M in (Y - X, X)]
    assert experiments.penalty(shared, body(Y)) == pytest.approx((R[0] / R[1]).item(), rel=1e-4)


REPORT = """
smollm2: KL at LoRA's lowest NLL (2.050 ± 0.071) +
| method | 0.03 | 0.01 | 0.005 | 0.0 |
| LoRA | 0.303 ± 0.014 | 0.308 ± 0.014 | 0.309 ± 0.014 | 0.310 ± 0.014 |
| MiLoRA | - | - | - | - |
smollm2: NLL and KL (drift) in nat per token
| method | setting | nll | drift | KL / FoLoRA's |
| untouched |  | 5.000 | 0.0000 |  |
| LoRA | lr 1e-3 | 2.050 ± 0.071 | 0.310 ± 0.014 | - |
| MiLoRA | lr 3e-4 | 2.550 ± 0.071 | 0.0600 ± 0.0141 | - |
| FoLoRA | basis-rank 32 lam 1 lr 3e-3 | 2.100 | 0.800 | 1.000 |
|  | preset paper zero-start 1 lam 1 s-min 0 lr 3e-3 | 2.600 | 0.250 | 0.500 |
smollm2, 26 points, rank correlation with prose: {'drift': 1.0, 'penalty': RHO, 'cka': -1.0}"""


def test_the_report_and_what_is_fresh_from_the_undominated_settings(tmp_path, capsys):
    """Each further seed is worse by 0.1 in NLL and by 0.02 in KL. Not all settings have two."""
    pytest.importorskip("matplotlib", reason="pip install matplotlib for the figure")
    named = lambda label, name="smollm2": [
        setting for some, _, setting in experiments.settings_of(name) if some == label]
    lora, milora, (folora, *_), (part, *_) = map(named, ("LoRA", "MiLoRA", "FoLoRA", ""))
    runs, points = [], []
    for setting, seeds, nll, kl in [
            (lora[0], 2, 3.0, 0.1), (lora[1], 2, 2.5, 0.9), (lora[2], 2, 2.0, 0.3),
            (lora[3], 3, 2.2, 0.3), (milora[1], 2, 2.5, 0.05), (folora, 1, 2.1, 0.8),
            (part, 1, 2.6, 0.25)]:
        for x, y, seed in ((nll + seed / 10, seed / 50, seed) for seed in range(seeds)):
            pairs = [(x, kl + y), (x + 1, kl / 4 + y)]
            scores = [{"nll": x, "drift": y, "penalty": x, "cka": 1 - y, "prose": y}
                      for x, y in pairs]
            runs.append(setting | {"seed": seed, "scores": scores[0], "scaled": {"0.5": scores[1]}})
            points += pairs
    untouched = {"nll": 5.0, "drift": 0.0, "GM": 1.0}
    (tmp_path / "smollm2.json").write_text(json.dumps({"untouched": untouched, "runs": runs}))
    experiments.main(["report"])
    printed = [line for line in capsys.readouterr().out.splitlines() if line and "---" not in line]
    rho = scipy.stats.spearmanr(*zip(*points))[0]
    assert printed == REPORT.replace("RHO", str(round(rho, 2))).strip().splitlines()
    assert (tmp_path / "tradeoff.png").exists()
    assert named("LoRA", "smollm2-fresh") == [lora[0], lora[2]]  # of those that are not scaled
    searched = experiments.SUITES["smollm2"]["options"]
    assert f"--eval-samples {experiments.FRESH_TEST.start} " in searched


@pytest.mark.parametrize("suite", ["tiny", "codes", "smollm2", "smollm2-long"])
def test_every_setting_of_a_suite_is_a_command_line(suite):
    for _, _, setting in experiments.settings_of(suite):
        assert setting["method"] in ("folora", "lora", *baselines.STARTS)
        suite_options = experiments.SUITES[suite]["options"].split()
        experiments.options_of(suite_options, setting["method"], setting["flags"], 0)


def test_gpu_sh_runs_at_toy_size(tmp_path):
    """On a CPU, so that it is known to work before the minutes of a GPU count."""
    done = subprocess.run(["bash", HERE / "assets" / "gpu.sh"], text=True, capture_output=True,
                          env=os.environ | {"OUT": str(tmp_path), "QUICK": "1"})
    rows = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    steps = {row.split(" | ")[0][2:]: row.split(" | ")[1] for row in rows[-5:]}
    wanted = dict.fromkeys(("tests", "tiny", "costs", "end-to-end"), "done")
    assert {name: steps.get(name) for name in wanted} == wanted, done.stdout + done.stderr
    measured = read_json(tmp_path / "gpu.json")["rows"]
    for what in ("FoLoRA + penalty, s", "sampled", "covariances", "null space", "CorDA"):
        assert any(what in row["row"] for row in measured), what
    assert not (tmp_path / "random").exists()
