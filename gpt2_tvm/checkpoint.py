"""From what a user calls a model to where its configuration and weights are.

A name is, in this order: a folder in Hugging Face layout; the model that ships with this package; a preset or
any other repository on the Hugging Face hub. A preset works without a network too: its weights are then
random, of the true shape, and `ModelSource.note` says so, because speed does not depend on the values but
text does.
"""

from __future__ import annotations

import json
import os
import re
import socket
import threading
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from gpt2_tvm.config import PRESETS, GPT2Config
from gpt2_tvm.errors import UserError

BUNDLED_NAMES = ("bundled", "austen-target")
BUNDLED_DRAFT_NAMES = ("bundled-draft", "austen-draft")

HUB_IDS = {
    **{name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")},
    "distilgpt2": "distilbert/distilgpt2",
}

# All that is read of a checkpoint: a repository may also hold gigabytes in formats that are not.
HUB_FILES = (
    "config.json",
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.json",
    "tokenizer_config.json",
)

CONNECT_TIMEOUT_S = 5.0  # for one attempt to reach the hub, name resolution included
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_HOW_TO_CONVERT = (
    "convert it where it is trusted: transformers' AutoModelForCausalLM.from_pretrained(FOLDER)"
    ".save_pretrained(NEW_FOLDER) writes safetensors"
)


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from.

    Attributes:
        name: what to call it in file names and tables (no slash).
        config: its shape.
        folder: the checkpoint in Hugging Face layout, None where the weights are random.
        random: True if `weights.iter_weights` makes the weights from `seed`.
        seed: the seed of random weights; without meaning otherwise.
        note: one line that a user should read, or None.
    """

    name: str
    config: GPT2Config
    folder: Path | None = None
    random: bool = False
    seed: int = 0
    note: str | None = None


def random_model(model: str | GPT2Config, seed: int = 0, name: str | None = None) -> ModelSource:
    """A source of seeded random weights for a preset's name or any configuration; it needs no network."""
    if isinstance(model, GPT2Config):
        return ModelSource(name or "random", model, random=True, seed=seed, note=_random_note(seed))
    if model not in PRESETS:
        raise UserError(f"no preset is called {model!r}; presets are {', '.join(PRESETS)}")
    return ModelSource(name or model, PRESETS[model], random=True, seed=seed, note=_random_note(seed))


def resolve_model(model: str, seed: int = 0) -> ModelSource:
    """Find the model that a user calls `model`.

    Args:
        model: a folder in Hugging Face layout; "bundled" or "austen-target" (ships with the package), and its draft,
            "bundled-draft" or "austen-draft"; "gpt2",
            "gpt2-medium", "gpt2-large", "gpt2-xl" or "distilgpt2"; or a hub id such as "owner/name".
        seed: for the random weights of a preset that cannot be downloaded.

    A hub model is downloaded into huggingface_hub's own cache (a copy there serves without a network as
    well); HF_HUB_OFFLINE, HF_ENDPOINT, HF_HOME and proxies are honoured. A hub out of reach is noticed within
    10 seconds. Of the files only the configuration is read here; `weights.iter_weights` reads the weights.

    Raises UserError for a folder that is not a checkpoint, a pickled one, an unsupported configuration, a
    name that the hub does not know, or a hub id when the hub is out of reach.
    """
    path = Path(model).expanduser()
    if (path / "config.json").is_file():
        return _from_folder(path)
    if model in BUNDLED_NAMES:
        from gpt2_tvm.data import bundled_model

        return ModelSource("austen-target", GPT2Config.from_json(bundled_model()), bundled_model())
    if model in BUNDLED_DRAFT_NAMES:
        from gpt2_tvm.data import bundled_draft

        return ModelSource("austen-draft", GPT2Config.from_json(bundled_draft()), bundled_draft())
    if model in PRESETS:
        return _preset_from_hub(model, seed)
    if path.suffix in _PICKLES:
        raise UserError(f"{model} is a pickled checkpoint, which can run code when it is read; {_HOW_TO_CONVERT}")
    if path.is_file():
        raise UserError(f"{model} is a file; give the folder that holds it beside its config.json")
    if path.is_dir():
        raise UserError(f"the folder {model} has no config.json; give a checkpoint in Hugging Face layout")
    if not _HUB_ID.fullmatch(model):
        raise UserError(f"there is no folder {model!r}, and it is not a hub id; presets are {', '.join(PRESETS)}")
    return _from_folder(_download(model, f"{model!r} is no folder here and no preset"), name=model.split("/")[-1])


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint: `model.safetensors`, or the shards that its index names.

    Raises UserError where there are none (and says how to convert a pickled checkpoint), or the index is
    damaged.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if index.is_file():
        return [folder / name for name in dict.fromkeys(read_index(index).values())]
    pickled = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLES)
    if pickled:
        raise UserError(
            f"{folder} holds its weights as a pickle ({pickled[0]}), which can run code when it is read;"
            f" {_HOW_TO_CONVERT}"
        )
    raise UserError(
        f"{folder} has neither model.safetensors nor model.safetensors.index.json; fetch the checkpoint"
        " again, or convert it with transformers' save_pretrained if it is published as a pickle alone"
    )


def read_index(index: Path) -> dict[str, str]:
    """The `weight_map` of a `model.safetensors.index.json`: tensor name to the name of a file beside it."""
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        valid = all(isinstance(k, str) and isinstance(v, str) and Path(v).name == v for k, v in weight_map.items())
    except OSError as error:
        raise UserError(f"cannot read {index}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        valid = False
    if not valid or not weight_map:
        raise UserError(f"{index} is damaged: it must map tensor names to files beside it; fetch it again")
    return weight_map


def _from_folder(folder: Path, name: str | None = None) -> ModelSource:
    config = GPT2Config.from_json(folder)
    weight_files(folder)  # a folder without weights is refused now, not after a compile
    return ModelSource(name or folder.resolve().name, config, folder)


def _preset_from_hub(preset: str, seed: int) -> ModelSource:
    try:
        folder = _download(HUB_IDS[preset], f"{preset} is not downloaded yet")
        weight_files(folder)  # a download that was cut off may have left the configuration alone
    except UserError as error:
        reason = str(error).split(";")[0]
        return ModelSource(preset, PRESETS[preset], random=True, seed=seed, note=_random_note(seed, reason))
    return _from_folder(folder, name=preset)


def _random_note(seed: int, reason: str | None = None) -> str:
    why = f" ({reason})" if reason else ""
    return f"weights are random, of the true shape, seed {seed}{why}: speed is as with trained ones, text is not"


def _download(hub_id: str, otherwise: str) -> Path:
    """The folder of a hub repository: downloaded if the hub can be reached, else huggingface_hub's cache."""
    if _hub_is_off():
        unreachable = "HF_HUB_OFFLINE is set"
    elif not _can_connect():
        unreachable = f"the hub ({_endpoint()}) cannot be reached"
    else:
        unreachable = None

    from huggingface_hub import errors, snapshot_download

    try:
        return Path(
            snapshot_download(
                hub_id,
                allow_patterns=list(HUB_FILES),
                local_files_only=unreachable is not None,
                etag_timeout=CONNECT_TIMEOUT_S,
                endpoint=_endpoint(),
            )
        )
    except errors.GatedRepoError:
        raise UserError(
            f"{hub_id} is gated; accept its terms on the hub, log in with `hf auth login`, try again"
        ) from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"the hub has no public model {hub_id}; check the name, or log in with `hf auth login`"
        ) from None
    except Exception as error:  # its HTTP library's errors differ between versions
        if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError):
            raise  # a full disk or a read-only cache: the command line has a line for these
        reason = unreachable or f"the download failed: {type(error).__name__}"
        raise UserError(f"{otherwise} and {reason}; connect to a network, or give a folder") from None


def _hub_is_off() -> bool:
    # Read here and not from huggingface_hub.constants, which fixes it at import.
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    return any(os.environ.get(name, "").strip().upper() in ("1", "ON", "YES", "TRUE") for name in names)


def _endpoint() -> str:
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or "https://huggingface.co"


def _can_connect(timeout_s: float = CONNECT_TIMEOUT_S) -> bool:
    """Whether the hub (or the proxy that leads to it) accepts a connection within `timeout_s` seconds.

    huggingface_hub retries each request, so that a network which drops packets would cost a minute before it
    gave up.
    """
    endpoint = urllib.parse.urlsplit(_endpoint())
    host = endpoint.hostname or ""
    proxy = None if urllib.request.proxy_bypass(host) else urllib.request.getproxies().get(endpoint.scheme)
    if proxy:
        endpoint = urllib.parse.urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    address = (endpoint.hostname or "", endpoint.port or (443 if endpoint.scheme == "https" else 80))
    reached = threading.Event()

    def connect() -> None:
        try:
            socket.create_connection(address, timeout=timeout_s).close()
            reached.set()
        except (OSError, UnicodeError):
            pass

    # In a thread because no timeout bounds the resolver; a daemon, so that a stuck one does not hold up the
    # exit.
    attempt = threading.Thread(target=connect, daemon=True)
    attempt.start()
    attempt.join(timeout_s)
    return reached.is_set()
