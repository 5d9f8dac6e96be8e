"""What is asked about every picture of a job."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fastvlm_mlx import __version__
from fastvlm_mlx.engine.options import GenerationConfig
from fastvlm_mlx.errors import ConfigError, FastVLMError
from fastvlm_mlx.formatting import printable
from fastvlm_mlx.inputs.resolution import Resolution

CAPTION = "text"
"""The field of a record that holds the caption."""
_OPTIONAL = ("system", "resolution", "background", "keep_openings", "sentence", "max_words", "prefix", "schema")
"""The settings that a record has only if they were given."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is asked about every picture, and of which model.

    Attributes:
        questions: The prompt for each field of a record, `CAPTION` among them or others.
        model: The model's name, for records.
        weights: The `checkpoint_fingerprint` of the model.
        dtype: What it computes in.
        system: Replaces the default system text.
        resolution: Side in pixels that images are resized to; None for the model's own.
        background: Colour under transparent pixels.
        config: How tokens are chosen.
        keep_openings: Whether phrases such as "The image shows" stay.
        sentence: Whether each answer ends after its first sentence.
        max_words: How many words each answer has at the most.
        prefix: What the caption begins with, but not the answers to other questions. No opening phrase is then removed.
        schema: The JSON that the caption has to be, see `fastvlm_mlx.structured`; answers to other questions are text.
    """

    questions: Mapping[str, str]
    model: str
    weights: str
    dtype: str
    system: str | None = None
    resolution: Resolution = None
    background: str | None = None
    config: GenerationConfig = field(default_factory=GenerationConfig)
    keep_openings: bool = False
    sentence: bool = False
    max_words: int | None = None
    prefix: str = ""
    schema: Any = None

    @property
    def removes_openings(self) -> bool:
        """Whether phrases such as "The image shows" are removed from captions."""
        return not (self.keep_openings or self.prefix or self.schema)

    @classmethod
    def of_settings(cls, settings: Mapping[str, Any]) -> "Task":
        """The task whose records have these settings.

        Raises:
            ConfigError: If there is none.
        """
        own = {"questions", "model", "weights", "dtype", *_OPTIONAL}
        chosen = {key: value for key, value in settings.items() if key not in own and key != "version"}
        try:
            return cls(
                **{key: value for key, value in settings.items() if key in own}, config=GenerationConfig(**chosen)
            )
        except (TypeError, FastVLMError) as err:
            raise ConfigError(f"the settings of the records are of another program ({printable(err)})") from err

    @property
    def settings(self) -> dict[str, Any]:
        """What every answer depends on besides the picture, as a JSON object; in every record."""
        config, defaults = self.config, GenerationConfig()
        chosen = {name: value for name, value in vars(config).items() if value != getattr(defaults, name)}
        optional = {name: getattr(self, name) for name in _OPTIONAL}
        off = {"keep_openings": False, "sentence": False, "prefix": ""}
        return {
            "model": self.model,
            "weights": self.weights,
            "dtype": self.dtype,
            "version": __version__,
            "questions": dict(self.questions),
            **chosen,
            **{name: value for name, value in optional.items() if value not in (None, off.get(name))},
        }


def differences(settings: object, others: object) -> list[str]:
    """The names of the settings that differ between two records, or workers, that are to have the same.

    All but the model's name count: `weights` says which model it is, and programs of two versions may differ.
    """
    first, second = ({**settings} if isinstance(settings, dict) else {} for settings in (settings, others))
    return [key for key in {**first, **second} if key != "model" and first.get(key) != second.get(key)]


def essence(settings: object) -> dict[str, Any]:
    """What of a record's settings tells it from those of other tasks.

    A model is known by its weights, not by its name; and whoever updates the program goes on with the same file.
    """
    names = ("model", "version")
    return {key: value for key, value in settings.items() if key not in names} if isinstance(settings, dict) else {}
