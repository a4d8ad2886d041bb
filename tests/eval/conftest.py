from ..transformers.conftest import one_thread  # noqa: F401
