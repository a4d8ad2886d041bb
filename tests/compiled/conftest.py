"""What executes compiled code runs by `make compiled` alone: without Triton's interpreter, with TRITON_INTERPRET=0."""

import os

EXECUTING = ["test_compiled.py", "test_compiled_cuda.py", "test_emulator.py", "test_emulator_tma.py", "test_hopper.py"]
EXECUTING += ["test_mutants.py", "test_plans.py"]
collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "0" else EXECUTING
