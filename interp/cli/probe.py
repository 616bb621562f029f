"""`interp probe`: linear probes, or probes on few neurons, of labelled data, with their controls."""

from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from interp.cli.lines import read_line, refuse, tell
from interp.cli.results import LineFlags, ModelConfig, ResultFolder, open_model, say, write_result
from interp.core.errors import ConfigError, InterpError
from interp.core.settings import Settings

if TYPE_CHECKING:
    from interp.core.manager import HookManager
    from interp.data.concept_tokens import ConceptTokens
    from interp.probing.result import ProbeResult
    from interp.probing.sparse_result import SparseProbes

__all__ = ["ProbeConfig", "ProbeData", "ProbeLine", "main"]

_STAND_IN = {"model": "-", "out": "-"}

_Kind = Literal["logistic", "mean_difference", "mass_mean", "lda", "ridge"]
_Ranking = Literal["mean_difference", "f", "mutual_information", "l1", "logistic", "random"]


class ProbeData(Settings):
    """What is told apart."""

    label: str | None = Field(
        default=None, description="a label of the small world, such as gender, number, sentiment, language, function"
    )
    file: str | None = Field(
        default=None, description="a table of texts: .csv, .tsv or .jsonl with text, label, [group]"
    )
    folder: str | None = Field(
        default=None, description="several such tables: each is probed, and each probe tried on all of them"
    )
    n: int = Field(default=200, gt=0, description="for a label, rows of text")
    ctx: int = Field(default=64, gt=0, description="for a label, tokens per row")
    per_class: int = Field(default=500, gt=0, description="for a label, at most so many tokens of a class")
    text_column: str = Field(default="text", description="of a table, the column of the texts")
    label_column: str = Field(default="label", description="of a table, the column of the labels")
    group_column: str | None = Field(
        default=None, description="of a table, the column of what a text belongs to; by default group, if there is one"
    )
    positive: str | None = Field(
        default=None, description="the class that is told from the others; by default all classes of a label"
    )
    tokens: Literal["last", "all"] = Field(default="last", description="of a table's texts, which tokens are read")

    @model_validator(mode="after")
    def _one_source(self) -> "ProbeData":
        if len(self.sources) > 1:
            raise ValueError(f"give one of label, file and folder, got {' and '.join(self.sources)}")
        return self

    @property
    def sources(self) -> list[str]:
        """Which of label, file and folder are given."""
        return [name for name in ("label", "file", "folder") if getattr(self, name) is not None]


class ProbeConfig(ModelConfig):
    """Probe a model for what labelled data tells apart."""

    data: ProbeData = ProbeData()
    sites: list[str] = Field(default=["*.resid_post"], min_length=1, description="sites or globs; *.post are neurons")
    kind: _Kind = Field(default="logistic", description="how a linear probe is fitted")
    k: list[int] | None = Field(
        default=None, min_length=1, description="probe on so many units of a site instead, such as 1 2 4 8"
    )
    ranking: _Ranking = Field(default="mean_difference", description="for k, how units are ranked")
    search: Literal["ranked", "swap", "adaptive"] = Field(
        default="ranked", description="for k, how sets of units are found"
    )
    pool: Literal["each", "mean", "max", "last"] = Field(
        default="each", description="what one example is: each token that is read, or a row's tokens pooled"
    )
    test: float = Field(default=0.3, gt=0, lt=1, description="share of the groups held out for the scores")
    n_bootstrap: int = Field(default=500, ge=0, description="resamples of the held-out groups, for the intervals")
    batch_size: int = Field(default=32, gt=0, description="rows per forward")
    seed: int = Field(default=0, ge=0, description="of the text, the split, the controls and the intervals")

    @model_validator(mode="after")
    def _sizes_fit(self) -> "ProbeConfig":
        if self.k is not None and min(self.k) < 1:
            raise ValueError(f"k: numbers of units are at least 1, got {min(self.k)}")
        if self.k is not None and self.data.folder is not None:
            raise ValueError("k is for one concept: a label or a file, no folder")
        return self


class ProbeLine(ProbeConfig, LineFlags):
    """Fit probes at every site and test them on held-out groups, beside a control task and shuffled labels.

    `interp probe [CONFIG.yaml] [OPTIONS]`: settings on the line go before those of the file. Writes scores.csv, a page,
    the result itself; for one linear probe of two classes its direction, for k the neurons.
    """

    def settings(self) -> ProbeConfig:
        """The configuration, without what belongs to the command line alone."""
        return ProbeConfig.model_validate({name: getattr(self, name) for name in ProbeConfig.model_fields})


def main(argv: list[str]) -> int:
    """Probe a model, or say what would be probed.

    Args:
        argv: The arguments after `interp probe`.

    Returns:
        The exit code: 0 done, 2 bad usage.

    Raises:
        InterpError: The data or the fit failed.
    """
    try:
        line = read_line(ProbeLine, ProbeConfig, argv, prog="interp probe", stand_in=_STAND_IN)
        cfg = line.settings()
        if not cfg.data.sources:
            return refuse("nothing to probe for: give --data.label, --data.file or --data.folder")
        folder = ResultFolder(cfg.out, force=line.force)
    except ConfigError as err:
        return refuse(str(err))
    hm = open_model(cfg)
    data = _opened(hm, cfg)
    if line.dry_run:
        return _described(hm, data, cfg, as_json=line.json_output)
    folder.begin(cfg)
    tell(f"probing {hm.name} for {', '.join(data)}")
    try:
        said, record, files = _probed(hm, data, cfg, folder)
    except InterpError:
        folder.give_up()
        raise
    names = [str(file) for file in files]
    say("\n".join([*said, *names]), {"out": cfg.out, **record, "files": names}, as_json=line.json_output)
    return 0


def _opened(hm: "HookManager", cfg: ProbeConfig) -> "dict[str, ConceptTokens]":
    """The data as tokens, by name."""
    from interp.core.where import Where
    from interp.data.contrast_files import contrast_from_file, contrasts_in_folder
    from interp.testbed.concepts import world_concept

    d = cfg.data
    if d.label is not None:
        found = world_concept(hm, d.label, d.n, d.ctx, per_class=d.per_class, seed=cfg.seed)
        return {d.label: found if d.positive is None else found.binary(d.positive)}
    text, label, group, positive = d.text_column, d.label_column, d.group_column, d.positive
    if d.file is not None:
        alone = contrast_from_file(d.file, text=text, label=label, group=group, positive=positive)
        held = {alone.name: alone}
    else:
        assert d.folder is not None
        held = contrasts_in_folder(d.folder, text=text, label=label, group=group, positive=positive)
        if "transfer" in held:
            raise ConfigError(f"{d.folder} has a table named 'transfer', which is what probes on other data are called")
    rule = Where() if d.tokens == "all" else Where(pos=-1)
    return {name: contrast.tokens(hm, where=rule, bos=cfg.bos) for name, contrast in held.items()}


def _described(hm: "HookManager", data: "dict[str, ConceptTokens]", cfg: ProbeConfig, *, as_json: bool) -> int:
    from interp.core.site import Site

    sites = [site.short for name in cfg.sites for site in hm.atlas.expand(name)]
    counts = {
        name: {c: int((held.labels == i).sum()) for i, c in enumerate(held.classes)} for name, held in data.items()
    }
    read = sum(int(held.read.sum()) for held in data.values())
    mib = 4 * read * sum(prod(hm.atlas.shape(Site(site))[2:]) for site in sites) / 2**20
    record = {"config": cfg.model_dump(mode="json"), "sites": sites, "tokens": counts, "mib": round(mib, 1)}
    shown = ", ".join(sites[:8]) + (", …" if len(sites) > 8 else "")
    lines = [f"{name}: " + ", ".join(f"{n:,} {c}" for c, n in held.items()) for name, held in counts.items()]
    text = "\n".join([cfg.to_yaml(), f"{len(sites)} sites ({shown}); at most {mib:,.0f} MiB of activations", *lines])
    say(text, record, as_json=as_json)
    return 0


def _probed(
    hm: "HookManager", data: "dict[str, ConceptTokens]", cfg: ProbeConfig, folder: ResultFolder
) -> tuple[list[str], dict[str, Any], list[Path]]:
    """What to say, its record, and the files."""
    if cfg.k is not None:
        (held,) = data.values()
        sparse = _sparse(hm, held, cfg)
        files = write_result(folder, sparse, "scores.csv", "probe.html")
        files.append(folder.write("neurons.csv", sparse.neurons().to_csv(index=False)))
        record = {
            "best": {str(k): {"site": sparse.best(k), "units": sparse.chosen(k)} for k in sparse.k},
            "mcc": {str(k): list(sparse.get("mcc", k)) for k in sparse.k},
        }
        return [sparse.summary()], record, files
    probes = {name: _linear(hm, held, cfg) for name, held in data.items()}
    said, files, record = [], [], {}
    for name, found in probes.items():
        own = "" if len(probes) == 1 else f"{name}/"
        if own:
            (folder.path / name).mkdir()
        files += write_result(folder, found, f"{own}scores.csv", f"{own}probe.html", name=f"{own}result")
        if len(found.classes) == 2:
            files.append(found.direction().save(folder.path / f"{own}direction.safetensors"))
        said.append(found.summary())
        figures = {m: list(found.get(m)) for m in ("accuracy", "auroc", "mcc", "selectivity")}
        record[name] = {"best": found.best, **figures}
    if len(probes) > 1:
        from interp.probing.detect import transfer

        across = transfer(hm, probes, data, pool=cfg.pool, n_bootstrap=cfg.n_bootstrap, batch_size=cfg.batch_size)
        files += write_result(folder, across, "transfer.csv", "transfer.html", name="transfer")
        said.append(across.summary())
    return said, {"probes": record}, files


def _linear(hm: "HookManager", data: "ConceptTokens", cfg: ProbeConfig) -> "ProbeResult":
    from interp.probing.linear import ProbeOptions, fit_probe

    options = ProbeOptions(test=cfg.test, n_bootstrap=cfg.n_bootstrap, seed=cfg.seed, batch_size=cfg.batch_size)
    return fit_probe(hm, data, cfg.sites, kind=cfg.kind, pool=cfg.pool, options=options)


def _sparse(hm: "HookManager", data: "ConceptTokens", cfg: ProbeConfig) -> "SparseProbes":
    from interp.probing.sparse import SparseOptions, sparse_probe

    assert cfg.k is not None
    options = SparseOptions(
        search=cfg.search,
        test=cfg.test,
        n_bootstrap=cfg.n_bootstrap,
        seed=cfg.seed,
        batch_size=cfg.batch_size,
    )
    return sparse_probe(hm, data, cfg.sites, k=cfg.k, ranking=cfg.ranking, pool=cfg.pool, options=options)
