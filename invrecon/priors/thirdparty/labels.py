"""Class-conditional networks as unconditional ones: a fixed class is a constant in the noise embedding."""

from __future__ import annotations

from torch import Tensor

from invrecon.errors import InputError


def fold_labels(tensors: dict[str, Tensor], label: int | None, notes: list[str]) -> dict[str, Tensor]:
    r"""Returns the tensors of a network with its class fixed, its label embedding added to a bias, exactly.

    Guided diffusion adds row `K` of `label_emb` to the embedding after its last linear layer. EDM's networks add
    $W_l y$, of a one-hot `y` or of zeros for "no class": DhariwalUNet after its second layer, SongUNet (with
    $\sqrt n\,y$ of `n` classes, and a bias) before its first, $W_0 (e + v) + b_0 = W_0 e + (b_0 + W_0 v)$.

    Args:
        tensors: The network's.
        label: The class; None for none.
        notes: Gets a sentence on what was done.

    Raises:
        InputError: If a class is needed and not given, or given and not there.
    """
    key = next((key for key in ("label_emb.weight", "map_label.weight") if key in tensors), None)
    if key is None:
        if label is not None:
            raise InputError(f"--label is {label}, but the network has no classes: leave it out.")
        return tensors
    if tensors[key].ndim != 2:
        raise InputError(f"The tensor '{key}' is {tuple(tensors[key].shape)}, expected a matrix of classes.")
    weight = tensors[key].double()
    num = weight.shape[0] if key == "label_emb.weight" else weight.shape[-1]
    if label is None and key == "label_emb.weight":
        raise InputError(f"The network is conditional on one of {num} classes: give the class to fix by --label.")
    if label is not None and not 0 <= label < num:
        raise InputError(f"--label is {label}, expected 0 to {num - 1}.")
    needed = ["time_embed.2.bias"] if key == "label_emb.weight" else ["map_label.bias", "map_layer0.bias"]
    needed = ["map_layer1.bias"] if "out_conv.weight" in tensors else needed
    if missing := [name for name in needed if name not in tensors]:
        raise InputError(
            f"The tensor '{missing[0]}' is missing: the file is not the whole network, or of another family."
        )
    folded = {name: value for name, value in tensors.items() if name not in (key, "map_label.bias")}
    if key == "label_emb.weight":
        target, added = "time_embed.2.bias", weight[label]
    elif "out_conv.weight" in tensors:
        target, added = "map_layer1.bias", weight[:, label or 0] * (label is not None)
    else:
        shift = weight[:, label or 0] * num**0.5 * (label is not None) + tensors["map_label.bias"].double()
        target, added = "map_layer0.bias", tensors["map_layer0.weight"].double() @ shift
    if tensors[target].shape != added.shape:
        raise InputError(
            f"The tensors '{key}' and '{target}' do not fit: {tuple(weight.shape)} and {tuple(tensors[target].shape)}."
        )
    folded[target] = (tensors[target].double() + added).float()
    what = "no class, the original's default (else --label)" if label is None else f"class {label}"
    notes.append(f"Its {num} classes are left out: it is evaluated for {what}.")
    return folded
