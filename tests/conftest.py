import os

import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:  # the cores are shared by processes: threads on top of them only wait
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(autouse=True)
def _seeded():
    torch.default_generator.manual_seed(0)  # torch.manual_seed also notes a seed, with its stack, for every accelerator


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory):
    """Corrupted images are kept in a folder of this test run's own."""
    os.environ["LIGHTNING_TTA_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def one_thread():
    """For modules of many tiny passes: handing them to several threads costs more than it saves."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
