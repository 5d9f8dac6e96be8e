"""Imported by the commands that tests start: they wait for a background server that is held up."""

from fastvlm_mlx.warm import client

client._PATIENCE = client._ASK_PATIENCE = 60.0
