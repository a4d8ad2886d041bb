import pytest
import torch


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Products as small as those of tiny models lose more to waking a second thread than they gain."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
