"""The refusals on vLLM's own configurations: the names that they read are there. No engine is started."""

import os
from types import SimpleNamespace

import pytest

from eah.reasons import Reason
from eah.vllm import engine_args
from eah.vllm.plan import Plan, Prompt, Run
from eah.vllm.refusals import check_engine
from eah.vllm.report import Tally
from eah.vllm.requests import STREAMED, asked
from eah.vllm.settings import Settings

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
        ({"limit_mm_per_prompt": {"image": 0, "video": 0}}, "--limit-mm-per-prompt"),
    ],
    ids=str,
)
def test_an_engine_is_refused(configuration, options, message):
    with pytest.raises(ValueError, match=r"^eah: ") as told:
        check_engine(configuration(**options), (1,))
    assert message in str(told.value)


def test_every_chunk_of_a_streamed_session_stands_aside(monkeypatch):
    """A session takes each chunk's parameters: a later one must not be enhanced in blocks that others may read."""
    from vllm import SamplingParams
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler

    from eah.vllm import Scheduler

    scheduler, taken = Scheduler.__new__(Scheduler), []
    scheduler._eah_settings, scheduler.requests = Settings(), {}
    monkeypatch.setattr(AsyncScheduler, "add_request", lambda self, request: taken.append(request))
    given = SamplingParams(extra_args={"eah": "on", "other": 1})
    for _ in range(2):
        chunk = SimpleNamespace(request_id="a", resumable=True, sampling_params=given, mm_features=[])
        scheduler.add_request(chunk)
        scheduler.requests["a"] = chunk
    assert [asked(chunk, Settings()) for chunk in taken] == [(STREAMED, True)] * 2
    assert taken[1].sampling_params.extra_args["other"] == 1 and given.extra_args["eah"] == "on"


@pytest.mark.parametrize("fails", [False, True])
def test_a_step_that_passes_eah_by_is_told_and_one_that_fails_is_not(monkeypatch, fails):
    from vllm import SamplingParams

    from eah.vllm import Worker

    def compute(self, scheduler_output):
        self._eah_plan = plan  # as its metadata builder makes it; no layer takes it
        if fails:
            raise RuntimeError("vLLM's")
        return "output"

    worker, plan = Worker.__new__(Worker), Plan([Run([Prompt("b", 6, 3)], slice(0, 6), None, None, 6)], {}, {}, [])
    worker._eah_settings, worker._eah_tally, worker._eah_holding = Settings(), Tally(lambda outcome: None), []
    monkeypatch.setattr(Worker.__base__, "execute_model", compute)
    image = SimpleNamespace(modality="image")
    new = SimpleNamespace(req_id="a", sampling_params=SamplingParams(), mm_features=[image])
    step = SimpleNamespace(finished_req_ids=[], num_scheduled_tokens={"a": 6, "b": 6}, scheduled_new_reqs=[new])
    if fails:
        with pytest.raises(RuntimeError, match="vLLM's"):
            worker.execute_model(step)
    else:
        assert worker.execute_model(step) == "output"
    assert worker._eah_tally.report()["stood_aside"] == ({} if fails else {Reason.NOT_REACHED.value: 2})
    assert worker._eah_plan is None and not worker._eah_scheduled


@pytest.mark.parametrize("name", ["Worker", "Scheduler"])
def test_the_classes_are_what_vllm_takes(name):
    from vllm.utils.import_utils import resolve_obj_by_qualname
    from vllm.v1.core.sched.interface import SchedulerInterface
    from vllm.v1.worker.worker_base import WorkerBase

    cls = resolve_obj_by_qualname(engine_args()[f"{name.lower()}_cls"])
    assert issubclass(cls, WorkerBase if name == "Worker" else SchedulerInterface)
