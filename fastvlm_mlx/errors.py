"""Everything that fastvlm-mlx raises on purpose; catch `FastVLMError` to catch it all."""

from typing import Any

from fastvlm_mlx.formatting import MESSAGE_LENGTH, printable


class FastVLMError(Exception):
    """Base of every error whose message is written for the user.

    The message is one printable line of bounded length, whatever names it holds.
    """

    def __str__(self) -> str:
        """The message; `args` has it as it was given."""
        return printable(super().__str__(), MESSAGE_LENGTH)


class ConfigError(FastVLMError):
    """A config.json, a setting or an argument that cannot be used."""


class SchemaError(ConfigError):
    """A schema that answers cannot be made to follow."""


class CheckpointError(FastVLMError):
    """A checkpoint that is missing, incomplete, damaged or of an unknown layout."""


class ConversionError(FastVLMError):
    """A conversion or quantization that cannot be carried out."""


class RangeError(ConversionError):
    """A weight that is too large for the type that a conversion stores."""


class GateError(ConversionError):
    """A quantization that does not meet a condition set for it.

    Attributes:
        report: The `QuantizationReport`, as nothing was written that would hold it.
    """

    def __init__(self, message: str, report: Any = None) -> None:
        super().__init__(message)
        self.report = report


class ImageError(FastVLMError):
    """An image that cannot be read or is not an image."""


class PromptError(FastVLMError):
    """A prompt, conversation or stop string that cannot be used."""


class QueueFullError(FastVLMError):
    """A request that an engine has no room for at present."""


class ServerError(FastVLMError):
    """A server that cannot be asked, or answers with something else than what was asked for."""
