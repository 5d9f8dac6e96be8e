"""The model under examination, in each of the forms that the checks compare; made when it is first needed."""

from collections.abc import Callable
from functools import cached_property

from fastvlm_mlx.backend import mx
from fastvlm_mlx.bench.candidate import Candidate
from fastvlm_mlx.doctor.agreement import Probe
from fastvlm_mlx.doctor.forms import parameters, twin
from fastvlm_mlx.errors import CheckpointError, ConfigError
from fastvlm_mlx.formatting import readable_bytes
from fastvlm_mlx.machine import describe
from fastvlm_mlx.model.fastvlm import FastVLM

_COPIES = 8
"""Bytes per weight of the forms that exist at the same time: as loaded, in float32 and in float16."""


class Subject:
    """A model and its twins.

    Args:
        load: Returns the model; it is called once, even if it fails.
        label: How reports name it.
    """

    def __init__(self, load: Callable[[], Candidate], label: str) -> None:
        self.label = label
        self._load: Callable[[], Candidate] | None = load

    @cached_property
    def candidate(self) -> Candidate:
        """The model as a user runs it.

        Raises:
            FastVLMError: If it does not load; a second time in short.
        """
        if self._load is None:
            raise CheckpointError("the model did not load")
        load, self._load = self._load, None
        return load()

    @cached_property
    def probe(self) -> Probe:
        """What the forms are shown."""
        return Probe.of(self.candidate.processor)

    @cached_property
    def reference(self) -> FastVLM:
        """The model in float32 and without quantized layers, for the CPU.

        Raises:
            ConfigError: If the machine's memory is too small for several copies.
        """
        model = self.candidate.model
        needed = _COPIES * sum(weight.size for weight in parameters(model).values())
        memory = describe().memory
        if needed > memory:
            raise ConfigError(
                f"comparing takes about {readable_bytes(needed)} and this machine has {readable_bytes(memory)}; "
                "`fastvlm doctor demo` needs little"
            )
        return twin(model, mx.float32, dequantize=True)

    @cached_property
    def float32(self) -> FastVLM:
        """The model in float32, for the device."""
        self.reference  # noqa: B018  (checks the memory)
        return twin(self.candidate.model, mx.float32)

    @cached_property
    def float16(self) -> FastVLM:
        """The model in float16, for the device."""
        self.reference  # noqa: B018  (checks the memory)
        return twin(self.candidate.model, mx.float16)
