import hypothesis
import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="the backend that the op tests run on")
    parser.addoption("--examples", type=int, help="random examples for each property (default: 200, always the same)")


def pytest_configure(config: pytest.Config) -> None:
    examples = config.getoption("--examples")
    hypothesis.settings.register_profile(
        "oxiscan",
        max_examples=examples or 200,
        derandomize=examples is None,
        print_blob=True,
        database=None,
        deadline=None,
    )
    hypothesis.settings.load_profile("oxiscan")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    device = torch.device(request.config.getoption("--device"))
    if device.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("--device cuda: no GPU on this machine")
    return device


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Uninitialised tensors hold NaN: an output that an op does not write shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
