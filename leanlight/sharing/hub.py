"""Folders to the Hugging Face hub and back, through `huggingface_hub`; whatever goes wrong there is one line."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from leanlight.contracts.errors import MissingExtraError, UserError
from leanlight.runs import CARD
from leanlight.sharing.card import NOT_SHARED, TAG, is_export
from leanlight.sharing.kinds import RepoType

#: Nothing of the suite writes such files into an export, and reading them may run what a stranger wrote.
_NEVER = ["*.bin", "*.ckpt", "*.dill", "*.joblib", "*.pickle", "*.pkl", "*.pt", "*.pth", "*.py", "*.so"]


def _hub() -> Any:
    try:
        import huggingface_hub
        from huggingface_hub.utils import disable_progress_bars
    except ModuleNotFoundError as error:
        raise MissingExtraError("huggingface_hub", "hub") from error
    if not sys.stderr.isatty():
        disable_progress_bars()
    return huggingface_hub


def check_push(repo: str) -> None:
    """Find before any work what would keep `push` from working: the package, the name, the token."""
    hub = _hub()
    _check_name(repo)
    if hub.get_token() is None:
        raise UserError("push: no token of the hub is there; `hf auth login` keeps one, or HF_TOKEN holds it")


def _check_name(repo: str) -> None:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo)
        if repo.count("/") != 1:
            raise HFValidationError
    except HFValidationError:
        raise UserError(f"repo: expected USER/NAME of letters, digits, '-', '_' and '.', got {repo[:120]!r}") from None


def push(folder: Path, repo: str, repo_type: RepoType, message: str, private: bool = False) -> str:
    """Upload what a folder shares into a repository, which is made if it is not there; return its address.

    Args:
        folder: with a card.
        repo: ``USER/NAME``.
        repo_type: of the repository.
        message: of the commit.
        private: make a new repository private; one that is there stays what it is.
    """
    api = _hub().HfApi(library_name=TAG)
    with _one_line(repo, api.endpoint):
        url = api.create_repo(repo, repo_type=repo_type, private=private or None, exist_ok=True)
        api.upload_folder(
            repo_id=repo,
            repo_type=repo_type,
            folder_path=folder,
            commit_message=message,
            ignore_patterns=[*NOT_SHARED, *_NEVER],
        )
    return str(url)


def pull(repo: str, revision: str | None, output: Path | None, repo_type: RepoType | None = None) -> Path:
    """Download an export of the suite and return its folder.

    Args:
        repo: ``USER/NAME``.
        revision: branch, tag or commit; None for the newest.
        output: folder to write; None for the hub's own cache.
        repo_type: of the repository; None looks for a model first, then for a data set.

    Raises:
        UserError: nothing is there, or it is no export of Leanlight; only its card was fetched then.
    """
    hub = _hub()
    _check_name(repo)
    api = hub.HfApi(library_name=TAG)
    with _one_line(repo, api.endpoint):
        kind, commit = _find(api, repo, revision, [repo_type] if repo_type else ["model", "dataset"])
        where: dict[str, Any] = {"repo_type": kind, "revision": commit}
        try:
            card = Path(api.hf_hub_download(repo, CARD, **where))
        except hub.errors.RemoteEntryNotFoundError:
            raise UserError(f"repo: {repo} is no export of Leanlight: it has no {CARD}") from None
        if not is_export(card.parent):
            raise UserError(f"repo: {repo} is no export of Leanlight: its {CARD} has no tag {TAG!r}")
        return Path(api.snapshot_download(repo, **where, local_dir=output, ignore_patterns=_NEVER))


def _find(api: Any, repo: str, revision: str | None, kinds: list[RepoType]) -> tuple[RepoType, str]:
    """The kind of a repository and its commit: what is checked and what is fetched are of one state."""
    from huggingface_hub.errors import RepositoryNotFoundError

    for kind in kinds:
        try:
            return kind, api.repo_info(repo, repo_type=kind, revision=revision).sha
        except RepositoryNotFoundError:
            if kind == kinds[-1]:
                raise
    raise AssertionError


@contextmanager
def _one_line(repo: str, endpoint: str) -> Iterator[None]:
    """Errors of the hub and of the way to it are the user's to mend."""
    from huggingface_hub import errors

    try:
        yield
    except errors.RepositoryNotFoundError:
        raise UserError(f"repo: {endpoint} has no {repo}, or shows it to others alone (`hf auth login`)") from None
    except errors.RevisionNotFoundError:
        raise UserError(f"--revision: {repo} has no such branch, tag or commit") from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        told = " ".join(str(error.server_message or error).split())[:200]
        help_ = "; `hf auth login` keeps another token" if status in (401, 403) else ""
        raise UserError(f"repo: {endpoint} refuses {repo} ({status}: {told}){help_}") from error
    except (errors.HTTPError, errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"repo: {endpoint} cannot be reached ({reason or type(error).__name__})") from error
