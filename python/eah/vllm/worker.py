"""vLLM's worker, with one attention layer (or a few) whose prompts are enhanced. No class of vLLM's is patched."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from prometheus_client import Counter
from torch import Tensor
from vllm import __version__
from vllm.distributed.parallel_state import get_tp_group
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform

from eah.method import HeadBlock
from eah.vllm.hold import HoldingLayer
from eah.vllm.layer import PLAN, EnhancedLayer
from eah.vllm.plan import Plan, no_plan, plan_step
from eah.vllm.refusals import check_engine, check_graphs, check_sharing, name_of, refuse, usable_layers
from eah.vllm.report import Tally, logger
from eah.vllm.requests import enhances
from eah.vllm.settings import TESTED, engine_settings

if TYPE_CHECKING:
    from vllm.v1.worker.gpu_worker import Worker as Base
elif current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as Base
else:
    from vllm.v1.worker.gpu_worker import Worker as Base


PROMPTS = Counter("eah_prompts", "Prompts by what EAH did with them", ["outcome"])  # eah_prompts_total


def count_prompt(outcome: str) -> None:
    PROMPTS.labels(outcome).inc()


def slots(layer_name: str) -> Tensor:
    """Where the rows of the step that runs are in a layer's cache, (tokens,)."""
    return get_forward_context().slot_mapping[layer_name]


class Worker(Base):
    """Its refusals are ValueErrors at the start; within a step it raises nothing."""

    def __init__(self, vllm_config, *args, **kwargs):
        self._eah_settings = engine_settings(vllm_config.additional_config)
        check_engine(vllm_config, self._eah_settings.layers)
        super().__init__(vllm_config, *args, **kwargs)
        self._eah_names: set[str] = set()  # of the layers that are enhanced
        self._eah_holding: list[HoldingLayer] = []  # with decode="hold"
        self._eah_scheduled: dict[str, int] = {}  # of the step that runs: request -> tokens
        self._eah_plan: Plan | None = None
        self._eah_due: list[str] = []  # the requests that begin in the step that runs and are to be enhanced

    def load_model(self, *args, **kwargs) -> None:
        super().load_model(*args, **kwargs)
        settings, group = self._eah_settings, get_tp_group()
        count = self.model_config.hf_text_config.num_hidden_layers
        found = self._attention_layers()
        layers = usable_layers(found, settings.layers, count)
        block = None
        if group.world_size > 1:
            block = HeadBlock(group.device_group, group.rank_in_group, group.world_size)
        self._eah_tally = Tally(count_prompt if group.rank_in_group == 0 else None, len(layers))
        for index, layer in layers.items():
            heads, dims = layer.num_heads * group.world_size, (layer.head_size, layer.head_size_v)
            try:
                settings.knobs.check(heads, dims, self.model_config.dtype, self.device)
            except (TypeError, ValueError) as error:
                refuse(f"layer {index}: {error}")
            self._eah_names.add(layer.layer_name)
            hook = index, layer, settings.knobs, block, self._eah_tally
            if settings.decode == "hold":
                check_sharing(layer, found)
                self._eah_holding.append(HoldingLayer(*hook, slots=slots))
            else:
                EnhancedLayer(*hook)
        logger.info("eah: layers %s of %d, %s", list(layers), count, settings)
        if not __version__.startswith(f"{TESTED}."):
            logger.warning("eah: tested is vLLM %s, this is %s: see docs/vllm.md", TESTED, __version__)

    def _attention_layers(self) -> dict[int, list[Any]]:
        """The attention modules of the target model's decoder, neither a draft model's nor a vision tower's."""
        decoder = name_of(self.model_runner.get_model(), "get_language_model")()
        found: dict[int, list[Any]] = {}
        for module in decoder.modules():
            if isinstance(module, Attention):
                try:
                    found.setdefault(extract_layer_index(module.layer_name), []).append(module)
                except AssertionError:  # a name with several numbers is no decoder layer's
                    continue
        return found

    def initialize_from_config(self, kv_cache_config) -> None:
        super().initialize_from_config(kv_cache_config)
        check_graphs(self.compilation_config, self._eah_settings.decode)
        for group in (group for groups in name_of(self.model_runner, "attn_groups") for group in groups):
            if self._eah_names.intersection(group.layer_names):
                for builder in group.metadata_builders:
                    builder.supports_update_block_table = False  # else another group's metadata are copied
                    builder.build = partial(self._build, name_of(builder, "build"))

    def _build(self, build, common_prefix_len, common_attn_metadata, *args, **kwargs):
        metadata = build(common_prefix_len, common_attn_metadata, *args, **kwargs)
        if not self._eah_scheduled:  # a capture, a dummy run or a draft model's step
            return metadata
        try:
            if self._eah_plan is None:
                self._eah_plan = no_plan()
                held = {request_id for layer in self._eah_holding for request_id in layer.heads}
                step = self._eah_scheduled, self._eah_settings, held
                self._eah_plan = plan_step(self.model_runner, common_attn_metadata, *step)
            setattr(metadata, PLAN, self._eah_plan)
        except Exception:  # it would end the engine
            logger.exception("eah: this step could not be planned; nothing in it is enhanced")
        return metadata

    def execute_model(self, scheduler_output):
        self._eah_tally.finished(scheduler_output.finished_req_ids)
        for layer in self._eah_holding:
            layer.forget(scheduler_output.finished_req_ids)
        self._eah_scheduled, self._eah_plan = scheduler_output.num_scheduled_tokens, None
        self._eah_due = [new.req_id for new in scheduler_output.scheduled_new_reqs if enhances(new, self._eah_settings)]
        try:
            return super().execute_model(scheduler_output)
        except Exception:  # vLLM's: what it did not compute did not pass EAH by
            self._eah_plan, self._eah_due = None, []
            raise
        finally:
            self._end_step()

    def _end_step(self) -> None:
        plan, self._eah_plan, self._eah_scheduled = self._eah_plan or no_plan(), None, {}
        try:
            self._eah_tally.end_step(plan, self._eah_due)
        except Exception:  # it would end the engine
            logger.exception("eah: what became of this step's prompts was not counted")

    def eah_report(self) -> dict[str, Any]:
        """What became of the prompts so far, by `LLM.collective_rpc("eah_report")`: see docs/vllm.md."""
        return self._eah_tally.report()
