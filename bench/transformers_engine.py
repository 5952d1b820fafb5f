"""transformers' continuous batching as a baseline that anyone can repeat: the same ids, lengths and sampling.

It runs on a GPU and on a CPU, with flash attention where that is installed and torch's own otherwise. Each run gets a
new manager, so that no prefix is cached; making and warming it is not timed.
"""

import logging
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from minisgl.bench.engines import Outcome
from minisgl.bench.workloads import TEMPERATURE, Workload
from minisgl.errors import MinisglError
from minisgl.models.config import ModelConfig
from minisgl.resolve import resolve_device, resolve_dtype

log = logging.getLogger("minisgl")

NEEDED = "--baseline transformers needs continuous batching: pip install 'transformers>=5.17' psutil"
NO_EOS = -1  # a negative id ends nothing
MAX_STEP_TOKENS = 8192  # on a CPU; the default elsewhere
IDLE_S = 1.0  # how long to wait for a result before looking whether the thread that makes them still lives


class TransformersEngine:
    """A transformers model. Of `options` it takes dtype, device and load_format (dummy: random weights by config).

    Raises MinisglError where transformers is too old or cannot load the model.
    """

    name = "transformers"

    def __init__(self, folder: Path, options: dict[str, Any]) -> None:
        try:
            from transformers import AutoConfig, AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig
            from transformers.generation.continuous_batching.utils import WorkloadHints
            from transformers.utils.logging import disable_progress_bar
        except ImportError as error:
            raise MinisglError(f"{NEEDED} ({error})") from error
        disable_progress_bar()
        logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)
        self._hints, self._batching = WorkloadHints, ContinuousBatchingConfig
        self._fields = {setting.name for setting in fields(ContinuousBatchingConfig)}
        self._sampling = GenerationConfig(
            do_sample=True, temperature=TEMPERATURE, top_k=0, top_p=1.0, eos_token_id=NO_EOS
        )
        started = time.perf_counter()
        self.device = resolve_device(options.get("device", "auto"))
        self.dtype = resolve_dtype(options.get("dtype", "auto"), ModelConfig.from_folder(folder).dtype, self.device)
        dtype = getattr(torch, self.dtype)
        if options.get("load_format") == "dummy":
            with self.device:
                config = AutoConfig.from_pretrained(folder)
                self.model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
        else:
            self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
        self.model = self.model.to(self.device).eval()
        self._switch_to_flash = True
        self._attention = "sdpa"
        self.ready_s = time.perf_counter() - started

    @torch.no_grad()
    def run(self, workload: Workload, with_times: bool = False) -> Outcome:
        hints = self._hints(
            max_prompt_length=max(map(len, workload.prompts)),
            max_generated_length=max(workload.output_lens),
            num_requests=len(workload.prompts),
        )
        on_gpu = self.device.type == "cuda"
        manager = self._new_manager(hints, {} if on_gpu else _cpu_sizes(workload))
        try:
            if on_gpu:
                manager.warmup()  # captures graphs; without any, it would only run the largest step there is
            manager.start()
            return self._answer(manager, workload, with_times)
        finally:
            manager.stop(block=True)
            manager.destroy()

    def _new_manager(self, hints: Any, sizes: dict[str, int]) -> Any:
        """A manager with flash attention, or with torch's where the first cannot be had (its kernel is a download)."""
        for switch in (self._switch_to_flash, False):
            # Older versions have no such field, and stay with torch's attention.
            asked = {"auto_switch_to_flash": switch} if "auto_switch_to_flash" in self._fields else {}
            config = self._batching(**sizes, **asked)
            try:
                manager = self.model.init_continuous_batching(self._sampling, config, workload_hints=hints)
                self._attention = self.model.config._attn_implementation.removeprefix("paged|")
                return manager
            except Exception as error:  # whatever a missing kernel raises: offline, no build for this torch, ...
                if not switch:
                    raise MinisglError(f"transformers cannot batch this model: {error}") from error
                log.warning("no flash attention for transformers (%s): it runs with torch's", error)
                self._switch_to_flash = False
        raise AssertionError

    def _answer(self, manager: Any, workload: Workload, with_times: bool) -> Outcome:
        started = time.perf_counter()
        for index, (prompt, length) in enumerate(zip(*workload, strict=True)):
            manager.add_request(
                prompt, str(index), max_new_tokens=length, record_timestamps=with_times, eos_token_id=NO_EOS
            )
        results: dict[int, Any] = {}
        while len(results) < len(workload.prompts):
            result = manager.get_result(timeout=IDLE_S)
            if result is None and not manager.is_running():
                raise MinisglError("transformers' continuous batching stopped: run with --debug, or a smaller workload")
            if result is not None and result.error:
                raise MinisglError(f"transformers could not answer a request: {result.error}")
            if result is not None and result.is_finished():
                results[int(result.request_id)] = result
        seconds = time.perf_counter() - started
        each = [results[index] for index in range(len(results))]
        times = [[stamp - started for stamp in result.timestamps] for result in each] if with_times else []
        return Outcome(seconds, sum(len(result.generated_tokens) for result in each), -1, times)

    def facts(self) -> dict[str, Any]:
        import transformers

        return {"engine_version": transformers.__version__, "attention": self._attention}

    def __enter__(self) -> "TransformersEngine":
        return self

    def __exit__(self, *exception: object) -> None:
        del self.model
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def _cpu_sizes(workload: Workload, block_size: int = 256) -> dict[str, int]:
    """KV blocks for all requests at once, and the tokens of a step. On a CPU transformers would else plan with most of
    the machine's memory, or, where there is a GPU as well, with that of the GPU."""
    lens = [len(prompt) for prompt in workload.prompts]
    num_blocks = sum(
        -(-(own + length) // block_size) + 1 for own, length in zip(lens, workload.output_lens, strict=True)
    )
    return {"num_blocks": num_blocks, "max_batch_tokens": min(sum(lens) + len(lens), MAX_STEP_TOKENS)}
