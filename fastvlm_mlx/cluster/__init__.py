"""Pictures on the machines of a Ray cluster; needs the extra `ray` (`pip install 'fastvlm-mlx[ray]'`).

`fastvlm caption --ray` is made of `connection` (joins or starts a cluster), `nodes` (what each machine has, and whether
it would answer like this one), `worker` (an actor with a model) and `engine` (asks the workers). `Captioner` is the
class for `ray.data.Dataset.map_batches`, where the machines read and write by themselves. README.md shows both.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastvlm_mlx.cluster.captioner import Captioner as Captioner
    from fastvlm_mlx.cluster.captioner import caption_dataset as caption_dataset

__all__ = ["Captioner", "caption_dataset"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from fastvlm_mlx.cluster import captioner

    return getattr(captioner, name)
