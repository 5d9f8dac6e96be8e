"""The shapes that folds promise are those of the model, without building one."""

import pytest
from mlx.utils import tree_flatten

from fastvlm_mlx.backend import nn
from fastvlm_mlx.convert import plan
from fastvlm_mlx.convert.fold.modules import parameter_shapes
from fastvlm_mlx.convert.quantize.scheme import layer_shapes
from fastvlm_mlx.model.fastvlm import FastVLM
from tests.checkpoints import SOURCES


@pytest.mark.parametrize("name", ["apple", "apple-untied"])
def test_shapes_are_those_of_the_models_parameters(name: str) -> None:
    config = plan(SOURCES[name]).config
    model = FastVLM(config)
    model.language_model.split()
    assert parameter_shapes(config) == {path: value.shape for path, value in tree_flatten(model.parameters())}
    layers = {path for path, module in model.named_modules() if isinstance(module, nn.Linear | nn.Embedding)}
    assert layer_shapes(config).keys() == layers
