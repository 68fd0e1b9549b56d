"""Whether the installed transformers has the interface that turnout.hf registers with."""

from __future__ import annotations

from importlib import import_module, metadata

OLDEST = "5.7"


def check_transformers() -> None:
    """Raises ImportError that names what is installed, what is expected and the command that installs it."""
    how = f"Install it: pip install 'transformers>={OLDEST}'"
    try:
        installed = metadata.version("transformers")
    except metadata.PackageNotFoundError as missing:
        raise ImportError(f"turnout.hf: transformers is not installed, expected {OLDEST} or newer. {how}") from missing
    if _release(installed) < _release(OLDEST):
        raise ImportError(
            f"turnout.hf: transformers is {installed}, which takes no experts of others; expected {OLDEST} or newer. "
            f"{how}"
        )
    try:
        import_module("transformers.integrations.moe").ALL_EXPERTS_FUNCTIONS  # noqa: B018  (asked whether it is there)
    except (ImportError, AttributeError) as changed:
        raise ImportError(
            f"turnout.hf: transformers {installed} has no transformers.integrations.moe.ALL_EXPERTS_FUNCTIONS, with "
            f"which experts are registered; {OLDEST} to 5.24 have it. {how}"
        ) from changed


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])
