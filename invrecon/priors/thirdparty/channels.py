"""What the channels of a network are, of which its tensors give the numbers alone."""

from __future__ import annotations

from dataclasses import dataclass

from invrecon.errors import InputError


@dataclass(frozen=True)
class Reading:
    """One way to understand a network's numbers of channels.

    Args:
        image: Channels of its images.
        more: What it sees beside: nothing, `positions`, or `condition`, another image of as many channels.
        variance: Whether it returns a learned variance, too.
    """

    image: int
    more: str = ""
    variance: bool = False

    def __str__(self) -> str:
        beside = {"": "", "positions": " and 2 of positions", "condition": f" and {self.image} of another image"}
        return f"{self.image} channels of an image{beside[self.more]}{', with a variance' if self.variance else ''}"


@dataclass
class Channels:
    """What is stated of a network's channels.

    Args:
        image_channels: Channels of its images; None if not stated.
        positions: Whether it is stated to see positions.
    """

    image_channels: int | None = None
    positions: bool = False

    def read(self, inputs: int, outputs: int, upsampler: bool = False) -> dict[str, int]:
        """Returns image, output and position channels of a network.

        Args:
            inputs: Channels that it sees.
            outputs: Channels that it returns.
            upsampler: Whether the family has conditional networks with a variance, whose inputs and outputs are as
                many: the upsamplers of guided diffusion.

        Raises:
            InputError: If the numbers fit nothing that is known, or several things, or a conditional network.
        """
        readings = _readings(inputs, outputs, upsampler)
        maps = f"The network maps {inputs} channels to {outputs}"
        if not readings:
            raise InputError(
                f"{maps}, expected as many, twice as many (a learned variance), or two fewer (positions): networks "
                "with other conditions cannot be imported."
            )
        texts = ", or ".join(str(reading) for reading in readings)
        fits = [reading for reading in readings if self.image_channels in (None, reading.image)]
        if not fits:
            raise InputError(f"--image-channels is {self.image_channels}, but {maps[0].lower()}{maps[1:]}: {texts}.")
        if self.positions:  # only a network of positions has what was stated
            fits = [reading for reading in fits if reading.more == "positions"] or fits
        chosen = fits[0]
        if len(fits) > 1:
            numbers = " or ".join(str(image) for image in sorted({reading.image for reading in readings}))
            asked = f"--image-channels {numbers}"
            if any(reading.more == "positions" for reading in fits):
                asked += ", and for positions --padding and --patch-sizes"
            raise InputError(
                f"{maps}, which can be {texts}: say which by {asked}. A network that sees another image, as an "
                "upsampler does, cannot be imported."
            )
        if chosen.more == "condition":
            raise InputError(
                f"{maps}, read as {chosen}: it is conditional, as an upsampler is, and cannot be imported, "
                "because a prior has no other image to give to it; take an unconditional network."
            )
        positions = 2 if chosen.more == "positions" else 0
        return {"image_channels": chosen.image, "out_channels": outputs, "position_channels": positions}


def _readings(inputs: int, outputs: int, upsampler: bool) -> list[Reading]:
    """Returns all that the numbers can be."""
    sides = [(inputs, ""), (inputs - 2, "positions")] + ([] if inputs % 2 else [(inputs // 2, "condition")])
    found = []
    for image, more in sides:
        # Outside guided diffusion no conditional network with a variance is known, and complex images are.
        is_known = more != "condition" or outputs == image or upsampler
        if image > 0 and outputs in (image, 2 * image) and is_known:
            found.append(Reading(image, more, outputs == 2 * image))
    return found
