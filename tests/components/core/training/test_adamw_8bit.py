"""AdamW with moments of 8 bits beside PyTorch's AdamW in float32."""

import pytest
import torch
from torch import Tensor, nn

from components.core.training import adamw_8bit
from components.core.training.adamw_8bit import MEAN, SCALE, SQUARE, AdamW8bit, _code_values, _Moment

BETAS = (0.9, 0.95)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def stepped(kind: type[torch.optim.Optimizer], weights: list[Tensor], gradients: list[list[Tensor]]) -> list[Tensor]:
    """The weights after one step with each of the gradients."""
    parameters = [nn.Parameter(weight.clone()) for weight in weights]
    groups = [{"params": parameters[:1], "weight_decay": 0.1}, {"params": parameters[1:], "weight_decay": 0.0}]
    optimizer = kind(groups, lr=1e-2, betas=BETAS)  # type: ignore[call-arg]
    for gradient in gradients:
        for parameter, value in zip(parameters, gradient, strict=True):
            parameter.grad = value.clone()
        optimizer.step()
    return [parameter.detach() for parameter in parameters]


@pytest.mark.parametrize("num_columns", [1, 256, 300])
@pytest.mark.parametrize("values_at_once", [1 << 22, 700])
def test_the_first_step_is_that_of_float32(
    monkeypatch: pytest.MonkeyPatch, num_columns: int, values_at_once: int
) -> None:
    monkeypatch.setattr(adamw_8bit, "UPDATED_VALUES", values_at_once)
    weights = [random(9, num_columns), random(9)]
    gradients = [[random(9, num_columns, seed=1), random(9, seed=2)]]
    found, expected = (stepped(kind, weights, gradients) for kind in (AdamW8bit, torch.optim.AdamW))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


def test_later_steps_stay_near_those_of_float32() -> None:
    """Gradients of very different sizes, in rows and in columns, as those of a real model are."""
    sizes = torch.logspace(-4, 0, 8)[:, None] * torch.logspace(0, -2, 300)
    weights = [random(8, 300), random(8)]
    gradients = [[(1 + random(8, 300, seed=step)) * sizes, random(8, seed=step)] for step in range(40)]
    found, expected = (stepped(kind, weights, gradients) for kind in (AdamW8bit, torch.optim.AdamW))
    way, apart = expected[0] - weights[0], found[0] - expected[0]
    assert float(apart.norm() / way.norm()) < 0.03
    torch.testing.assert_close(found[1], expected[1])


def test_a_row_without_gradients_stays_and_one_whose_gradients_end_comes_to_rest() -> None:
    weights = [random(3, 256)]
    gradients = [[random(3, 256, seed=step) * torch.tensor([[0.0], [1.0], [1.0]])] for step in range(3)]
    gradients += [[torch.zeros(3, 256)]] * 60
    found, expected = (stepped(kind, weights, gradients)[0] for kind in (AdamW8bit, torch.optim.AdamW))
    assert float((found[0] - weights[0][0] * (1 - 1e-3) ** 63).abs().max()) < 1e-5
    assert float((found - expected).abs().max()) < 0.05


@pytest.mark.parametrize("name", [MEAN, SQUARE])
def test_each_value_is_kept_as_the_nearest_code(name: str) -> None:
    values = random(4, 300) ** 3
    values = values if name == MEAN else values.square()
    state = {name: torch.zeros(4, 300, dtype=torch.uint8), name + SCALE: torch.zeros(4, 2)}
    moment = _Moment.of(state, name)
    moment.write(slice(0, 4), values)
    read = moment.read(slice(0, 4))
    codes = _code_values(name == MEAN, values.device)
    assert len(codes.unique()) == 256
    for block in (slice(0, 256), slice(256, 300)):
        scale = values[:, block].abs().amax(dim=1, keepdim=True)
        nearest = (values[:, block, None] - codes * scale[:, :, None]).abs().amin(dim=2)
        torch.testing.assert_close((read[:, block] - values[:, block]).abs(), nearest, atol=1e-6, rtol=1e-3)


def test_moments_of_a_matrix_take_two_bytes_a_value_and_a_scale_for_each_256() -> None:
    parameter = nn.Parameter(random(16, 512))
    optimizer = AdamW8bit([{"params": [parameter]}], lr=1e-3, betas=BETAS)
    parameter.grad = random(16, 512, seed=1)
    optimizer.step()
    moments = [value for value in optimizer.state[parameter].values() if value.ndim]
    assert sum(moment.numel() * moment.element_size() for moment in moments) == 2 * (16 * 512 + 4 * 16 * 2)
