"""The main job on tiny models: what the store serves, what the evaluation measures, what the command leaves behind."""

import itertools
import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor

import interp
from interp.cli.main import main
from interp.core.errors import ConfigError, DataError
from interp.core.resources import resource
from interp.data.documents import Documents
from interp.data.store import ActivationStore, Batch
from interp.data.tokens import TokenSource
from interp.dictionaries.topk import TopKConfig, TopKSAE
from interp.evaluate.baseline import fit_pca
from interp.evaluate.dictionary import evaluate_dictionary
from interp.testbed.text import TASKS, Text
from interp.testbed.tokenizer import build_tokenizer
from interp.train.config import TrainConfig
from interp.train.text import WorldTexts
from interp.train.trainer import DictionaryFit
from tests.families import make, manager, word_tokenizer

SITE = "1.resid_post"


def random_texts(n: int, seed: int = 0) -> list[str]:
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(3, 20, (n,), generator=generator).tolist()
    rows = [torch.randint(1, 120, (size,), generator=generator).tolist() for size in sizes]
    return [" ".join(f"w{i}" for i in row) for row in rows]


def source(texts: Any, **options: Any) -> TokenSource:
    return TokenSource(texts, word_tokenizer(), **{"ctx": 16, "rows": 4, "bos": True, **options})


def plain_activations(model: Any, ids: Tensor, layer: int) -> Tensor:
    """The block's output by a hook of our own on the plain model [batch pos d_model]."""
    kept: list[Tensor] = []

    def keep(module: Any, args: Any, output: Any) -> None:
        kept.append(output[0] if isinstance(output, tuple) else output)

    handle = model.model.layers[layer].register_forward_hook(keep)
    with torch.no_grad():
        model(ids, use_cache=False)
    handle.remove()
    return kept[0]


# -- the store --------------------------------------------------------------------------------------------------


def test_every_token_is_served_once_with_the_models_own_activation() -> None:
    hm, tokens = manager("Llama"), source(random_texts(40), packing="one_doc")
    expected = {}
    for block in tokens.blocks():
        for row, mask, doc in zip(block.ids, block.mask, block.doc, strict=True):
            x = plain_activations(hm.model, row[mask][None], 1)[0]
            expected.update(
                {(int(t), p, int(doc[0])): v for p, (t, v) in enumerate(zip(row[mask][1:], x[1:], strict=True))}
            )
    store = ActivationStore.stream(hm, tokens, SITE, batch_size=10, buffer_tokens=48)
    served: list[tuple[tuple[int, int], Tensor]] = []
    for batch in store.batches():
        assert batch.tokens is not None and batch.positions is not None and batch.mask is None
        assert not bool(hm.special_mask(batch.tokens).any())
        keys = zip(batch.tokens.tolist(), batch.positions.tolist(), strict=True)
        served += list(zip(keys, batch.x, strict=True))
    assert sorted(key for key, _ in served) == sorted((t, p) for t, p, _ in expected)
    for (token, position), x in served:
        same = [v for (t, p, _), v in expected.items() if (t, p) == (token, position)]
        assert min(float((x - v).abs().max()) for v in same) < 1e-4


def test_the_order_is_shuffled_by_the_seed_and_mixes_across_documents() -> None:
    def order(seed: int) -> list[int]:
        store = ActivationStore.stream(
            manager("Llama"), source(random_texts(60)), SITE, batch_size=8, buffer_tokens=64, seed=seed
        )
        return [int(t) for batch in store.batches() for t in batch.tokens]  # type: ignore[union-attr]

    given = [int(t) for b in source(random_texts(60)).blocks() for t in b.ids[b.mask & ~b.special]]
    assert order(1) == order(1) != order(2)
    assert sorted(order(1)) == sorted(order(2)) == sorted(given)
    assert order(1) != given


def test_packed_documents_do_not_see_each_other_under_block_diagonal_but_do_under_concat() -> None:
    def rows(packing: str) -> dict[tuple[int, int], Tensor]:
        texts = [" ".join(f"w{i}" for i in range(a, a + 5)) for a in range(1, 60, 5)]
        store = ActivationStore.stream(
            manager("Llama"), source(texts, packing=packing), SITE, batch_size=8, buffer_tokens=64
        )
        return {
            (int(t), int(p)): x
            for b in store.batches()
            for t, p, x in zip(b.tokens, b.positions, b.x, strict=True)  # type: ignore[arg-type]
        }

    alone, packed, joined = rows("one_doc"), rows("block_diagonal"), rows("concat")
    # A document cut by a row's end goes on without its beginning: only those that begin in their row are comparable.
    whole = [key for key in alone if float((alone[key] - packed[key]).abs().max()) < 1e-4]
    assert len(whole) > 0.7 * len(alone)
    assert max(float((alone[key] - joined[key]).abs().max()) for key in whole) > 1e-2


def test_several_sites_come_in_one_pass_and_keep_their_rows_together() -> None:
    hm, texts = manager("Llama"), random_texts(30)
    both = ActivationStore.stream(
        hm, source(texts), ["0.resid_post", SITE], batch_size=16, buffer_tokens=64, dtype=torch.float64
    )
    first, second = (
        ActivationStore.stream(hm, source(texts), s, batch_size=16, buffer_tokens=64) for s in ("0.resid_post", SITE)
    )
    for pair, a, b in zip(both.batches_by_site(), first.batches(), second.batches(), strict=True):
        assert pair[SITE].x.dtype == torch.float64
        torch.testing.assert_close(pair["0.resid_post"].x.float(), a.x)
        torch.testing.assert_close(pair[SITE].x.float(), b.x)
    transcoder = next(both.batches(x="0.resid_post", target=SITE))
    assert transcoder.target is not None
    torch.testing.assert_close(transcoder.target.float(), next(second.batches()).x)


def test_a_store_reads_ahead_no_more_than_its_buffer() -> None:
    class Counted(list[str]):
        given = 0

        def __iter__(self) -> Any:
            for text in super().__iter__():
                Counted.given += len(text.split())
                yield text

    texts = Counted(random_texts(3000))
    store = ActivationStore.stream(manager("Llama"), source(texts), SITE, batch_size=16, buffer_tokens=64)
    next(store.batches())
    # The buffer, one block, and the 64 documents that are tokenized together.
    assert Counted.given < 64 + 4 * 16 + 2 * 64 * 20


def test_repeating_goes_on_after_the_last_document_and_stores_refuse_what_they_cannot_serve() -> None:
    hm, texts = manager("Llama"), random_texts(10)
    store = ActivationStore.stream(hm, source(texts), SITE, batch_size=16, buffer_tokens=32, repeat=True)
    assert all(len(batch.x) == 16 for batch in itertools.islice(store.batches(), 50))
    with pytest.raises(ConfigError, match="at least two batches"):
        ActivationStore.stream(hm, source(texts), SITE, batch_size=16, buffer_tokens=31)
    heads = next(ActivationStore.stream(hm, source(texts), "1.z", batch_size=4, buffer_tokens=8).batches()).x
    assert heads.shape == (4, hm.n_heads * hm.d_head)
    with pytest.raises(ConfigError, match="something for each token"):
        ActivationStore.stream(hm, source(texts), "1.pattern")
    with pytest.raises(ConfigError, match="say which one"):
        next(ActivationStore.stream(hm, source(texts), ["0.resid_post", SITE]).batches())
    with pytest.raises(DataError, match="only special tokens"):
        next(ActivationStore.stream(hm, source(["w0 w0", "w0"]), SITE, repeat=True).batches())


# -- the evaluation ---------------------------------------------------------------------------------------------


def planted(d: int, *, gain: float = 1.0, centre: Tensor | None = None) -> TopKSAE:
    """A TopK SAE that gives `centre + gain · (x − centre)`: every coordinate and its negative is a latent."""
    sae = TopKSAE(TopKConfig(d_in=d, d_sae=2 * d, k=2 * d))
    with torch.no_grad():
        sae.W_enc.copy_(torch.cat([torch.eye(d), -torch.eye(d)], dim=1))
        sae.W_dec.copy_(gain * sae.W_enc.T)
        sae.b_dec.copy_(torch.zeros(d) if centre is None else centre)
    return sae.requires_grad_(False)


def counted_activations(hm: interp.HookManager, tokens: TokenSource) -> Tensor:
    kept = []
    for block in tokens.blocks():
        x = hm.run(block.inputs, read=[SITE])[SITE]
        kept.append(x[block.mask & ~block.special])
    return torch.cat(kept).double()


@pytest.mark.filterwarnings("ignore:Splice at 1.resid_post changed nothing")
def test_a_dictionary_that_changes_nothing_recovers_everything_and_the_mean_and_zero_recover_nothing() -> None:
    hm, tokens = manager("Llama"), source(random_texts(60))
    x = counted_activations(hm, tokens)
    same = evaluate_dictionary(hm, planted(hm.d_model), tokens, SITE)
    assert same.fvu < 1e-10 and same.explained_variance == pytest.approx(1)
    assert same.ce_recovered == pytest.approx(1, abs=1e-6) and same.kl < 1e-6
    assert same.n_tokens == len(x) and same.l0 == pytest.approx(hm.d_model, rel=1e-3)
    mean = evaluate_dictionary(hm, planted(hm.d_model, gain=0, centre=x.mean(0).float()), tokens, SITE)
    assert mean.fvu == pytest.approx(1, abs=1e-6)
    assert mean.ce_recovered_mean == pytest.approx(0, abs=1e-4) and mean.ce_sae == pytest.approx(mean.ce_mean)
    nothing = evaluate_dictionary(hm, planted(hm.d_model, gain=0), tokens, SITE)
    assert nothing.ce_recovered == pytest.approx(0, abs=1e-6) and nothing.ce_sae == pytest.approx(nothing.ce_zero)


def test_the_figures_are_those_of_a_two_pass_reference_and_of_hand_made_hooks() -> None:
    hm, tokens = manager("Llama"), source(random_texts(60))
    sae = planted(hm.d_model, gain=0.6, centre=torch.full((hm.d_model,), 0.3))
    x = counted_activations(hm, tokens)
    got = evaluate_dictionary(hm, sae, tokens, SITE)
    missed = x - sae(x.float()).double()
    assert got.fvu == pytest.approx(float(missed.pow(2).sum() / (x - x.mean(0)).pow(2).sum()), rel=1e-6)
    losses, score, n = torch.zeros(2, dtype=torch.float64), torch.zeros(3, dtype=torch.float64), 0
    for block in tokens.blocks():
        keep = block.mask & ~block.special

        def spliced(module: Any, args: Any, output: Any, keep: Tensor = keep) -> Any:
            y = output[0] if isinstance(output, tuple) else output
            new = torch.where(keep[..., None], sae(y), y)
            return (new, *output[1:]) if isinstance(output, tuple) else new

        def zeroed(module: Any, args: Any, output: Any) -> Any:
            y = torch.zeros_like(output[0] if isinstance(output, tuple) else output)
            return (y, *output[1:]) if isinstance(output, tuple) else y

        for i, hook in enumerate((None, spliced, zeroed)):
            handle = None if hook is None else hm.model.model.layers[1].register_forward_hook(hook)
            with torch.no_grad():
                # Right pads: causal attention never looks at them, so no mask is needed here.
                logits = hm.model(block.ids, use_cache=False).logits
            if handle is not None:
                handle.remove()
            loss = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), block.ids[:, 1:], reduction="none")
            if i < 2:
                losses[i] += loss[keep[:, :-1] & keep[:, 1:]].double().sum()
            score[i] += loss[keep[:, :-1] & block.mask[:, 1:]].double().sum()
        n += int((keep[:, :-1] & keep[:, 1:]).sum())
    assert got.n_predictions == n
    assert got.ce_clean == pytest.approx(float(losses[0]) / n, rel=1e-5)
    assert got.ce_sae == pytest.approx(float(losses[1]) / n, rel=1e-5)
    assert got.ce_loss_score == pytest.approx(float((score[2] - score[1]) / (score[2] - score[0])), rel=1e-4)


def test_dead_latents_and_firing_are_counted_on_the_tokens_that_count() -> None:
    hm, tokens = manager("Llama"), source(random_texts(60))
    sae = planted(hm.d_model)
    with torch.no_grad():
        sae.b_enc[:5] = -1e6
    got = evaluate_dictionary(hm, sae, tokens, SITE)
    latents = sae.encode(counted_activations(hm, tokens).float())
    assert torch.equal(got.firing, (latents > 0).sum(0))
    assert got.dead == pytest.approx(5 / (2 * hm.d_model))


def test_an_evaluation_is_a_result_with_a_table_a_figure_and_a_summary(tmp_path: Path) -> None:
    hm = manager("Llama")
    got = evaluate_dictionary(hm, planted(hm.d_model, gain=0.5), source(random_texts(20)), SITE, max_tokens=64)
    assert type(got).load(got.save(tmp_path / "e")).scalars() == got.scalars()
    frame = got.to_frame().set_index("figure")["value"]
    assert frame["fvu"] == pytest.approx(got.fvu)
    assert next(bar.y for bar in got.plot().data) == pytest.approx((got.ce_clean, got.ce_sae, got.ce_mean, got.ce_zero))
    assert "special ones left out" in got.summary()


# -- the command ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command line of a small job, without --out."""
    folder = tmp_path_factory.mktemp("job")
    make("Llama").save_pretrained(folder / "model")
    word_tokenizer().save_pretrained(folder / "model")
    lines = (json.dumps({"text": text}) for text in random_texts(300))
    (folder / "text.jsonl").write_text("\n".join(lines), encoding="utf-8")
    settings = {"train.tokens": 4000, "train.batch-size": 100, "train.buffer-tokens": 500, "train.log-every": 5}
    settings |= {"dictionary.d-sae": 64, "dictionary.k": 4, "text.ctx": 16, "evaluation.tokens": 500}
    small = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    return ["train", "--model", str(folder / "model"), "--site", SITE, "--data", str(folder / "text.jsonl"), *small]


def test_one_command_leaves_a_run_that_loads_and_says_where_to_look(
    job: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main([*job, "--out", str(out)]) == 0
    printed = capfd.readouterr()
    assert "CE recovered" in printed.out and f"interp.SAE.load({str(out)!r})" in printed.out
    assert "tok/s" in printed.err
    names = {
        "cfg.json",
        "sae_weights.safetensors",
        "config.yaml",
        "provenance.json",
        "metrics.jsonl",
        "speed.jsonl",
        "evaluation.json",
    }
    assert {p.name for p in out.iterdir()} == names
    sae = interp.SAE.load(out)
    assert sae.cfg.metadata["hook_name"] == "blocks.1.hook_resid_post"
    figures = json.loads((out / "evaluation.json").read_text())
    hm = manager("Llama")
    fitted, held_out = (
        TokenSource(Documents(job[6], part=part), word_tokenizer(), ctx=16, rows=32) for part in ("train", "held_out")
    )
    pca = fit_pca(hm, fitted, SITE, rank=4, max_tokens=500)
    again = evaluate_dictionary(hm, sae, held_out, SITE, max_tokens=500, pca=pca)
    assert figures["pca_rank"] == 4 and "PCA of rank 4" in printed.out
    assert {k: figures[k] for k in again.scalars()} == again.scalars()
    assert 0 < figures["l0"] <= 4 and figures["fvu"] < 1
    provenance = json.loads((out / "provenance.json").read_text())
    assert provenance["status"] == "finished" and provenance["tokens"] == 4000
    assert provenance["store"]["special_tokens"] == "left out"
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [5, 10, 15, 20, 25, 30, 35, 40]
    assert all("tokens_per_s" not in line for line in lines)
    speeds = [json.loads(line) for line in (out / "speed.jsonl").read_text().splitlines()]
    assert [line["step"] for line in speeds] == [line["step"] for line in lines] and speeds[0]["tokens_per_s"] > 0
    # The configuration that the run left is one that runs: with it, the same bytes come out.
    second = tmp_path / "second"
    assert main(["train", "--json", str(out / "config.yaml"), "--out", str(second)]) == 0
    record = json.loads(capfd.readouterr().out)
    assert record["status"] == "finished" and record["ce_recovered"] == figures["ce_recovered"]
    assert {"ce_recovered", "fvu", "l0", "dead", "tokens_per_s"} <= record.keys()
    assert (second / "sae_weights.safetensors").read_bytes() == (out / "sae_weights.safetensors").read_bytes()


def test_a_folder_that_holds_something_is_refused_before_anything_is_loaded(
    job: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    assert main([*job, "--out", str(tmp_path)]) == 1
    assert "already holds mine.txt" in capfd.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_a_dry_run_estimates_and_writes_nothing(
    job: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main([*job, "--out", str(out), "--dry-run", "--json"]) == 0
    record = json.loads(capfd.readouterr().out)
    model = make("Llama")
    assert record["estimates"]["parameters"] == 2 * 32 * 64 + 32 + 64
    assert record["estimates"]["model_parameters"] == sum(p.numel() for p in model.parameters())
    assert record["estimates"]["steps"] == 40
    assert record["estimates"]["checkpoint_bytes"] == 12 * 4192 + 8 * 64 + 500 * (4 * 32 + 32) + 32 * 16 * (4 * 32 + 16)
    assert record["config"]["dictionary"]["d_sae"] == 64 and not out.exists()
    without = [word for word in job if word not in ("--dictionary.d-sae", "64", "--dictionary.k", "4")]
    assert main([*without, "--out", str(out), "--dry-run"]) == 0
    assert "256, of which 8 may be active per token" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--dictionary.d-sea", "4"], "dictionary.d-sea"),
        (["--dictionary.k", "65"], "k is 65, more than the 64 latents"),
        (["--site", "1.residpost"], "did you mean 'resid_post'"),
        (["--config", "nothing.yaml"], "no config file nothing.yaml"),
        (["nothing.yaml"], "no config file nothing.yaml"),
        (["--train.normalize=whiten", "nothing.yaml"], "no config file nothing.yaml"),
        (["a.yaml", "--config=b.yaml"], "one config file is read, got a.yaml and b.yaml"),
        (["--force", "--resume"], "give one of them"),
    ],
)
def test_bad_usage_exits_with_2_and_says_what_is_wrong(
    job: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str], extra: list[str], message: str
) -> None:
    assert main([*job, "--out", str(tmp_path / "run"), *extra]) == 2
    printed = capfd.readouterr()
    assert message in " ".join(printed.err.replace("│", " ").split()) and printed.out == ""
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--site", "9.resid_post"], "no site 9.resid_post; 0.resid_post, 1.resid_post"),
        (["--site", "1.pattern"], "one vector a token"),
        (["--data", "nothing.jsonl"], "no file or folder nothing.jsonl"),
        (["--text.field", "story"], "its fields are: text"),
        (["--text.hold-out-every", "400"], "'held_out' part"),
        (
            ["--model", "testbed", "--text.ctx", "129"],
            "with ctx 129 a row is too long: 129 tokens, but this model",
        ),
    ],
)
def test_a_job_that_cannot_run_exits_with_1_and_leaves_nothing_that_loads(
    job: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str], extra: list[str], message: str
) -> None:
    assert main([*job, "--out", str(tmp_path / "run"), *extra]) == 1
    assert message in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_what_was_trained_and_says_so(
    job: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    out = tmp_path / "run"

    def send() -> None:
        while not (out / "metrics.jsonl").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    threading.Thread(target=send, daemon=True).start()
    assert main([*job, "--out", str(out), "--train.tokens", "100000000", "--json"]) == 143
    printed = capfd.readouterr()
    assert f"stopped by {number.name}" in printed.err and f"interp train --resume --out {out}" in printed.err
    record = json.loads(printed.out)
    assert record["status"] == "stopped" and 0 < record["tokens"] < 100000000
    assert json.loads((out / "provenance.json").read_text())["status"] == "stopped"
    assert not (out / "evaluation.json").exists()
    x = torch.randn(10, 32)
    assert bool(interp.SAE.load(out)(x).isfinite().all())


def test_a_signal_before_the_first_step_says_that_nothing_was_trained(
    job: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"

    def send() -> None:
        while not (out / "provenance.json").exists():
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=send, daemon=True).start()
    # A buffer that takes far longer to fill than the signal takes to arrive.
    assert main([*job, "--out", str(out), "--train.buffer-tokens", "50000000", "--train.tokens", "100000000"]) == 143
    assert "before the first step; nothing was trained" in capfd.readouterr().err
    assert {p.name for p in out.iterdir()} == {"config.yaml", "provenance.json", "resume"}


def test_the_command_goes_on_with_a_run_that_was_stopped(
    job: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out, plain = tmp_path / "whole", tmp_path / "stopped", DictionaryFit.step

    def stopping(self: DictionaryFit, batch: Batch) -> None:
        plain(self, batch)
        if self.steps == 13:
            os.kill(os.getpid(), signal.SIGTERM)

    assert main([*job, "--out", str(whole)]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(DictionaryFit, "step", stopping)
        assert main([*job, "--out", str(out)]) == 143
    # The folder may have moved; what it was begun with is in it.
    moved = out.rename(tmp_path / "moved")
    capfd.readouterr()
    assert main(["train", "--resume", "--out", str(moved), "--train.lr", "1e-3"]) == 1
    assert "train.lr was None, now 0.001" in capfd.readouterr().err
    assert main([*job, "--out", str(moved)]) == 1
    assert "--resume to go on with the run" in capfd.readouterr().err
    assert main(["train", "--resume", "--out", str(moved), "--dry-run"]) == 0
    capfd.readouterr()
    assert main([*job, "--resume", "--out", str(moved), "--json"]) == 0
    record = json.loads(capfd.readouterr().out)
    assert record["status"] == "finished" and record["tokens"] == 4000
    for name in ("sae_weights.safetensors", "metrics.jsonl", "evaluation.json"):
        assert (moved / name).read_bytes() == (whole / name).read_bytes()
    assert main(["train", "--resume", "--out", str(moved)]) == 1
    assert "is finished; there is nothing to resume" in capfd.readouterr().err


# -- what comes with the library ----------------------------------------------------------------------------------


def test_without_a_word_the_packaged_model_text_and_settings_are_taken(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    packaged = TrainConfig.from_yaml(resource("configs/sae-testbed.yaml"))
    assert main(["train", "--dry-run", "--json"]) == 0
    assert TrainConfig.model_validate(json.loads(capfd.readouterr().out)["config"]) == packaged
    assert packaged.model == packaged.data == "testbed" and not list(tmp_path.iterdir())
    small = {"train.tokens": 2048, "train.batch-size": 512, "train.buffer-tokens": 1024}
    small |= {"evaluation.tokens": 512, "text.hold-out-every": 2}
    words = [word for name, value in small.items() for word in (f"--{name}", str(value))]
    assert main(["train", *words, "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["out"] == packaged.out
    sae = interp.SAE.load(packaged.out)
    assert sae.cfg.metadata["model_name"] == "testbed" and sae.cfg.metadata["dataset_path"] == "testbed"


@pytest.mark.parametrize(
    ("config", "model", "parameters", "d_in"),
    [
        ("sae-gpt2-small-l8", tf.GPT2Config(), 124_439_808, 768),
        ("sae-gemma-2-2b-l12", tf.Gemma2Config(), 2_614_341_888, 2304),
        (
            "sae-pythia-70m-l3",
            tf.GPTNeoXConfig(
                vocab_size=50304,
                hidden_size=512,
                num_hidden_layers=6,
                num_attention_heads=8,
                intermediate_size=2048,
                tie_word_embeddings=False,
            ),
            70_426_624,
            512,
        ),
    ],
)
def test_the_configs_of_known_models_fit_them(
    config: str, model: Any, parameters: int, d_in: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Sizes as their authors publish them; the sites are there, and one batch of memory fits a GPU of 24 GB."""
    model.save_pretrained(tmp_path / "model")
    words = ["--model", str(tmp_path / "model"), "--out", str(tmp_path / "run"), "--dry-run", "--json"]
    assert main(["train", str(resource(f"configs/{config}.yaml")), *words]) == 0
    estimates = json.loads(capfd.readouterr().out)["estimates"]
    assert (estimates["model_parameters"], estimates["d_in"]) == (parameters, d_in)
    assert sum(estimates[f"{part}_bytes"] for part in ("dictionary", "buffer", "model")) < 24e9


def test_a_model_or_text_of_ones_own_needs_the_other(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for word in ("--model", "--data"):
        assert main(["train", word, "mine", "--out", str(tmp_path / "run")]) == 2
        assert "equired" in capfd.readouterr().err


def test_the_small_worlds_documents_are_text_that_the_tokenizer_gives_back() -> None:
    tokenizer, texts = build_tokenizer(), WorldTexts()
    given = [texts[i] for i in range(60)]
    same = Text("dictionary", tasks=[name for name in TASKS if name != "repeat"])
    for i, text in enumerate(given):
        assert tokenizer(text)["input_ids"] == same.document(i).ids()[:-1]
    held_out = list(itertools.islice(Documents(texts, part="held_out").read(30), 2))
    assert held_out == [(39, given[39]), (59, given[59])]
