"""The paper's comparison: its variants are correct, and a short run ends, resumes and refuses."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLConfig

from benchmarks import paper_table
from benchmarks.paper_table_scores import Gain
from benchmarks.paper_table_variants import VARIANTS, OrganGate, build, size_of
from echovlm_ray.model.configuration import EchoVLMConfig
from echovlm_ray.model.modeling import EchoVLMForConditionalGeneration
from router.gating.token_gate import route_tokens

ROOT = Path(__file__).resolve().parents[2]
BY_NAME = {variant.name: variant for variant in VARIANTS}
SMALL = ("--look-steps", "1", "--pictures", "34", "--held-out", "17", "--seeds", "0", "1")


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    line = [sys.executable, "-m", "benchmarks.paper_table", "--json", *SMALL, *arguments]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of three variants and two seeds, two steps each."""
    folder = tmp_path_factory.mktemp("paper")
    done = run(
        *("--steps", "2", "--variants", "dense", "moe", "by-organ"),
        *("--work", str(folder / "work"), "--out", str(folder / "out")),
    )
    assert done.returncode == 0, done.stderr
    (folder / "stdout").write_text(done.stdout)
    return folder


def test_the_options_name_every_variant() -> None:
    assert tuple(BY_NAME) == paper_table.VARIANTS


def built(folder: Path, name: str) -> EchoVLMForConditionalGeneration:
    work = folder / "work"
    model = build(BY_NAME[name], work / "start", work / "tower", organs=3, layers=2, seed=0)
    model.train(False)
    return model


def test_a_run_leaves_its_page_values_and_picture(finished: Path) -> None:
    values = json.loads((finished / "stdout").read_text())
    assert values == json.loads((finished / "out" / "paper_table.json").read_text())
    assert {(cell["variant"], cell["seed"]) for cell in values["cells"]} == {
        (variant, seed) for variant in ("dense", "moe", "by-organ") for seed in (0, 1)
    }
    assert all(len(found["BLEU-1 (words)"]["seeds"]) == 2 for name, found in values["values"].items() if name == "moe")
    pairs = [(each["variant"], each["against"]) for each in values["comparisons"]]
    assert pairs == [("moe", "dense"), ("by-organ", "dense"), ("by-organ", "moe")]
    page = (finished / "out" / "paper_table.md").read_text()
    assert "+10.15 in its first version, +7.58 in its second" in page
    assert "+4.77 in its first version, +3.45 in its second" in page
    assert (finished / "out" / "paper_table.png").stat().st_size > 10_000


def test_a_run_goes_on_with_what_is_missing(finished: Path) -> None:
    work = finished / "work"
    kept, lost = work / "cell-dense-0.json", work / "cell-moe-1.json"
    before, answers = kept.stat().st_mtime_ns, json.loads(lost.read_text())
    lost.unlink()
    options = ("--variants", "dense", "moe", "--work", str(work), "--out", str(finished / "again"))
    assert run("--steps", "2", *options).returncode == 0
    assert kept.stat().st_mtime_ns == before
    # The same seed and the same steps: the same answers.
    assert json.loads(lost.read_text())["answers"] == answers["answers"]
    refused = run("--steps", "3", *options)
    assert refused.returncode == 1
    assert "holds cells of another scale" in refused.stderr


@torch.no_grad()
def test_dense_is_qwen2_vl(finished: Path) -> None:
    ours = built(finished, "dense")
    config = ours.config
    assert isinstance(config, EchoVLMConfig)
    text = {
        name: value
        for name, value in config.text_config.to_dict().items()
        if name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        or name in ("num_key_value_heads", "vocab_size", "rms_norm_eps", "rope_parameters")
    }
    plain = Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(text_config=text, vision_config=config.vision_config.to_dict(), tie_word_embeddings=True)
    )
    plain.train(False)
    weights = {
        name: value for name, value in ours.state_dict().items() if ".moe." not in name and ".coefficient." not in name
    }
    plain.load_state_dict(weights)
    ids = torch.randint(0, 1000, (2, 12), generator=torch.Generator().manual_seed(0))
    assert torch.allclose(ours(input_ids=ids).logits, plain(input_ids=ids).logits, atol=1e-5)


def test_dense_large_has_as_many_parameters_as_the_moe(finished: Path) -> None:
    sizes = {name: size_of(BY_NAME[name], built(finished, name)) for name in BY_NAME}
    assert sizes["dense-large"].total == pytest.approx(sizes["moe"].total, rel=1e-3)
    assert sizes["dense-large"].active == sizes["dense-large"].total
    # Of 4 experts of 3 × 192 × 64 in 2 layers a token meets 2, or 1.
    expert = 2 * 3 * 192 * 64
    assert sizes["moe"].total - sizes["moe"].active == 2 * expert
    assert sizes["top-1"].total - sizes["top-1"].active == 3 * expert
    assert sizes["moe"].total - sizes["no-shared"].total == 2 * (3 * 192 * 128 + 192)
    assert sizes["by-organ"] == sizes["ungated-large"]


@torch.no_grad()
def test_organ_gated_tokens_meet_experts_of_their_organ(finished: Path) -> None:
    gate = next(each for each in built(finished, "by-organ").modules() if isinstance(each, OrganGate))
    x_TD = torch.randn(60, 192, generator=torch.Generator().manual_seed(0))
    gate.organ_T = torch.arange(60) % 3
    logits_TE, weight_TK, index_TK = gate(x_TD)
    for organ in range(3):
        expected = route_tokens(x_TD[organ::3], gate.weight[4 * organ : 4 * organ + 4], 2, norm_topk_prob=False)
        assert torch.equal(index_TK[organ::3], expected.index_TK + 4 * organ)
        assert torch.allclose(weight_TK[organ::3], expected.weight_TK)
        assert torch.allclose(logits_TE[organ::3], expected.logits_TE, atol=1e-6)


def test_without_the_shared_expert_it_adds_nothing(finished: Path) -> None:
    layer = built(finished, "no-shared").model.language_model.layers[0]
    assert not torch.count_nonzero(layer.moe.shared(torch.ones(3, 192)))
    assert torch.count_nonzero(built(finished, "moe").model.language_model.layers[0].moe.shared(torch.ones(3, 192)))


@pytest.mark.parametrize(
    ("low", "high", "seeds", "verdict"),
    [
        (0.1, 2.0, (1.0, 0.5), "better"),
        (-2.0, -0.1, (-1.0, -0.5), "worse"),
        (0.1, 2.0, (3.0, -0.5), "the seeds disagree"),
        (-0.1, 2.0, (1.0, 0.5), "no difference shown"),
    ],
)
def test_verdicts(low: float, high: float, seeds: tuple[float, ...], verdict: str) -> None:
    assert Gain((low + high) / 2, low, high, 0.5, seeds).verdict == verdict
