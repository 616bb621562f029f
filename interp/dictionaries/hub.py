"""Dictionaries on the Hugging Face hub: files fetched from it, folders sent to it."""

import html
import json
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interp.core.errors import ArtifactError, ConfigError

if TYPE_CHECKING:
    from interp.dictionaries.base import Dictionary

__all__ = ["HubFolder", "push_dictionary", "stage"]

_SCHEME = re.compile(r"hf:/{1,2}(?!/)")  # a Path has lost one of the two
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,95}")
_PLAIN = re.compile(r"[^\w\-. /]")


@dataclass
class HubFolder:
    """A folder of a repository on the hub, whose files are fetched one by one into huggingface_hub's cache.

    Attributes:
        repo: `owner/name`.
        folder: in it; empty for its top.
        revision: branch, tag or commit that was asked for; None for the main branch.
        commit: that all files are of, once one has been fetched.
        reached: whether the hub, or the cache, said what it holds.
    """

    repo: str
    folder: str = ""
    revision: str | None = None
    commit: str | None = None
    reached: bool = True

    @classmethod
    def named(cls, name: str, revision: str | None = None) -> "HubFolder | None":
        """The folder that a name such as `hf://owner/repo@revision/folder` stands for; None for other names.

        Args:
            name: any name.
            revision: where the name has none.

        Raises:
            ConfigError: a name of that kind that cannot be one, or two revisions.
        """
        begin = _SCHEME.match(name)
        if begin is None:
            return None
        owner, _, rest = name[begin.end() :].rstrip("/").partition("/")
        repo, _, folder = rest.partition("/")
        repo, _, pinned = repo.partition("@")
        if pinned and revision and pinned != revision:
            raise ConfigError(f"{name} asks for revision {pinned}, and revision is {revision!r}; give one of them")
        parts = folder.split("/") if folder else []
        if not (_NAME.fullmatch(owner) and _NAME.fullmatch(repo)) or any(
            part in ("", ".", "..") or "\\" in part for part in parts
        ):
            raise ConfigError(
                f"{name!r} is no folder on the hub; write hf://owner/repo/folder or hf://owner/repo@v1/folder"
            )
        return cls(f"{owner}/{repo}", folder, pinned or revision)

    def __str__(self) -> str:
        at = self.commit or self.revision
        return f"hf://{self.repo}{f'@{at}' if at else ''}{f'/{self.folder}' if self.folder else ''}"

    def get(self, name: str, *, beside: bool = False) -> Path | None:
        """Fetch a file, or take it from the cache.

        Args:
            name: of the file in the folder.
            beside: take it from the folder's parent.

        Returns:
            Where it is; None where there is none, or none in the cache and no network.

        Raises:
            ArtifactError: the repository or the revision is not there, not open to this token, or cannot be reached.
        """
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import (
            EntryNotFoundError,
            GatedRepoError,
            HfHubHTTPError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )

        folder = self.folder.rpartition("/")[0] if beside else self.folder
        at = f"{folder}/{name}" if folder else name
        try:
            found = Path(hf_hub_download(self.repo, at, revision=self.commit or self.revision))
        except EntryNotFoundError as err:
            self.reached = self.reached and not isinstance(err, LocalEntryNotFoundError)
            return None
        except RevisionNotFoundError as err:
            raise ArtifactError(
                f"{self.repo} has no revision {self.revision!r}; give a branch, a tag or a commit"
            ) from err
        except (GatedRepoError, RepositoryNotFoundError) as err:
            raise ArtifactError(
                f"{self.repo} is not on the hub, or not open to you; check the name, or log in with `hf auth login`"
            ) from err
        except (HfHubHTTPError, OSError) as err:
            raise ArtifactError(f"{self} cannot be fetched: {type(err).__name__}: {err}") from err
        parts = found.parts
        self.commit = self.commit or parts[parts.index("snapshots") + 1]
        return found

    def need(self, *names: str) -> Path:
        """Fetch files of which the first must be there, and one of the others.

        Args:
            names: alternatives, in order.

        Returns:
            The first that is there.

        Raises:
            ArtifactError: none is there, or none is in the cache and the hub cannot be reached.
        """
        for name in names:
            if (found := self.get(name)) is not None:
                return found
        raise self.lacks(*names)

    def lacks(self, *names: str) -> ArtifactError:
        """The error that says what is not there, and whether the network may be why."""
        from huggingface_hub import constants

        said = f"{self} holds no {' or '.join(names)}"
        if not self.reached:
            get = f"hf download {self.repo} {f'--include {self.folder}/* ' if self.folder else ''}--local-dir FOLDER"
            why = "HF_HUB_OFFLINE forbids the network" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
            said = (
                f"{said} in the cache ({constants.HF_HUB_CACHE}), and {why}; where there is a network, run `{get}`, "
                "and give that folder"
            )
        return ArtifactError(said)


def stage(dictionary: "Dictionary", folder: Path, *, run: str | Path | None = None) -> Path:
    """Write what goes to the hub: what `save` writes, a model card, and the run's `evaluation.json`.

    Args:
        dictionary: to be sent.
        folder: that is empty.
        run: the run's folder, whose evaluation is sent too.

    Raises:
        ArtifactError: the dictionary cannot be saved, or the evaluation cannot be read.
    """
    dictionary.save(folder)
    figures: dict[str, Any] = {}
    measured = None if run is None else Path(run) / "evaluation.json"
    if measured is not None and measured.is_file():
        try:
            figures = json.loads(measured.read_text(encoding="utf-8"))
            shutil.copyfile(measured, folder / "evaluation.json")
        except (OSError, ValueError) as err:
            raise ArtifactError(f"{measured} cannot be read ({err}); run `interp eval` again") from err
    record = json.loads((folder / "cfg.json").read_text(encoding="utf-8"))
    (folder / "README.md").write_text(_card(record, figures), encoding="utf-8")
    return folder


def push_dictionary(
    dictionary: "Dictionary",
    repo_id: str,
    *,
    folder_in_repo: str = "",
    private: bool = True,
    run: str | Path | None = None,
    revision: str | None = None,
    message: str | None = None,
) -> str:
    """Send a dictionary to the hub; see `Dictionary.push_to_hub`."""
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    place = HubFolder.named(f"hf://{repo_id}/{folder_in_repo}", revision)
    if place is None or place.repo != repo_id or place.folder != folder_in_repo.rstrip("/"):
        raise ConfigError(
            f"{repo_id!r} with folder {folder_in_repo!r} is no place on the hub; give owner/name, and a folder"
        )
    if get_token() is None:
        raise ArtifactError(
            f"sending to {repo_id} needs a token with write access: set HF_TOKEN, or log in with `hf auth login`; "
            "without one, save(folder) writes the same files"
        )
    with tempfile.TemporaryDirectory() as draft:
        stage(dictionary, Path(draft), run=run)
        try:
            api = HfApi()
            api.create_repo(repo_id, private=private, exist_ok=True)
            sent = api.upload_folder(
                repo_id=repo_id,
                folder_path=draft,
                path_in_repo=place.folder,
                revision=revision,
                commit_message=message or f"{type(dictionary).__name__} of {_site(dictionary.cfg.metadata)}",
            )
        except (HfHubHTTPError, OfflineModeIsEnabled, OSError) as err:
            why = f"{type(err).__name__}: {err}"
            raise ArtifactError(f"{repo_id} could not be written: {why}; save(folder) writes the same files") from err
    place.commit = sent.oid
    return str(place)


def _site(metadata: Mapping[str, Any]) -> str:
    return str(metadata.get("hook_name") or "an unknown site")


def _card(record: Mapping[str, Any], figures: Mapping[str, Any]) -> str:
    """A model card: what cfg.json says, what was measured, and how to load it."""
    import yaml

    about = record["metadata"]
    model, loads = about.get("model_name"), "Transcoder" if "transcoder" in record["architecture"] else "SAE"
    front = {"library_name": "saelens", "tags": ["sparse-autoencoder", record["architecture"]]}
    named = {"architecture": record["architecture"], "model": model, "site": about.get("hook_name")}
    named |= {"reconstructs": about.get("hook_name_out"), **{key: record.get(key) for key in ("d_in", "d_sae", "k")}}
    named |= {key: about.get(key) for key in ("dataset_path", "context_size", "training_tokens", "loaded_from")}
    rows = [(name.replace("_", " "), value) for name, value in named.items() if value is not None]
    plain = {name: value for name, value in figures.items() if isinstance(value, int | float | str)}
    lines = [
        f"---\n{yaml.safe_dump(front)}---",
        f"# {_cell(loads)} of {_cell(_site(about))} in {_cell(model or 'a model')}",
    ]
    lines += [_table(("setting", "value"), rows)]
    lines += [_table(("measured", "value"), list(plain.items()))] if plain else []
    lines += [
        f'`interp.{loads}.load("hf://OWNER/REPO/FOLDER")` loads it, and so does `sae_lens.SAE.load_from_disk` from a '
        "copy of the folder."
    ]
    return "\n\n".join(lines) + "\n"


def _table(head: tuple[str, str], rows: list[tuple[str, Any]]) -> str:
    return "\n".join(f"| {_cell(a)} | {_cell(b)} |" for a, b in [head, ("---", "---"), *rows])


def _cell(value: Any) -> str:
    """Text that stays within its cell and is no markup, whatever it holds."""
    text = f"{value:.6g}" if isinstance(value, float) else " ".join(str(value).split())
    if _PLAIN.search(text) is None:
        return text
    # Marks of Markdown as entities of HTML, which neither of the two takes for its own.
    return re.sub(r"[\\`*\[\]|{}~!#+:@$]", lambda mark: f"&#{ord(mark[0])};", html.escape(text))
