from __future__ import annotations

import subprocess
import sys

import torch

from fedlab.seeds import stream_seed, torch_stream


def test_a_torch_stream_is_its_name_and_nothing_else():
    drawn = torch.randn(4, generator=torch_stream(7, "init", "layer", 3))
    torch.manual_seed(1)
    assert torch.equal(drawn, torch.randn(4, generator=torch_stream(7, "init", "layer", "3")))
    for other in (torch_stream(8, "init", "layer", 3), torch_stream(7, "eva", "layer", 3), torch_stream(7, "init")):
        assert not torch.equal(drawn, torch.randn(4, generator=other))


def test_a_torch_stream_is_seeded_by_the_lower_63_bits_of_its_name():
    seed = stream_seed(0, "conformance", "state") % 2**63
    wanted = torch.randn(5, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(torch.randn(5, generator=torch_stream(0, "conformance", "state")), wanted)


def test_streams_need_no_torch():
    code = "import sys, fedlab.seeds; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
