"""The refusals on vLLM's own configurations: the names that they read are there. No engine is started."""

import os

import pytest

from eah.vllm import engine_args
from eah.vllm.refusals import check_engine

from .engine import ENVIRONMENT

pytest.importorskip("vllm")


@pytest.fixture
def configuration(saved, monkeypatch):
    """Of options of `LLM`, vLLM's whole configuration."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setitem(os.environ, name, value)

    def of(**options):
        from vllm.engine.arg_utils import EngineArgs

        given = {**engine_args(), "dtype": "float32", "max_model_len": 512, "enforce_eager": True, **options}
        return EngineArgs(model=str(saved("llava")), **given).create_engine_config()

    return of


def test_an_engine_with_both_classes_is_accepted(configuration):
    check_engine(configuration(), (1,))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheduler_cls": None}, "--scheduler-cls eah.vllm.Scheduler"),
        ({"worker_cls": "auto"}, "--worker-cls eah.vllm.Worker, got vllm.v1.worker.cpu_worker.CPUWorker"),
        ({"pipeline_parallel_size": 2}, "--pipeline-parallel-size 2"),
        ({"kv_cache_dtype": "fp8"}, "KV cache is fp8"),
        ({"mm_encoder_only": True}, "--mm-encoder-only"),
    ],
    ids=str,
)
def test_an_engine_is_refused(configuration, options, message):
    with pytest.raises(ValueError, match=r"^eah: ") as told:
        check_engine(configuration(**options), (1,))
    assert message in str(told.value)


@pytest.mark.parametrize("name", ["Worker", "Scheduler"])
def test_the_classes_are_what_vllm_takes(name):
    from vllm.utils.import_utils import resolve_obj_by_qualname
    from vllm.v1.core.sched.interface import SchedulerInterface
    from vllm.v1.worker.worker_base import WorkerBase

    cls = resolve_obj_by_qualname(engine_args()[f"{name.lower()}_cls"])
    assert issubclass(cls, WorkerBase if name == "Worker" else SchedulerInterface)
