"""What `model_parameters` may be: all that torch's optimizers take."""

import pytest
import torch

from hift_ds.rotation.param_groups import HyperParameters, trainable_groups

FORMS = {
    "list": lambda model: list(model.parameters()),
    "generator": lambda model: model.parameters(),
    "with names": lambda model: model.named_parameters(),
    "groups": lambda model: [{"params": list(part.parameters()), "lr": 0.5} for part in model],
    "groups with names": lambda model: [{"params": list(model.named_parameters())}],
    "a group of a generator": lambda model: [{"params": model.parameters()}],
    "groups of one tensor": lambda model: [{"params": param} for param in model.parameters()],
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_parameters_that_require_gradients(form):
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
    model[1].bias.requires_grad_(False)
    holder = HyperParameters(trainable_groups(FORMS[form](model)), {"lr": 1.0})
    held = [param for group in holder.param_groups for param in group["params"]]
    assert list(map(id, held)) == [id(param) for param in model.parameters() if param.requires_grad]
