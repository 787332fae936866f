"""Checkpoints: tensors in one safetensors file, everything else in its JSON header; written atomically, loading never executes."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from cryorbit.errors import RunError
from cryorbit.io.atomic import atomic_path

State = dict[str, torch.Tensor]


def save_checkpoint(path: Path, tensors: State, meta: dict[str, object]) -> None:
    """Write ``tensors`` and the JSON-able ``meta`` to ``path``; a reader sees the old file or the new one, never a part."""
    packed = {}
    complex_names = [name for name, value in tensors.items() if value.is_complex()]
    for name, value in tensors.items():
        value = value.detach().cpu()
        packed[name] = (torch.view_as_real(value) if value.is_complex() else value).contiguous().clone()
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        try:
            save_file(packed, str(temporary), metadata={"meta": json.dumps(meta), "complex": json.dumps(complex_names)})
        except SafetensorError as error:
            raise RunError(
                "RUN014", f"checkpoint {path} cannot be written ({error})", "check space and permissions"
            ) from error


def load_checkpoint(path: Path) -> tuple[State, dict[str, object]]:
    """Read back what :func:`save_checkpoint` wrote."""
    try:
        with safe_open(str(path), framework="pt") as stream:
            header = stream.metadata()
            complex_names = set(json.loads(header["complex"]))
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}
            meta = json.loads(header["meta"])
    except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
        raise RunError(
            "RUN013", f"checkpoint {path} cannot be read ({error})", "delete the checkpoint folder to start over"
        ) from error
    # The file aligns numbers to 8 bytes, complex ones are worked on at 16: a copy is aligned.
    return {k: torch.view_as_complex(v.clone()) if k in complex_names else v for k, v in tensors.items()}, meta


def fitted(state: State, shapes: Mapping[str, Sequence[int]]) -> State:
    """The tensors of ``state`` that ``shapes`` names.

    Raises
    ------
    RunError
        RUN013 one of them is missing or has another shape.
    """
    hint = "delete the checkpoint to do its stage again"
    for name, shape in shapes.items():
        if name not in state:
            raise RunError("RUN013", f"the checkpoint lacks {name}", hint)
        found, expected = tuple(state[name].shape), tuple(shape)
        if found != expected:
            raise RunError("RUN013", f"the checkpoint holds {name} of shape {found}, expected {expected}", hint)
    return {name: state[name] for name in shapes}


@contextmanager
def in_use(path: Path) -> Iterator[None]:
    """Wherever what :func:`load_checkpoint` read from ``path`` is put to use: what does not fit is one error that names the file."""
    try:
        yield
    except (KeyError, IndexError, ValueError, RuntimeError) as error:
        reason = error.message if isinstance(error, RunError) else repr(error)
        raise RunError(
            "RUN013", f"{path} does not fit this run ({reason})", "delete it to do its stage again, or pass --overwrite"
        ) from error


def kept(path: Path, fingerprint: str, shapes: Mapping[str, Sequence[int]], make: Callable[[], State]) -> State:
    """What ``make`` returns, tensors of these ``shapes``, kept in ``path``, so that a resumed run does not make it again.

    Raises
    ------
    RunError
        RUN013 ``path`` holds other tensors, though made with the same settings and data (``fingerprint``).
    """
    if path.exists():
        tensors, meta = load_checkpoint(path)
        if meta.get("fingerprint") == fingerprint:
            with in_use(path):
                return fitted(tensors, shapes)
    tensors = make()
    save_checkpoint(path, tensors, {"fingerprint": fingerprint})
    return tensors
