"""transformers: `get_memory_footprint` of a 4-bit model leaves the quantization constants out.

It adds up parameters and buffers. The scales, their scales and the code tables hang on the
parameter's `quant_state` and are neither.
"""

from experiments.faults import ABSENT, PRESENT, heading, verdict
from qlora_lab.loading import constant_bytes, four_bit_layers, load_model


def main() -> str:
    heading("What a 4-bit model weighs", "transformers", "bitsandbytes")
    shares = []
    for double_quant in (True, False):
        model = load_model(bits=4, double_quant=double_quant).model
        packed = sum(layer.weight.nbytes for layer in four_bit_layers(model).values())
        said, left_out = model.get_memory_footprint(), constant_bytes(model)
        counted = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
        shares.append(left_out if said == counted else 0)
        scales = "double quantization" if double_quant else "float32 scales"
        print(
            f"  {scales:19}: {said:,} bytes said, {left_out:,} left out "
            f"({left_out / packed:.1%} of the packed weights)"
        )
    if all(shares):
        return verdict(PRESENT, "the constants are not counted")
    return verdict(ABSENT, "the constants are counted")


if __name__ == "__main__":
    main()
