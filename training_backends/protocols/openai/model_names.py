"""Names of fine-tuned models and their checkpoints.

OpenAI: `ft:<base>:<organization>:<suffix or empty>:<8 characters>`, a checkpoint with a further
`:ckpt-step-<n>` (recorded 2024-08 and 2024-12). The characters of a checkpoint differ from the
model's. Azure: `<base>.ft-<32 hex digits>`, then `-<suffix>` (documentation of 2025-12).
"""

import re
from dataclasses import dataclass
from typing import Final

__all__ = ["AzureModelName", "TunedModelName", "read_model_name"]

_STEP: Final = re.compile(r"ckpt-step-(\d{1,18})", re.ASCII)
_AZURE: Final = re.compile(
    r"(?P<base>.+)\.ft-(?P<tag>[0-9a-f]{32})(?:-(?P<suffix>[\w-]+))?", re.ASCII
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TunedModelName:
    """The name of a fine-tuned model of OpenAI.

    Attributes:
        base: The base model; may contain slashes, and colons where it is a tuned model itself.
        suffix: Empty if none was given.
        tag: The last part, eight characters at OpenAI.
        step: Step of the checkpoint; None for the final model.
    """

    base: str
    organization: str
    suffix: str = ""
    tag: str
    step: int | None = None

    def __str__(self) -> str:
        name = f"ft:{self.base}:{self.organization}:{self.suffix}:{self.tag}"
        return name if self.step is None else f"{name}:ckpt-step-{self.step}"


@dataclass(frozen=True, slots=True, kw_only=True)
class AzureModelName:
    """The name of a fine-tuned model of Azure.

    Attributes:
        tag: 32 hexadecimal digits.
    """

    base: str
    suffix: str = ""
    tag: str

    def __str__(self) -> str:
        return f"{self.base}.ft-{self.tag}" + (f"-{self.suffix}" if self.suffix else "")


def read_model_name(name: str) -> TunedModelName | AzureModelName | None:
    """Parse the name of a fine-tuned model; None for any other name."""
    kind, *parts = name.split(":")
    if kind == "ft":
        step = _STEP.fullmatch(parts[-1]) if parts else None
        if step:
            parts.pop()
        if len(parts) < 4 or not parts[0] or not parts[-1]:
            return None
        *base, organization, suffix, tag = parts
        return TunedModelName(
            base=":".join(base),
            organization=organization,
            suffix=suffix,
            tag=tag,
            step=int(step[1]) if step else None,
        )
    found = _AZURE.fullmatch(name)
    if found is None:
        return None
    return AzureModelName(base=found["base"], suffix=found["suffix"] or "", tag=found["tag"])
