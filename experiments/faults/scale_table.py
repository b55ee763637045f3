"""bitsandbytes, x86 CPUs: some scales are not rounded to the nearest of the 256 values.

Double quantization stores each scale in 8 bits. The CPU kernel looks the code up in a table of
65,536 evenly spaced points; near a border between two values the point may lie on the other side.
"""

import bitsandbytes.functional as bnb
import torch

from experiments.faults import ABSENT, PRESENT, heading, verdict
from qlora_lab.codebooks import dynamic_map

SCALES = 300_000


def main() -> str:
    heading("8-bit codes of block scales", "bitsandbytes", "torch")
    torch.manual_seed(0)
    scales = torch.randn(SCALES // 256 * 256, 64).abs().amax(dim=1)
    centred = scales - scales.mean()
    codes, state = bnb.quantize_blockwise(centred, blocksize=256)
    values = torch.tensor(dynamic_map(), dtype=torch.float64)
    scaled = (centred.view(-1, 256) / state.absmax[:, None]).view(-1).double()
    nearest = torch.bucketize(scaled, (values[1:] + values[:-1]) / 2)
    differ = codes.long() != nearest
    apart = (codes.long() - nearest).abs().max().item()
    error = [(values[c] - scaled).abs().mean().item() for c in (codes.long(), nearest)]
    print(f"  {differ.float().mean():.3%} of {len(scaled):,} codes differ, by at most {apart}")
    print(f"  mean error {error[0]:.7f}, to the nearest value {error[1]:.7f}")
    if differ.any():
        return verdict(PRESENT, "harmless, but no other implementation agrees byte for byte")
    return verdict(ABSENT, "every scale is rounded to the nearest value")


if __name__ == "__main__":
    main()
