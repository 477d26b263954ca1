"""Export: a finished run's student as a folder that can be given away: weights, tokenizer, and a model card of what is known.

The copy is loaded again before it gets its name, and must be the model that was trained. It leaves the machine only when asked to.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from limbeck.errors import LimbeckError, RunError
from limbeck.export.card import HUB_NAME, model_card
from limbeck.log import say
from limbeck.run import Run

SUFFIXES = (".safetensors", ".json", ".jinja", ".txt", ".model")
"""What a model and its tokenizer consist of: no pickles, no code."""


def export(run: Run | str | Path, out: str | Path | None = None, push_to_hub: str | None = None) -> Path:
    """Write a finished run's student with a model card to a new folder (RUN/export where not given), and return it.

    `push_to_hub` names a repository of the Hugging Face Hub (owner/name); it is made private where it does not exist.
    """
    run = run if isinstance(run, Run) else Run(Path(run))
    status = run.read_json("run.json").get("status")
    if status != "finished":
        raise RunError(f"{run.path}: found status {status!r}, expected a finished run; `limbeck train` with this directory goes on with it")
    if push_to_hub and not HUB_NAME.fullmatch(push_to_hub):
        raise LimbeckError(f"--push-to-hub: found {push_to_hub!r}, expected the name of a repository, owner/name")
    path = Path(out) if out else run.path / "export"
    if path.exists():
        if problem := _problem(run, path):
            raise RunError(f"{path}: exists, and is no export of this run ({problem}); choose another folder with --out")
        say(f"{path}: already holds this run's student")
        if push_to_hub:  # the card tells how to load it from there
            (path / "README.md").write_text(model_card(run, push_to_hub), encoding="utf-8")
    else:
        _write(run, path, push_to_hub)
    if push_to_hub:
        _push(path, push_to_hub)
    return path


def _write(run: Run, path: Path, repository: str | None) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        shutil.copytree(run.student, temporary, ignore=lambda _, names: [name for name in names if not name.endswith(SUFFIXES)])
        (temporary / "README.md").write_text(model_card(run, repository or path.name), encoding="utf-8")
        if problem := _problem(run, temporary):
            raise RunError(f"{run.student}: {problem}; the student's folder was changed after training")
        temporary.rename(path)
    except OSError as error:
        raise RunError(f"{path}: could not be written ({error})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _problem(run: Run, path: Path) -> str | None:
    """Why the model in a folder, loaded anew, is not the one that the run trained; None where it is."""
    import torch

    from limbeck.models import load_model, load_tokenizer, weights_hash
    from limbeck.tokens.identity import template_hash, vocabulary_hash

    try:
        model, tokenizer = load_model(str(path)), load_tokenizer(str(path))
    except LimbeckError as error:
        return str(error)
    data = run.read_json("data.json")
    pairs = {
        "set of weights": (weights_hash(dict(model.named_parameters())), run.read_json("run.json")["weights_sha256"]),
        "vocabulary": (vocabulary_hash(tokenizer), data["vocabulary_sha256"]),
        "chat template": (template_hash(tokenizer), data["template_sha256"]),
    }
    if different := [name for name, (found, expected) in pairs.items() if found != expected]:
        return f"it has another {different[0]} than the run trained"
    trained = load_model(str(run.student))
    ids = torch.arange(16)[None] % len(tokenizer)
    with torch.no_grad():
        found, expected = (each(input_ids=ids, use_cache=False).logits for each in (model, trained))
    return None if torch.equal(found, expected) else f"its logits differ by {(found - expected).abs().max().item():.3g} from the student's"


def _push(path: Path, repository: str) -> None:
    from huggingface_hub import HfApi

    say(f"pushing {path} to {repository}")
    try:
        api = HfApi()
        api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=str(path), commit_message="Add the student, exported by Limbeck")
    except Exception as error:  # of the network, the account or the hub: they have no common base
        cause = " ".join(str(error).split())[:300]
        raise LimbeckError(
            f"{repository}: could not be pushed ({type(error).__name__}: {cause}); the export is complete in {path}"
        ) from error
