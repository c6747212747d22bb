"""Frequency Filter: the part of a latent that a frequency control sees, as a latent and as a picture."""

from comfy_api.latest import io

from ..dha.frequency import BANDS, filter_band


class FrequencyFilter(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DHAFrequencyFilter",
            display_name="Frequency Filter",
            category="DHA",
            description="Keeps one band of a latent's frequencies (DCT), and shows what that is.",
            inputs=[
                io.Latent.Input("samples", tooltip="The latent to filter, for example from VAE Encode."),
                io.Vae.Input("vae", tooltip="Decodes what the band keeps, to be looked at."),
                io.Combo.Input(
                    "band",
                    options=list(BANDS),
                    default="low",
                    tooltip="mini: colours and light, shuffled; low: layout and shapes; mid: outlines; high: textures "
                    "and edges.",
                ),
                io.Boolean.Input(
                    "scaled",
                    default=True,
                    tooltip="Whether the band follows the size of the latent. Off: the numbers for 512x512 pictures, "
                    "whatever the size.",
                ),
                io.Int.Input(
                    "shuffle_seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    tooltip="The mini band's coefficients are shuffled by this seed; other bands do not use it.",
                ),
            ],
            outputs=[
                io.Latent.Output(tooltip="The kept part."),
                io.Image.Output(tooltip="The kept part, decoded."),
            ],
        )

    @classmethod
    def execute(cls, samples, vae, band, scaled, shuffle_seed) -> io.NodeOutput:
        kept = filter_band(samples["samples"], band, shuffle_seed, scaled)
        return io.NodeOutput({**samples, "samples": kept}, vae.decode(kept))
