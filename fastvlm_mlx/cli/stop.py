"""`fastvlm stop`: ends the background server."""

from fastvlm_mlx.cli.terminal import note


def stop() -> None:
    """End the background server; answers on their way may take ten seconds more."""
    from fastvlm_mlx.cli.background import end
    from fastvlm_mlx.warm.place import Place

    holder = end(Place.of_user())
    note("no background server runs" if holder is None else f"ended (process {holder})")
