"""These tests run by `make compiled` alone: in a process without Triton's interpreter, with TRITON_INTERPRET=0."""

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "0" else ["test_*.py"]
